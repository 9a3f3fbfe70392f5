"""Attention of diffusers' networks: which kernel computes it, and negative prompts inside it (NASA).

Kernels go by diffusers' own names (``native`` is SDPA with torch's own choice of kernel; ``_native_math``, ``flash``,
``xformers``, ``sage``, ...) and are chosen for one network at a time.  diffusers' ``set_attention_backend`` changes a
process-wide default as well, which a teacher and its student would share, and does nothing for networks of the older
``Attention`` module (Stable Diffusion's UNets, UNet2DModel), so neither is used: those modules get
:class:`AttentionProcessor`, which passes the backend with each call, and newer ones get their own processor's field
written.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from stepdistill.errors import UserError

AUTO, NATIVE = "auto", "native"
BACKENDS = tuple(name.value for name in AttentionBackendName)
"""diffusers' names of the kernels."""
FASTEST_OF = ("_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3", "xformers")
"""What ``auto`` tries beside ``native`` on a GPU: exact kernels that need no download.  Quantised ones (sage) are for
who names them."""


# -- kernels -----------------------------------------------------------------------------------------------


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, backend: str | None) -> Tensor:
    """``softmax(Q K^T / sqrt(D) + mask) V``.

    Args:
        query, key, value: (B, H, L, D), (B, H, S, D), (B, H, S, D).
        mask: broadcastable to (B, H, L, S), boolean (True is seen) or added; None for none.
        backend: a name of ``BACKENDS``; None is native.
    """
    if backend in (None, NATIVE):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    rows = (x.transpose(1, 2) for x in (query, key, value))
    return dispatch_attention_fn(*rows, attn_mask=mask, backend=AttentionBackendName(backend)).transpose(1, 2)


def why_not(
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    gradients: bool = False,
    masked: bool = False,
) -> str | None:
    """None where ``backend`` runs on this machine, else the reason: it is tried on a small tensor.

    A ``_hub`` kernel is downloaded here, as diffusers does when it is chosen.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 32, head_dim, generator=generator) for _ in range(3))
    mask = None
    if masked:  # as a call has it: added, and hiding something
        mask = torch.zeros(1, 1, 1, 32).index_fill(-1, torch.arange(20, 32), float("-inf"))
    exact = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    inputs = [x.to(device, dtype).requires_grad_(gradients) for x in (query, key, value)]
    mask = None if mask is None else mask.to(device, dtype)
    try:
        with attention_backend(backend):  # checks what it needs, and puts the process-wide default back
            output = attend(*inputs, mask, backend)
        if gradients:
            torch.autograd.grad(output.float().sum(), inputs)
    except Exception as error:  # of kernels and packages, many kinds
        return (" ".join(str(error).split()) or type(error).__name__).split(". ")[0].rstrip(".")[:160]
    wrong = (output.detach().float().cpu() - exact).abs().max().item()
    return None if wrong < 0.1 else f"its result is off by {wrong:.2g}"


def require(
    backend: str,
    key: str,
    device: torch.device | str,
    dtype: torch.dtype,
    gradients: bool,
    networks: Iterable[nn.Module] = (),
) -> None:
    """Raise UserError, naming the config's ``key``, where ``backend`` is unknown or does not run here, on the heads of
    ``networks``."""
    if backend in (AUTO, NATIVE):
        return
    if backend not in BACKENDS:
        raise UserError(f"{key} = {backend}: use auto, or one of diffusers' backends: {', '.join(sorted(BACKENDS))}")
    reason = why_not_heads(backend, device, dtype, networks, gradients)
    if reason is not None:
        raise UserError(f"{key} = {backend}: it does not run on this {torch.device(device).type} ({reason}); use auto")


def why_not_heads(
    backend: str, device: torch.device | str, dtype: torch.dtype, networks: Iterable[nn.Module], gradients: bool
) -> str | None:
    """:func:`why_not` on every width of head that ``networks`` have: kernels differ in those that they take."""
    dims = sorted({head_dim_of(module) for network in networks for module in modules_of(network)}) or [64]
    found = [(dim, why_not(backend, device, dtype, dim, gradients)) for dim in dims]
    reasons = [(dim, reason) for dim, reason in found if reason is not None]
    if not reasons:
        return None
    dim, reason = reasons[0]
    return reason if len(reasons) == len(dims) else f"heads of {dim}: {reason}"


def fastest(
    network: nn.Module, device: torch.device, dtype: torch.dtype, gradients: bool = False
) -> tuple[str, dict[str, str]]:
    """The fastest exact backend for ``network`` on this device, and why each other one is not it.

    On a GPU the candidates are timed on the network's widest attention; elsewhere it is native: on a CPU, SDPA's own
    choice is the fused kernel already.
    """
    if torch.device(device).type != "cuda":
        return NATIVE, {", ".join(FASTEST_OF): f"on a {torch.device(device).type} SDPA's own choice is fused already"}
    widths = [(m.heads, head_dim_of(m)) for m in modules_of(network)]
    heads, head_dim = max(widths, key=lambda width: width[0] * width[1], default=(8, 64))
    times, reasons = {}, {}
    for backend in (NATIVE, *FASTEST_OF):
        reason = None if backend == NATIVE else why_not_heads(backend, device, dtype, [network], gradients)
        if reason is None:
            times[backend] = _seconds(backend, device, dtype, heads, head_dim)
        else:
            reasons[backend] = reason
    best = min(times, key=lambda name: times[name] * (0.97 if name == NATIVE else 1))  # noise must not decide
    reasons |= {name: f"{time / times[best]:.2f} x the time" for name, time in times.items() if name != best}
    return best, reasons


def _seconds(backend: str, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> float:
    """The median time of one call on 4,096 tokens."""
    query = torch.randn(1, heads, 4096, head_dim, device=device, dtype=dtype)
    taken = []
    for _ in range(8):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        attend(query, query, query, None, backend)
        torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


# -- which kernel a network uses -----------------------------------------------------------------------------


def modules_of(network: nn.Module) -> Iterator[nn.Module]:
    """The attention modules of a diffusers network."""
    return (m for m in network.modules() if hasattr(m, "processor") and hasattr(m, "to_q"))


def head_dim_of(attn: nn.Module) -> int:
    return attn.to_q.weight.shape[0] // attn.heads


def install(network: nn.Module, user: str) -> dict[str, str]:
    """Give the older attention modules an :class:`AttentionProcessor` on behalf of ``user``; gives the modules that
    keep what they have, with the reason."""
    kept = {}
    for name, module in network.named_modules():
        if not (isinstance(module, Attention) and hasattr(module, "to_q")):
            continue
        if type(module.processor) is AttnProcessor2_0:
            module.set_processor(AttentionProcessor(module.processor))
        if isinstance(module.processor, AttentionProcessor):
            module.processor.users.add(user)
        elif not hasattr(module.processor, "_attention_backend"):
            kept[name] = f"has a {type(module.processor).__name__} of its own"
    return kept


def release(network: nn.Module, user: str) -> None:
    """Undo :func:`install`: the last user's leaving puts the stock processors back."""
    for module in modules_of(network):
        processor = module.processor
        if isinstance(processor, AttentionProcessor):
            processor.users.discard(user)
            if not processor.users:
                module.set_processor(processor.stock)


def set_backend(network: nn.Module, backend: str) -> dict[str, str]:
    """Compute every attention of ``network`` by ``backend`` (a name of ``BACKENDS``), and of no other network.

    Masked attention stays native where the kernel takes no masks.  Returns the modules left alone, with the reason.
    """
    kept = {} if backend == NATIVE else install(network, "backend")
    masked: dict[tuple, str] = {}
    for module in modules_of(network):
        processor = module.processor
        if isinstance(processor, AttentionProcessor):
            weight = module.to_q.weight
            place = (weight.device, weight.dtype, head_dim_of(module))
            if backend != NATIVE and place not in masked:
                masked[place] = NATIVE if why_not(backend, *place, masked=True) else backend
            processor._attention_backend = None if backend == NATIVE else AttentionBackendName(backend)
            processor.masked_backend = masked.get(place, NATIVE)
        elif hasattr(processor, "_attention_backend"):
            processor._attention_backend = AttentionBackendName(backend)  # None would be the process-wide default
    if backend == NATIVE:
        release(network, "backend")
    return kept


# -- one attention module ------------------------------------------------------------------------------------


class AttentionProcessor:
    """diffusers' ``AttnProcessor2_0``, with a kernel of its own choice, fused projections and a negative branch.

    Without any of them its arithmetic is the stock one's, bit for bit.

    NASA (2412.02687 version 3, eqs. 7 to 9): a cross-attention that is given ``negative_hidden_states`` gives

        Z = softmax(Q K+^T / sqrt(D)) V+ - a softmax(Q K-^T / sqrt(D)) V-

    before the output projection, so its bias counts once, with the same projections for both prompts.  Both branches
    are one call on a batch of 2B.  Self-attention is untouched.  a = 0 is the plain attention, to the bit; there is no
    compensation: equal prompts scale the branch by 1 - a, and an empty negative prompt is not nothing.
    """

    _attention_backend: AttentionBackendName | None = None  # the name that diffusers looks for
    _parallel_config = None

    def __init__(self, stock: AttnProcessor2_0 | None = None):
        self.stock = AttnProcessor2_0() if stock is None else stock
        self.users: set[str] = set()
        self.masked_backend = NATIVE

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        negative_hidden_states: Tensor | None = None,
        negative_mask: Tensor | None = None,
        negative_scale: float | Tensor = 0.0,
    ) -> Tensor:
        """
        Args:
            hidden_states: (B, L, C), or (B, C, h, w) for a VAE's.
            encoder_hidden_states: (B, S+, W), the text; None for self-attention.
            attention_mask: of the text, as diffusers' UNets prepare it: added, (B, 1, S+); or boolean.
            negative_hidden_states: (B, S-, W) or (1, S-, W); its length is its own.
            negative_mask: (B, S-) or (1, S-), boolean, True is seen; at least one a row.
            negative_scale: a, a number or one a sample, (B,) or (1,).

        Raises:
            ValueError: a negative prompt of another batch size.
        """
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        count = len(hidden_states)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = attention_mask
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, context.shape[1], count).view(
                count, attn.heads, -1, mask.shape[-1]
            )
        off = isinstance(negative_scale, float | int) and negative_scale == 0
        crossed = encoder_hidden_states is not None
        steered = crossed and negative_hidden_states is not None and not off
        negative = negative_hidden_states.to(context) if steered else None
        if crossed and attn.norm_cross is not None:  # each by itself: a group norm is over the tokens too
            context = attn.norm_encoder_hidden_states(context)
            negative = attn.norm_encoder_hidden_states(negative) if steered else None
        if steered:
            context, mask = _both(context, mask, negative, negative_mask)
        query, key, value = _projections(attn, hidden_states, context, encoder_hidden_states is None)
        if steered:
            query = torch.cat([query, query])
        backend = self._attention_backend if mask is None else self.masked_backend
        output = attend(query, key, value, mask, None if backend is None else str(AttentionBackendName(backend).value))
        if steered:
            output = negative_away(*output.chunk(2), negative_scale)
        output = output.transpose(1, 2).reshape(count, -1, attn.heads * output.shape[-1]).to(query.dtype)
        output = attn.to_out[1](attn.to_out[0](output))
        if len(shape) == 4:
            output = output.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            output = output + residual
        return output / attn.rescale_output_factor


def negative_away(positive: Tensor, negative: Tensor, scale: float | Tensor) -> Tensor:
    """``Z+ - a Z-`` (2412.02687 version 3, eq. 9), all (B, H, L, D); ``scale`` a number or (B,)."""
    if isinstance(scale, Tensor):
        scale = scale.to(positive).reshape(-1, 1, 1, 1)
    return positive - scale * negative


def _both(
    context: Tensor, mask: Tensor | None, negative: Tensor, negative_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Both prompts as one batch (2B, max(S+, S-), W), padded, and the mask that hides the padding, where there is any
    need of one: added, (2B, 1 or H, 1 or L, S)."""
    count, length, _ = context.shape
    if len(negative) not in (1, count):
        raise ValueError(
            f"{len(negative)} negative prompts for a batch of {count}: give one for all, or one a picture "
            "(images_per_prompt), with guidance off"
        )
    negative = negative.expand(count, -1, -1)
    own = negative.shape[1]
    if mask is None and negative_mask is None and own == length:
        return torch.cat([context, negative]), None
    wide = max(length, own)
    hidden = float("-inf")

    def added(seen: Tensor) -> Tensor:
        return torch.zeros_like(seen, dtype=context.dtype).masked_fill(~seen, hidden)

    if mask is None:
        mask = context.new_zeros(count, 1, 1, length)
    elif mask.dtype == torch.bool:
        mask = added(mask)
    if negative_mask is None:
        seen = context.new_zeros(count, 1, 1, own)
    else:
        seen = added(negative_mask.bool().expand(count, -1)[:, None, None])
    mask = F.pad(mask, (0, wide - length), value=hidden)
    seen = F.pad(seen, (0, wide - own), value=hidden).expand(-1, *mask.shape[1:3], -1)
    both = [F.pad(x, (0, 0, 0, wide - x.shape[1])) for x in (context, negative)]
    return torch.cat(both), torch.cat([mask.to(seen), seen])


def _projections(attn: Attention, hidden: Tensor, context: Tensor, own: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Q (B, H, L, D) of ``hidden``, K and V of ``context`` (the same where ``own``), through fused weights if those
    are there, for this use, and still what they were made of."""
    fused = None if own == attn.is_cross_attention else fused_projection(attn)
    if fused is None:
        query, key, value = attn.to_q(hidden), attn.to_k(context), attn.to_v(context)
    elif own:
        query, key, value = F.linear(hidden, *fused).chunk(3, -1)
    else:
        query, (key, value) = attn.to_q(hidden), F.linear(context, *fused).chunk(2, -1)
    query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return query, key, value


# -- fused projections ---------------------------------------------------------------------------------------

_FUSED = ("_fused_weight", "_fused_bias")


def _parts(attn: nn.Module) -> list[nn.Module]:
    return [attn.to_k, attn.to_v] if attn.is_cross_attention else [attn.to_q, attn.to_k, attn.to_v]


def fuse(network: nn.Module) -> dict[str, str]:
    """Q, K and V of self-attention as one product, K and V of cross-attention too; gives what is left, with the reason.

    The separate weights become views of the fused ones, so whatever changes the former in place (an optimizer, a LoRA
    merged into them) changes the latter, and no memory is spent.  The fused ones are outside of the state dict, so that
    saving writes what it always wrote (diffusers' own ``fuse_qkv_projections`` writes them beside the others).  Where
    a LoRA is injected later, or weights are replaced or moved, the module goes back to its separate projections by
    itself; compiled code notices the LoRA alone.
    """
    left = {}
    install(network, "fused")
    for name, attn in network.named_modules():
        if not (isinstance(attn, Attention) and isinstance(attn.processor, AttentionProcessor)):
            continue
        parts = _parts(attn)
        odd = next((type(part) for part in parts if type(part) is not nn.Linear), None)
        if odd is not None:
            kind = f"{odd.__module__.split('.')[0]}'s {odd.__name__}"
            left[name] = f"its projections are {kind}, not torch's Linear; fuse a LoRA into the weights first"
            continue
        for buffer, own in zip(_FUSED, ("weight", "bias"), strict=True):
            attn.register_buffer(buffer, _joined([getattr(part, own) for part in parts]), persistent=False)
    return left


def unfuse(network: nn.Module) -> None:
    """Undo :func:`fuse`."""
    for attn in modules_of(network):
        if hasattr(attn, "_fused_weight"):
            for parameter in (p for part in _parts(attn) for p in part.parameters()):
                parameter.data = parameter.data.clone()  # a tensor of its own again
            for name in _FUSED:
                delattr(attn, name)
    release(network, "fused")


def _joined(parts: list[nn.Parameter | None]) -> Tensor | None:
    """One tensor of which the parameters are views from now on."""
    if parts[0] is None:
        return None
    whole = torch.cat([part.detach() for part in parts])
    for part, own in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = own
    return whole


def _are_views(parts: list[nn.Parameter | None], whole: Tensor | None) -> bool:
    """Whether the parameters, one after the other, still are ``whole``."""
    if whole is None:
        return all(part is None for part in parts)
    place = whole.data_ptr()
    for part in parts:
        if part is None or part.data_ptr() != place:
            return False
        place += part.nbytes
    return True


def fused_projection(attn: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """The fused weight and bias; None where there are none, they are no longer the weights, or the weights train."""
    if not hasattr(attn, "_fused_weight"):
        return None
    parts, fused = _parts(attn), (attn._fused_weight, attn._fused_bias)
    if any(type(part) is not nn.Linear for part in parts):
        return None
    if torch.is_grad_enabled() and any(parameter.requires_grad for part in parts for parameter in part.parameters()):
        return None
    if not torch.compiler.is_compiling():  # which knows no addresses
        weights, biases = ([getattr(part, own) for part in parts] for own in ("weight", "bias"))
        if not (_are_views(weights, fused[0]) and _are_views(biases, fused[1])):
            return None
    return fused
