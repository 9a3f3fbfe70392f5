"""Teacher, student and fake score: full copies of the network, or LoRA adapters on one frozen base.

Which adapter is on is a property of each *call*, not a mode to remember: every role is a denoiser that switches its
adapter on for the length of its own forward pass.  The switch writes peft's two private fields and leaves
``requires_grad`` alone: peft's own ``set_adapter`` turns the other adapters' gradients off, so switching between a
forward and its backward silently loses gradients.  Gradient checkpointing, which runs the forward again during the
backward, restores the adapter of the original call.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepdistill import precision
from stepdistill.checkpoint import latest, load
from stepdistill.config import Section, UserPath
from stepdistill.denoiser import Condition, Denoiser, NetworkDenoiser, Prediction
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.finiteness import Watch

from .discriminator import features_at
from .lora import MOST_RANK, LoRA, read_lora, stacked

Weights = Literal["full", "shared", "mixed"]


class LoRASettings(Section):
    """Low-rank adapters (2106.09685): ``W + alpha/rank B A``."""

    rank: int = Field(64, ge=1, le=MOST_RANK)
    alpha: float | None = Field(None, gt=0, description="scale times rank; the rank by default (scale 1)")
    targets: list[str] | None = Field(None, description="module names; the family's list by default")

    @property
    def effective_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)


class RolesSettings(Section):
    """``full``: student and fake score are copies of the teacher.  ``shared``: both are LoRAs on the one frozen
    teacher.  ``mixed``: a full student, and a fake score that is a LoRA on the teacher.

    With ``student_from`` a ``shared`` student is a LoRA on that model, a second frozen base, in float32.
    """

    weights: Weights = "full"
    lora: LoRASettings = LoRASettings()
    student_lora: LoRASettings | None = Field(None, description="the student's own; lora by default")
    student_from: UserPath | None = Field(None, description="start the student from this folder (an earlier student)")
    fake_score_from: UserPath | None = Field(
        None, description="a run folder: go on with the fake score of its newest checkpoint"
    )
    network: dict[str, Any] | None = Field(
        None,
        description="a student of another size: keys of the teacher's network config that differ, e.g. "
        "block_out_channels, layers_per_block; random weights (train them by tsm first)",
    )
    lora_from: UserPath | None = Field(
        None, description="go on with this LoRA (a file, or a student exported with one)"
    )
    lora_under: UserPath | None = Field(
        None, description="a frozen LoRA that stays on below the student's new one; both are exported as one"
    )

    @model_validator(mode="after")
    def _of_a_lora_student(self):
        for key in ("student_lora", "lora_from", "lora_under"):
            if getattr(self, key) is not None and self.weights != "shared":
                raise ValueError(f"{key} needs a LoRA student; set weights to shared or remove it")
        if self.network is not None and self.weights == "shared":
            raise ValueError(
                "network: a student of another size is no LoRA on the teacher; set weights to full or mixed"
            )
        if self.lora_from is not None and self.student_lora is not None:
            raise ValueError("student_lora and lora_from: a LoRA that is gone on with has its own rank; remove one")
        return self


class AdapterSwitch:
    """Which LoRA adapter of a network is on; ``None`` is the bare base."""

    def __init__(self, network: nn.Module):
        self.network = network
        self.layers: list[BaseTunerLayer] = []
        self.active: str | None = None
        self.stacks: dict[str, tuple[str, ...]] = {}
        """Adapters that are on together: those below, and at last the one that names them."""

    def add(self, name: str, settings: LoRASettings, targets: list[str]) -> None:
        """Inject a trainable float32 adapter; the base stays frozen.

        Raises:
            UserError: no module has one of the target names.
        """
        names = [f".{name}" for name, _ in self.network.named_modules()]
        for target in settings.targets or []:
            if not any(name.endswith(f".{target}") for name in names):
                raise UserError(f"roles.lora.targets: the teacher has no module named {target!r}; leave the key out")
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.effective_alpha,
            target_modules=settings.targets or targets,
            init_lora_weights=True,
        )
        trainable = [p for p in self.network.parameters() if p.requires_grad]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # the second of two is meant
                inject_adapter_in_model(config, self.network, adapter_name=name)
        except ValueError as error:
            raise UserError(f"roles.lora.targets: {str(error).splitlines()[0]}") from None
        self.layers = [m for m in self.network.modules() if isinstance(m, BaseTunerLayer)]
        for key, parameter in self.network.named_parameters():
            if f".{name}." in key and "lora_" in key:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
            elif "lora_" not in key:
                parameter.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)
        self._write(self.active)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's own parameters by their name in the network."""
        return {k: p for k, p in self.network.named_parameters() if "lora_" in k and f".{name}." in k}

    def _write(self, name: str | None) -> None:
        for layer in self.layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = list(self.stack(name))

    def stack(self, name: str) -> tuple[str, ...]:
        """``name`` with the frozen adapters below it."""
        return self.stacks.get(name, (name,))

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """The adapter ``name`` on within the block, the previous state afterwards."""
        previous = self.active
        if name != previous:
            self.active = name
            self._write(name)
        try:
            yield
        finally:
            if name != previous:
                self.active = previous
                self._write(previous)

    @contextlib.contextmanager
    def scaled(self, name: str, ratio: float) -> Iterator[None]:
        """Adapter ``name`` counts ``ratio`` times within the block; what is below it is left alone."""
        layers = [layer for layer in self.layers if name in layer.scaling]
        kept = [layer.scaling[name] for layer in layers]
        for layer, scale in zip(layers, kept, strict=True):
            layer.scaling[name] = ratio * scale
        try:
            yield
        finally:
            for layer, scale in zip(layers, kept, strict=True):
                layer.scaling[name] = scale

    def lora(self, name: str) -> LoRA:
        """Adapter ``name`` as what a LoRA file holds, the ones below it included."""
        return stacked(self._parts(name))

    def _parts(self, name: str) -> list[tuple[LoRA, float]]:
        """The adapters of :meth:`stack`, each with the ratio that it counts, on the CPU."""

        def part(name: str) -> tuple[LoRA, float]:
            factors, ratio = {}, 1.0
            for path, module in self.network.named_modules():
                if isinstance(module, LoraLayer) and name in module.lora_A:
                    pair = (module.lora_A[name].weight, module.lora_B[name].weight)
                    factors[path] = tuple(factor.detach().cpu().float() for factor in pair)
                    rank, alpha = module.r[name], module.lora_alpha[name]
                    ratio = module.scaling[name] * rank / alpha
            return LoRA(rank, alpha, factors), ratio

        return [part(name) for name in self.stack(name)]

    def merged_state_dict(self, name: str | None) -> dict[str, Tensor]:
        """The base's state dict under its original names, with adapter ``name`` merged in, on the CPU.

        A weight that an adapter changes is float32, whatever the base is stored in: rounded to bfloat16 a sixth of a
        young adapter's delta is lost.  The others keep their dtype.
        """
        parts = [] if name is None else self._parts(name)
        merged = {}
        for key, value in self.network.state_dict().items():
            if "lora_" in key:
                continue
            key = key.replace(".base_layer.", ".")
            path = key.removesuffix(".weight")
            merged[key] = value.detach().to("cpu", copy=True)
            for lora, ratio in parts:
                if key != path and path in lora.factors:
                    merged[key] = merged[key].float() + ratio * lora.delta(path)
        return merged


class PassMeter:
    """Counts network passes in images: forward, and what backward costs in forwards (2, or 1 to the input only)."""

    def __init__(self) -> None:
        self.forward = 0
        self.backward = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs within the block is not counted."""
        before = self.forward, self.backward
        try:
            yield
        finally:
            self.forward, self.backward = before

    def count(self, x: Tensor, trains: bool) -> None:
        self.forward += len(x)
        if torch.is_grad_enabled():
            if x.requires_grad:
                self.backward += len(x)
            elif trains:
                self.backward += 2 * len(x)


class Role:
    """One role as a denoiser: a network, the adapter that makes it this role, and what it trains.

    ``trains`` is False for the teacher; ``switch`` is None for a network without adapters; ``lora`` is what its own
    adapter was made by.
    """

    def __init__(
        self,
        name: str,
        family: Family,
        network: nn.Module,
        switch: AdapterSwitch | None,
        adapter: str | None,
        trains: bool,
        meter: PassMeter,
        autocast_dtype: torch.dtype | None = None,
        lora: LoRASettings | None = None,
        watch: Watch | None = None,
    ):
        self.name, self.family, self.network, self.lora = name, family, network, lora
        self.watch = Watch() if watch is None else watch
        self.switch, self.adapter, self.trains, self.meter = switch, adapter, trains, meter
        self.autocast_dtype = precision.autocast_dtype(network, autocast_dtype)
        self.schedule, self.kind = family.schedule, family.kind
        self._denoiser = NetworkDenoiser(self._forward, self.schedule, self.kind)

    def active(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.switch is None else self.switch.using(self.adapter)

    def _forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        self.meter.count(x, self.trains)
        with self.active(), precision.computing(x.device, self.autocast_dtype):
            output = self.family.forward(self.network, x, time, condition)
        self.watch.note(self.name, output, time)
        return output

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """Predict at x_t (B, ...), t (B,).  Float32 or better comes back, whatever the network computes in."""
        return self._denoiser(x_t, t, condition)

    def signal(self, eps: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """BOOT's student (2306.05544): y(eps, t) (B, ...), the x0-like signal at label t (B,) of the path from unit
        noise eps (B, ...).

        The network always sees the starting noise; t is a label alone.  So its output is read with the coefficients
        of the noise's own time T for every label: those of t would divide by sigma_t, which goes to zero.
        """
        schedule = self.schedule
        last = schedule.level(torch.full((len(eps),), schedule.num_levels - 1, device=eps.device))
        x = eps * schedule.start_scale(last[0].item())
        output = self._forward(schedule.network_input(x, last), schedule.network_time(t), condition)
        return schedule.to_x0(output.to(torch.promote_types(output.dtype, x.dtype)), self.kind, x, last)

    def features(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The mid-block's output at x_t, (B, F, h, w); the decoder is not run."""
        (output,) = self._maps([self.family.mid_block(self.network)], x_t, t, condition)
        return output

    def feature_maps(self, x_t: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """The outputs of all blocks at x_t, (B, F, h, w) each, in the order in which they run."""
        return self._maps(self.family.feature_blocks(self.network), x_t, t, condition)

    def _maps(self, blocks: list[nn.Module], x_t: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        maps = features_at(blocks, lambda: self(x_t, t, condition))
        for one in maps:
            self.watch.note(self.name, one, self.schedule.network_time(t))
        return maps

    def parameters(self) -> dict[str, nn.Parameter]:
        """What this role trains, by name."""
        if not self.trains:
            return {}
        if self.adapter is not None:
            return self.switch.parameters(self.adapter)
        return {k: p for k, p in self.network.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that make this role what it is: all of a full network, or an adapter's own."""
        if self.adapter is not None:
            return {k: p.detach() for k, p in self.switch.parameters(self.adapter).items()}
        return self.network.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Strict: every tensor must be there and fit."""
        own = self.state_dict()
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())
            raise UserError(f"{self.name}: the saved weights do not fit this network, e.g. {odd[0]!r}")
        for key, value in own.items():
            if value.shape != state[key].shape:
                raise UserError(f"{self.name}: saved {key} is {tuple(state[key].shape)}, not {tuple(value.shape)}")
            value.copy_(state[key])

    def _portable(self, key: str) -> str:
        return key if self.adapter is None else key.replace(f".{self.adapter}.", ".")

    def portable_state_dict(self) -> dict[str, Tensor]:
        """:meth:`state_dict` without the adapter's name, so that another role of the same kind can take it."""
        return {self._portable(key): value for key, value in self.state_dict().items()}

    def load_portable_state_dict(self, state: dict[str, Tensor]) -> None:
        """Strict, as :meth:`load_state_dict`."""
        names = {self._portable(key): key for key in self.state_dict()}
        self.load_state_dict({names.get(key, key): value for key, value in state.items()})

    def plain_state_dict(self) -> dict[str, Tensor]:
        """Weights under the stock network's names, on the CPU, adapters merged: what an export writes."""
        if self.switch is not None:
            return self.switch.merged_state_dict(self.adapter)
        return {k: v.detach().to("cpu", copy=True) for k, v in self.network.state_dict().items()}


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
        self.switch = AdapterSwitch(base) if weights != "full" else None
        self.student = self._lora_student() if weights == "shared" else self._full_student()
        self.fake_score: Role | None = None
        if fake_score and weights == "full":
            self.fake_score = self._full("fake_score")
        elif fake_score:
            self.fake_score = self._adapted("fake_score", base, self.switch, settings.lora)
        if self.fake_score is not None and settings.fake_score_from is not None:
            self._go_on_with_fake_score(settings.fake_score_from)
        own_teacher = family.teacher_denoiser()
        teacher = self._role("teacher", base, self.switch, None, False)
        self.teacher: Denoiser = teacher if own_teacher is None else own_teacher
        if gradient_checkpointing:
            for network, own in {id(r.network): (r.network, r.switch) for r in self.trained()}.values():
                enable_checkpointing(network, own)
            if weights == "full":
                enable_checkpointing(base, None)  # SIM differentiates through the teacher

    def _full(self, name: str, network: nn.Module | None = None) -> Role:
        network = copy.deepcopy(self.family.network) if network is None else network
        return self._role(name, network.float().requires_grad_(True), None, None, True)

    def _full_student(self) -> Role:
        start, changes = self.settings.student_from, self.settings.network
        student = self._full("student", None if changes is None else self.family.altered_network(changes).eval())
        if start is not None:
            student.network.load_state_dict(self.family.read_weights(start, student.network))
        return student

    def _lora_student(self) -> Role:
        settings, base, switch = self.settings, self.family.network, self.switch
        if settings.student_from is not None:
            base = copy.deepcopy(base).float()  # rounded to the teacher's dtype, part of what it was trained to is lost
            base.load_state_dict(self.family.read_weights(settings.student_from))
            switch = AdapterSwitch(base)
        if settings.lora_under is not None:
            self._loaded("under", base, switch, settings.lora_under, "roles.lora_under", False)
        if settings.lora_from is not None:
            student = self._loaded("student", base, switch, settings.lora_from, "roles.lora_from", True)
        else:
            student = self._adapted("student", base, switch, settings.student_lora or settings.lora)
        if settings.lora_under is not None:
            switch.stacks["student"] = ("under", "student")
        return student

    def _adapted(
        self, name: str, network: nn.Module, switch: AdapterSwitch, lora: LoRASettings, trains: bool = True
    ) -> Role:
        switch.add(name, lora, self.family.lora_targets)
        for parameter in switch.parameters(name).values():
            parameter.requires_grad_(trains)
        return self._role(name, network, switch, name, trains, lora)

    def _loaded(self, name: str, network: nn.Module, switch: AdapterSwitch, path: str, key: str, trains: bool) -> Role:
        """A role whose adapter is read from a file, with that file's rank, alpha and modules."""
        found = read_lora(path, key)
        try:
            settings = LoRASettings(rank=found.rank, alpha=found.alpha, targets=sorted(found.factors))
            role = self._adapted(name, network, switch, settings, trains)
            role.load_portable_state_dict(found.portable_state_dict())
        except UserError as error:
            raise UserError(f"{key} = {path}: it is not a LoRA for this teacher ({error})") from None
        return role

    def _go_on_with_fake_score(self, run: str) -> None:
        key = f"roles.fake_score_from = {run}"
        last = latest(Path(run) / "checkpoints")
        if last is None:
            raise UserError(f"{key}: no whole checkpoint there; name the folder of a run with a fake score")
        tensors, _ = load(last)
        if "fake_score" not in tensors:
            raise UserError(f"{key}: its method has no fake score; remove the key")
        try:
            self.fake_score.load_state_dict(tensors["fake_score"])
        except UserError as error:
            raise UserError(f"{key}: {error}; hold both runs' roles in the same way") from None

    def to(self, device: torch.device | str) -> Roles:
        for network in {id(r.network): r.network for r in self.trained()}.values():
            network.to(device)
        self.family.to(device)
        return self

    def _role(self, name: str, network: nn.Module, switch, adapter: str | None, trains: bool, lora=None) -> Role:
        shared = (self.meter, self.autocast_dtype, lora, self.watch)
        return Role(name, self.family, network, switch, adapter, trains, *shared)

    def frozen_like(self, role: Role, name: str) -> Role:
        """One more frozen role that says what ``role`` says now: a copy of its network, or of its adapter on the same
        base."""
        if role.adapter is None:
            return self._role(name, copy.deepcopy(role.network).requires_grad_(False), None, None, False)
        frozen = self._adapted(name, role.network, role.switch, role.lora, False)
        if role.adapter in role.switch.stacks:
            role.switch.stacks[name] = (*role.switch.stack(role.adapter)[:-1], name)
        frozen.load_portable_state_dict(role.portable_state_dict())
        return frozen

    def networks(self) -> list[nn.Module]:
        """Each network once: the teacher's, and those of the roles that are not adapters on it."""
        found = [self.family.network, *(role.network for role in self.trained())]
        return list({id(network): network for network in found}.values())

    def trained(self) -> list[Role]:
        return [role for role in (self.student, self.fake_score) if role is not None]


def enable_checkpointing(network: nn.Module, switch: AdapterSwitch | None) -> None:
    """Gradient checkpointing that recomputes each block under the adapter that was on in its forward pass."""

    def run(module, *args):
        if switch is None:
            return checkpoint(module.__call__, *args, use_reentrant=False)
        adapter = switch.active

        def again(*inner):
            with switch.using(adapter):
                return module(*inner)

        return checkpoint(again, *args, use_reentrant=False)

    try:
        network.enable_gradient_checkpointing(gradient_checkpointing_func=run)
    except (AttributeError, ValueError):
        raise UserError(
            f"train.gradient_checkpointing: {type(network).__name__} does not support it; set it to false"
        ) from None


class EMA:
    """An exponential moving average of a role's trained parameters, float32.

    ``shadow <- d shadow + (1 - d) parameter`` after each update n = 1, 2, ..., with
    ``d = min(decay, (1 + n) / (10 + n))``: 2/11, 3/12, ...  This is one update ahead of diffusers' ``EMAModel``, whose
    d is 0 after its first update (the start is forgotten) and 2/11 after its second.
    """

    def __init__(self, role: Role, decay: float):
        self.role, self.decay, self.updates = role, decay, 0
        self.shadow = {k: p.detach().float().clone() for k, p in role.parameters().items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = [p.detach().float() for p in self.role.parameters().values()]
        torch._foreach_lerp_(list(self.shadow.values()), parameters, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The role computes with the averaged weights within the block."""
        parameters = self.role.parameters()
        kept = {k: p.detach().clone() for k, p in parameters.items()}
        self._write(parameters, self.shadow)
        try:
            yield
        finally:
            self._write(parameters, kept)

    @staticmethod
    @torch.no_grad()
    def _write(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
        for key, parameter in parameters.items():
            parameter.copy_(values[key])
