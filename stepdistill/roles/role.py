"""One role of a run: a network, or an adapter on one, as a denoiser that counts its passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill import precision
from stepdistill.denoiser import Condition, NetworkDenoiser, Prediction
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.finiteness import Watch

from .adapters import AdapterSwitch
from .settings import LoRASettings


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

    Args:
        switch: None for a network without adapters.
        adapter: the adapter's name; None: the role is the whole network.
        trains: False for the teacher.
        meter: counts the role's passes.
        autocast_dtype: what the network is to compute in; None is float32.
        lora: the settings that the adapter was made with.
        watch: notes whether the role's predictions are finite.
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
        self._denoiser = NetworkDenoiser(self._forward, self.schedule, self.kind, family.combine)

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """The role's adapter on within the block."""
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
        """The encoder's last feature at x_t, (B, F, h, w); the decoder is not run."""
        (feature,) = self._features(x_t, t, condition, every=False)
        return feature

    def feature_maps(self, x_t: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """The outputs of all blocks at x_t, (B, F, h, w) each, in the order in which they run."""
        return self._features(x_t, t, condition, every=True)

    def _features(self, x_t: Tensor, t: Tensor, condition: Condition, every: bool) -> list[Tensor]:
        x, time = self.schedule.network_input(x_t, t), self.schedule.network_time(t)
        self.meter.count(x, self.trains)
        with self.active(), precision.computing(x.device, self.autocast_dtype):
            features = self.family.features(self.network, x, time, condition, every)
        for feature in features:
            self.watch.note(self.name, feature, time)
        return features

    def parameters(self) -> dict[str, nn.Parameter]:
        """What this role trains, by name."""
        if not self.trains:
            return {}
        if self.adapter is not None and self.switch is not None:
            return self.switch.parameters(self.adapter)
        return {k: p for k, p in self.network.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that make this role what it is: all of a full network, or those of its adapter."""
        if self.adapter is not None and self.switch is not None:
            return {k: p.detach() for k, p in self.switch.parameters(self.adapter).items()}
        return self.network.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy ``state`` in.

        Raises:
            UserError: a tensor is missing, of another network, or of another shape.
        """
        current = self.state_dict()
        if current.keys() != state.keys():
            odd = sorted(current.keys() ^ state.keys())
            raise UserError(f"{self.name}: the saved weights do not fit this network, e.g. {odd[0]!r}")
        for key, value in current.items():
            if value.shape != state[key].shape:
                raise UserError(f"{self.name}: saved {key} is {tuple(state[key].shape)}, not {tuple(value.shape)}")
            value.copy_(state[key])

    def _portable(self, key: str) -> str:
        return key if self.adapter is None else key.replace(f".{self.adapter}.", ".")

    def portable_state_dict(self) -> dict[str, Tensor]:
        """:meth:`state_dict` without the adapter's name, so that another role of the same kind can take it."""
        return {self._portable(key): value for key, value in self.state_dict().items()}

    def load_portable_state_dict(self, state: dict[str, Tensor]) -> None:
        """As :meth:`load_state_dict`, for what :meth:`portable_state_dict` gives.

        Raises:
            UserError: as there.
        """
        names = {self._portable(key): key for key in self.state_dict()}
        self.load_state_dict({names.get(key, key): value for key, value in state.items()})

    def plain_state_dict(self) -> dict[str, Tensor]:
        """Weights under the stock network's names, on the CPU, adapters merged: what an export writes."""
        if self.switch is not None:
            return self.switch.merged_state_dict(self.adapter)
        return {k: v.detach().to("cpu", copy=True) for k, v in self.network.state_dict().items()}
