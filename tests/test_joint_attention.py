"""NASA in joint attention (SD3, Flux) against its formula and the stock processors."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor

from stepdistill.joint_attention import JointNegativeProcessor, joint_negative_attention

F64 = torch.float64
IMAGE, TEXT, WIDTH, HEADS, HEAD_DIM = 5, 4, 12, 3, 4
EXACT = {"sd3": 1e-11, "sd3_normed": 1e-5, "sd3_last": 1e-11, "flux": 1e-5}
"""diffusers' RMSNorm squares, and its rotary embedding turns, in float32."""


def random_parameters(made: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64) * 0.6)
    return made.double().eval()


def module(kind: str) -> torch.nn.Module:
    sizes = {"query_dim": WIDTH, "heads": HEADS, "dim_head": HEAD_DIM, "added_kv_proj_dim": WIDTH, "bias": True}
    if kind == "flux":
        return random_parameters(FluxAttention(**sizes, context_pre_only=False))
    norm = {"qk_norm": "rms_norm", "eps": 1e-6} if kind == "sd3_normed" else {}
    last = kind == "sd3_last"
    return random_parameters(
        Attention(**sizes, **norm, cross_attention_dim=None, context_pre_only=last, processor=JointAttnProcessor2_0())
    )


def tokens(length: int, seed: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=F64)


def angles(length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Flux's cos and sin (S, D), each angle for two neighbouring channels."""
    own = torch.randn(length, HEAD_DIM // 2, generator=torch.Generator().manual_seed(seed)).repeat_interleave(2, 1)
    return own.cos(), own.sin()


def rotary(kind: str, negative_length: int) -> dict:
    """Angles of text and image, text first; the negative text's first ones are others."""
    if kind != "flux":
        return {}
    return {
        "image_rotary_emb": angles(TEXT + IMAGE, 7),
        "negative_rotary_emb": angles(negative_length + IMAGE, 8),
    }


def stock(attn: torch.nn.Module, x, text, emb=None):
    """The stock processor's output (image, text)."""
    flux = isinstance(attn, FluxAttention)
    attn.set_processor(FluxAttnProcessor() if flux else JointAttnProcessor2_0())
    return attn(x, encoder_hidden_states=text, **({"image_rotary_emb": emb} if emb is not None else {}))


def steered(attn: torch.nn.Module, x, text, negative, scale, **more):
    attn.set_processor(JointNegativeProcessor())
    return attn(x, encoder_hidden_states=text, negative_hidden_states=negative, negative_scale=scale, **more)


def turned(x: torch.Tensor, emb: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """Each pair of channels (L, D) as a complex number, turned by its angle."""
    if emb is None:
        return x
    cos, sin = (part[:, ::2].double() for part in emb)
    real, imaginary = x[:, ::2], x[:, 1::2]
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(1)


def normed(x: torch.Tensor, own: torch.nn.Module | None) -> torch.Tensor:
    return x if own is None else x / (x.square().mean(-1, keepdim=True) + (own.eps or 0)).sqrt() * own.weight


def linear(x: torch.Tensor, own: torch.nn.Linear) -> torch.Tensor:
    return x @ own.weight.T + own.bias


def image_rows(attn, x, text, negative, scale, emb=None, negative_emb=None) -> torch.Tensor:
    """The module's formula of one sample, before the output projection, head by head with explicit softmaxes."""
    rows = []
    for head in range(HEADS):
        own = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)

        def part(given, projection, norm=None, angle=None, own=own):
            return turned(normed(linear(given, getattr(attn, projection))[:, own], norm), angle)

        of_image = None if emb is None else [e[TEXT:] for e in emb]
        query = part(x, "to_q", attn.norm_q, of_image)
        key = part(x, "to_k", attn.norm_k, of_image)
        value = linear(x, attn.to_v)[:, own]

        def weights(side, angle, query=query, key=key, part=part):
            keys = torch.cat([key, part(side, "add_k_proj", attn.norm_added_k, angle)])
            scores = (query @ keys.T / HEAD_DIM**0.5).exp()
            return scores / scores.sum(-1, keepdim=True)

        angle = None if emb is None else [e[:TEXT] for e in emb]
        away_angle = None if negative_emb is None else [e[: len(negative)] for e in negative_emb]
        plus = weights(text, angle) @ torch.cat([value, linear(text, attn.add_v_proj)[:, own]])
        minus = weights(negative, away_angle)[:, len(x) :] @ linear(negative, attn.add_v_proj)[:, own]
        rows.append(plus - scale * minus)
    return torch.cat(rows, -1)


KINDS = list(EXACT)
LENGTHS = [TEXT, 2, 7]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_scale_zero_is_the_stock_joint_processor(kind, length):
    attn, x, text, negative = module(kind), tokens(IMAGE, 1), tokens(TEXT, 2), tokens(length, 3)
    more = rotary(kind, length)
    for scale in (0.0, torch.zeros(2)):
        image, own_text, _ = steered(attn, x, text, negative, scale, **more)
        expected = stock(attn, x, text, more.get("image_rotary_emb"))
        torch.testing.assert_close(image, expected[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(own_text, expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_image_rows_are_the_formula_written_out(kind, length):
    attn, x, text, negative = module(kind), tokens(IMAGE, 1), tokens(TEXT, 2), tokens(length, 3)
    more = rotary(kind, length)
    kept = []
    attn.to_out[0].register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    scales = torch.tensor([0.4, 1.3], dtype=F64)
    got = steered(attn, x, text, negative, scales, **more)[0]
    emb = more.get("image_rotary_emb"), more.get("negative_rotary_emb")
    expected = torch.stack([image_rows(attn, x[i], text[i], negative[i], scales[i], *emb) for i in range(2)])
    torch.testing.assert_close(kept[0], expected, rtol=0, atol=EXACT[kind])
    torch.testing.assert_close(got, linear(kept[0], attn.to_out[0]), rtol=0, atol=1e-12)  # the bias counts once
    plain = torch.stack([image_rows(attn, x[i], text[i], negative[i], 0, *emb) for i in range(2)])
    assert (expected - plain).abs().max() > 0.05


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_texts_rows_are_those_of_a_stock_call_with_it(kind, length):
    """Neither text knows the other or the scale."""
    attn, x, text, negative = module(kind), tokens(IMAGE, 1), tokens(TEXT, 2), tokens(length, 3)
    more = rotary(kind, length)
    if kind == "flux":  # a stock call has one set of angles for its image, so both texts share the image's
        cos_sin = zip(more["image_rotary_emb"], more["negative_rotary_emb"], strict=True)
        more["negative_rotary_emb"] = [torch.cat([away[:length], own[TEXT:]]) for own, away in cos_sin]
    _, own_text, negative_text = steered(attn, x, text, negative, 0.9, **more)
    plain = stock(attn, x, text, more.get("image_rotary_emb"))[1]
    away = stock(attn, x, negative, more.get("negative_rotary_emb"))[1]
    torch.testing.assert_close(own_text, plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(negative_text, away, rtol=0, atol=1e-12)
    assert negative_text.shape == negative.shape


@pytest.mark.parametrize("scale", [0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_prompts_scale_the_texts_share_alone(kind, scale):
    """Image share + (1 - a) text share: with a = 1 nothing of the text is left, and the image's share is whole."""
    attn, x, text = module(kind), tokens(IMAGE, 1), tokens(TEXT, 2)
    more = {} if kind != "flux" else {"image_rotary_emb": angles(TEXT + IMAGE, 7)}
    kept = []
    attn.to_out[0].register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    stock(attn, x, text, more.get("image_rotary_emb"))
    added = attn.add_v_proj
    held = added.weight.detach().clone(), added.bias.detach().clone()
    with torch.no_grad():  # without the text's values, its share is nothing and its share of the weights stays
        added.weight.zero_()
        added.bias.zero_()
        stock(attn, x, text, more.get("image_rotary_emb"))
        added.weight.copy_(held[0])
        added.bias.copy_(held[1])
    steered(attn, x, text, text, scale, **more)
    whole, image_share, got = kept
    torch.testing.assert_close(got, image_share + (1 - scale) * (whole - image_share), rtol=0, atol=1e-12)
    assert (whole - image_share).abs().max() > 0.1


def test_the_last_block_keeps_its_text_rows_unprojected():
    attn, x, text, negative = module("sd3_last"), tokens(IMAGE, 1), tokens(TEXT, 2), tokens(2, 3)
    assert attn.to_add_out is None
    _, own_text, negative_text = steered(attn, x, text, negative, 0.5)
    assert own_text.shape == (2, TEXT, WIDTH)
    assert negative_text.shape == (2, 2, WIDTH)


def test_scale_of_each_sample_is_that_samples_own():
    attn, x, text, negative = module("flux"), tokens(IMAGE, 1), tokens(TEXT, 2), tokens(TEXT, 3)
    more = {"image_rotary_emb": angles(TEXT + IMAGE, 7)}
    both = steered(attn, x, text, negative, torch.tensor([0.2, 0.9], dtype=F64), **more)
    for i, scale in enumerate([0.2, 0.9]):
        own = slice(i, i + 1)
        for got, alone in zip(both, steered(attn, x[own], text[own], negative[own], scale, **more), strict=True):
            torch.testing.assert_close(got[own], alone, rtol=0, atol=1e-12)


def test_angles_of_the_negative_text_are_the_first_ones_by_default():
    attn, x, text, negative = module("flux"), tokens(IMAGE, 1), tokens(TEXT, 2), tokens(2, 3)
    emb = angles(TEXT + IMAGE, 7)
    default = steered(attn, x, text, negative, 0.5, image_rotary_emb=emb)
    said = steered(attn, x, text, negative, 0.5, image_rotary_emb=emb, negative_rotary_emb=emb)
    for a, b in zip(default, said, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_mask_is_refused(kind):
    attn = module(kind)
    with pytest.raises(ValueError, match="takes no mask"):
        steered(attn, tokens(IMAGE, 1), tokens(TEXT, 2), tokens(2, 3), 0.5, attention_mask=torch.ones(2, TEXT))


def test_gradients_reach_negative_and_weights():
    attn, x, text = module("sd3_normed"), tokens(IMAGE, 1), tokens(TEXT, 2)
    negative, scale = tokens(2, 3).requires_grad_(), torch.tensor([0.4, 1.1], dtype=F64, requires_grad=True)
    image, _, _ = steered(attn, x, text, negative, scale)
    image.square().sum().backward()
    for value in (negative, scale, attn.add_k_proj.weight, attn.add_v_proj.weight, attn.to_q.weight):
        assert value.grad.abs().sum() > 0


def test_a_kernel_can_be_named(monkeypatch):
    """Both branches of the image's rows are one call of it, the negative text's rows another."""
    name, calls = AttentionBackendName("_native_math"), []
    own = _AttentionBackendRegistry._backends[name]

    def run(**given):
        calls.append((tuple(given["query"].shape), given["attn_mask"] is not None))
        return own(**given)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, run)
    generator = torch.Generator().manual_seed(0)

    def rows(length):
        return tuple(torch.randn(2, HEADS, length, HEAD_DIM, generator=generator, dtype=F64) for _ in range(3))

    image, text, negative = rows(IMAGE), rows(TEXT), rows(6)
    plain = joint_negative_attention(image, text, negative, 0.5)
    assert calls == []
    named = joint_negative_attention(image, text, negative, 0.5, "_native_math")
    assert calls == [((4, IMAGE + 6, HEADS, HEAD_DIM), True), ((2, 6, HEADS, HEAD_DIM), False)]
    for a, b in zip(plain, named, strict=True):
        torch.testing.assert_close(a, b)
