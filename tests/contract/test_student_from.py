"""A run that starts from an earlier student: its export, null label and all."""

import pytest
import tiny
import torch
from stepdistill.pipelines import export_student
from test_export import build

from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.roles import Roles, RolesSettings


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
    own, given = again.student.network.state_dict(), roles.student.network.state_dict()
    teacher = family.network.state_dict()
    for key, value in own.items():
        if key == "class_embedding.weight":
            assert torch.equal(value[:3], given[key][:3])
            assert torch.equal(value[3], teacher[key][3])
        else:
            assert torch.equal(value, given[key]), key


def test_another_architecture_is_refused(tmp_path):
    tiny.save_pixels(tmp_path / "teacher", "v", labels=3, null=True)
    tiny.save_pixels(tmp_path / "other", "v", labels=7)
    with pytest.raises(UserError, match="not the teacher's architecture"):
        Roles(load_family(str(tmp_path / "teacher")), RolesSettings(student_from=str(tmp_path / "other")))
    with pytest.raises(UserError, match="cannot be loaded"):
        Roles(load_family(str(tmp_path / "teacher")), RolesSettings(student_from=str(tmp_path / "nowhere")))
