"""Weights in and out: a student's files are those that were exported, a run's teacher the one that it began with."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from console import stepdistill
from safetensors.torch import load_file, save_file
from test_cli import write_config

from stepdistill import assets, checkpoint, files
from stepdistill.digests import RECORD, check_file, check_folder, digest_networks, read_record, write_record
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.pipelines import MSDPipeline
from stepdistill.roles.roles import Roles
from stepdistill.roles.settings import RolesSettings

UNET = "unet/diffusion_pytorch_model.safetensors"
LORA = "lora/pytorch_lora_weights.safetensors"
CHANGED = "damaged or changed since it was exported; export it again, or delete stepdistill.json if you changed it on p"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of one update with a LoRA student."""
    root = tmp_path_factory.mktemp("digests")
    teacher = tiny.save_pixels(root / "teacher", "v", labels=3, null=True)
    config = write_config(root, teacher, updates=1)
    result = stepdistill("distill", config, "roles.weights=shared", "roles.lora.rank=2")
    assert result.code == 0, result.err
    return root / "run"


@pytest.fixture
def student(run, tmp_path) -> Path:
    return Path(shutil.copytree(run / "student", tmp_path / "student"))


def flip(file: Path, place: float = 0.9) -> None:
    """One bit of the file, among its numbers."""
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 1
    file.write_bytes(data)


def spoil(file: Path, value: float = math.nan, index: int = 0) -> None:
    """One number of one tensor of a safetensors file."""
    tensors = load_file(file)
    name = sorted(k for k, v in tensors.items() if v.is_floating_point())[index]
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, {"format": "pt"})


# -- exported folders --------------------------------------------------------------------------------------


def test_an_export_has_the_digest_of_every_weight_and_lora_file(student):
    record = read_record(student)
    assert record.keys() == {UNET, LORA}
    assert all(record[name] == files.digest(student / name) for name in record)
    check_folder(student, "here")


READS = {
    "sample": ("sample", "{student}", "--count", 2, "--output", "{out}/a.png"),
    "evaluate": ("evaluate", "{student}", "--samples", 4, "--output", "{out}/a.json"),
    "merge A": ("merge", "{student}", "{other}", "--output", "{out}/merged"),
    "merge B": ("merge", "{other}", "{student}", "--output", "{out}/merged"),
    "benchmark": ("benchmark", "inference", "{student}", "--output", "{out}/a.json"),
    "student_from": ("distill", "{config}", "roles.student_from={student}", "output={out}/again"),
    "lora_from": ("distill", "{config}", "roles.weights=shared", "roles.lora_from={student}", "output={out}/again"),
    "lora_under": ("distill", "{config}", "roles.weights=shared", "roles.lora_under={student}", "output={out}/again"),
    "dry run": ("distill", "{config}", "roles.student_from={student}", "output={out}/again", "--dry-run"),
}


def read(command: str, student: Path, run: Path, out: Path):
    out.mkdir(exist_ok=True)
    names = {"student": student, "other": run / "student", "config": run.parent / "config.yaml", "out": out}
    return stepdistill(*(str(a).format(**names) for a in READS[command]))


@pytest.mark.parametrize("command", READS)
def test_a_flipped_bit_is_noticed_by_whatever_reads_the_student(command, student, run, tmp_path):
    file = student / (LORA if "lora" in command else UNET)
    flip(file)
    result = read(command, student, run, tmp_path / "out")
    assert result.code == 2, result.out
    assert CHANGED in result.error
    assert file.name in result.error
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("command", READS)
def test_a_folder_without_record_is_searched_for_what_is_not_finite(command, student, run, tmp_path):
    file = student / (LORA if "lora" in command else UNET)
    spoil(file)
    (student / RECORD).unlink()
    result = read(command, student, run, tmp_path / "out")
    assert result.code == 2, result.out
    assert "has weights that are not finite" in result.error
    assert not list((tmp_path / "out").iterdir())


def test_what_was_changed_on_purpose_is_read_once_the_record_is_gone(student, run, tmp_path):
    spoil(student / UNET, 0.5)
    assert read("sample", student, run, tmp_path / "out").code == 2
    (student / RECORD).unlink()
    assert read("sample", student, run, tmp_path / "out").code == 0


def test_files_that_are_not_read_are_not_compared(student, run, tmp_path):
    flip(student / LORA)
    assert read("sample", student, run, tmp_path / "out").code == 0
    with pytest.raises(UserError, match=LORA):
        check_folder(student, "here")


def test_a_weight_file_that_is_missing_is_named(student):
    (student / UNET).unlink()
    with pytest.raises(UserError, match=f"^here: {UNET}: no such file; export it again"):
        check_folder(student, "here", ("unet",))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sha256": []}', '{"sha256": {"a": 1}}', "\0"])
def test_a_damaged_record_is_one_line(content, student, run, tmp_path):
    (student / RECORD).write_text(content)
    result = read("sample", student, run, tmp_path / "out")
    assert result.code == 2
    assert f"{student / RECORD}: cannot be read" in result.error


def test_a_lora_file_is_compared_where_it_is_named_by_itself(student):
    check_file(student / LORA, "here")
    flip(student / LORA)
    with pytest.raises(UserError, match=r"^here: damaged or changed"):
        check_file(student / LORA, "here")


@pytest.mark.slow
def test_students_together_keep_their_records(tmp_path):
    teacher = tiny.save_pixels(tmp_path / "teacher", "v", labels=3, null=True)
    config = write_config(tmp_path, teacher, updates=1)
    raw = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**raw, "msd": {"students": 2}}))
    result = stepdistill("distill", config)
    assert result.code == 0, result.err
    together = tmp_path / "run" / "student"
    flip(together / "student-1" / UNET)
    pipeline = MSDPipeline.from_pretrained(together)
    pipeline.student(0)
    with pytest.raises(UserError, match=f"student-1: {UNET}: damaged or changed"):
        pipeline.student(1)
    flip(tmp_path / "run" / "student-0" / "student" / UNET)
    shutil.rmtree(together)
    result = stepdistill("distill", config, "--resume")
    assert result.code == 2
    assert f"student-0/student: {UNET}: damaged or changed" in result.error


# -- what is written ---------------------------------------------------------------------------------------


def test_a_student_that_is_not_finite_is_not_exported(run, tmp_path):
    whole = Path(shutil.copytree(run, tmp_path / "run"))
    last = checkpoint.latest(whole / "checkpoints")
    tensors, meta = checkpoint.load(last)
    for group in ("student", "ema"):
        next(iter(tensors[group].values())).view(-1)[0] = math.nan
    shutil.rmtree(last)
    checkpoint.save(whole / "checkpoints", 1, tensors, meta, 1)
    result = stepdistill("export", whole, "--output", tmp_path / "out")
    assert result.code == 2
    assert "the unet to be exported has weights that are not finite" in result.error
    assert not (tmp_path / "out").exists()


def test_weights_that_float16_cannot_hold_are_not_exported_in_it(student, tmp_path):
    spoil(student / UNET, 1e6)
    write_record(student)
    from diffusers import DiffusionPipeline

    from stepdistill.pipelines.saving import save_in_one_dtype

    pipeline = DiffusionPipeline.from_pretrained(student)
    save_in_one_dtype(pipeline, tmp_path / "wide", torch.bfloat16)
    with pytest.raises(UserError, match=r"the unet in float16 has weights that are not finite.*too large for float16"):
        save_in_one_dtype(pipeline, tmp_path / "narrow", torch.float16)


# -- a run's teacher ---------------------------------------------------------------------------------------


def other_teacher(folder: Path) -> None:
    spoil(folder / UNET, 0.25, index=5)


def test_the_digest_is_of_values_and_of_no_lora(tmp_path):
    folder = str(tiny.save_stable_diffusion(tmp_path / "teacher"))
    family = load_family(folder)
    digests = digest_networks(family.networks())
    assert digests.keys() == {"unet", "vae", "text_encoder"}
    Roles(family, RolesSettings(weights="shared"))
    assert digest_networks(family.networks()) == digests
    half = load_family(folder, dtype=torch.bfloat16)
    halved = digest_networks(half.networks())
    assert halved.keys() == digests.keys()
    assert all(halved[name] != digests[name] for name in digests)
    assert digest_networks({name: network.float() for name, network in half.networks().items()}) == halved


@pytest.mark.parametrize("stopped", ["before its first checkpoint", "after it"])
def test_another_teacher_is_noticed_by_resume_and_export(stopped, tmp_path):
    teacher = tiny.save_pixels(tmp_path / "teacher", "v", labels=3, null=True)
    config = write_config(tmp_path, teacher)
    assert stepdistill("distill", config, "train.max_minutes=1e-9").code == 0
    if stopped == "before its first checkpoint":
        shutil.rmtree(tmp_path / "run" / "checkpoints")
    else:  # what was copied without it is noticed by the checkpoint
        (tmp_path / "run" / "environment.json").unlink()
    shutil.copytree(teacher, tmp_path / "kept")
    now = digest_networks(load_family(str(teacher)).networks())["unet"][:12]
    other_teacher(teacher)
    then = digest_networks(load_family(str(teacher)).networks())["unet"][:12]
    results = [stepdistill("distill", config, "--resume")]
    if stopped == "after it":
        results.append(stepdistill("export", tmp_path / "run", "--output", tmp_path / "out"))
    for result in results:
        assert result.code == 2
        assert f"teacher {teacher}: the weights of its unet are not those that the run was started with" in result.error
        assert f"(digest {now} then, {then} now); put the earlier ones back" in result.error
    assert not (tmp_path / "out").exists()
    shutil.rmtree(teacher)
    shutil.copytree(tmp_path / "kept", teacher)
    assert stepdistill("distill", config, "--resume").code == 0


def test_the_next_stage_notices_another_teacher(tmp_path):
    teacher = tiny.save_pixels(tmp_path / "teacher", "v", labels=3, null=True)
    config = write_config(tmp_path, teacher, updates=1)
    raw = yaml.safe_load(config.read_text())
    stages = [{"name": "first"}, {"name": "second", "take": "student", "train": {"max_minutes": 1e-9, "updates": 2}}]
    config.write_text(yaml.safe_dump({**raw, "stages": stages}))
    assert stepdistill("distill", config).code == 0
    assert (tmp_path / "run" / "01-first" / "student").exists()
    shutil.rmtree(tmp_path / "run" / "02-second")
    other_teacher(teacher)
    result = stepdistill("distill", config, "--resume")
    assert result.code == 2
    assert "the weights of its unet are not those that the run was started with" in result.error
    assert not (tmp_path / "run" / "02-second" / "config.yaml").exists()


def test_the_next_student_notices_another_teacher(tmp_path):
    teacher = tiny.save_pixels(tmp_path / "teacher", "v", labels=3, null=True)
    config = write_config(tmp_path, teacher, updates=1)
    raw = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**raw, "msd": {"students": 2}}))
    assert stepdistill("distill", config, "--student", 1).code == 0
    other_teacher(teacher)
    result = stepdistill("distill", config, "--student", 0)
    assert result.code == 2
    assert "the weights of its unet are not those that the run was started with" in result.error
    assert not (tmp_path / "run" / "student-0" / "config.yaml").exists()


# -- what is shipped ---------------------------------------------------------------------------------------

SHIPPED = sorted(
    path.relative_to(assets.ROOT).as_posix() for path in assets.ROOT.rglob("*") if path.suffix in assets.RECORDED
)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A copy of what is shipped in its place."""
    monkeypatch.setattr(assets, "ROOT", Path(shutil.copytree(assets.ROOT, tmp_path / "assets")))
    return assets.ROOT


def test_every_shipped_file_of_numbers_is_recorded_as_it_is():
    recorded = {f"{name}/{file}" for name in ("emoji", "fashion_mnist") for file in read_record(assets.ROOT / name)}
    assert recorded == set(SHIPPED)
    for name in ("emoji", "fashion_mnist"):
        check_folder(assets.ROOT / name, name)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_flipped_bit_of_a_shipped_file_is_noticed(name, shipped):
    flip(shipped / name, 0.5)
    collection, _, file = name.partition("/")
    place = file if not file.startswith("teacher") else "teacher"
    with pytest.raises(UserError, match=f"^asset:{collection}: {file}: not the file that was shipped; install stepdi"):
        assets.resolve(f"asset:{collection}/{place}")


@pytest.mark.parametrize("name", ["../emoji", "emoji/../..", "/etc", "emoji/none"])
def test_what_is_no_asset_is_refused(name):
    with pytest.raises(UserError, match=r"no such asset; shipped are asset:emoji/images.npz"):
        assets.resolve(f"asset:{name}")
