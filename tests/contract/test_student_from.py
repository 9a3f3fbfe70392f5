"""A run that starts from an earlier student: its export, null label and all."""

import pytest
import tiny
import torch
from test_export import build

from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.pipelines import export_student
from stepdistill.roles.roles import Roles
from stepdistill.roles.settings import RolesSettings


@pytest.mark.parametrize(
    "case",
    [
        ("unet2d", "v", 3, 1, None, "renoise", "full"),
        ("stable_diffusion", "sd_ddim_eps", "prompt", 1, None, "renoise", "full"),
    ],
    ids=["unet2d", "stable_diffusion"],
)
def test_an_exported_student_is_a_start(case, tmp_path):
    family, roles, sampler = build(case, tmp_path / "teacher")
    folder = export_student(family, roles.student, sampler, tmp_path / "student", {})
    again = Roles(load_family(str(tmp_path / "teacher")), RolesSettings(student_from=str(folder)))
    started, exported = again.student.network.state_dict(), roles.student.network.state_dict()
    teacher = family.network.state_dict()
    for key, value in started.items():
        if key == "class_embedding.weight":
            assert torch.equal(value[:3], exported[key][:3])
            assert torch.equal(value[3], teacher[key][3])
        else:
            assert torch.equal(value, exported[key]), key


def test_another_architecture_is_refused(tmp_path):
    tiny.save_pixels(tmp_path / "teacher", "v", labels=3, null=True)
    tiny.save_pixels(tmp_path / "other", "v", labels=7)
    with pytest.raises(UserError, match="not of the student's architecture"):
        Roles(load_family(str(tmp_path / "teacher")), RolesSettings(student_from=str(tmp_path / "other")))
    with pytest.raises(UserError, match="cannot be loaded"):
        Roles(load_family(str(tmp_path / "teacher")), RolesSettings(student_from=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_lora_student_on_another_model(tmp_path, checkpointing):
    """SwiftBrush version 2's B: the student a LoRA on an earlier student, the fake score one on the teacher."""
    from stepdistill.roles.settings import LoRASettings

    case = ("stable_diffusion", "sd_ddim_eps", "prompt", 1, None, "renoise", "full")
    family, roles, sampler = build(case, tmp_path / "teacher")
    with torch.no_grad():
        for parameter in roles.student.parameters().values():
            parameter.add_(0.1)
    folder = export_student(family, roles.student, sampler, tmp_path / "student", {})
    settings = RolesSettings(
        weights="shared",
        lora=LoRASettings(rank=2),
        student_lora=LoRASettings(rank=4, alpha=8),
        student_from=str(folder),
    )
    again = Roles(load_family(str(tmp_path / "teacher")), settings, gradient_checkpointing=checkpointing)
    x, t = torch.randn(2, *family.sample_shape), torch.tensor([999, 500])
    condition = again.family.encode_conditions(["a", "b"])
    with torch.no_grad():
        for role, start in ((again.student, roles.student), (again.teacher, roles.teacher)):
            torch.testing.assert_close(role(x, t, condition).output, start(x, t, condition).output)
    assert {p.shape[0] for k, p in again.student.parameters().items() if "lora_A" in k} == {4}
    assert {p.shape[0] for k, p in again.fake_score.parameters().items() if "lora_A" in k} == {2}
    again.student(x, t, condition).output.sum().backward()
    assert any(p.grad is not None for p in again.student.parameters().values())
    assert all(p.grad is None for p in again.fake_score.parameters().values())
    with torch.no_grad():
        for role in again.trained():
            for parameter in role.parameters().values():
                parameter.add_(0.1)
        expected = again.student(x, t, condition).output
    exported = load_family(str(export_student(again.family, again.student, sampler, tmp_path / "merged", {})))
    with torch.no_grad():
        torch.testing.assert_close(exported.denoiser()(x, t, condition).output, expected, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "merged/lora/pytorch_lora_weights.safetensors").is_file()
