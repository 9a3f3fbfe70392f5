"""A picture that cannot be read ends no run of days: another one is taken, it is counted and named, up to a limit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from console import stepdistill
from datasets import Dataset
from PIL import Image

from stepdistill import checkpoint
from stepdistill.conditions import Conditions
from stepdistill.config import merge
from stepdistill.data import images as data
from stepdistill.data.images import ImageSet
from stepdistill.data.pictures import UnreadablePicture
from stepdistill.data.sources import load_images
from stepdistill.data.streams import RealSource
from stepdistill.errors import UserError
from stepdistill.run import RunFolder, fixed_part
from stepdistill.settings import ImagesSettings
from stepdistill.trainers.methods.base import RunStopped
from stepdistill.trainers.plans.build import build_trainer, resume
from stepdistill.trainers.plans.job import make_job

GAN = {"dmd2": {"fake_score_updates": 1, "gan": {"student_weight": 0.01}}}


class Plain:
    """A family of grey pictures without conditions, or with labels."""

    device = torch.device("cpu")

    def __init__(self, kind="label"):
        self.condition_kind = kind

    def encode_images(self, pixels):
        return pixels

    def encode_conditions(self, items):
        return {"label": torch.tensor(items)}


def image_set(count=10, broken=(), **more) -> ImageSet:
    """Picture i has the grey value i and the label i."""

    def read(index):
        if index in broken:
            raise UnreadablePicture(f"{index}.png: not a readable image (cut short); replace it")
        return np.full((2, 2, 1), index, dtype=np.uint8)

    return ImageSet("noise", read, count, list(range(count)), f"{count} {broken}", **more)


def drawn(source: RealSource, start: int, count: int) -> list[int]:
    """The pictures of a batch, by pixels, label, condition and index alike."""
    batch = source.batch(start, count)
    values = ((batch.samples[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert values == batch.items == batch.indices == batch.condition["label"].tolist()
    return values


# -- another picture ---------------------------------------------------------------------------------------


def test_the_next_picture_that_can_be_read_is_taken_with_its_own_label():
    whole = drawn(RealSource(Plain(), image_set(), None, 3), 0, 30)
    source = RealSource(Plain(), image_set(broken=(4, 5, 9), max_unreadable=0.3), None, 3)
    next_good = {4: 6, 5: 6, 9: 0}
    assert drawn(source, 0, 30) == [next_good.get(index, index) for index in whole]


def test_batches_do_not_depend_on_when_a_picture_is_noticed():
    expected = drawn(RealSource(Plain(), image_set(broken=(4, 5)), None, 3), 0, 40)
    late = RealSource(Plain(), image_set(broken=(4, 5)), None, 3)
    assert [index for start in (30, 20, 10, 0) for index in drawn(late, start, 10)] == [
        index for start in (30, 20, 10, 0) for index in expected[start : start + 10]
    ]
    known = image_set(broken=(4, 5))
    known.unreadable = {4: "a", 5: "b"}
    assert drawn(RealSource(Plain(), known, None, 3), 0, 40) == expected


def test_a_students_own_pictures_stand_in_for_each_other():
    source = RealSource(Plain(), image_set(broken=(4, 8)), None, 3, [2, 4, 6, 8])
    assert set(drawn(source, 0, 40)) == {2, 6}
    latents = torch.arange(10.0)[:, None, None, None] / 127.5 - 1
    images = image_set()
    images.unreadable = {4: "a", 8: "b"}
    assert set(drawn(RealSource(Plain(), images, latents, 3, [2, 4, 6, 8]), 0, 40)) == {2, 6}


def test_a_picture_is_noted_once(capsys):
    source = RealSource(Plain(), image_set(broken=(4,)), None, 3)
    drawn(source, 0, 50)
    assert capsys.readouterr().out == (
        "note: skipped, and another picture taken: 4.png: not a readable image (cut short); replace it\n"
    )


def test_where_none_can_be_read_it_ends():
    source = RealSource(Plain(), image_set(3, broken=(0, 1, 2)), None, 3)
    with pytest.raises(UserError, match="none of its images can be read"):
        source.batch(0, 1)


# -- the limit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "size", "limit"), [(0.0, 10_000, 0), (0.001, 10, 1), (0.001, 1999, 1), (0.001, 5000, 5), (0.5, 10, 5)]
)
def test_the_limit_is_a_share_and_at_least_one(share, size, limit):
    assert ImageSet("x", None, size, None, "", max_unreadable=share).limit == limit


def test_looking_finds_the_first_ones_once_in_a_process(monkeypatch):
    reads = []
    images = image_set(broken=(2, 8), max_unreadable=0.2)
    read = images._read
    images._read = lambda index: reads.append(index) or read(index)
    monkeypatch.setattr(data, "MOST_TRIED", 6)
    images.try_reading()
    assert images.unreadable == {2: "2.png: not a readable image (cut short); replace it"}
    images.try_reading()
    assert reads == list(range(6))
    images.try_reading(10)
    assert set(images.unreadable) == {2, 8}


def test_looking_refuses_more_than_the_limit_and_all():
    with pytest.raises(UserError, match=r"^2\.png: not a readable image"):
        image_set(broken=(2,), max_unreadable=0.0).try_reading()
    with pytest.raises(UserError, match=r"^3 of 10 pictures cannot be used: 2\.png, 5\.png, 7\.png; the first: 2\.png"):
        image_set(broken=(2, 5, 7), max_unreadable=0.2).try_reading()
    with pytest.raises(UserError, match=r"^0\.png: not a readable"):
        image_set(1, broken=(0,), max_unreadable=0.5).try_reading()


# -- readers -----------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    """Keep the header of a picture file and lose its end."""
    path.write_bytes(path.read_bytes()[: -len(path.read_bytes()) // 2])


def folder(root: Path, count: int = 6, side: int = 8) -> Path:
    """Grey noise, a folder for each of the labels 0, 1, 2."""
    generator = np.random.default_rng(0)
    for index in range(count):
        place = root / str(index % 3)
        place.mkdir(parents=True, exist_ok=True)
        picture = generator.integers(0, 255, (side, side), dtype=np.uint8)
        Image.fromarray(picture).save(place / f"{index}.png")
    return root


@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b"none"), lambda path: path.write_bytes(b"")])
def test_a_folder_tolerates_what_it_may(tmp_path, damage):
    root = folder(tmp_path / "set")
    damage(root / "1" / "4.png")
    images = load_images(ImagesSettings(folder=str(root)), (1, 8, 8), Conditions("label", range(3)))
    assert len(images) == 6
    assert list(images.unreadable) == [3]  # 0/0, 0/3, 1/1, 1/4
    with pytest.raises(UserError, match=r"4\.png: not a readable image"):
        load_images(ImagesSettings(folder=str(root), max_unreadable=0), (1, 8, 8))
    damage(root / "0" / "0.png")
    with pytest.raises(UserError, match=r"2 of 6 pictures cannot be used: .*0\.png, .*4\.png"):
        load_images(ImagesSettings(folder=str(root)), (1, 8, 8))


def test_a_dataset_tolerates_what_it_may(tmp_path):
    file = folder(tmp_path / "set", 1) / "0" / "0.png"
    column = [b"none", file.read_bytes(), file.read_bytes()]
    Dataset.from_dict({"image": column}).save_to_disk(tmp_path / "saved")
    images = load_images(ImagesSettings(dataset=str(tmp_path / "saved")), (1, 8, 8))
    assert list(images.unreadable) == [0]
    with pytest.raises(UserError, match=r"saved\[0\]: not a readable image"):
        load_images(ImagesSettings(dataset=str(tmp_path / "saved"), max_unreadable=0), (1, 8, 8))


def test_another_size_is_refused_before_a_run_whatever_is_tolerated(tmp_path):
    root = folder(tmp_path / "set")
    Image.new("L", (9, 8)).save(root / "0" / "z.png")
    with pytest.raises(UserError, match=r"z\.png: the image is 9x8, the teacher needs 8x8"):
        load_images(ImagesSettings(folder=str(root), max_unreadable=0.9), (1, 8, 8))


# -- runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    tiny.save_pixels(root / "label", "v", labels=3)
    tiny.save_stable_diffusion(root / "text")
    return root


def raw(teachers: Path, output: Path, images: dict, teacher: str = "label", **changes) -> dict:
    config = {
        "method": "dmd2",
        "output": str(output),
        "teacher": {"path": str(teachers / teacher)},
        "data": {"images": images},
        "train": {
            "updates": 6,
            "batch_size": 2,
            "sample_count": 2,
            "checkpoint_every": 100,
            "log_every": 1,
            "trackers": [],
        },
        "evaluation": {"enabled": False},
        **GAN,
    }
    return merge(config, changes)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def run_of(tmp_path: Path, raw: dict, *arguments):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    return stepdistill("distill", tmp_path / "config.yaml", *arguments)


def test_a_run_takes_another_picture_counts_and_names_it(teachers, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MOST_TRIED", 0)  # as of the 2,001st picture
    root = folder(tmp_path / "set")
    cut(root / "1" / "4.png")
    result = run_of(tmp_path, raw(teachers, tmp_path / "run", {"folder": str(root)}))
    assert result.code == 0, result.err
    assert f"note: skipped, and another picture taken: {root}/1/4.png: not a readable image" in result.out
    assert rows(tmp_path / "run")[-1]["unreadable"] == 1


def test_what_is_found_before_a_run_is_in_its_plan(teachers, tmp_path):
    root = folder(tmp_path / "set")
    cut(root / "1" / "4.png")
    result = run_of(tmp_path, raw(teachers, tmp_path / "run", {"folder": str(root)}), "--dry-run")
    assert result.code == 0, result.err
    assert f"skipped, up to 1 are: {root}/1/4.png: not a readable image" in result.out


@pytest.mark.parametrize(("limit", "broken"), [(0, 1), (0.2, 2)])
def test_above_the_limit_a_run_is_saved_ends_in_one_line_and_goes_on(teachers, tmp_path, monkeypatch, limit, broken):
    monkeypatch.setattr(data, "MOST_TRIED", 0)
    root = folder(tmp_path / "set")
    good = {path: path.read_bytes() for path in sorted(root.rglob("*.png"))[:broken]}
    for path in good:
        cut(path)
    config = raw(teachers, tmp_path / "run", {"folder": str(root), "max_unreadable": limit})
    result = run_of(tmp_path, config)
    assert result.code == 2
    assert f"data.images.max_unreadable allows {int(limit * 6)}" in result.error
    assert str(next(iter(good))) in result.error
    assert "go on with --resume (saved at student update " in result.error
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is not None
    before = len(rows(tmp_path / "run"))
    assert 0 < before < 6
    again = run_of(tmp_path, merge(config, {"data": {"images": {"max_unreadable": 0.9}}}), "--resume")
    assert again.code == 0, again.err
    assert len(rows(tmp_path / "run")) == 6


def test_a_run_that_was_resumed_sees_what_one_without_a_stop_does(teachers, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MOST_TRIED", 0)
    root = folder(tmp_path / "set")
    cut(root / "1" / "4.png")

    def trained(output: Path, stop: int | None) -> dict[str, torch.Tensor]:
        config = raw(teachers, output, {"folder": str(root)}, train={"max_passes": stop})
        run = RunFolder(output)
        trainer = build_trainer(make_job(config), run)
        run.create(trainer.config, 0)
        trainer.fit()
        if stop is not None:
            trainer = build_trainer(make_job(raw(teachers, output, {"folder": str(root)})), run)
            resume(trainer, run)
            trainer.fit()
        assert set(trainer.parts.real.images.unreadable) == {3}
        return trainer.roles.student.state_dict()

    whole, parts = trained(tmp_path / "whole", None), trained(tmp_path / "parts", 40)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_latents_leave_out_what_cannot_be_read(teachers, tmp_path):
    root = folder(tmp_path / "set", side=16)
    for path in root.rglob("*.png"):
        path.with_suffix(".txt").write_text(path.stem)
    cut(root / "1" / "4.png")
    images, prompts = {"folder": str(root)}, {"prompts_from_images": True}
    job = make_job(raw(teachers, tmp_path / "run", images, "text", data=prompts))
    for _ in range(2):  # made, and read
        trainer = build_trainer(job, None)
        batch = trainer.parts.real.batch(0, 60)
        assert set(batch.items) == {"0", "1", "2", "3", "5"}
        assert trainer.parts.real.latents.flatten(1).abs().sum(1).nonzero().flatten().tolist() == [0, 1, 2, 4, 5]


def test_pairs_take_another_pair(teachers, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MOST_TRIED", 0)
    for side in ("winner", "loser"):
        folder(tmp_path / "pairs" / side)
    cut(tmp_path / "pairs" / "loser" / "1" / "4.png")
    settings = {"mode": "pairs", "pairs": {"folder": str(tmp_path / "pairs")}, "probe": 2}
    config = {
        **raw(teachers, tmp_path / "run", {"npz": "unused"}),
        "method": "pso",
        "pso": settings,
        "data": {},
        "sampler": {"transition": "ode"},
    }
    del config["dmd2"]
    trainer = build_trainer(make_job(config), None)
    seen = [index for _ in range(12) for index in trainer.method.next_batch().indices]
    assert set(seen) == {0, 1, 2, 4, 5}
    assert set(trainer.parts.preferences.pairs.sets[1].unreadable) == {3}
    trainer.parts.preferences.pairs.sets[1].limit = 0
    with pytest.raises(RunStopped, match=r"pso\.pairs: .*4\.png: not a readable image"):
        trainer._maybe_stop()


def test_what_is_tolerated_may_change_on_resume():
    for section, images in (("data", "images"), ("pso", "pairs")):
        a, b = ({section: {images: {"folder": "x", "max_unreadable": share}}} for share in (0.1, 0.2))
        assert fixed_part(a) == fixed_part(b)
        assert fixed_part(a)[section][images] == {"folder": "x"}
