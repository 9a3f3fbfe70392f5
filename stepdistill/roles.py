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
from typing import Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepdistill.config import Section
from stepdistill.denoiser import Condition, Denoiser, NetworkDenoiser, Prediction
from stepdistill.discriminator import features_at
from stepdistill.errors import UserError
from stepdistill.families.base import Family

Weights = Literal["full", "shared", "mixed"]


class LoRASettings(Section):
    """Low-rank adapters (2106.09685): ``W + alpha/rank B A``."""

    rank: int = Field(64, ge=1)
    alpha: float | None = Field(None, gt=0, description="scale times rank; the rank by default (scale 1)")
    targets: list[str] | None = Field(None, description="module names; the family's list by default")

    @property
    def effective_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)


class RolesSettings(Section):
    """``full``: student and fake score are copies of the teacher.  ``shared``: both are LoRAs on the one frozen
    teacher.  ``mixed``: a full student, and a fake score that is a LoRA on the teacher.

    With ``student_from`` a ``shared`` student is a LoRA on that model, a second frozen base.
    """

    weights: Weights = "full"
    lora: LoRASettings = LoRASettings()
    student_lora: LoRASettings | None = Field(None, description="the student's own; lora by default")
    student_from: str | None = Field(None, description="start the student from this folder (an earlier student)")

    @model_validator(mode="after")
    def _student_lora(self):
        if self.student_lora is not None and self.weights != "shared":
            raise ValueError("student_lora needs a LoRA student; set weights to shared or remove it")
        return self


class AdapterSwitch:
    """Which LoRA adapter of a network is on; ``None`` is the bare base."""

    def __init__(self, network: nn.Module):
        self.network = network
        self.layers: list[BaseTunerLayer] = []
        self.active: str | None = None

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
                layer._active_adapter = [name]

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

    def merged_state_dict(self, name: str | None) -> dict[str, Tensor]:
        """The base's state dict under its original names, with adapter ``name`` merged in (float32 sums)."""
        deltas = {}
        for path, module in self.network.named_modules():
            if name is not None and isinstance(module, LoraLayer) and name in module.lora_A:
                deltas[f"{path}.weight"] = module.get_delta_weight(name)
        merged = {}
        for key, value in self.network.state_dict().items():
            if "lora_" in key:
                continue
            key = key.replace(".base_layer.", ".")
            value = value.detach()
            if key in deltas:
                value = (value.float() + deltas[key].detach().float()).to(value.dtype)
            merged[key] = value.clone()
        return merged


class PassMeter:
    """Counts network passes in images: forward, and what backward costs in forwards (2, or 1 to the input only)."""

    def __init__(self) -> None:
        self.forward = 0
        self.backward = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def count(self, x: Tensor, trains: bool) -> None:
        self.forward += len(x)
        if torch.is_grad_enabled():
            if x.requires_grad:
                self.backward += len(x)
            elif trains:
                self.backward += 2 * len(x)


class Role:
    """One role as a denoiser: a network, the adapter that makes it this role, and what it trains.

    ``trains`` is False for the teacher; ``switch`` is None for a network without adapters.
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
    ):
        self.name, self.family, self.network = name, family, network
        self.switch, self.adapter, self.trains, self.meter = switch, adapter, trains, meter
        self.autocast_dtype = autocast_dtype
        self.schedule, self.kind = family.schedule, family.kind
        self._denoiser = NetworkDenoiser(self._forward, self.schedule, self.kind)

    def active(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.switch is None else self.switch.using(self.adapter)

    def _autocast(self, x: Tensor) -> contextlib.AbstractContextManager:
        # a context of its own for each call: a cast cached by a no-grad pass must not serve one with gradients
        enabled = self.autocast_dtype is not None
        return torch.autocast(x.device.type, dtype=self.autocast_dtype or torch.bfloat16, enabled=enabled)

    def _forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        self.meter.count(x, self.trains)
        with self.active(), self._autocast(x):
            return self.family.forward(self.network, x, time, condition)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """Predict at x_t (B, ...), t (B,).  Float32 or better comes back, whatever the network computes in."""
        return self._denoiser(x_t, t, condition)

    def features(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The mid-block's output at x_t, (B, F, h, w); the decoder is not run."""
        block = self.family.mid_block(self.network)
        return features_at(block, lambda: self(x_t, t, condition))

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
        """Weights under the stock network's names, adapters merged: what an export writes."""
        if self.switch is not None:
            return self.switch.merged_state_dict(self.adapter)
        return {k: v.detach().clone() for k, v in self.network.state_dict().items()}


class Roles:
    """The roles of one distillation run, built from a family's teacher.

    Attributes:
        teacher, student, fake_score: denoisers.  ``teacher`` is any denoiser for an analytic family.
        meter: network passes so far.
    """

    def __init__(
        self,
        family: Family,
        settings: RolesSettings,
        autocast_dtype: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
    ):
        self.family, self.settings, self.meter = family, settings, PassMeter()
        self.autocast_dtype, self.gradient_checkpointing = autocast_dtype, gradient_checkpointing
        weights = settings.weights
        base = family.network
        base.requires_grad_(False).eval()
        self.switch = switch = AdapterSwitch(base) if weights != "full" else None
        role = self._role

        def full(name: str) -> Role:
            return role(name, copy.deepcopy(base).float().requires_grad_(True), None, None, True)

        def adapted(name: str, network: nn.Module, switch: AdapterSwitch, lora: LoRASettings) -> Role:
            switch.add(name, lora, family.lora_targets)
            return role(name, network, switch, name, True)

        start = None if settings.student_from is None else family.read_weights(settings.student_from)
        if weights != "shared":
            self.student = full("student")
            if start is not None:
                self.student.network.load_state_dict(start)
        self.fake_score = full("fake_score") if weights == "full" else None
        if weights == "shared":
            student_base, student_switch = base, switch
            if start is not None:
                student_base = copy.deepcopy(base)
                student_base.load_state_dict(start)
                student_switch = AdapterSwitch(student_base)
            self.student = adapted("student", student_base, student_switch, settings.student_lora or settings.lora)
        if weights != "full":
            self.fake_score = adapted("fake_score", base, switch, settings.lora)
        own_teacher = family.teacher_denoiser()
        self.teacher: Denoiser = role("teacher", base, switch, None, False) if own_teacher is None else own_teacher
        if gradient_checkpointing:
            for network, own in {id(r.network): (r.network, r.switch) for r in self.trained()}.values():
                enable_checkpointing(network, own)
            if weights == "full":
                enable_checkpointing(base, None)  # SIM differentiates through the teacher

    def to(self, device: torch.device | str) -> Roles:
        for network in {id(r.network): r.network for r in self.trained()}.values():
            network.to(device)
        self.family.to(device)
        return self

    def _role(self, name: str, network: nn.Module, switch, adapter: str | None, trains: bool) -> Role:
        return Role(name, self.family, network, switch, adapter, trains, self.meter, self.autocast_dtype)

    def frozen_like_fake_score(self, name: str) -> Role:
        """One more frozen role that holds what a fake score's ``state_dict`` holds: a network of the teacher's
        architecture, or an adapter on the shared base.  The teacher's weights until :meth:`Role.load_state_dict`."""
        if self.fake_score.adapter is None:
            network = copy.deepcopy(self.family.network).requires_grad_(False)
            if self.gradient_checkpointing:
                enable_checkpointing(network, None)
            return self._role(name, network, None, None, False)
        self.switch.add(name, self.settings.lora, self.family.lora_targets)
        for parameter in self.switch.parameters(name).values():
            parameter.requires_grad_(False)
        return self._role(name, self.family.network, self.switch, name, False)

    def trained(self) -> list[Role]:
        return [self.student, self.fake_score]


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

    ``shadow <- d shadow + (1 - d) parameter`` after each update n, with ``d = min(decay, (1 + n) / (10 + n))``.
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
