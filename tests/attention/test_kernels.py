"""Kernels, for one network alone, and their choice."""

from __future__ import annotations

import copy
import itertools

import pytest
import tiny
import torch
from attending import call_unet, condition_unet, tokens
from diffusers import UNet2DConditionModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention

from stepdistill.attention import choice, kernels
from stepdistill.attention.choice import choose_fastest, require_backend
from stepdistill.attention.kernels import BACKENDS, FASTEST_OF, NATIVE
from stepdistill.attention.modules import find_attention, fuse, head_width, install, release, set_backend, unfuse
from stepdistill.attention.processor import AttentionProcessor
from stepdistill.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

# -- kernels ---------------------------------------------------------------------------------------------------

HERE = ("native", "_native_math", "_native_flash", "flex")


def test_kernels_that_run_on_a_cpu():
    runs = {name for name in BACKENDS if kernels.try_backend(name, "cpu", head_dim=4) is None}
    assert runs >= {"native", "_native_math", "_native_flash"}
    assert runs <= set(HERE)
    for name in set(BACKENDS) - runs:
        reason = kernels.try_backend(name, "cpu")
        assert "\n" not in reason, name
        assert 0 < len(reason) <= 160


def test_a_kernel_without_backward_is_refused_for_training_alone():
    if kernels.try_backend("flex", "cpu") is not None:
        pytest.skip("flex does not run here at all")
    assert "backward" in kernels.try_backend("flex", "cpu", gradients=True)
    assert kernels.try_backend("_native_math", "cpu", gradients=True) is None


@pytest.mark.parametrize("backend", HERE)
def test_every_kernel_gives_the_same_within_rounding(backend, counted):
    unet = tiny.condition_unet().eval().requires_grad_(False)
    assert head_width(next(find_attention(unet))) == 4
    if kernels.try_backend(backend, "cpu", head_dim=4) is not None:
        pytest.skip(f"{backend} does not run here")
    plain = call_unet(unet)
    counted.clear()
    assert set_backend(unet, backend) == {}
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
    set_backend(unet, NATIVE)
    install(unet, "negative")
    exact = call_unet(unet, steer)
    assert set_backend(unet, backend) == {}
    counted.clear()
    torch.testing.assert_close(call_unet(unet, steer), exact, rtol=0, atol=1e-11)
    return dict(counted)


def test_a_kernel_that_takes_no_mask_leaves_masked_attention_to_native(counted):
    """_native_flash: four self-attentions by it, four masked cross-attentions by SDPA."""
    assert "not supported" in kernels.try_backend("_native_flash", "cpu", head_dim=4, masked=True)
    assert masks_of(condition_unet(), "_native_flash", counted) == {"_native_flash": [False] * 4}
    called = masks_of(condition_unet(), "_native_math", counted)
    assert sorted(called["_native_math"]) == [False] * 4 + [True] * 4


@pytest.mark.parametrize(
    ("takes", "message"),
    [
        ("boolean", "must be of type bool"),  # the varlen kernels: the masks of a call are added ones
        ("nothing", "off by"),  # one that would silently compute without it
    ],
)
def test_masks_are_tried_as_a_call_has_them(takes, message, counted, monkeypatch):
    name = AttentionBackendName("_native_math")
    original = _AttentionBackendRegistry._backends[name]

    def kernel(*, attn_mask=None, **arguments):
        if takes == "boolean" and attn_mask is not None and attn_mask.dtype != torch.bool:
            raise ValueError(f"Attention mask must be of type bool, got {attn_mask.dtype}.")
        return original(attn_mask=attn_mask if takes == "boolean" else None, **arguments)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, kernel)
    assert kernels.try_backend("_native_math", "cpu") is None
    assert message in kernels.try_backend("_native_math", "cpu", masked=True)
    assert masks_of(condition_unet(), "_native_math", counted) == {"_native_math": [False] * 4}


def test_a_wrong_result_is_a_reason(monkeypatch):
    name = AttentionBackendName("_native_math")
    original = _AttentionBackendRegistry._backends[name]
    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, lambda **arguments: original(**arguments) + 0.2)
    assert kernels.try_backend("_native_math", "cpu") == "its result is off by 0.2"
    monkeypatch.setitem(
        _AttentionBackendRegistry._backends, name, lambda **arguments: original(**arguments) * float("nan")
    )
    assert kernels.try_backend("_native_math", "cpu") == "its result is off by nan"


def test_one_networks_kernel_is_no_others(counted):
    """A teacher beside its student: processors, outputs and calls stay its own."""
    student, teacher = condition_unet(), condition_unet()
    plain = call_unet(teacher)
    set_backend(student, "_native_math")
    counted.clear()
    assert torch.equal(call_unet(teacher), plain)
    assert counted == {}
    assert {type(attn.processor) for attn in find_attention(teacher)} == {AttnProcessor2_0}
    with attention_backend("_native_flash"):  # and a process-wide choice is not theirs
        call_unet(student)
        assert set(counted) == {"_native_math"}
        set_backend(student, NATIVE)
        install(student, "negative")
        counted.clear()
        call_unet(student)
        assert counted == {}


@pytest.mark.parametrize("order", list(itertools.permutations(["backend", "fused", "negative"])))
def test_stock_processors_come_back_when_the_last_user_leaves(order):
    unet = condition_unet()
    before, plain = unet.attn_processors, call_unet(unet)
    leave = {
        "backend": lambda: set_backend(unet, NATIVE),
        "fused": lambda: unfuse(unet),
        "negative": lambda: release(unet, "negative"),
    }
    set_backend(unet, "_native_math")
    fuse(unet)
    install(unet, "negative")
    for user in order:
        assert {type(attn.processor) for attn in find_attention(unet)} == {AttentionProcessor}
        torch.testing.assert_close(call_unet(unet), plain, rtol=0, atol=1e-12)
        leave[user]()
    after = unet.attn_processors
    assert all(after[name] is processor for name, processor in before.items())
    assert torch.equal(call_unet(unet), plain)


def test_leaving_twice_or_without_having_come_is_nothing():
    unet = condition_unet()
    release(unet, "negative")
    set_backend(unet, NATIVE)
    unfuse(unet)
    assert {type(attn.processor) for attn in find_attention(unet)} == {AttnProcessor2_0}
    install(unet, "negative")
    release(unet, "somebody else")
    assert {type(attn.processor) for attn in find_attention(unet)} == {AttentionProcessor}


def test_a_copy_keeps_its_kernel_and_is_on_its_own(counted):
    unet = condition_unet()
    set_backend(unet, "_native_math")
    other = copy.deepcopy(unet)
    set_backend(unet, NATIVE)
    assert {type(attn.processor) for attn in find_attention(unet)} == {AttnProcessor2_0}
    counted.clear()
    call_unet(other)
    assert counted == {"_native_math": [False] * 8}
    set_backend(other, NATIVE)
    assert {type(attn.processor) for attn in find_attention(other)} == {AttnProcessor2_0}


def flux_attention() -> FluxAttention:
    torch.manual_seed(0)
    return FluxAttention(query_dim=8, heads=2, dim_head=4, added_kv_proj_dim=8, context_pre_only=False).eval()


def test_newer_modules_get_their_own_processors_field(counted):
    flux = flux_attention()
    x, text = torch.randn(1, 3, 8), torch.randn(1, 2, 8)
    plain = flux(x, text)[0]
    processor = flux.processor
    assert set_backend(flux, "_native_math") == {}
    counted.clear()
    torch.testing.assert_close(flux(x, text)[0], plain)
    assert flux.processor is processor
    assert counted == {"_native_math": [False]}
    with attention_backend("_native_math"):  # native is native, not what the process has for a default
        set_backend(flux, NATIVE)
        counted.clear()
        assert torch.equal(flux(x, text)[0], plain)
        assert counted == {"native": [False]}


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("flush", "train.attention = flush: use auto, or one of diffusers' backends: _flash_3, "),
        ("flash", "train.attention = flash: it does not run on this cpu (Flash Attention backend 'flash' is not "),
        ("flex", "train.attention = flex: it does not run on this cpu (FlexAttention does not support backward on CPU"),
    ],
)
def test_requires_error_is_one_line(backend, message):
    with pytest.raises(UserError) as caught:
        require_backend(backend, "train.attention", "cpu", torch.float32, gradients=True)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_require_tries_what_is_named_and_never_auto_or_native(monkeypatch):
    tried, original = [], kernels.try_backend
    monkeypatch.setattr(
        kernels,
        "try_backend",
        lambda name, *arguments, **more: tried.append(name) or original(name, *arguments, **more),
    )
    for backend in ("auto", "native", "_native_math", "_native_flash"):
        require_backend(backend, "attention", torch.device("cpu"), torch.float32, True, [condition_unet()])
    assert set(tried) == {"_native_math", "_native_flash"}
    monkeypatch.setattr(kernels, "try_backend", lambda *arguments, **more: "nothing runs")
    with pytest.raises(UserError, match="nothing runs"):
        require_backend("_native_math", "attention", "cpu", torch.float32, True)


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
    original = kernels.try_backend
    monkeypatch.setattr(
        kernels,
        "try_backend",
        lambda name, device, dtype, head_dim=64, gradients=False: (
            original("_native_math", device, dtype, head_dim, gradients)
            if name == "_native_math" or head_dim < 16
            else "too wide"
        ),
    )
    call = (backend, "attention", "cpu", torch.float32, True, [tiny.condition_unet(), heads_unet()])
    if reason is None:
        require_backend(*call)
    else:
        with pytest.raises(UserError, match=rf"attention = {backend}: .* \({reason}\); use auto"):
            require_backend(*call)
        require_backend(*call[:-1], [tiny.condition_unet()])


def test_fastest_on_a_cpu_is_native_untried(monkeypatch):
    monkeypatch.setattr(choice, "time_backend", lambda *arguments: pytest.fail("timed"))
    name, reasons = choose_fastest(condition_unet(), torch.device("cpu"), torch.float32)
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
        kernels, "try_backend", lambda name, *arguments: None if times.get(name) is not None else "is not there"
    )
    monkeypatch.setattr(choice, "time_backend", lambda name, *arguments: times[name])
    name, reasons = choose_fastest(tiny.condition_unet(), torch.device("cuda"), torch.bfloat16, gradients=True)
    assert name == expected
    assert reasons.keys() == {"native", *FASTEST_OF} - {expected}
    assert reasons["xformers"] == "is not there"
    if expected != "native":
        assert reasons["native"] == f"{times['native'] / times[expected]:.2f} x the time"


def test_fastest_is_one_that_every_head_can_use_timed_on_the_widest(monkeypatch):
    """_native_cudnn is quickest but stops below heads of 16; the widest is 8 heads' worth of channels, not of heads."""
    tried, timed = [], set()

    def why_not(name, device, dtype, head_dim, gradients):
        tried.append((name, head_dim, gradients))
        return "too wide" if name == "_native_cudnn" and head_dim == 16 else None

    monkeypatch.setattr(kernels, "try_backend", why_not)
    monkeypatch.setattr(
        choice, "time_backend", lambda name, device, dtype, heads, dim: timed.add((heads, dim)) or FAKE.get(name, 3.0)
    )
    name, reasons = choose_fastest(heads_unet(), torch.device("cuda"), torch.bfloat16, gradients=True)
    assert name == "native"
    assert reasons["_native_cudnn"] == "heads of 16: too wide"
    assert {head_dim for _, head_dim, _ in tried} == {4, 16}
    assert all(gradients for *_, gradients in tried)
    assert timed == {(1, 16)}
