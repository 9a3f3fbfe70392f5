"""Teacher, student and fake score: values and gradients, not only that they run."""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from torch import nn

from stepdistill import checkpoint
from stepdistill.errors import UserError
from stepdistill.families.stable_diffusion import StableDiffusionFamily
from stepdistill.families.unet2d import UNet2DFamily
from stepdistill.roles.ema import EMA
from stepdistill.roles.roles import Roles
from stepdistill.roles.settings import LoRASettings, RolesSettings

BATCH = 3


def unet2d() -> UNet2DFamily:
    return UNet2DFamily(tiny.unet(labels=3, null=True), tiny.scheduler("v"))


def stable_diffusion() -> StableDiffusionFamily:
    """The denoising network alone; VAE and text encoder are stand-ins that are not called."""
    network = tiny.condition_unet()
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    return StableDiffusionFamily.of(network, tiny.scheduler("sd_ddim_eps"), vae, nn.Identity(), None)


FAMILIES = {"unet2d": unet2d, "stable_diffusion": stable_diffusion}
MODES = ["full", "shared", "mixed"]


def settings(weights: str, **lora) -> RolesSettings:
    return RolesSettings(weights=weights, lora=LoRASettings(**{"rank": 2, "alpha": 3.0, **lora}))


def inputs(family):
    """x_t (B, C, H, W), t (B,), condition."""
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(BATCH, *family.sample_shape, generator=generator)
    t = torch.tensor([10, 500, 900])
    if family.condition_kind == "prompt":
        return x, t, {"text": torch.randn(BATCH, 5, 8, generator=generator)}
    return x, t, {"label": torch.tensor([0, 2, 1])}


def shake(role, seed: int) -> None:
    """Move what the role trains, so that an adapter's B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in role.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@functools.cache
def build(name: str, weights: str):
    family = FAMILIES[name]()
    untouched = copy.deepcopy(family.network)
    roles = Roles(family, settings(weights))
    shake(roles.student, 1)
    shake(roles.fake_score, 2)
    return family, untouched, roles


@pytest.fixture(params=[(f, m) for f in FAMILIES for m in MODES], ids=lambda p: "-".join(p))
def built(request):
    """A family, an untouched copy of its network, and roles that differ from one another."""
    family, untouched, roles = copy.deepcopy(build(*request.param))
    assert roles.family is family
    assert roles.teacher.network is family.network
    return family, untouched, roles


@torch.no_grad()
def test_before_training_all_roles_are_the_teacher():
    for make in FAMILIES.values():
        for weights in MODES:
            family = make()
            call = inputs(family)
            roles = Roles(family, settings(weights))
            expected = roles.teacher(*call).output
            for role in roles.trained():  # torch takes other kernels for weights that want gradients: not bit-equal
                torch.testing.assert_close(role(*call).output, expected, rtol=0, atol=2e-6)


def test_the_teacher_is_bit_equal_to_the_untouched_network(built):
    family, untouched, roles = built
    x, t, condition = inputs(family)
    expected = family.forward(untouched, x, t, condition)
    for _ in range(2):
        assert torch.equal(roles.teacher(x, t, condition).output, expected)
        roles.student(x, t, condition)
        roles.fake_score(x, t, condition)
    assert torch.equal(family.denoiser()(x, t, condition).output, expected)


def test_student_and_fake_score_differ_from_the_teacher_and_each_other(built):
    family, _, roles = built
    call = inputs(family)
    outputs = [role(*call).output for role in (roles.teacher, roles.student, roles.fake_score)]
    for i in range(3):
        for j in range(i):
            assert (outputs[i] - outputs[j]).abs().max() > 1e-3


def separate(family, role) -> nn.Module:
    """A network of its own with the role's weights."""
    network = family.fresh_network()
    network.load_state_dict(role.plain_state_dict())
    return network.eval()


def test_merged_weights_are_the_adapters_own_output(built):
    family, untouched, roles = built
    x, t, condition = inputs(family)
    for role in (roles.student, roles.fake_score, roles.teacher):
        merged = role.plain_state_dict()
        assert merged.keys() == untouched.state_dict().keys()
        with torch.no_grad():
            torch.testing.assert_close(
                family.forward(separate(family, role), x, t, condition),
                role(x, t, condition).output,
                rtol=1e-5,
                atol=1e-5,
            )
    for key, value in roles.teacher.plain_state_dict().items():
        assert torch.equal(value, untouched.state_dict()[key])


def test_roles_between_forward_and_backward_do_not_mix_gradients(built):
    """Forward student, forward fake score, then both backwards: each as if it had a network of its own."""
    family, _, roles = built
    x, t, condition = inputs(family)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    ask = {"student": roles.student, "fake_score": roles.fake_score}

    def loss(output):
        return (weight * output.square()).sum()

    outputs = {name: role(x, t, condition).output for name, role in ask.items()}
    with torch.no_grad():
        roles.teacher(x, t, condition)
    for name in ("fake_score", "student"):
        loss(outputs[name]).backward()
    for role in ask.values():
        alone = separate(family, role).requires_grad_(True)
        loss(family.forward(alone, x, t, condition)).backward()
        weights = {k: p.grad for k, p in alone.named_parameters() if p.grad is not None}
        for key, expected in separate_gradients(role, weights).items():
            gradient = role.parameters()[key].grad
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()) + 1e-6)
        assert sum(float(p.grad.abs().sum()) for p in role.parameters().values() if p.grad is not None) > 1
    trained = {id(p) for role in ask.values() for p in role.parameters().values()}
    for key, parameter in family.network.named_parameters():
        if id(parameter) not in trained:
            assert parameter.grad is None, f"the frozen {key} has a gradient"


def separate_gradients(role, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradients of a role's parameters from those of the whole weights W: of B they are scale dL/dW A^T."""
    if role.adapter is None:
        return weights
    gradients = {}
    for path, module in role.network.named_modules():
        if not (hasattr(module, "lora_A") and role.adapter in module.lora_A):
            continue
        of_weight = weights.get(f"{path}.weight")
        if of_weight is None:
            continue
        a, b = module.lora_A[role.adapter].weight, module.lora_B[role.adapter].weight
        scale = module.scaling[role.adapter]
        flat = of_weight.flatten(1)
        gradients[f"{path}.lora_B.{role.adapter}.weight"] = (scale * flat @ a.flatten(1).T).reshape(b.shape)
        gradients[f"{path}.lora_A.{role.adapter}.weight"] = (scale * b.flatten(1).T @ flat).reshape(a.shape)
    return {k: v.detach() for k, v in gradients.items()}


@pytest.mark.parametrize("weights", ["shared", "mixed"])
def test_nested_calls_restore_the_outer_adapter(weights):
    roles = Roles(unet2d(), settings(weights))
    switch = roles.fake_score.switch
    names = ["fake_score", None] + (["student"] if weights == "shared" else [])
    for outer in names:
        for inner in names:
            with switch.using(outer):
                with contextlib.suppress(KeyError), switch.using(inner):
                    assert switch.active == inner
                    raise KeyError
                assert switch.active == outer
                for layer in switch.layers:
                    assert layer._disable_adapters == (outer is None)
                    assert outer is None or layer._active_adapter == [outer]
            assert switch.active is None
            assert all(layer._disable_adapters for layer in switch.layers)


def test_switching_never_touches_requires_grad(built):
    family, _, roles = built
    before = {k: p.requires_grad for k, p in family.network.named_parameters()}
    call = inputs(family)
    for role in (roles.student, roles.teacher, roles.fake_score, roles.student):
        role(*call)
        assert {k: p.requires_grad for k, p in family.network.named_parameters()} == before
    for role in (roles.student, roles.fake_score):
        assert role.parameters()
        assert all(p.requires_grad and p.dtype == torch.float32 for p in role.parameters().values())
    assert roles.teacher.parameters() == {}


def test_what_each_mode_trains():
    whole = sum(p.numel() for p in tiny.unet(labels=3, null=True).parameters())
    for weights in MODES:
        family = unet2d()
        roles = Roles(family, settings(weights))
        counts = [sum(p.numel() for p in role.parameters().values()) for role in roles.trained()]
        assert (counts[0] == whole) == (weights != "shared")
        assert (counts[1] == whole) == (weights == "full")
        assert not roles.student.parameters().keys() & roles.fake_score.parameters().keys() or weights == "full"
        ids = [{id(p) for p in role.parameters().values()} for role in roles.trained()]
        assert not ids[0] & ids[1]
        assert not ids[0] & {id(p) for p in family.network.parameters()} or weights == "shared"


def test_adapters_of_a_half_precision_teacher_are_float32_masters():
    family = unet2d()
    family.network.to(torch.bfloat16)
    roles = Roles(family, settings("mixed"))
    for role in roles.trained():
        assert {p.dtype for p in role.parameters().values()} == {torch.float32}
    base = [p.dtype for k, p in family.network.named_parameters() if "lora_" not in k]
    assert set(base) == {torch.bfloat16}


# -- saving and loading ------------------------------------------------------------------------------------


def test_state_round_trip(built):
    family, _, roles = built
    call = inputs(family)
    for role in roles.trained():
        saved = {k: v.clone() for k, v in role.state_dict().items()}
        expected = role(*call).output.detach()
        shake(role, 5)
        assert not torch.equal(role(*call).output, expected)
        role.load_state_dict(saved)
        assert torch.equal(role(*call).output, expected)


def test_loading_is_strict(built):
    _, _, roles = built
    for role in roles.trained():
        saved = {k: v.clone() for k, v in role.state_dict().items()}
        first = next(iter(saved))
        for wrong in (
            {k: v for k, v in saved.items() if k != first},
            {**saved, "more": torch.zeros(1)},
            {**saved, first: torch.zeros(saved[first].numel() + 1)},
        ):
            with pytest.raises(UserError, match=role.name):
                role.load_state_dict(wrong)


@pytest.mark.parametrize("weights", MODES)
def test_a_fake_score_goes_on_with_that_of_another_runs_newest_checkpoint(weights, tmp_path):
    first = Roles(unet2d(), settings(weights))
    for step in (1, 2):
        shake(first.fake_score, step)
        checkpoint.save(tmp_path / "checkpoints", step, {"fake_score": first.fake_score.state_dict()}, {}, 2)
    family = unet2d()
    result = RolesSettings(weights=weights, lora=LoRASettings(rank=2, alpha=3.0), fake_score_from=str(tmp_path))
    again = Roles(family, result)
    call = inputs(family)
    torch.testing.assert_close(again.fake_score(*call).output, first.fake_score(*call).output)
    assert (again.fake_score(*call).output - again.teacher(*call).output).abs().max() > 1e-3
    torch.testing.assert_close(again.student(*call).output, again.teacher(*call).output, rtol=0, atol=2e-6)


def test_the_students_lora_may_be_another_than_the_fake_scores():
    result = RolesSettings(
        weights="shared", lora=LoRASettings(rank=2), student_lora=LoRASettings(rank=3, alpha=6.0, targets=["to_q"])
    )
    roles = Roles(unet2d(), result)
    ranks = [{len(p) for k, p in role.parameters().items() if "lora_A" in k} for role in roles.trained()]
    assert ranks == [{3}, {2}]
    assert all(".to_q." in key for key in roles.student.parameters())
    assert not all(".to_q." in key for key in roles.fake_score.parameters())
    scales = {layer.scaling["student"] for layer in roles.student.switch.layers if "student" in layer.scaling}
    assert scales == {2.0}


# -- settings ----------------------------------------------------------------------------------------------


def test_unknown_targets_are_named():
    for targets in (["nowhere"], ["to_q", "nowhere"], ["o_q"]):
        with pytest.raises(UserError, match=r"roles\.lora\.targets: .*'(nowhere|o_q)'"):
            Roles(unet2d(), settings("shared", targets=targets))


def test_a_target_without_weights_is_refused():
    with pytest.raises(UserError, match=r"roles\.lora\.targets"):
        Roles(unet2d(), settings("shared", targets=["conv_norm_out"]))


def test_chosen_targets_are_what_is_adapted():
    roles = Roles(unet2d(), settings("shared", targets=["to_q"]))
    assert roles.student.parameters()
    assert all(".to_q." in key for key in roles.student.parameters())


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (6.0, 3.0)])
def test_alpha_is_the_scale_times_the_rank(alpha, scale):
    roles = Roles(unet2d(), settings("shared", rank=2, alpha=alpha))
    assert {layer.scaling["student"] for layer in roles.student.switch.layers} == {scale}


# -- the average -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["full", "shared"])
def test_ema_is_its_formula(weights):
    role = Roles(unet2d(), settings(weights)).student
    ema = EMA(role, 0.3)
    expected = {k: p.detach().double().clone() for k, p in role.parameters().items()}
    for n in range(1, 6):
        shake(role, n)
        ema.update()
        decay = min(0.3, (1 + n) / (10 + n))  # 2/11, 3/12, 4/13 (> 0.3), ...
        for key, p in role.parameters().items():
            expected[key] = decay * expected[key] + (1 - decay) * p.detach().double()
    assert ema.updates == 5
    assert ema.shadow.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(ema.shadow[key].double(), value, rtol=0, atol=1e-6)


def test_ema_is_one_update_ahead_of_diffusers():
    """Its decay after n updates is EMAModel's after n + 1."""
    role = Roles(unet2d(), settings("full")).student
    ema = EMA(role, 0.9999)
    average = EMAModel(role.network.parameters(), decay=0.9999)
    key, parameter = next(iter(role.parameters().items()))
    decays = []
    for _ in range(5):
        with torch.no_grad():
            ema.shadow[key].zero_()
            parameter.fill_(1.0)
        ema.update()
        decays.append(1 - ema.shadow[key].mean().item())
    assert decays == pytest.approx([average.get_decay(n + 1) for n in range(1, 6)])
    assert average.get_decay(1) == 0


@pytest.mark.parametrize("weights", ["full", "shared"])
def test_applied_computes_with_the_average_and_restores_exactly(weights):
    family = unet2d()
    role = Roles(family, settings(weights)).student
    ema = EMA(role, 0.9)
    call = inputs(family)
    averaged = role(*call).output.detach()  # nothing has moved yet
    shake(role, 3)
    before, result = {k: p.detach().clone() for k, p in role.parameters().items()}, role(*call).output.detach()
    identities = [id(p) for p in role.parameters().values()]
    with contextlib.suppress(KeyError), ema.applied():
        assert torch.equal(role(*call).output, averaged)
        raise KeyError
    assert torch.equal(role(*call).output, result)
    assert all(torch.equal(p, before[k]) for k, p in role.parameters().items())
    assert [id(p) for p in role.parameters().values()] == identities


# -- counting ----------------------------------------------------------------------------------------------


def test_passes_are_counted_in_images():
    family = unet2d()
    roles = Roles(family, settings("shared"))
    x, t, condition = inputs(family)
    meter = roles.meter

    def cost(call) -> tuple[int, int]:
        before = meter.forward, meter.backward
        call()
        return meter.forward - before[0], meter.backward - before[1]

    with torch.no_grad():
        assert cost(lambda: roles.student(x, t, condition)) == (BATCH, 0)
    assert cost(lambda: roles.teacher(x, t, condition)) == (BATCH, 0)
    assert cost(lambda: roles.fake_score(x, t, condition)) == (BATCH, 2 * BATCH)
    leaf = x.clone().requires_grad_()
    assert cost(lambda: roles.teacher(leaf, t, condition)) == (BATCH, BATCH)
    assert meter.total == meter.forward + meter.backward == 4 * BATCH + 3 * BATCH
