"""The processor: NASA against its formula, and bit for bit the stock one where nothing is asked of it."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F
from attending import (
    CASES,
    F64,
    HEADS,
    KINDS,
    NEGATIVE_SEEN,
    QUERIES,
    SEEN,
    WIDTH,
    added,
    before_output,
    call_unet,
    condition_unet,
    module,
    output_of,
    seeded,
    steerable,
    tokens,
)
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from stepdistill.attention.modules import find_attention, install, release
from stepdistill.attention.processor import AttentionProcessor

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

# -- NASA ------------------------------------------------------------------------------------------------------


# a masked token still counts in a group norm over all tokens, in stock diffusers too
FORMULAS = [(k, c) for k in KINDS for c, (*_, a, b) in CASES.items() if "group" not in k or a is None is b]


@pytest.mark.parametrize("scale", [0.7, "per_sample"])
@pytest.mark.parametrize(("kind", "case"), FORMULAS)
def test_output_is_the_formula_written_out(kind, case, scale):
    length, negative_length, seen, negative_seen = CASES[case]
    attn = steerable(kind)
    x, text, negative = tokens(2, QUERIES, WIDTH), tokens(2, length, seed=1), tokens(2, negative_length, seed=2)
    negative_scale = torch.tensor([0.3, 1.4], dtype=F64) if scale == "per_sample" else scale
    got = attn(
        x,
        text,
        None if seen is None else added(seen),
        negative_hidden_states=negative,
        negative_mask=negative_seen,
        negative_scale=negative_scale,
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
    install(attn, "test")
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
    inputs = []
    attn.to_out[0].register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    return inputs


@pytest.mark.parametrize("scale", [0.25, 1.0, 1.5])
def test_equal_prompts_scale_the_branch_by_one_less_a(scale):
    """No (1 + a) compensation, and an output whose bias counts once: to_out((1 - a) Z)."""
    attn = steerable("bias")
    x, text = tokens(2, QUERIES, WIDTH), tokens(2, 6, seed=1)
    inputs = keep_inputs(attn)
    attn(x, text)
    got = attn(x, text, negative_hidden_states=text, negative_scale=scale)
    plain, steered = inputs
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
        rows = slice(i, i + 1)
        alone = attn(x[rows], text[rows], negative_hidden_states=negative[rows], negative_scale=scale)
        torch.testing.assert_close(got[rows], alone, rtol=0, atol=1e-12)
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
    install(attn, "test")
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


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("length", [6, 3])
def test_through_a_whole_unet(length, mask):
    """Every cross-attention of UNet2DConditionModel, and no self-attention, as the pipeline's arguments ask it."""
    unet, reference = condition_unet(), condition_unet()
    plain = call_unet(unet, mask=mask)
    assert install(unet, "negative") == {}
    steer = {"negative_hidden_states": tokens(2, length, 8, seed=5), "negative_scale": 0.8}
    assert torch.equal(call_unet(unet, {**steer, "negative_scale": 0.0}, mask), plain)
    crossed = 0
    for name, attn in reference.named_modules():
        if name.endswith("attn2"):
            attn.set_processor(ByHand())
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
    assert install(network, "test") == {}
    assert [type(attn.processor) for attn in find_attention(network)] == [AttentionProcessor] * modules
    assert torch.equal(call(network), stock)
    release(network, "test")
    assert [type(attn.processor) for attn in find_attention(network)] == [AttnProcessor2_0] * modules
    assert torch.equal(call(network), stock)


def test_spatial_norm_and_pictures_with_their_residual():
    """The oldest form: (B, C, h, w) in and out, a spatial norm that is told ``temb``."""
    attn = module("residual", query_dim=32, cross_attention_dim=None, spatial_norm_dim=4, norm_num_groups=4)
    x = torch.randn(2, 32, 3, 2, generator=seeded(1), dtype=F64)
    temb = torch.randn(2, 4, 3, 2, generator=seeded(2), dtype=F64)
    stock = attn(x, temb=temb)
    install(attn, "test")
    assert torch.equal(attn(x, temb=temb), stock)
    assert stock.shape == x.shape


def test_dropout_is_kept():
    attn = module("bias", dropout=0.5).train()
    x, text = tokens(2, QUERIES, WIDTH), tokens(2, 6, seed=1)
    torch.manual_seed(0)
    stock = attn(x, text)
    install(attn, "test")
    torch.manual_seed(0)
    assert torch.equal(attn(x, text), stock)


def test_foreign_processors_are_left_alone_and_named():
    unet = tiny.condition_unet()
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(AttnProcessor())
    skipped = install(unet, "test")
    assert skipped == {"mid_block.attentions.0.transformer_blocks.0.attn2": "has a AttnProcessor already"}
    assert type(unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor) is AttnProcessor
    release(unet, "test")
    assert {type(attn.processor) for attn in find_attention(unet)} == {AttnProcessor, AttnProcessor2_0}
