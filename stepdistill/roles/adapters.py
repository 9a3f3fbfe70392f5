"""LoRA adapters on one network, switched on for the length of a call.

Which adapter is on is a property of each *call*, not a mode to remember.  The switch writes peft's two private fields
and leaves ``requires_grad`` alone: peft's own ``set_adapter`` turns the other adapters' gradients off, so switching
between a forward and its backward silently loses gradients.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from stepdistill.errors import UserError, first_line

from .lora import LoRA, stacked
from .settings import LoRASettings


class AdapterSwitch:
    """Which LoRA adapter of a network is on; ``None`` is the bare base."""

    def __init__(self, network: nn.Module):
        self.network = network
        self.layers: list[LoraLayer] = []
        self.active: str | None = None
        self.stacks: dict[str, tuple[str, ...]] = {}
        """By an adapter's name, the adapters that are on with it: first those below it, last the adapter itself."""

    def add(self, name: str, settings: LoRASettings, targets: list[str] | str) -> None:
        """Inject a trainable float32 adapter; the base stays frozen.

        Args:
            targets: names of modules to adapt where the settings name none, or peft's ``all-linear``.

        Raises:
            UserError: no module has one of the target names.
        """
        names = [f".{name}" for name, _ in self.network.named_modules()]
        for target in settings.targets or []:
            if not any(name.endswith(f".{target}") for name in names):
                raise UserError(f"roles.lora.targets: the teacher has no module named {target!r}; leave the key out")
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.effective_alpha,  # type: ignore[arg-type]  # peft only divides it by the rank
            target_modules=settings.targets or targets,
            init_lora_weights=True,
        )
        trainable = [p for p in self.network.parameters() if p.requires_grad]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are intended
                inject_adapter_in_model(config, self.network, adapter_name=name)
        except ValueError as error:
            raise UserError(f"roles.lora.targets: {first_line(error)}") from None
        self.layers = [module for module in self.network.modules() if isinstance(module, LoraLayer)]
        for key, parameter in self.network.named_parameters():
            if f".{name}." in key and "lora_" in key:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
            elif "lora_" not in key:
                parameter.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)
        self._activate(self.active)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of adapter ``name`` by their names in the network."""
        return {k: p for k, p in self.network.named_parameters() if "lora_" in k and f".{name}." in k}

    def _activate(self, name: str | None) -> None:
        for layer in self.layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = list(self.stack(name))

    def stack(self, name: str) -> tuple[str, ...]:
        """The frozen adapters below ``name``, and ``name`` last."""
        return self.stacks.get(name, (name,))

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """The adapter ``name`` on within the block, the previous state afterwards."""
        previous = self.active
        if name != previous:
            self.active = name
            self._activate(name)
        try:
            yield
        finally:
            if name != previous:
                self.active = previous
                self._activate(previous)

    @contextlib.contextmanager
    def scaled(self, name: str, ratio: float) -> Iterator[None]:
        """Adapter ``name`` counts ``ratio`` times within the block; the adapters below it keep their scale."""
        layers = [layer for layer in self.layers if name in layer.scaling]
        previous = [layer.scaling[name] for layer in layers]
        for layer, scale in zip(layers, previous, strict=True):
            layer.scaling[name] = ratio * scale
        try:
            yield
        finally:
            for layer, scale in zip(layers, previous, strict=True):
                layer.scaling[name] = scale

    def lora(self, name: str) -> LoRA:
        """Adapter ``name`` as the content of a LoRA file, the adapters below it included."""
        return stacked(self.scaled_loras(name))

    def scaled_loras(self, name: str) -> list[tuple[LoRA, float]]:
        """The adapters of :meth:`stack` on the CPU, each with the ratio that it counts now."""
        return [self._scaled_lora(part) for part in self.stack(name)]

    def _scaled_lora(self, name: str) -> tuple[LoRA, float]:
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        rank, alpha, ratio = 1, 1.0, 1.0
        for path, layer in self.network.named_modules():
            if isinstance(layer, LoraLayer) and name in layer.lora_A:
                factors[path] = (_weight(layer.lora_A, name), _weight(layer.lora_B, name))
                rank, alpha = layer.r[name], layer.lora_alpha[name]
                ratio = layer.scaling[name] * rank / alpha
        return LoRA(rank, alpha, factors), ratio

    def merged_state_dict(self, name: str | None) -> dict[str, Tensor]:
        """The base's state dict under its original names, with adapter ``name`` merged in, on the CPU.

        A weight that an adapter changes is float32, whatever the base is stored in: rounded to bfloat16 a sixth of a
        young adapter's delta is lost.  The others keep their dtype.  (peft's ``merge`` rounds to the base's dtype, and
        merges into the network itself.)
        """
        loras = [] if name is None else self.scaled_loras(name)
        merged = {}
        for key, value in self.network.state_dict().items():
            if "lora_" in key:
                continue
            key = key.replace(".base_layer.", ".")
            path = key.removesuffix(".weight")
            merged[key] = value.detach().to("cpu", copy=True)
            for lora, ratio in loras:
                if key != path and path in lora.factors:
                    merged[key] = merged[key].float() + ratio * lora.delta(path)
        return merged


def _weight(layers: nn.ModuleDict, name: str) -> Tensor:
    """A factor of adapter ``name``, float32 on the CPU."""
    return layers[name].get_parameter("weight").detach().cpu().float()
