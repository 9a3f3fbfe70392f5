"""Fused projections: the same numbers, whatever happens to the weights later."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from attending import HEAD_DIM, HEADS, QUERIES, SEEN, WIDTH, added, call_unet, condition_unet, module, tokens
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from stepdistill.attention.fused import fused_projection
from stepdistill.attention.modules import find_attention, fuse, install, set_backend, unfuse

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

# -- fused projections -----------------------------------------------------------------------------------------


def fused_modules(unet) -> list[str]:
    return [name for name, attn in unet.named_modules() if fused_projection(attn) is not None]


def assert_right(unet, used: bool | None = None) -> None:
    """What ``unet`` gives is what a stock network of its weights gives; ``used``: through all fused products, or none.

    LoRA layers count with what they are.
    """
    stock = copy.deepcopy(unet)
    unfuse(stock)
    assert {type(attn.processor) for attn in find_attention(stock)} == {AttnProcessor2_0}
    separate = []
    hooks = [attn.to_v.register_forward_hook(lambda *arguments: separate.append(1)) for attn in find_attention(unet)]
    with torch.no_grad():
        torch.testing.assert_close(call_unet(unet), call_unet(stock), rtol=0, atol=1e-11)
    for hook in hooks:
        hook.remove()
    if used is not None:
        assert len(separate) == (0 if used else 8)


def test_fused_is_the_same_within_rounding_and_saves_no_weight_twice():
    unet = condition_unet()
    plain = call_unet(unet)
    assert fuse(unet) == {}
    assert len(fused_modules(unet)) == 8
    torch.testing.assert_close(call_unet(unet), plain, rtol=0, atol=1e-12)
    assert_right(unet, used=True)
    for attn in find_attention(unet):
        assert attn.to_k.weight.untyped_storage().data_ptr() == attn._fused_weight.untyped_storage().data_ptr()
        rows = 2 if attn.is_cross_attention else 3
        assert attn._fused_weight.shape == (rows * 8, 8)
    text = {"encoder_hidden_states": tokens(2, 6, 8, seed=6)}
    assert (call_unet(unet, **text) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["bias", "layer_norms", "residual"])
def test_fused_with_biases_and_norms(kind):
    attn = module(kind).requires_grad_(False)
    x, text, negative = tokens(2, QUERIES, WIDTH), tokens(2, 6, seed=1), tokens(2, 4, seed=2)
    plain = attn(x, text, added(SEEN))
    install(attn, "negative")
    steered = attn(x, text, negative_hidden_states=negative, negative_scale=0.5)
    fuse(attn)
    assert fused_projection(attn)[1].shape == (2 * HEADS * HEAD_DIM,)
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
        fuse(attn)
        assert fused_projection(attn) is not None
        assert torch.equal(attn(*call), plain)


def test_saving_a_fused_network_writes_the_stock_one(tmp_path):
    unet = tiny.condition_unet().eval()
    keys, weights = list(unet.state_dict()), {k: v.clone() for k, v in unet.state_dict().items()}
    with torch.no_grad():
        plain = call_unet(unet)
        fuse(unet)
        set_backend(unet, "_native_math")
        assert list(unet.state_dict()) == keys
        assert all(torch.equal(unet.state_dict()[k], v) for k, v in weights.items())
        unet.save_pretrained(tmp_path)
        read = UNet2DConditionModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
        assert list(read.state_dict()) == keys
        assert {type(attn.processor) for attn in find_attention(read)} == {AttnProcessor2_0}
        assert torch.equal(call_unet(read.eval()), plain)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size < 1.1 * sum(v.nbytes for v in weights.values()) + 50_000


def by_in_place(unet):
    for attn in find_attention(unet):
        attn.to_v.weight.add_(0.3)


def by_an_optimizer(unet):
    parameters = [p for attn in find_attention(unet) for p in attn.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True).grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, 0.1).step()
    unet.requires_grad_(False)


def by_new_data(unet):
    for attn in find_attention(unet):
        attn.to_k.weight.data = attn.to_k.weight.data + 0.3


def behind_its_back(unet):
    """As peft merges a LoRA: no version is counted, no address changes."""
    for attn in find_attention(unet):
        attn.to_k.weight.data += 0.3


def by_loading(unet):
    unet.load_state_dict({k: v + 0.05 for k, v in unet.state_dict().items()})


def by_assigning(unet):
    unet.load_state_dict({k: v + 0.05 for k, v in unet.state_dict().items()}, assign=True)


def by_another_layer(unet):
    for attn in find_attention(unet):
        attn.to_v = nn.Linear(8, 8, bias=False).double().requires_grad_(False)


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
    fuse(unet)
    plain = call_unet(unet)
    torch.manual_seed(0)
    change(unet)
    assert (call_unet(unet) - plain).abs().max() > 1e-4
    assert_right(unet, used)


@torch.no_grad()
def test_biases_that_change_after_fusing_count():
    attn = module("bias", cross_attention_dim=None).requires_grad_(False)
    x = tokens(2, QUERIES, WIDTH)
    fuse(attn)
    for change in (lambda: attn.to_v.bias.add_(1.0), lambda: setattr(attn.to_q.bias, "data", attn.to_q.bias + 1)):
        change()
        stock = copy.deepcopy(attn)
        unfuse(stock)
        torch.testing.assert_close(attn(x), stock(x))
    assert fused_projection(attn) is None


def lora(targets: list[str]) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=targets)


@torch.no_grad()
def test_a_lora_that_comes_after_fusing_counts_and_so_it_does_merged():
    unet = condition_unet()
    plain = call_unet(unet)
    fuse(unet)
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
    unfuse(unet)
    torch.testing.assert_close(call_unet(unet), with_lora)


@torch.no_grad()
def test_a_lora_that_is_there_before_keeps_its_modules_separate():
    unet = condition_unet()
    torch.manual_seed(0)
    unet.add_adapter(lora(["attn2.to_k"]))
    unet.double()
    plain = call_unet(unet)
    left = fuse(unet)
    assert set(left) == {name for name, _ in unet.named_modules() if name.endswith("attn2")}
    assert len(left) == 4
    for name, reason in left.items():
        assert reason == "its projections are peft's Linear, not torch's Linear; fuse a LoRA into the weights first"
        assert isinstance(unet.get_submodule(name).to_k, LoraLayer)
    assert len(fused_modules(unet)) == 4
    torch.testing.assert_close(call_unet(unet), plain, rtol=0, atol=1e-12)
    unfuse(unet)
    assert torch.equal(call_unet(unet), plain)


@torch.no_grad()
def test_unfuse_is_the_network_as_it_was():
    unet = tiny.condition_unet().eval()
    plain, names = call_unet(unet), [name for name, _ in unet.named_buffers()]
    fuse(unet)
    assert [name for name, _ in unet.named_buffers()] != names
    unfuse(unet)
    assert [name for name, _ in unet.named_buffers()] == names
    assert torch.equal(call_unet(unet), plain)
    for attn in find_attention(unet):
        assert attn.to_k.weight.untyped_storage().nbytes() == attn.to_k.weight.nbytes


@torch.no_grad()
def test_moves_after_fusing_keep_working():
    unet = tiny.condition_unet().eval()
    fuse(unet)
    exact = condition_unet()
    unet.double()
    torch.testing.assert_close(call_unet(unet), call_unet(exact), rtol=0, atol=1e-6)
    assert_right(unet)
    for attn in find_attention(unet):  # and what comes then is not lost either
        attn.to_k.weight.data += 0.3
    assert_right(unet)
    assert call_unet(unet.bfloat16()).dtype == torch.bfloat16
    unet.to(memory_format=torch.channels_last).float()
    assert torch.isfinite(call_unet(unet)).all()


@torch.no_grad()
def test_a_copy_of_a_fused_network_is_on_its_own():
    unet = condition_unet()
    fuse(unet)
    plain, other = call_unet(unet), copy.deepcopy(unet)
    by_in_place(other)
    assert torch.equal(call_unet(unet), plain)
    assert_right(other)
    unfuse(other)
    assert len(fused_modules(unet)) == 8


def test_a_fused_network_that_trains_gets_its_gradients():
    unet, reference = condition_unet().requires_grad_(True), condition_unet().requires_grad_(True)
    fuse(unet)
    for attn in (unet, reference):
        call_unet(attn).square().mean().backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(unet.get_parameter(name).grad, parameter.grad, msg=name)


@torch.no_grad()
def test_compiled_code_sees_a_lora_that_comes_later():
    attn = module("bias").requires_grad_(False)
    x, text = tokens(2, QUERIES, WIDTH), tokens(2, 6, seed=1)
    holder = nn.ModuleDict({"attn": attn})
    fuse(holder)
    plain = attn(x, text)
    attn.compile(backend="eager")
    torch.testing.assert_close(attn(x, text), plain)
    with torch.no_grad():
        attn.to_v.weight.data += 0.1  # as a LoRA is merged
    merged = copy.deepcopy(holder)
    unfuse(merged)
    torch.testing.assert_close(attn(x, text), merged["attn"]._call_impl(x, text))
    from peft import inject_adapter_in_model

    torch.manual_seed(0)
    inject_adapter_in_model(lora(["to_k"]), holder)
    holder.double()
    compiled = attn(x, text)
    assert (compiled - merged["attn"]._call_impl(x, text)).abs().max() > 1e-3
    torch.testing.assert_close(compiled, attn._call_impl(x, text))
