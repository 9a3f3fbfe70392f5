"""What a run says of its data before it trains: the plan's lines, and the run's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml
from console import Result, stepdistill
from PIL import Image

from stepdistill.config import apply_overrides, merge, read_yaml
from stepdistill.trainers.plans.build import check_fit, load_teacher
from stepdistill.trainers.plans.job import make_job

GAN = {"dmd2": {"fake_score_updates": 1, "gan": {"student_weight": 0.01}}}
CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("plans")
    tiny.save_pixels(root / "label", "v", labels=3)
    tiny.save_stable_diffusion(root / "text")
    return root


def raw(root: Path, folder: Path, teacher: str, **changes) -> dict:
    config = {
        "method": "dmd2",
        "output": str(folder / "run"),
        "teacher": {"path": str(root / teacher)},
        "train": {"updates": 1, "batch_size": 2, "sample_count": 2, "trackers": []},
        "evaluation": {"enabled": False},
        "dmd2": {"fake_score_updates": 1},
    }
    return merge(config, changes)


def distill(root: Path, folder: Path, teacher: str, *arguments: str, **changes) -> Result:
    (folder / "config.yaml").write_text(yaml.safe_dump(raw(root, folder, teacher, **changes)))
    return stepdistill("distill", folder / "config.yaml", *arguments)


LONG = "a photograph of a cat that sits on a red mat"
"""More than the 16 tokens that the tiny encoder reads: it knows single letters."""


def test_a_plan_and_a_run_show_the_first_prompts_and_count_the_long_ones(root, tmp_path):
    (tmp_path / "p.txt").write_text(f"a cat\n# a dog\n{LONG}\na bus\na cat\n{LONG}\n")
    expected = [
        f'6 prompts: "a cat", "# a dog", "{LONG}"',
        "1 begin with '#' and are prompts like all others, such as \"# a dog\"",
        "2 are repeated",
        f'2 prompts are longer than the text encoder reads, and are cut: "{LONG}"',
    ]
    dry = distill(root, tmp_path, "text", "--dry-run", data={"prompts": str(tmp_path / "p.txt")})
    assert dry.code == 0, dry.err
    lines = dry.out.splitlines()
    start = lines.index(f"data      {expected[0]}")
    assert [line.strip() for line in lines[start + 1 : start + 4]] == expected[1:]
    run = distill(root, tmp_path, "text", data={"prompts": str(tmp_path / "p.txt")})
    assert run.code == 0, run.err
    assert all(line in run.out.splitlines() for line in expected)


def test_only_prompts_beyond_the_encoders_length_are_cut(root):
    family = load_teacher(make_job(raw(root, root, "text", data={"prompts": "x"})).config)
    assert family.prompts_cut(["a" * 14, "a" * 15, "", "b"]) == [1]  # start and end are tokens too


def test_a_plan_shows_the_labels_of_folders(root, tmp_path):
    for name in ("cat", "ant", "bee"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "set" / name / "a.png")
    dry = distill(root, tmp_path, "label", "--dry-run", data={"images": {"folder": str(tmp_path / "set")}}, **GAN)
    assert dry.code == 0, dry.err
    expected = f"data      images {tmp_path / 'set'}: 3 pictures of labels 0 ant (1), 1 bee (1), 2 cat (1)"
    assert expected in dry.out.splitlines()


def test_a_run_on_captions_of_its_own_images_is_shown_and_evaluated(root, tmp_path):
    """The captions are the prompts; one picture has two of them."""
    rows = ['{"file_name": "0.png", "text": ["a cat", "one cat"]}', '{"file_name": "1.png", "text": "a dog"}']
    (tmp_path / "set").mkdir()
    for index in range(2):
        Image.fromarray(np.full((16, 16, 3), 40 * index, dtype=np.uint8)).save(tmp_path / "set" / f"{index}.png")
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(rows))
    changes = {"data": {"images": {"folder": str(tmp_path / "set")}, "prompts_from_images": True}, **GAN}
    run = distill(root, tmp_path, "text", **changes)
    assert run.code == 0, run.err
    assert '2 prompts: "a cat", "a dog"' in run.out
    assert f'images {tmp_path / "set"}: 2 pictures, the first is of "a cat"' in run.out
    assert "data.images is not used" not in run.out
    evaluated = stepdistill("evaluate", tmp_path / "run")
    assert evaluated.code == 0, evaluated.err
    assert (tmp_path / "run" / "grid.png").is_file()


def test_captions_that_are_cut_are_counted(root, tmp_path):
    (tmp_path / "set").mkdir()
    for name, caption in (("a", "a cat"), ("b", LONG)):
        Image.new("RGB", (16, 16)).save(tmp_path / "set" / f"{name}.png")
        (tmp_path / "set" / f"{name}.txt").write_text(caption)
    (tmp_path / "p.txt").write_text("a cat\n")
    changes = {"data": {"images": {"folder": str(tmp_path / "set")}, "prompts": str(tmp_path / "p.txt")}, **GAN}
    job = make_job(raw(root, tmp_path, "text", **changes))
    family = load_teacher(job.config)
    assert check_fit(job, family).lines(family) == [
        '1 prompts: "a cat"',
        f'images {tmp_path / "set"}: 2 pictures, the first is of "a cat"',
        f'1 captions are longer than the text encoder reads, and are cut: "{LONG}"',
    ]


def test_negative_prompts_are_shown(root, tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n")
    (tmp_path / "away.csv").write_text("text,other\nblurry,x\n# dark,y\n,z\n")
    changes = {
        "data": {"prompts": str(tmp_path / "p.txt")},
        "method": "swiftbrush",
        "swiftbrush": {"negatives": {"prompts": str(tmp_path / "away.csv")}},
    }
    config = raw(root, tmp_path, "text", **changes)
    del config["dmd2"]
    job = make_job(config)
    family = load_teacher(job.config)
    assert check_fit(job, family).lines(family)[1:] == [
        '2 negative prompts: "blurry", "# dark"',
        "1 of 3 rows are empty and are passed over",
        "1 begin with '#' and are prompts like all others, such as \"# dark\"",
    ]


def test_images_for_their_captions_alone_are_used(root, tmp_path):
    """A method without real images reads the captions and no picture."""
    (tmp_path / "set").mkdir()
    Image.new("RGB", (999, 5)).save(tmp_path / "set" / "a.png")  # not of the teacher's size
    (tmp_path / "set" / "a.txt").write_text("a cat")
    changes = {"data": {"images": {"folder": str(tmp_path / "set")}, "prompts_from_images": True}}
    job = make_job(raw(root, tmp_path, "text", **changes))
    assert check_fit(job, load_teacher(job.config)).items == ["a cat"]


def test_the_shipped_pick_a_pic_config_reads_such_a_dataset(root, tmp_path):
    """Its pictures are plain bytes of a column."""
    import io

    from datasets import Dataset

    file = io.BytesIO()
    Image.new("RGB", (20, 30), "red").save(file, "JPEG")
    columns = {"jpg_0": [file.getvalue()] * 3, "jpg_1": [file.getvalue()] * 3, "caption": ["a", "b", "c"]}
    Dataset.from_dict({**columns, "label_0": [1.0, 0.5, 0.0]}).save_to_disk(str(tmp_path / "set"))
    (tmp_path / "p.txt").write_text("a cat\n")
    overrides = [
        f"output={tmp_path}/run",
        f"teacher.path={root}/text",
        f"data.prompts={tmp_path}/p.txt",
        f"pso.pairs.dataset={tmp_path}/set",
        "sampler.transition=ode",
        "train.updates=1",
        "train.batch_size=2",
        "train.gradient_accumulation=1",
        "train.precision=float32",
        "train.sample_count=1",
        "train.trackers=[]",
        "evaluation.enabled=false",
        "pso.probe=1",
    ]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(apply_overrides(read_yaml(CONFIGS / "pso" / "sd15_pairs.yaml"), overrides)))
    result = stepdistill("distill", config)
    assert result.code == 0, result.err
    assert f"pairs {tmp_path}/set: 2 of 3, 1 are ties or without a condition" in result.out
    assert (tmp_path / "run" / "student" / "model_index.json").is_file()
    assert len(list((tmp_path / "run" / "cache").glob("latents-*.safetensors"))) == 2  # of each side its own
