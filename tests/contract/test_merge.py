"""Merging two students: the arithmetic, the folder, and what cannot be merged."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from console import stepdistill
from diffusers import ConsistencyModelPipeline, DiffusionPipeline
from teacher_table import TEACHERS
from test_export import build

from stepdistill.errors import UserError
from stepdistill.families import calls_of
from stepdistill.pipelines import export_student, merge_students
from stepdistill.pipelines.merge import interpolate

CASES = {name: row.export_case(1) for name, row in TEACHERS.items()}
CASES["lora"] = TEACHERS["stable_diffusion"].export_case(1, "shared")


def test_interpolation_is_exact_at_the_ends_and_independent_of_order():
    generator = torch.Generator().manual_seed(0)
    a, b = ({k: torch.randn(4, 3, generator=generator) for k in "xyz"} for _ in range(2))
    a["count"] = b["count"] = torch.tensor([3])
    assert all(torch.equal(interpolate(a, b, 1.0)[k], a[k]) for k in a)
    assert all(torch.equal(interpolate(a, b, 0.0)[k], b[k]) for k in a)
    torch.testing.assert_close(interpolate(a, b, 0.25)["x"], 0.25 * a["x"] + 0.75 * b["x"])
    turned = interpolate(dict(reversed(a.items())), b, 0.3)
    assert all(torch.equal(turned[k], v) for k, v in interpolate(a, b, 0.3).items())


def two(tmp_path, first="unet2d", second="unet2d"):
    paths = []
    for index, case in enumerate((first, second)):
        family, roles, sampler = build(CASES[case], tmp_path / f"teacher{index}")
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for parameter in roles.student.parameters().values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        facts = {"method": "swiftbrush", "teacher": "t"}
        paths.append(export_student(family, roles.student, sampler, tmp_path / f"student{index}", facts))
    return [str(path) for path in paths]


@pytest.mark.parametrize(("first", "second"), [*((name, name) for name in TEACHERS), ("stable_diffusion", "lora")])
def test_the_merged_folder_is_a_stock_student(tmp_path, first, second):
    """A full student with one trained as LoRA too: its export has the adapter merged."""
    a, b = two(tmp_path, first, second)
    done = stepdistill("merge", a, b, "--weight", "0.25", "--output", tmp_path / "merged")
    assert done.code == 0, done.err
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    networks = [calls_of(DiffusionPipeline.from_pretrained(path)).network.state_dict() for path in (a, b)]
    network = calls_of(merged).network
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, 0.25 * networks[0][key] + 0.75 * networks[1][key])
    assert network.config["_stepdistill"]["weight"] == 0.25
    assert merged.scheduler.config["_stepdistill"]["steps"] == 1
    assert [part["path"] for part in network.config["_stepdistill"]["of"]] == [Path(a).name, Path(b).name]
    assert json.loads((tmp_path / "merged/model_index.json").read_text())["_class_name"] == type(merged).__name__
    assert "interpolation" in (tmp_path / "merged/README.md").read_text()


def test_students_that_cannot_be_merged_are_one_line(tmp_path):
    a, _ = two(tmp_path)
    b = two(tmp_path / "other", "stable_diffusion")[0]
    with pytest.raises(UserError, match="they cannot be merged"):
        merge_students(a, b, 0.5, tmp_path / "merged")
    with pytest.raises(UserError, match="nowhere: no such folder; name an exported student"):
        merge_students(a, str(tmp_path / "nowhere"), 0.5, tmp_path / "merged")
    steps = tmp_path / "steps"
    pipeline = DiffusionPipeline.from_pretrained(a)
    pipeline.scheduler.register_to_config(original_inference_steps=4)
    pipeline.save_pretrained(steps)
    with pytest.raises(UserError, match=r"sampled differently .*original_inference_steps"):
        merge_students(a, str(steps), 0.5, tmp_path / "merged")
    wide = tmp_path / "wide"
    ConsistencyModelPipeline(tiny.unet(labels=5), DiffusionPipeline.from_pretrained(a).scheduler).save_pretrained(wide)
    with pytest.raises(UserError, match="networks of other shapes"):
        merge_students(a, str(wide), 0.5, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert stepdistill("merge", a, a, "--weight", "1.5", "--output", tmp_path / "merged").code == 2
