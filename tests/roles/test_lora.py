"""LoRA files: what diffusers loads from them, stacked adapters as one, and what is refused."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.pipelines import export_student
from stepdistill.readers import read_tensors
from stepdistill.roles.adapters import AdapterSwitch
from stepdistill.roles.lora import FILE, KOHYA_FILE, LoRA, read_lora, stacked
from stepdistill.roles.roles import Roles
from stepdistill.roles.settings import LoRASettings, RolesSettings
from stepdistill.sampler import FewStepSampler, few_step_times


def shake(role, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in role.parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A Stable Diffusion LoRA student (rank 4, alpha 6) exported: the teacher's folder, and its own."""
    root = tmp_path_factory.mktemp("lora")
    family = load_family(str(tiny.save_stable_diffusion(root / "teacher")))
    roles = Roles(family, RolesSettings(weights="shared", lora=LoRASettings(rank=4, alpha=6.0)), fake_score=False)
    shake(roles.student, 1)
    sampler = FewStepSampler(family.schedule, few_step_times(family.schedule, 4))
    folder = export_student(family, roles.student, sampler, root / "student", {"method": "test"})
    return root / "teacher", folder


def pictures(folder, lora=None, weight_name=None):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(lora, weight_name=weight_name)
    return pipe.unet, pipe


@pytest.mark.parametrize("name", [FILE, KOHYA_FILE])
def test_diffusers_loads_either_file_onto_the_teacher_and_gets_the_merged_student(student, name):
    """rank 4 with alpha 6: a loader that loses alpha is off by a third."""
    teacher, folder = student
    merged, _ = pictures(folder)
    plain, _ = pictures(teacher)
    loaded, _ = pictures(teacher, folder / "lora", name)
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 8, generator=generator)
    with torch.no_grad():
        outputs = [network(x, torch.tensor([999, 20]), text).sample for network in (merged, plain, loaded)]
    torch.testing.assert_close(outputs[2], outputs[0], rtol=0, atol=1e-5)
    assert (outputs[1] - outputs[0]).abs().max() > 0.05


def test_kohyas_keys(student):
    teacher, folder = student
    tensors = load_file(folder / "lora" / KOHYA_FILE)
    ours = read_lora(folder, "here")
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert torch.equal(tensors[f"{name}.lora_down.weight"], ours.factors[path][0])
    assert torch.equal(tensors[f"{name}.lora_up.weight"], ours.factors[path][1])
    assert float(tensors[f"{name}.alpha"]) == 6.0
    assert len(tensors) == 3 * len(ours.factors)
    with safe_open(folder / "lora" / KOHYA_FILE, "pt") as opened:
        assert opened.metadata()["ss_network_dim"] == "4"
    assert teacher.is_dir()


def test_a_file_is_read_as_it_was_written(student, tmp_path):
    ours = read_lora(student[1], "here")
    assert (ours.rank, ours.alpha) == (4, 6.0)
    ours.save(tmp_path, "unet")
    again = read_lora(tmp_path / FILE, "here")
    assert again.factors.keys() == ours.factors.keys()
    assert all(torch.equal(a, b) for k in ours.factors for a, b in zip(ours.factors[k], again.factors[k], strict=True))


def test_a_file_that_says_nothing_of_alpha_has_scale_one_as_diffusers_has_it(student, tmp_path):
    teacher, folder = student
    save_file(load_file(folder / "lora" / FILE), tmp_path / FILE)
    lora = read_lora(tmp_path, "here")
    assert (lora.rank, lora.alpha) == (4, 4.0)
    loaded, _ = pictures(teacher, tmp_path, FILE)
    (scales,) = {tuple(module.scaling.values()) for module in loaded.modules() if isinstance(module, LoraLayer)}
    assert scales == (1.0,)


@pytest.mark.parametrize("ratio", [0.25, 2.0])
def test_one_adapter_that_counts_for_less_is_exported_so(ratio):
    """Its factors' product is that of the merged weights: without the ratio both would be the whole adapter."""
    network = tiny.unet(labels=2)
    switch = AdapterSwitch(network)
    switch.add("student", LoRASettings(rank=2, alpha=3.0), ["to_q", "conv1"])
    base = switch.merged_state_dict(None)
    with torch.no_grad():
        for parameter in switch.parameters("student").values():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    whole = switch.lora("student")
    with switch.scaled("student", ratio):
        lora, merged = switch.lora("student"), switch.merged_state_dict("student")
    assert len(lora.factors) > 2
    for path, (down, up) in whole.factors.items():
        delta = ratio * 1.5 * (up.flatten(1) @ down.flatten(1)).reshape(merged[f"{path}.weight"].shape)
        down, up = lora.factors[path]
        product = lora.alpha / lora.rank * (up.flatten(1) @ down.flatten(1)).reshape(delta.shape)
        torch.testing.assert_close(product, delta)
        torch.testing.assert_close(merged[f"{path}.weight"] - base[f"{path}.weight"], delta, rtol=1e-4, atol=1e-5)


def test_adapters_stacked_are_the_sum_of_their_products():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    a = LoRA(3, 6.0, {"linear": (draw(3, 5), draw(4, 3)), "conv": (draw(3, 2, 3, 3), draw(6, 3, 1, 1))})
    b = LoRA(2, 1.0, {"linear": (draw(2, 5), draw(4, 2)), "conv": (draw(2, 2, 3, 3), draw(6, 2, 1, 1))})
    both = stacked([(a, 1.0), (b, 0.25)])
    assert (both.rank, both.alpha) == (5, 5.0)
    product = lambda lora, k: lora.factors[k][1].flatten(1) @ lora.factors[k][0].flatten(1)  # noqa: E731
    for key in ("linear", "conv"):
        expected = 2.0 * product(a, key) + 0.25 * 0.5 * product(b, key)
        torch.testing.assert_close(product(both, key), expected, rtol=1e-12, atol=1e-12)
    assert stacked([(a, 1.0)]) is a
    with pytest.raises(ValueError, match="different modules"):
        stacked([(a, 1.0), (LoRA(1, 1.0, {"linear": (draw(1, 5), draw(4, 1))}), 1.0)])


def roles_under(teacher, folder, **more):
    family = load_family(str(teacher))
    settings = RolesSettings(weights="shared", lora=LoRASettings(rank=2, alpha=3.0), **more)
    return family, Roles(family, settings, fake_score=False)


def ask(role, family):
    generator = torch.Generator().manual_seed(4)
    x, t = torch.randn(2, *family.sample_shape, generator=generator), torch.tensor([900, 30])
    return role(x, t, family.encode_conditions(["a", "b"])).output


def test_going_on_with_a_lora_starts_as_the_student_that_it_is_of(student):
    teacher, folder = student
    family, roles = roles_under(teacher, folder, lora_from=str(folder))
    merged = load_family(str(folder))
    with torch.no_grad():
        torch.testing.assert_close(ask(roles.student, family), ask_teacher(merged), rtol=0, atol=1e-5)
        assert not torch.allclose(ask(roles.teacher, family), ask(roles.student, family), atol=1e-3)
    assert roles.student.lora.rank == 4
    assert all(parameter.requires_grad for parameter in roles.student.parameters().values())


def ask_teacher(family):
    denoiser = family.denoiser()
    return ask(denoiser, family)


def test_a_lora_on_top_leaves_the_one_below_alone_and_both_are_exported_as_one(student, tmp_path):
    teacher, folder = student
    family, roles = roles_under(teacher, folder, lora_under=str(folder))
    merged = load_family(str(folder))
    with torch.no_grad():  # a new LoRA is zero: the student is what it starts from
        torch.testing.assert_close(ask(roles.student, family), ask_teacher(merged), rtol=0, atol=1e-5)
    below = {k: p.clone() for k, p in roles.student.switch.parameters("under").items()}
    out = ask(roles.student, family)
    out.square().mean().backward()
    trained = roles.student.parameters()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    assert all(p.grad is None for p in roles.student.switch.parameters("under").values())
    assert not trained.keys() & below.keys()
    shake(roles.student, 2)
    role = roles.student
    half = {}
    with torch.no_grad(), role.switch.scaled("student", 0.5):
        half["output"] = ask(role, family)
        half["plain"] = role.plain_state_dict()
        half["lora"] = role.switch.lora("student")
    with torch.no_grad():
        assert not torch.allclose(ask(role, family), half["output"], atol=1e-3)
    assert half["lora"].rank == 6
    half["lora"].save(tmp_path, "unet")
    again, loaded = roles_under(teacher, tmp_path, lora_from=str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(ask(loaded.student, again), half["output"], rtol=0, atol=1e-5)
    network = family.fresh_network()
    network.load_state_dict(half["plain"])
    with torch.no_grad():
        torch.testing.assert_close(ask(family.denoiser(network), family), half["output"], rtol=0, atol=1e-5)
    assert all(torch.equal(p, below[k]) for k, p in role.switch.parameters("under").items())


def test_a_frozen_copy_of_a_stacked_student_is_stacked_too(student):
    teacher, folder = student
    family, roles = roles_under(teacher, folder, lora_under=str(folder))
    shake(roles.student, 3)
    copy = roles.frozen_like(roles.student, "copy")
    with torch.no_grad():
        assert torch.equal(ask(copy, family), ask(roles.student, family))
    assert not any(parameter.requires_grad for parameter in copy.switch.parameters("copy").values())
    assert all(parameter.requires_grad for parameter in roles.student.parameters().values())


def test_what_is_no_lora_of_this_teacher_is_refused(student, tmp_path):
    teacher, folder = student
    with pytest.raises(UserError, match=r"roles\.lora_from = .*gone: no LoRA there"):
        roles_under(teacher, folder, lora_from=str(tmp_path / "gone"))
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a readable LoRA file"):
        roles_under(teacher, folder, lora_from=str(tmp_path))
    save_file({"other.key": torch.zeros(2)}, tmp_path / FILE)
    with pytest.raises(UserError, match="not one LoRA in diffusers' keys"):
        roles_under(teacher, folder, lora_from=str(tmp_path))
    LoRA(1, 1.0, {"no.such.module": (torch.zeros(1, 3), torch.zeros(3, 1))}).save(tmp_path, "unet")
    with pytest.raises(UserError, match=r"roles\.lora_under = .*it is not a LoRA for this teacher"):
        roles_under(teacher, folder, lora_under=str(tmp_path))
    wrong = {k: (a[:, :1], b) for k, (a, b) in read_lora(folder, "here").factors.items()}
    LoRA(4, 4.0, wrong).save(tmp_path, "unet")
    with pytest.raises(UserError, match="it is not a LoRA for this teacher"):
        roles_under(teacher, folder, lora_from=str(tmp_path))
    with pytest.raises(ValueError, match="lora_under needs a LoRA student"):
        RolesSettings(weights="full", lora_under="x")


def lora_file(folder, change=None, metadata=None, keep_digest=False):
    """A small LoRA of one module, after ``change(tensors)`` and with ``metadata`` in place of its own."""
    file = LoRA(2, 4.0, {"a.b": (torch.ones(2, 3), torch.ones(5, 2))}).save(folder, "unet")
    tensors, written = read_tensors(file)
    if not keep_digest:
        del written["sha256"]
    if change is not None:
        change(tensors)
    if metadata is not None:
        written["lora_adapter_metadata"] = metadata
    save_file(tensors, file, written)
    return file


DOWN, UP = "unet.a.b.lora_A.weight", "unet.a.b.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "metadata", "says"),
    [
        (None, "[]", "its metadata are not a mapping"),
        (None, "3", "its metadata are not a mapping"),
        (None, "{", "not valid JSON"),
        (None, '{"unet.lora_alpha": "4"}', "its alpha is '4'; a number above 0 is needed"),
        (None, '{"unet.lora_alpha": NaN}', "its alpha is nan"),
        (None, '{"unet.lora_alpha": 0}', "its alpha is 0"),
        (None, '{"unet.lora_alpha": -2}', "its alpha is -2"),
        (None, '{"unet.lora_alpha": true}', "its alpha is True"),
        (None, '{"unet.lora_alpha": 1e300}', "its alpha is 1e\\+300"),
        (None, '{"unet.lora_alpha": null}', "its alpha is None"),
        (lambda t: t.update({DOWN: torch.ones(0, 3), UP: torch.ones(5, 0)}), None, "its rank is 0"),
        (lambda t: t.update({DOWN: torch.ones(5000, 3), UP: torch.ones(5, 5000)}), None, "its rank is 5000"),
        (lambda t: t.update({UP: torch.ones(5, 3)}), None, r"factors of \(2, 3\) and \(5, 3\)"),
        (lambda t: t.update({DOWN: torch.ones(2)}), None, r"factors of \(2,\) and \(5, 2\)"),
        (lambda t: t.update({DOWN: torch.tensor(2.0)}), None, "its rank is 0"),
        (lambda t: t.update(more=torch.ones(1)), None, "not one LoRA in diffusers' keys"),
        (lambda t: t.pop(UP), None, "not one LoRA in diffusers' keys"),
        (lambda t: t.clear(), None, "not one LoRA in diffusers' keys"),
    ],
)
def test_a_lora_of_other_metadata_or_shapes_is_one_line(change, metadata, says, tmp_path):
    file = lora_file(tmp_path, change, metadata)
    with pytest.raises(UserError, match=says) as caught:
        read_lora(file, "roles.lora_from")
    assert str(caught.value).startswith(f"roles.lora_from = {file}: not a readable LoRA file")
    assert "\n" not in str(caught.value)


def test_a_changed_weight_or_alpha_of_a_lora_is_noticed(tmp_path):
    assert read_lora(lora_file(tmp_path / "whole", keep_digest=True), "key").alpha == 4
    for number, (change, metadata) in enumerate(
        [(lambda t: t[UP].view(-1)[0].add_(1), None), (None, '{"unet.lora_alpha": 8}')]
    ):
        file = lora_file(tmp_path / str(number), change, metadata, keep_digest=True)
        with pytest.raises(UserError, match="the digest differs"):
            read_lora(file, "key")
