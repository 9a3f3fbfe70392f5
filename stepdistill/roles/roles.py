"""Teacher, student and fake score of one run: full copies of the network, or LoRA adapters on one frozen base."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from stepdistill.checkpoint import latest, load
from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.finiteness import Watch

from .adapters import AdapterSwitch
from .checkpointing import enable_checkpointing
from .lora import read_lora
from .role import PassMeter, Role
from .settings import LoRASettings, RolesSettings


class Roles:
    """The roles of one distillation run, built from a family's teacher.

    Attributes:
        teacher, student, fake_score: denoisers.  ``teacher`` is any denoiser for an analytic family; ``fake_score`` is
            None for methods without one.
        meter: network passes so far.
        watch: whether the roles' last predictions were finite.
    """

    def __init__(
        self,
        family: Family,
        settings: RolesSettings,
        autocast_dtype: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
        fake_score: bool = True,
    ):
        self.family, self.settings, self.meter, self.watch = family, settings, PassMeter(), Watch()
        self.autocast_dtype, self.gradient_checkpointing = autocast_dtype, gradient_checkpointing
        weights = settings.weights
        base = family.network
        base.requires_grad_(False).eval()
        switch = AdapterSwitch(base)
        self.switch = None if weights == "full" else switch
        self.student = self._make_lora_student(switch) if weights == "shared" else self._make_full_student()
        self.fake_score: Role | None = None
        if fake_score and weights == "full":
            self.fake_score = self._make_full("fake_score")
        elif fake_score:
            self.fake_score = self._make_adapted("fake_score", base, switch, settings.lora)
        if self.fake_score is not None and settings.fake_score_from is not None:
            load_fake_score(self.fake_score, settings.fake_score_from)
        closed_form = family.teacher_denoiser()
        teacher = self._make_role("teacher", base, self.switch, None, False)
        self.teacher: Denoiser = teacher if closed_form is None else closed_form
        if gradient_checkpointing:
            for role in {id(role.network): role for role in self.trained()}.values():
                enable_checkpointing(role.network, role.switch)
            if weights == "full":
                enable_checkpointing(base, None)  # SIM differentiates through the teacher

    def _make_full(self, name: str, network: nn.Module | None = None) -> Role:
        network = copy.deepcopy(self.family.network) if network is None else network
        return self._make_role(name, network.float().requires_grad_(True), None, None, True)

    def _make_full_student(self) -> Role:
        start, changes = self.settings.student_from, self.settings.network
        student = self._make_full("student", None if changes is None else self.family.altered_network(changes).eval())
        if start is not None:
            student.network.load_state_dict(self.family.read_weights(start, student.network))
        return student

    def _make_lora_student(self, switch: AdapterSwitch) -> Role:
        settings, base = self.settings, self.family.network
        if settings.student_from is not None:
            base = copy.deepcopy(base).float()  # rounded to the teacher's dtype, part of what it was trained to is lost
            base.load_state_dict(self.family.read_weights(settings.student_from))
            switch = AdapterSwitch(base)
        if settings.lora_under is not None:
            self._load_adapted("under", base, switch, settings.lora_under, "roles.lora_under", False)
        if settings.lora_from is not None:
            student = self._load_adapted("student", base, switch, settings.lora_from, "roles.lora_from", True)
        else:
            student = self._make_adapted("student", base, switch, settings.student_lora or settings.lora)
        if settings.lora_under is not None:
            switch.stacks["student"] = ("under", "student")
        return student

    def _make_adapted(
        self, name: str, network: nn.Module, switch: AdapterSwitch, lora: LoRASettings, trains: bool = True
    ) -> Role:
        switch.add(name, lora, self.family.lora_targets)
        for parameter in switch.parameters(name).values():
            parameter.requires_grad_(trains)
        return self._make_role(name, network, switch, name, trains, lora)

    def _load_adapted(
        self, name: str, network: nn.Module, switch: AdapterSwitch, path: str, key: str, trains: bool
    ) -> Role:
        """A role whose adapter is read from a file, with that file's rank, alpha and modules."""
        lora = read_lora(path, key)
        try:
            settings = LoRASettings(rank=lora.rank, alpha=lora.alpha, targets=sorted(lora.factors))
            role = self._make_adapted(name, network, switch, settings, trains)
            role.load_portable_state_dict(lora.portable_state_dict())
        except UserError as error:
            raise UserError(f"{key} = {path}: it is not a LoRA for this teacher ({error})") from None
        return role

    def to(self, device: torch.device | str) -> Roles:
        """Move every network to ``device``."""
        for network in {id(r.network): r.network for r in self.trained()}.values():
            network.to(device)
        self.family.to(device)
        return self

    def _make_role(
        self,
        name: str,
        network: nn.Module,
        switch: AdapterSwitch | None,
        adapter: str | None,
        trains: bool,
        lora: LoRASettings | None = None,
    ) -> Role:
        return Role(
            name, self.family, network, switch, adapter, trains, self.meter, self.autocast_dtype, lora, self.watch
        )

    def frozen_like(self, role: Role, name: str) -> Role:
        """One more role, frozen, with the weights that ``role`` has now: a copy of its network, or of its adapter on
        the same base."""
        if role.adapter is None or role.switch is None or role.lora is None:
            return self._make_role(name, copy.deepcopy(role.network).requires_grad_(False), None, None, False)
        frozen = self._make_adapted(name, role.network, role.switch, role.lora, False)
        if role.adapter in role.switch.stacks:
            role.switch.stacks[name] = (*role.switch.stack(role.adapter)[:-1], name)
        frozen.load_portable_state_dict(role.portable_state_dict())
        return frozen

    def networks(self) -> list[nn.Module]:
        """Each network once: the teacher's, and those of the roles that are not adapters on it."""
        networks = [self.family.network, *(role.network for role in self.trained())]
        return list({id(network): network for network in networks}.values())

    def trained(self) -> list[Role]:
        """The roles with weights that are trained: student and, if the method has one, fake score."""
        return [role for role in (self.student, self.fake_score) if role is not None]


def load_fake_score(fake_score: Role, run: str) -> None:
    """Give a fake score the weights that it has in the newest checkpoint of the run folder ``run``.

    Raises:
        UserError: no checkpoint there, none with a fake score, or one of other weights.
    """
    key = f"roles.fake_score_from = {run}"
    last = latest(Path(run) / "checkpoints")
    if last is None:
        raise UserError(f"{key}: no whole checkpoint there; name the folder of a run with a fake score")
    tensors, _ = load(last)
    if "fake_score" not in tensors:
        raise UserError(f"{key}: its method has no fake score; remove the key")
    try:
        fake_score.load_state_dict(tensors["fake_score"])
    except UserError as error:
        raise UserError(f"{key}: {error}; hold both runs' roles in the same way") from None
