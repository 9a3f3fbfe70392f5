"""NASA against its formula, processors bit for bit the stock ones, kernels for one network alone, fused projections."""

from __future__ import annotations

import copy
import itertools

import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from stepdistill.attention import kernels as attention
from stepdistill.attention.kernels import AttentionProcessor, head_dim_of, modules_of
from stepdistill.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

F64 = torch.float64
QUERIES, WIDTH, TEXT_WIDTH, HEADS, HEAD_DIM = 5, 12, 10, 3, 4
KINDS = {
    "plain": {},
    "bias": {"bias": True},
    "no_bias_at_all": {"out_bias": False},
    "residual": {"bias": True, "residual_connection": True, "rescale_output_factor": 1.7},
    "layer_norms": {"bias": True, "cross_attention_norm": "layer_norm", "norm_num_groups": 3, "qk_norm": "layer_norm"},
    "group_norm_of_the_text": {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 2},
    "rms": {"qk_norm": "rms_norm", "residual_connection": True, "rescale_output_factor": 0.5},
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def module(kind: str = "bias", **changes) -> Attention:
    """A cross-attention in float64, every parameter random, norms too."""
    sizes = {"query_dim": WIDTH, "cross_attention_dim": TEXT_WIDTH, "heads": HEADS, "dim_head": HEAD_DIM}
    made = Attention(**{**sizes, **KINDS[kind], **changes}).double().eval()
    generator = seeded(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64) * 0.6)
    return made


def steerable(kind: str = "bias", **changes) -> Attention:
    made = module(kind, **changes)
    assert attention.install(made, "test") == {}
    assert type(made.processor) is AttentionProcessor
    return made


def tokens(count: int, length: int, width: int = TEXT_WIDTH, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, length, width, generator=seeded(100 + seed), dtype=F64)


def added(seen: torch.Tensor, hidden: float = -10000.0) -> torch.Tensor:
    """(B, 1, S), as UNet2DConditionModel prepares an ``encoder_attention_mask``."""
    return ((~seen).to(F64) * hidden)[:, None]


def layer_norm(x: torch.Tensor, own: nn.Module) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + own.eps).sqrt() * own.weight + own.bias


def of_kind(x: torch.Tensor, own: nn.Module | None) -> torch.Tensor:
    """The norms of queries and keys, written out."""
    if own is None:
        return x
    if isinstance(own, nn.LayerNorm):
        return layer_norm(x, own)
    return x / (x.square().mean(-1, keepdim=True) + own.eps).sqrt() * own.weight


def group_norm(x: torch.Tensor, own: nn.GroupNorm) -> torch.Tensor:
    """Of one sample's tokens (S, C): each group of channels over all tokens."""
    groups = x.unflatten(-1, (own.num_groups, -1))
    mean = groups.mean((0, 2), keepdim=True)
    variance = (groups - mean).square().mean((0, 2), keepdim=True)
    return ((groups - mean) / (variance + own.eps).sqrt()).flatten(1) * own.weight + own.bias


def linear(x: torch.Tensor, own: nn.Linear) -> torch.Tensor:
    return x @ own.weight.T + (0 if own.bias is None else own.bias)


def branch(attn: Attention, hidden: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D)) V of one sample (L, C) and the tokens that it may see (S, W), head by head: (L, H D)."""
    if isinstance(attn.norm_cross, nn.LayerNorm):
        text = layer_norm(text, attn.norm_cross)
    elif attn.norm_cross is not None:
        text = group_norm(text, attn.norm_cross)
    query, key, value = linear(hidden, attn.to_q), linear(text, attn.to_k), linear(text, attn.to_v)
    parts = []
    for head in range(attn.heads):
        own = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        scores = of_kind(query[:, own], attn.norm_q) @ of_kind(key[:, own], attn.norm_k).T / HEAD_DIM**0.5
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        parts.append(weights @ value[:, own])
    return torch.cat(parts, -1)


def before_output(attn, x, text, text_seen, negative, negative_seen, scales) -> torch.Tensor:
    """Z = Z+ - a Z-, (B, L, H D); masked tokens are not there at all."""
    rows = []
    for i in range(len(x)):
        hidden = x[i] if attn.group_norm is None else group_norm(x[i], attn.group_norm)
        plus = text[i] if text_seen is None else text[i][text_seen[i]]
        minus = negative[i % len(negative)]
        minus = minus if negative_seen is None else minus[negative_seen[i % len(negative_seen)]]
        rows.append(branch(attn, hidden, plus) - scales[i] * branch(attn, hidden, minus))
    return torch.stack(rows)


def output_of(attn, z, x) -> torch.Tensor:
    out = linear(z, attn.to_out[0])
    return (out + (x if attn.residual_connection else 0)) / attn.rescale_output_factor


SEEN = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 0, 1, 1, 1, 0]]).bool()
NEGATIVE_SEEN = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1]]).bool()
CASES = {
    "equal_lengths": (6, 6, None, None),
    "shorter_negative": (6, 4, None, None),
    "longer_negative": (6, 9, None, None),
    "text_masked": (6, 6, SEEN, None),
    "text_masked_shorter_negative": (6, 3, SEEN, None),
    "negative_masked": (6, 4, None, NEGATIVE_SEEN),
    "both_masked": (6, 4, SEEN, NEGATIVE_SEEN),
}


# -- NASA ------------------------------------------------------------------------------------------------------


# a masked token still counts in a group norm over all tokens, in stock diffusers too
FORMULAS = [(k, c) for k in KINDS for c, (*_, a, b) in CASES.items() if "group" not in k or a is None is b]


@pytest.mark.parametrize("scale", [0.7, "per_sample"])
@pytest.mark.parametrize(("kind", "case"), FORMULAS)
def test_output_is_the_formula_written_out(kind, case, scale):
    length, own, seen, negative_seen = CASES[case]
    attn = steerable(kind)
    x, text, negative = tokens(2, QUERIES, WIDTH), tokens(2, length, seed=1), tokens(2, own, seed=2)
    given = torch.tensor([0.3, 1.4], dtype=F64) if scale == "per_sample" else scale
    got = attn(
        x,
        text,
        None if seen is None else added(seen),
        negative_hidden_states=negative,
        negative_mask=negative_seen,
        negative_scale=given,
    )
    scales = [0.3, 1.4] if scale == "per_sample" else [scale, scale]
    z = before_output(attn, x, text, seen, negative, negative_seen, scales)
    exact = 1e-6 if kind == "rms" else 1e-11  # diffusers' RMSNorm squares in float32
    torch.testing.assert_close(got, output_of(attn, z, x), rtol=0, atol=exact)
    without = before_output(attn, x, text, seen, negative, negative_seen, [0, 0])
    assert (z - without).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_scale_zero_is_the_stock_processor_to_the_bit(kind, masked, dtype):
    attn = module(kind).to(dtype)
    x, text, negative = tokens(2, QUERIES, WIDTH).to(dtype), tokens(2, 6, seed=1).to(dtype), tokens(2, 4, seed=2)
    mask = added(SEEN).to(dtype) if masked else None
    stock = attn(x, text, mask)
    attention.install(attn, "test")
    for scale in (0, 0.0):
        assert torch.equal(attn(x, text, mask, negative_hidden_states=negative, negative_scale=scale), stock)
    nothing = torch.full_like(negative, float("nan"))
    assert torch.equal(attn(x, text, mask, negative_hidden_states=nothing, negative_scale=0.0), stock)  # unseen
    assert torch.equal(attn(x, text, mask), stock)
    assert torch.equal(attn(x, text, mask, negative_hidden_states=negative), stock)  # no scale is none
    zero = attn(x, text, mask, negative_hidden_states=negative, negative_scale=torch.zeros(2))
    torch.testing.assert_close(zero, stock, rtol=0, atol=1e-12 if dtype == F64 else 1e-5)


def keep_inputs(attn: Attention) -> list[torch.Tensor]:
    """What goes into the output projection from now on."""
    kept = []
    attn.to_out[0].register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    return kept


@pytest.mark.parametrize("scale", [0.25, 1.0, 1.5])
def test_equal_prompts_scale_the_branch_by_one_less_a(scale):
    """No (1 + a) compensation, and an output whose bias counts once: to_out((1 - a) Z)."""
    attn = steerable("bias")
    x, text = tokens(2, QUERIES, WIDTH), tokens(2, 6, seed=1)
    kept = keep_inputs(attn)
    attn(x, text)
    got = attn(x, text, negative_hidden_states=text, negative_scale=scale)
    plain, steered = kept
    torch.testing.assert_close(steered, (1 - scale) * plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(got, (1 - scale) * plain @ attn.to_out[0].weight.T + attn.to_out[0].bias)


def test_bias_counts_once_unlike_a_difference_of_outputs():
    attn, scale = steerable("bias"), 0.8
    x, text, negative = tokens(2, QUERIES, WIDTH), tokens(2, 6, seed=1), tokens(2, 6, seed=2)
    right = attn(x, text, negative_hidden_states=negative, negative_scale=scale)
    wrong = attn(x, text) - scale * attn(x, negative)
    bias = attn.to_out[0].bias
    torch.testing.assert_close(right - wrong, (scale * bias).expand_as(right), rtol=0, atol=1e-12)
    assert (scale * bias).abs().max() > 0.1
    with torch.no_grad():
        bias.zero_()
    right = attn(x, text, negative_hidden_states=negative, negative_scale=scale)
    torch.testing.assert_close(right, attn(x, text) - scale * attn(x, negative), rtol=0, atol=1e-12)


def test_order_of_negative_tokens_is_nothing():
    attn = steerable("layer_norms")
    x, text, negative = tokens(2, QUERIES, WIDTH), tokens(2, 6, seed=1), tokens(2, 4, seed=2)
    order = torch.tensor([2, 0, 3, 1])
    call = {"negative_scale": 0.6}
    for mask in (None, NEGATIVE_SEEN):
        shuffled = None if mask is None else mask[:, order]
        straight = attn(x, text, negative_hidden_states=negative, negative_mask=mask, **call)
        mixed = attn(x, text, negative_hidden_states=negative[:, order], negative_mask=shuffled, **call)
        torch.testing.assert_close(mixed, straight, rtol=0, atol=1e-12)
    unmoved = attn(x, text, negative_hidden_states=negative[:, order], negative_mask=NEGATIVE_SEEN, **call)
    assert (unmoved - straight).abs().max() > 1e-3  # the mask is of tokens, not of places


def test_hidden_tokens_are_the_same_as_none_there():
    """A mask, of either prompt, is the prompt without those tokens; whatever they hold is nothing."""
    attn = steerable("layer_norms")
    x, text, negative = tokens(1, QUERIES, WIDTH), tokens(1, 6, seed=1), tokens(1, 4, seed=2)
    seen, negative_seen = SEEN[:1], NEGATIVE_SEEN[:1]
    short = attn(x, text[seen][None], negative_hidden_states=negative[negative_seen][None], negative_scale=0.9)
    for odd in (0.0, 1e3):
        with torch.no_grad():
            text[~seen] += odd
            negative[~negative_seen] += odd
        masked = attn(
            x,
            text,
            added(seen),
            negative_hidden_states=negative,
            negative_mask=negative_seen,
            negative_scale=0.9,
        )
        torch.testing.assert_close(masked, short, rtol=0, atol=1e-12)


def test_boolean_masks_are_as_good_as_added_ones():
    attn = steerable("bias")
    x, text, negative = tokens(2, QUERIES, WIDTH), tokens(2, 6, seed=1), tokens(2, 9, seed=2)
    call = {"negative_hidden_states": negative, "negative_scale": 0.9}
    torch.testing.assert_close(attn(x, text, SEEN[:, None], **call), attn(x, text, added(SEEN), **call))
    numbers = {"negative_mask": NEGATIVE_SEEN.long(), "negative_scale": 0.9, "negative_hidden_states": tokens(2, 4)}
    torch.testing.assert_close(
        attn(x, text, **numbers), attn(x, text, **{**numbers, "negative_mask": NEGATIVE_SEEN}), rtol=0, atol=0
    )


def test_mask_of_every_query_its_own_keys():
    """(B, L, S): the first queries see the first tokens alone."""
    attn = steerable("bias")
    x, text, negative = tokens(2, QUERIES, WIDTH), tokens(2, 6, seed=1), tokens(2, 4, seed=2)
    mask = torch.zeros(2, QUERIES, 6, dtype=F64)
    mask[:, :2, 3:] = float("-inf")
    call = {"negative_hidden_states": negative, "negative_scale": 0.9}
    got = attn(x, text, mask, **call)
    torch.testing.assert_close(got[:, :2], attn(x[:, :2], text[:, :3], **call))
    torch.testing.assert_close(got[:, 2:], attn(x[:, 2:], text, **call))


def test_scale_of_each_sample_is_that_samples_own():
    attn = steerable("residual")
    x, text, negative = tokens(3, QUERIES, WIDTH), tokens(3, 6, seed=1), tokens(3, 4, seed=2)
    scales = [0.0, 0.5, 2.0]
    got = attn(x, text, negative_hidden_states=negative, negative_scale=torch.tensor(scales))
    for i, scale in enumerate(scales):
        own = slice(i, i + 1)
        alone = attn(x[own], text[own], negative_hidden_states=negative[own], negative_scale=scale)
        torch.testing.assert_close(got[own], alone, rtol=0, atol=1e-12)
    one = attn(x, text, negative_hidden_states=negative, negative_scale=torch.tensor([0.5]))
    torch.testing.assert_close(one, attn(x, text, negative_hidden_states=negative, negative_scale=0.5))


def test_one_negative_for_all_or_one_each_and_nothing_else():
    attn = steerable("bias")
    x, text, negative = tokens(3, QUERIES, WIDTH), tokens(3, 6, seed=1), tokens(1, 4, seed=2)
    one = attn(x, text, negative_hidden_states=negative, negative_scale=0.5)
    each = attn(x, text, negative_hidden_states=negative.expand(3, -1, -1), negative_scale=0.5)
    assert torch.equal(one, each)
    mask = torch.tensor([[True, True, False, True]])
    masked = attn(x, text, negative_hidden_states=negative, negative_mask=mask, negative_scale=0.5)
    torch.testing.assert_close(masked, attn(x, text, negative_hidden_states=negative[:, mask[0]], negative_scale=0.5))
    with pytest.raises(ValueError, match="2 negative prompts for a batch of 3: give one for all"):
        attn(x, text, negative_hidden_states=tokens(2, 4), negative_scale=0.5)


def test_it_is_no_joint_softmax():
    """Neither keys side by side with values [V+; -a V-], nor a mixture of prompts before the projections."""
    attn, scale = steerable("no_bias_at_all"), 0.7
    x, text, negative = tokens(2, QUERIES, WIDTH), tokens(2, 6, seed=1), tokens(2, 4, seed=2)
    right = attn(x, text, negative_hidden_states=negative, negative_scale=scale)
    query, key = attn.to_q(x), attn.to_k(torch.cat([text, negative], 1))
    value = torch.cat([attn.to_v(text), -scale * attn.to_v(negative)], 1)
    query, key, value = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (query, key, value))
    joint = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    assert (attn.to_out[0](joint) - right).abs().max() > 0.1
    mixed = attn(x, torch.cat([text[:, :4] - scale * negative, text[:, 4:]], 1))
    assert (mixed - right).abs().max() > 0.1


def test_self_attention_is_untouched():
    attn = module("residual", cross_attention_dim=None)
    x, negative = tokens(2, QUERIES, WIDTH), tokens(2, 4, WIDTH, seed=2)
    stock = attn(x)
    attention.install(attn, "test")
    assert torch.equal(attn(x, negative_hidden_states=negative, negative_scale=0.9), stock)


def test_gradients_reach_everything_that_takes_part():
    attn = steerable("layer_norms")
    x, text, negative = tokens(2, QUERIES, WIDTH), tokens(2, 6, seed=1), tokens(2, 4, seed=2)
    scale = torch.tensor([0.4, 1.1], dtype=F64)
    parts = {"x": x, "text": text, "negative": negative, "scale": scale}

    def run(*values):
        x, text, negative, scale = values
        return attn(
            x, text, negative_hidden_states=negative, negative_mask=NEGATIVE_SEEN, negative_scale=scale
        ).square()

    values = tuple(v.clone().requires_grad_() for v in parts.values())
    assert torch.autograd.gradcheck(run, values, fast_mode=True)
    run(*values).sum().backward()
    for name, value in zip(parts, values, strict=True):
        assert value.grad.abs().sum() > 0, name
    assert (values[2].grad[~NEGATIVE_SEEN] == 0).all()  # hidden tokens teach nothing
    for name, parameter in attn.named_parameters():  # a key's bias cancels in a softmax, but for its norm
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_half_precision_keeps_its_type():
    attn = steerable("residual").bfloat16()
    x, text, negative = tokens(2, QUERIES, WIDTH), tokens(2, 6, seed=1), tokens(2, 4, seed=2)
    call = {"negative_hidden_states": negative.float(), "negative_scale": torch.tensor([0.5, 1.0])}
    got = attn(x.bfloat16(), text.bfloat16(), added(SEEN).bfloat16(), **call)
    assert got.dtype == torch.bfloat16
    exact = steerable("residual")(x, text, added(SEEN), **call)
    assert (got.double() - exact).abs().max() < 0.15


class ByHand:
    """The formula in place of the cross-attentions' processors."""

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        temb=None,
        negative_hidden_states=None,
        negative_scale=0.0,
    ):
        query, rows = attn.to_q(hidden_states), []
        for text, mask, factor in (
            (encoder_hidden_states, attention_mask, 1.0),
            (negative_hidden_states, None, -negative_scale),
        ):
            parts = []
            for q, k, v in zip(
                *(t.chunk(attn.heads, -1) for t in (query, attn.to_k(text), attn.to_v(text))), strict=True
            ):
                scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
                parts.append((scores if mask is None else scores + mask).softmax(-1) @ v)
            rows.append(factor * torch.cat(parts, -1))
        return attn.to_out[0](rows[0] + rows[1])


def condition_unet() -> UNet2DConditionModel:
    return tiny.condition_unet().double().eval().requires_grad_(False)


def call_unet(unet: UNet2DConditionModel, steer: dict | None = None, mask: bool = False, **changes) -> torch.Tensor:
    dtype = unet.dtype
    x = torch.randn(2, 4, 8, 8, generator=seeded(3), dtype=F64).to(dtype)
    given = {"encoder_hidden_states": tokens(2, 6, 8, seed=4).to(dtype), **changes}
    if mask:
        given["encoder_attention_mask"] = SEEN
    return unet(x, torch.tensor([999, 20]), cross_attention_kwargs=steer, **given).sample


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("length", [6, 3])
def test_through_a_whole_unet(length, mask):
    """Every cross-attention of UNet2DConditionModel, and no self-attention, as the pipeline's arguments ask it."""
    unet, reference = condition_unet(), condition_unet()
    plain = call_unet(unet, mask=mask)
    assert attention.install(unet, "negative") == {}
    steer = {"negative_hidden_states": tokens(2, length, 8, seed=5), "negative_scale": 0.8}
    assert torch.equal(call_unet(unet, {**steer, "negative_scale": 0.0}, mask), plain)
    crossed = 0
    for name, own in reference.named_modules():
        if name.endswith("attn2"):
            own.set_processor(ByHand())
            crossed += 1
    assert crossed == 4
    got = call_unet(unet, steer, mask)
    torch.testing.assert_close(got, call_unet(reference, steer, mask), rtol=0, atol=1e-11)
    assert (got - plain).abs().max() > 1e-3


# -- processors that are asked for nothing ---------------------------------------------------------------------


def networks():
    """Each with a call that runs all of its attention; the VAE's is on pictures, (B, C, h, w)."""
    torch.manual_seed(0)
    latents, pictures, pixels = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16, 16), torch.randn(2, 1, 8, 8)
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "sample_size": 16}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}

    def through_vae(vae):
        parts = vae.decode(latents).sample, vae.encode(pictures).latent_dist.mean
        return torch.cat([part.flatten() for part in parts])

    return {
        "UNet2DConditionModel": (tiny.condition_unet(), call_unet),
        "UNet2DModel": (tiny.unet(labels=3), lambda unet: unet(pixels, 20, class_labels=torch.tensor([0, 2])).sample),
        "AutoencoderKL": (AutoencoderKL(**sizes, **blocks), through_vae),
    }


@pytest.mark.parametrize(("name", "modules"), [("UNet2DConditionModel", 8), ("UNet2DModel", 4), ("AutoencoderKL", 2)])
def test_bare_processors_are_the_stock_ones_to_the_bit(name, modules):
    network, call = networks()[name]
    network.eval().requires_grad_(False)
    stock = call(network)
    assert attention.install(network, "test") == {}
    assert [type(own.processor) for own in modules_of(network)] == [AttentionProcessor] * modules
    assert torch.equal(call(network), stock)
    attention.release(network, "test")
    assert [type(own.processor) for own in modules_of(network)] == [AttnProcessor2_0] * modules
    assert torch.equal(call(network), stock)


def test_spatial_norm_and_pictures_with_their_residual():
    """The oldest form: (B, C, h, w) in and out, a spatial norm that is told ``temb``."""
    attn = module("residual", query_dim=32, cross_attention_dim=None, spatial_norm_dim=4, norm_num_groups=4)
    x = torch.randn(2, 32, 3, 2, generator=seeded(1), dtype=F64)
    temb = torch.randn(2, 4, 3, 2, generator=seeded(2), dtype=F64)
    stock = attn(x, temb=temb)
    attention.install(attn, "test")
    assert torch.equal(attn(x, temb=temb), stock)
    assert stock.shape == x.shape


def test_dropout_is_kept():
    attn = module("bias", dropout=0.5).train()
    x, text = tokens(2, QUERIES, WIDTH), tokens(2, 6, seed=1)
    torch.manual_seed(0)
    stock = attn(x, text)
    attention.install(attn, "test")
    torch.manual_seed(0)
    assert torch.equal(attn(x, text), stock)


def test_foreign_processors_are_left_alone_and_named():
    unet = tiny.condition_unet()
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(AttnProcessor())
    kept = attention.install(unet, "test")
    assert kept == {"mid_block.attentions.0.transformer_blocks.0.attn2": "has a AttnProcessor of its own"}
    assert type(unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor) is AttnProcessor
    attention.release(unet, "test")
    assert {type(own.processor) for own in modules_of(unet)} == {AttnProcessor, AttnProcessor2_0}


# -- kernels ---------------------------------------------------------------------------------------------------

HERE = ("native", "_native_math", "_native_flash", "flex")


@pytest.fixture(autouse=True)
def process_wide_default():
    """No test here, so nothing that it calls, may move what all other networks of the process use."""
    before = _AttentionBackendRegistry._active_backend
    yield
    assert _AttentionBackendRegistry._active_backend == before == AttentionBackendName.NATIVE


@pytest.fixture
def counted(monkeypatch):
    """How often diffusers' kernels are called, by name, with masks and without."""
    calls: dict[str, list[bool]] = {}
    for name, own in list(_AttentionBackendRegistry._backends.items()):

        def run(*, own=own, name=name, **given):
            calls.setdefault(name.value, []).append(given.get("attn_mask") is not None)
            return own(**given)

        monkeypatch.setitem(_AttentionBackendRegistry._backends, name, run)
    return calls


def test_kernels_that_run_on_a_cpu():
    runs = {name for name in attention.BACKENDS if attention.why_not(name, "cpu", head_dim=4) is None}
    assert runs >= {"native", "_native_math", "_native_flash"}
    assert runs <= set(HERE)
    for name in set(attention.BACKENDS) - runs:
        reason = attention.why_not(name, "cpu")
        assert "\n" not in reason, name
        assert 0 < len(reason) <= 160


def test_a_kernel_without_backward_is_refused_for_training_alone():
    if attention.why_not("flex", "cpu") is not None:
        pytest.skip("flex does not run here at all")
    assert "backward" in attention.why_not("flex", "cpu", gradients=True)
    assert attention.why_not("_native_math", "cpu", gradients=True) is None


@pytest.mark.parametrize("backend", HERE)
def test_every_kernel_gives_the_same_within_rounding(backend, counted):
    unet = tiny.condition_unet().eval().requires_grad_(False)
    assert head_dim_of(next(modules_of(unet))) == 4
    if attention.why_not(backend, "cpu", head_dim=4) is not None:
        pytest.skip(f"{backend} does not run here")
    plain = call_unet(unet)
    counted.clear()
    assert attention.set_backend(unet, backend) == {}
    counted.clear()
    got = call_unet(unet)
    torch.testing.assert_close(got, plain, rtol=0, atol=2e-6)
    if backend == "native":
        assert torch.equal(got, plain)
        assert counted == {}  # SDPA itself
    else:
        assert counted == {backend: [False] * 8}


def masks_of(unet, backend, counted, monkeypatch=None):
    """Steered by a prompt of another length: what was called with a mask and what without."""
    steer = {"negative_hidden_states": tokens(2, 3, 8, seed=5).to(unet.dtype), "negative_scale": 0.8}
    attention.set_backend(unet, attention.NATIVE)
    attention.install(unet, "negative")
    exact = call_unet(unet, steer)
    assert attention.set_backend(unet, backend) == {}
    counted.clear()
    torch.testing.assert_close(call_unet(unet, steer), exact, rtol=0, atol=1e-11)
    return dict(counted)


def test_a_kernel_that_takes_no_mask_leaves_masked_attention_to_native(counted):
    """_native_flash: four self-attentions by it, four masked cross-attentions by SDPA."""
    assert "not supported" in attention.why_not("_native_flash", "cpu", head_dim=4, masked=True)
    assert masks_of(condition_unet(), "_native_flash", counted) == {"_native_flash": [False] * 4}
    called = masks_of(condition_unet(), "_native_math", counted)
    assert sorted(called["_native_math"]) == [False] * 4 + [True] * 4


@pytest.mark.parametrize(
    ("takes", "says"),
    [
        ("boolean", "must be of type bool"),  # the varlen kernels: the masks of a call are added ones
        ("nothing", "off by"),  # one that would silently compute without it
    ],
)
def test_masks_are_tried_as_a_call_has_them(takes, says, counted, monkeypatch):
    name = AttentionBackendName("_native_math")
    own = _AttentionBackendRegistry._backends[name]

    def kernel(*, attn_mask=None, **given):
        if takes == "boolean" and attn_mask is not None and attn_mask.dtype != torch.bool:
            raise ValueError(f"Attention mask must be of type bool, got {attn_mask.dtype}.")
        return own(attn_mask=attn_mask if takes == "boolean" else None, **given)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, kernel)
    assert attention.why_not("_native_math", "cpu") is None
    assert says in attention.why_not("_native_math", "cpu", masked=True)
    assert masks_of(condition_unet(), "_native_math", counted) == {"_native_math": [False] * 4}


def test_a_wrong_result_is_a_reason(monkeypatch):
    name = AttentionBackendName("_native_math")
    own = _AttentionBackendRegistry._backends[name]
    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, lambda **given: own(**given) + 0.2)
    assert attention.why_not("_native_math", "cpu") == "its result is off by 0.2"
    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, lambda **given: own(**given) * float("nan"))
    assert attention.why_not("_native_math", "cpu") == "its result is off by nan"


def test_one_networks_kernel_is_no_others(counted):
    """A teacher beside its student: processors, outputs and calls stay its own."""
    student, teacher = condition_unet(), condition_unet()
    plain = call_unet(teacher)
    attention.set_backend(student, "_native_math")
    counted.clear()
    assert torch.equal(call_unet(teacher), plain)
    assert counted == {}
    assert {type(own.processor) for own in modules_of(teacher)} == {AttnProcessor2_0}
    with attention_backend("_native_flash"):  # and a process-wide choice is not theirs
        call_unet(student)
        assert set(counted) == {"_native_math"}
        attention.set_backend(student, attention.NATIVE)
        attention.install(student, "negative")
        counted.clear()
        call_unet(student)
        assert counted == {}


@pytest.mark.parametrize("order", list(itertools.permutations(["backend", "fused", "negative"])))
def test_stock_processors_come_back_when_the_last_user_leaves(order):
    unet = condition_unet()
    before, plain = unet.attn_processors, call_unet(unet)
    leave = {
        "backend": lambda: attention.set_backend(unet, attention.NATIVE),
        "fused": lambda: attention.unfuse(unet),
        "negative": lambda: attention.release(unet, "negative"),
    }
    attention.set_backend(unet, "_native_math")
    attention.fuse(unet)
    attention.install(unet, "negative")
    for user in order:
        assert {type(own.processor) for own in modules_of(unet)} == {AttentionProcessor}
        torch.testing.assert_close(call_unet(unet), plain, rtol=0, atol=1e-12)
        leave[user]()
    after = unet.attn_processors
    assert all(after[name] is processor for name, processor in before.items())
    assert torch.equal(call_unet(unet), plain)


def test_leaving_twice_or_without_having_come_is_nothing():
    unet = condition_unet()
    attention.release(unet, "negative")
    attention.set_backend(unet, attention.NATIVE)
    attention.unfuse(unet)
    assert {type(own.processor) for own in modules_of(unet)} == {AttnProcessor2_0}
    attention.install(unet, "negative")
    attention.release(unet, "somebody else")
    assert {type(own.processor) for own in modules_of(unet)} == {AttentionProcessor}


def test_a_copy_keeps_its_kernel_and_is_on_its_own(counted):
    unet = condition_unet()
    attention.set_backend(unet, "_native_math")
    other = copy.deepcopy(unet)
    attention.set_backend(unet, attention.NATIVE)
    assert {type(own.processor) for own in modules_of(unet)} == {AttnProcessor2_0}
    counted.clear()
    call_unet(other)
    assert counted == {"_native_math": [False] * 8}
    attention.set_backend(other, attention.NATIVE)
    assert {type(own.processor) for own in modules_of(other)} == {AttnProcessor2_0}


def flux_attention() -> FluxAttention:
    torch.manual_seed(0)
    return FluxAttention(query_dim=8, heads=2, dim_head=4, added_kv_proj_dim=8, context_pre_only=False).eval()


def test_newer_modules_get_their_own_processors_field(counted):
    flux = flux_attention()
    x, text = torch.randn(1, 3, 8), torch.randn(1, 2, 8)
    plain = flux(x, text)[0]
    processor = flux.processor
    assert attention.set_backend(flux, "_native_math") == {}
    counted.clear()
    torch.testing.assert_close(flux(x, text)[0], plain)
    assert flux.processor is processor
    assert counted == {"_native_math": [False]}
    with attention_backend("_native_math"):  # native is native, not what the process has for a default
        attention.set_backend(flux, attention.NATIVE)
        counted.clear()
        assert torch.equal(flux(x, text)[0], plain)
        assert counted == {"native": [False]}


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        ("flush", "train.attention = flush: use auto, or one of diffusers' backends: _flash_3, "),
        ("flash", "train.attention = flash: it does not run on this cpu (Flash Attention backend 'flash' is not "),
        ("flex", "train.attention = flex: it does not run on this cpu (FlexAttention does not support backward on CPU"),
    ],
)
def test_requires_error_is_one_line(backend, says):
    with pytest.raises(UserError) as caught:
        attention.require(backend, "train.attention", "cpu", torch.float32, gradients=True)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_require_tries_what_is_named_and_never_auto_or_native(monkeypatch):
    asked, own = [], attention.why_not
    monkeypatch.setattr(
        attention, "why_not", lambda name, *given, **more: asked.append(name) or own(name, *given, **more)
    )
    for backend in ("auto", "native", "_native_math", "_native_flash"):
        attention.require(backend, "attention", torch.device("cpu"), torch.float32, True, [condition_unet()])
    assert set(asked) == {"_native_math", "_native_flash"}
    monkeypatch.setattr(attention, "why_not", lambda *given, **more: "nothing runs")
    with pytest.raises(UserError, match="nothing runs"):
        attention.require("_native_math", "attention", "cpu", torch.float32, True)


def heads_unet() -> UNet2DConditionModel:
    """Heads of 4 and of 16: half of all kernels stop somewhere."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=(2, 1),
        norm_num_groups=4,
    )


@pytest.mark.parametrize(("backend", "reason"), [("_native_math", None), ("_native_cudnn", "heads of 16: too wide")])
def test_require_tries_every_width_of_head_that_the_networks_have(backend, reason, monkeypatch):
    own = attention.why_not
    monkeypatch.setattr(
        attention,
        "why_not",
        lambda name, device, dtype, head_dim=64, gradients=False: (
            own("_native_math", device, dtype, head_dim, gradients)
            if name == "_native_math" or head_dim < 16
            else "too wide"
        ),
    )
    call = (backend, "attention", "cpu", torch.float32, True, [tiny.condition_unet(), heads_unet()])
    if reason is None:
        attention.require(*call)
    else:
        with pytest.raises(UserError, match=rf"attention = {backend}: .* \({reason}\); use auto"):
            attention.require(*call)
        attention.require(*call[:-1], [tiny.condition_unet()])


def test_fastest_on_a_cpu_is_native_untried(monkeypatch):
    monkeypatch.setattr(attention, "_seconds", lambda *given: pytest.fail("timed"))
    name, reasons = attention.fastest(condition_unet(), torch.device("cpu"), torch.float32)
    assert name == "native"
    assert "on a cpu" in next(iter(reasons.values()))


FAKE = {"native": 1.0, "_native_cudnn": 0.5, "_native_flash": 2.0, "_native_efficient": 0.98}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "_native_cudnn"),
        ({"_native_cudnn": None}, "native"),  # 2 % faster is noise
        ({"_native_cudnn": None, "_native_efficient": 0.971}, "native"),
        ({"_native_cudnn": None, "_native_efficient": 0.969}, "_native_efficient"),
        ({"_native_cudnn": None, "_native_flash": 0.9, "_native_efficient": 0.8}, "_native_efficient"),
        ({"native": 5.0, "_native_cudnn": None, "_native_efficient": None}, "_native_flash"),
    ],
)
def test_fastest_on_a_gpu_is_the_fastest_and_native_where_it_is_close(changes, expected, monkeypatch):
    times = {**FAKE, **changes}
    monkeypatch.setattr(
        attention, "why_not", lambda name, *given: None if times.get(name) is not None else "is not there"
    )
    monkeypatch.setattr(attention, "_seconds", lambda name, *given: times[name])
    name, reasons = attention.fastest(tiny.condition_unet(), torch.device("cuda"), torch.bfloat16, gradients=True)
    assert name == expected
    assert reasons.keys() == {"native", *attention.FASTEST_OF} - {expected}
    assert reasons["xformers"] == "is not there"
    if expected != "native":
        assert reasons["native"] == f"{times['native'] / times[expected]:.2f} x the time"


def test_fastest_is_one_that_every_head_can_use_timed_on_the_widest(monkeypatch):
    """_native_cudnn is quickest but stops below heads of 16; the widest is 8 heads' worth of channels, not of heads."""
    asked, timed = [], set()

    def why_not(name, device, dtype, head_dim, gradients):
        asked.append((name, head_dim, gradients))
        return "too wide" if name == "_native_cudnn" and head_dim == 16 else None

    monkeypatch.setattr(attention, "why_not", why_not)
    monkeypatch.setattr(
        attention, "_seconds", lambda name, device, dtype, heads, dim: timed.add((heads, dim)) or FAKE.get(name, 3.0)
    )
    name, reasons = attention.fastest(heads_unet(), torch.device("cuda"), torch.bfloat16, gradients=True)
    assert name == "native"
    assert reasons["_native_cudnn"] == "heads of 16: too wide"
    assert {head_dim for _, head_dim, _ in asked} == {4, 16}
    assert all(gradients for *_, gradients in asked)
    assert timed == {(1, 16)}


# -- fused projections -----------------------------------------------------------------------------------------


def fused_modules(unet) -> list[str]:
    return [name for name, own in unet.named_modules() if attention.fused_projection(own) is not None]


def assert_right(unet, used: bool | None = None) -> None:
    """What ``unet`` gives is what a stock network of its weights gives; ``used``: through all fused products, or none.

    LoRA layers count with what they are.
    """
    stock = copy.deepcopy(unet)
    attention.unfuse(stock)
    assert {type(own.processor) for own in modules_of(stock)} == {AttnProcessor2_0}
    separate = []
    hooks = [own.to_v.register_forward_hook(lambda *given: separate.append(1)) for own in modules_of(unet)]
    with torch.no_grad():
        torch.testing.assert_close(call_unet(unet), call_unet(stock), rtol=0, atol=1e-11)
    for hook in hooks:
        hook.remove()
    if used is not None:
        assert len(separate) == (0 if used else 8)


def test_fused_is_the_same_within_rounding_and_saves_no_weight_twice():
    unet = condition_unet()
    plain = call_unet(unet)
    assert attention.fuse(unet) == {}
    assert len(fused_modules(unet)) == 8
    torch.testing.assert_close(call_unet(unet), plain, rtol=0, atol=1e-12)
    assert_right(unet, used=True)
    for own in modules_of(unet):
        assert own.to_k.weight.untyped_storage().data_ptr() == own._fused_weight.untyped_storage().data_ptr()
        rows = 2 if own.is_cross_attention else 3
        assert own._fused_weight.shape == (rows * 8, 8)
    text = {"encoder_hidden_states": tokens(2, 6, 8, seed=6)}
    assert (call_unet(unet, **text) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["bias", "layer_norms", "residual"])
def test_fused_with_biases_and_norms(kind):
    attn = module(kind).requires_grad_(False)
    x, text, negative = tokens(2, QUERIES, WIDTH), tokens(2, 6, seed=1), tokens(2, 4, seed=2)
    plain = attn(x, text, added(SEEN))
    attention.install(attn, "negative")
    steered = attn(x, text, negative_hidden_states=negative, negative_scale=0.5)
    attention.fuse(attn)
    assert attention.fused_projection(attn)[1].shape == (2 * HEADS * HEAD_DIM,)
    torch.testing.assert_close(attn(x, text, added(SEEN)), plain)
    torch.testing.assert_close(attn(x, text, negative_hidden_states=negative, negative_scale=0.5), steered)


def test_fused_modules_that_are_called_the_other_way():
    """A cross-attention without a text, and a self-attention with one."""
    for changes, call in (
        ({"cross_attention_dim": WIDTH}, (tokens(2, QUERIES, WIDTH),)),
        ({"cross_attention_dim": None}, (tokens(2, QUERIES, WIDTH), tokens(2, 4, WIDTH, seed=3))),
    ):
        attn = module("bias", **changes).requires_grad_(False)
        plain = attn(*call)
        attention.fuse(attn)
        assert attention.fused_projection(attn) is not None
        assert torch.equal(attn(*call), plain)


def test_saving_a_fused_network_writes_the_stock_one(tmp_path):
    unet = tiny.condition_unet().eval()
    keys, weights = list(unet.state_dict()), {k: v.clone() for k, v in unet.state_dict().items()}
    with torch.no_grad():
        plain = call_unet(unet)
        attention.fuse(unet)
        attention.set_backend(unet, "_native_math")
        assert list(unet.state_dict()) == keys
        assert all(torch.equal(unet.state_dict()[k], v) for k, v in weights.items())
        unet.save_pretrained(tmp_path)
        read = UNet2DConditionModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
        assert list(read.state_dict()) == keys
        assert {type(own.processor) for own in modules_of(read)} == {AttnProcessor2_0}
        assert torch.equal(call_unet(read.eval()), plain)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size < 1.1 * sum(v.nbytes for v in weights.values()) + 50_000


def by_in_place(unet):
    for own in modules_of(unet):
        own.to_v.weight.add_(0.3)


def by_an_optimizer(unet):
    parameters = [p for own in modules_of(unet) for p in own.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True).grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, 0.1).step()
    unet.requires_grad_(False)


def by_new_data(unet):
    for own in modules_of(unet):
        own.to_k.weight.data = own.to_k.weight.data + 0.3


def behind_its_back(unet):
    """As peft merges a LoRA: no version is counted, no address changes."""
    for own in modules_of(unet):
        own.to_k.weight.data += 0.3


def by_loading(unet):
    unet.load_state_dict({k: v + 0.05 for k, v in unet.state_dict().items()})


def by_assigning(unet):
    unet.load_state_dict({k: v + 0.05 for k, v in unet.state_dict().items()}, assign=True)


def by_another_layer(unet):
    for own in modules_of(unet):
        own.to_v = nn.Linear(8, 8, bias=False).double().requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "used"),
    [
        (by_in_place, True),
        (by_an_optimizer, True),
        (behind_its_back, True),
        (by_loading, True),
        (by_new_data, False),
        (by_assigning, False),
        (by_another_layer, False),
    ],
)
@torch.no_grad()
def test_weights_that_change_after_fusing_count(change, used):
    unet = condition_unet()
    attention.fuse(unet)
    plain = call_unet(unet)
    torch.manual_seed(0)
    change(unet)
    assert (call_unet(unet) - plain).abs().max() > 1e-4
    assert_right(unet, used)


@torch.no_grad()
def test_biases_that_change_after_fusing_count():
    attn = module("bias", cross_attention_dim=None).requires_grad_(False)
    x = tokens(2, QUERIES, WIDTH)
    attention.fuse(attn)
    for change in (lambda: attn.to_v.bias.add_(1.0), lambda: setattr(attn.to_q.bias, "data", attn.to_q.bias + 1)):
        change()
        stock = copy.deepcopy(attn)
        attention.unfuse(stock)
        torch.testing.assert_close(attn(x), stock(x))
    assert attention.fused_projection(attn) is None


def lora(targets: list[str]) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=targets)


@torch.no_grad()
def test_a_lora_that_comes_after_fusing_counts_and_so_it_does_merged():
    unet = condition_unet()
    plain = call_unet(unet)
    attention.fuse(unet)
    torch.manual_seed(0)
    unet.add_adapter(lora(["to_k", "to_v"]))
    unet.double()
    with_lora = call_unet(unet)
    assert (with_lora - plain).abs().max() > 1e-3
    assert fused_modules(unet) == []
    assert_right(unet, used=False)
    unet.disable_adapters()
    torch.testing.assert_close(call_unet(unet), plain)
    unet.enable_adapters()
    unet.fuse_lora()
    torch.testing.assert_close(call_unet(unet), with_lora)
    unet.unload_lora()
    torch.testing.assert_close(call_unet(unet), with_lora)
    assert_right(unet)
    attention.unfuse(unet)
    torch.testing.assert_close(call_unet(unet), with_lora)


@torch.no_grad()
def test_a_lora_that_is_there_before_keeps_its_modules_separate():
    unet = condition_unet()
    torch.manual_seed(0)
    unet.add_adapter(lora(["attn2.to_k"]))
    unet.double()
    plain = call_unet(unet)
    left = attention.fuse(unet)
    assert set(left) == {name for name, _ in unet.named_modules() if name.endswith("attn2")}
    assert len(left) == 4
    for name, reason in left.items():
        assert reason == "its projections are peft's Linear, not torch's Linear; fuse a LoRA into the weights first"
        assert isinstance(unet.get_submodule(name).to_k, LoraLayer)
    assert len(fused_modules(unet)) == 4
    torch.testing.assert_close(call_unet(unet), plain, rtol=0, atol=1e-12)
    attention.unfuse(unet)
    assert torch.equal(call_unet(unet), plain)


@torch.no_grad()
def test_unfuse_is_the_network_as_it_was():
    unet = tiny.condition_unet().eval()
    plain, names = call_unet(unet), [name for name, _ in unet.named_buffers()]
    attention.fuse(unet)
    assert [name for name, _ in unet.named_buffers()] != names
    attention.unfuse(unet)
    assert [name for name, _ in unet.named_buffers()] == names
    assert torch.equal(call_unet(unet), plain)
    for own in modules_of(unet):
        assert own.to_k.weight.untyped_storage().nbytes() == own.to_k.weight.nbytes


@torch.no_grad()
def test_moves_after_fusing_keep_working():
    unet = tiny.condition_unet().eval()
    attention.fuse(unet)
    exact = condition_unet()
    unet.double()
    torch.testing.assert_close(call_unet(unet), call_unet(exact), rtol=0, atol=1e-6)
    assert_right(unet)
    for own in modules_of(unet):  # and what comes then is not lost either
        own.to_k.weight.data += 0.3
    assert_right(unet)
    assert call_unet(unet.bfloat16()).dtype == torch.bfloat16
    unet.to(memory_format=torch.channels_last).float()
    assert torch.isfinite(call_unet(unet)).all()


@torch.no_grad()
def test_a_copy_of_a_fused_network_is_on_its_own():
    unet = condition_unet()
    attention.fuse(unet)
    plain, other = call_unet(unet), copy.deepcopy(unet)
    by_in_place(other)
    assert torch.equal(call_unet(unet), plain)
    assert_right(other)
    attention.unfuse(other)
    assert len(fused_modules(unet)) == 8


def test_a_fused_network_that_trains_gets_its_gradients():
    unet, reference = condition_unet().requires_grad_(True), condition_unet().requires_grad_(True)
    attention.fuse(unet)
    for own in (unet, reference):
        call_unet(own).square().mean().backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(unet.get_parameter(name).grad, parameter.grad, msg=name)


@torch.no_grad()
def test_compiled_code_sees_a_lora_that_comes_later():
    attn = module("bias").requires_grad_(False)
    x, text = tokens(2, QUERIES, WIDTH), tokens(2, 6, seed=1)
    holder = nn.ModuleDict({"attn": attn})
    attention.fuse(holder)
    plain = attn(x, text)
    attn.compile(backend="eager")
    torch.testing.assert_close(attn(x, text), plain)
    with torch.no_grad():
        attn.to_v.weight.data += 0.1  # as a LoRA is merged
    merged = copy.deepcopy(holder)
    attention.unfuse(merged)
    torch.testing.assert_close(attn(x, text), merged["attn"]._call_impl(x, text))
    from peft import inject_adapter_in_model

    torch.manual_seed(0)
    inject_adapter_in_model(lora(["to_k"]), holder)
    holder.double()
    compiled = attn(x, text)
    assert (compiled - merged["attn"]._call_impl(x, text)).abs().max() > 1e-3
    torch.testing.assert_close(compiled, attn._call_impl(x, text))
