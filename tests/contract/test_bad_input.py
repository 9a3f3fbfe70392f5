"""Bad input ends in one line that names the thing and the remedy, exit code 2, and nothing half-written.

A new method, family or setting joins by adding rows: what to change in a good config, and what the line must say.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml
from console import Result, stepdistill
from PIL import Image

from stepdistill.config import merge

GAN = {"gan": {"student_weight": 0.01}}


@dataclass(frozen=True)
class Bad:
    """``changes`` to the good config of ``teacher`` (``{root}`` is the folder of all files), and ``says``.

    ``dry``: whether --dry-run must say the same.
    """

    changes: dict
    says: tuple[str, ...]
    teacher: str = "label"
    overrides: tuple[str, ...] = ()
    dry: bool = True


def row(changes: dict, *says: str, **more) -> Bad:
    return Bad(changes, says, **more)


# Answered before any weight is loaded: these rows' teacher does not exist.
CONFIGS = {
    "unknown key": row({"optimiser": {}}, "unknown key 'optimiser'", "known keys here", "optimizer"),
    "unknown key, deep": row({"train": {"update": 3}}, "unknown key 'train.update'", "updates"),
    "wrong type": row({"train": {"updates": "all"}}, "train.updates = 'all'", "valid integer"),
    "out of range": row({"train": {"batch_size": 0}}, "train.batch_size = 0", "greater than or equal to 1"),
    "not one of": row(
        {"sampler": {"transition": "ddim"}}, "sampler.transition = 'ddim'", "'renoise', 'ode', 'tcd' or 'ancestral'"
    ),
    "override": row({}, "train.updates = -3", "greater than or equal to 1", overrides=("train.updates=-3",)),
    "override without value": row({}, "'train.updates'", "key=value", overrides=("train.updates",)),
    "unknown method": row({"method": "dmd9"}, "method = 'dmd9'", "methods are dmd2"),
    "method of wrong type": row({"method": ["dmd2"]}, "method = ['dmd2']", "methods are dmd2"),
    "missing parent": row({"inherits": "gone.yaml"}, "inherits", "gone.yaml does not exist"),
    "prompts twice": row(
        {"data": {"prompts": "a", "prompt_dataset": {"name": "b"}}}, "data: set prompts or prompt_dataset, not both"
    ),
    "images twice": row({"data": {"images": {"folder": "a", "npz": "b"}}}, "exactly one of folder, npz, dataset"),
    "images nowhere": row({"data": {"images": {"resize": True}}}, "exactly one of folder, npz, dataset"),
    "extractor alone": row({"evaluation": {"extractor": "x"}}, "extractor and reference go together", "both"),
    "dmd2: gan without images": row({"dmd2": GAN}, "dmd2.gan.student_weight > 0 needs real images", "data.images"),
    "dmd2: levels": row({"dmd2": {"min_level": 9, "max_level": 8}}, "min_level = 9 is above max_level = 8"),
    "dmd2: real inputs, one step": row(
        {"dmd2": {"multistep_input": "real"}, "data": {"images": {"npz": "x"}}},
        "dmd2.multistep_input = real needs sampler.steps above 1",
    ),
    "dmd2: guidance below 1": row({"dmd2": {"guidance_scale": 0}}, "dmd2.guidance_scale = 0"),
}

STAGES = [{"name": "a"}, {"name": "b"}]
ONLINE = {"method": "pso", "pso": {"rewards": [{"reward": "judges:Brightness"}]}, "sampler": {"steps": 4}}

CONFIGS |= {
    "msd: students missing": row({"msd": {}}, "msd: key 'students' is missing"),
    "msd: no section": row({"msd": None}, "msd: key 'students' is missing"),
    "msd: no students": row({"msd": {"students": 0}}, "msd: students = 0", "greater than or equal to 1"),
    "msd: unknown key": row({"msd": {"students": 2, "count": 3}}, "msd: unknown key 'count'", "partition"),
    "msd: unknown partition": row({"msd": {"students": 2, "partition": "even"}}, "partition = 'even'", "'medians'"),
    "msd: table with order": row(
        {"msd": {"students": 2, "table": [[0], [1, 2]]}}, "table goes with partition = table", "both or neither"
    ),
    "msd: table of another number": row(
        {"msd": {"students": 3, "partition": "table", "table": [[0], [1, 2]]}}, "table has 2 lists for students = 3"
    ),
    "msd: three by medians": row({"msd": {"students": 3, "partition": "medians"}}, "medians makes 2, 4, 8", "kmeans"),
    "msd: shared after own": row(
        {"msd": {"students": 2}, "stages": [STAGES[0], {**STAGES[1], "shared": True}]},
        "stages: those with shared = true come before the students' own",
    ),
    "msd: all shared": row(
        {"msd": {"students": 2}, "stages": [{**stage, "shared": True} for stage in STAGES]},
        "stages: all are shared; at least the last one must be each student's own",
    ),
    "msd: a bad stage": row({"msd": {"students": 2}, "stages": [{"name": "a", "train": {"x": 1}}]}, "stages[1] (a)"),
    "msd: a student too many": row(
        {"msd": {"students": 2}}, "--student 2: students are 0..1, or shared", overrides=("--student", "2")
    ),
    "msd: a student of no number": row(
        {"msd": {"students": 2}}, "--student first: students are 0..1, or shared", overrides=("--student", "first")
    ),
    "msd: nothing shared": row(
        {"msd": {"students": 2}}, "--student shared: no stage has shared = true", overrides=("--student", "shared")
    ),
    "msd: --student without it": row(
        {}, "--student 0: the config has one student", "section msd", overrides=("--student", "0")
    ),
    "pso: online without rewards": row({"method": "pso"}, "pso.mode = online needs a judge: set pso.rewards"),
    "pso: online, one step": row(
        merge(ONLINE, {"sampler": {"steps": 1}}), "pso.mode = online: a rollout of one step", "set pso.rollout_steps"
    ),
    "pso: online, rollouts of one step": row(
        merge(ONLINE, {"pso": {"rollout_steps": 1}}), "a rollout of one step has no stochastic move"
    ),
    "pso: online, deterministic": row(
        merge(ONLINE, {"sampler": {"transition": "ode"}}),
        "a deterministic sampler (transition = ode) has no density",
        "set pso.rollout_transition=renoise",
    ),
    "pso: online, tcd without noise": row(
        merge(ONLINE, {"sampler": {"transition": "tcd", "eta": 0}}), "a deterministic sampler (transition = tcd)"
    ),
    "pso: a hinge": row(
        merge(ONLINE, {"pso": {"rewards": [{"reward": "judges:Brightness", "hinge": 1.0}]}}),
        "a hinge has no meaning for a comparison; remove it",
    ),
    "pso: pairs without mode": row(
        merge(ONLINE, {"pso": {"pairs": {"folder": "x"}}}), "pairs goes with mode = pairs; set both or neither"
    ),
    "pso: mode without pairs": row({"method": "pso", "pso": {"mode": "pairs"}}, "pairs goes with mode = pairs"),
    "pso: targets without images": row(
        {"method": "pso", "pso": {"mode": "targets"}}, "pso.mode = targets needs images: set data.images"
    ),
    "pso: plain loss without targets": row(
        merge(ONLINE, {"pso": {"loss": "diffusion"}}), "loss = diffusion needs mode = targets, not online"
    ),
    "pso: a student from elsewhere": row(
        merge(ONLINE, {"roles": {"student_from": "x"}}), "roles.student_from: pso tunes the model of teacher.path"
    ),
    "pso: a LoRA below, which the reference would not have": row(
        merge(ONLINE, {"roles": {"lora_under": "x"}}), "roles.lora_under: pso tunes the model of teacher.path"
    ),
    "pso: another size": row(
        merge(ONLINE, {"roles": {"weights": "full", "network": {"layers_per_block": 1}}}),
        "roles.network: pso tunes the model of teacher.path",
    ),
    "pso: pairs of several students": row(
        merge(ONLINE, {"pso": {"mode": "pairs", "pairs": {"folder": "x"}}, "msd": {"students": 2}}),
        "msd: pso's pairs are not divided among students",
        "online or targets",
    ),
}

TEACHERS = {
    "missing": row({"teacher": {"path": "{root}/gone"}}, "teacher {root}/gone: no such folder", "hub id"),
    "a file": row({"teacher": {"path": "{root}/prompts.txt"}}, "teacher {root}/prompts.txt", "give a diffusers folder"),
    "unknown asset": row({"teacher": {"path": "asset:none"}}, "asset:none: no such asset; shipped are"),
    "not a diffusers folder": row({"teacher": {"path": "{root}/pictures"}}, "no model_index.json in it"),
    "index is not JSON": row(
        {"teacher": {"path": "{root}/bad_index"}}, "model_index.json: cannot be read (it is not valid JSON, line 1"
    ),
    "unsupported class": row(
        {"teacher": {"path": "{root}/flux"}}, "a FluxPipeline is not supported", "UNet2DModel or UNet2DConditionModel"
    ),
    "broken weights": row({"teacher": {"path": "{root}/broken"}}, "teacher {root}/broken: cannot be loaded"),
    "scheduler missing": row({"teacher": {"path": "{root}/no_scheduler"}}, "{root}/no_scheduler: cannot be loaded"),
    "another family": row(
        {"teacher": {"family": "stable_diffusion"}}, "teacher.family = stable_diffusion", "is of family unet2d"
    ),
    "guided without a null label": row(
        {"dmd2": {"guidance_scale": 2.0}}, "no null label", "guidance_scale to 1", teacher="no_null"
    ),
    "label too high": row({"data": {"labels": [0, 3]}}, "data.labels: 3 is outside 0..2"),
    "label negative": row({"data": {"labels": [-1]}}, "data.labels: -1 is outside 0..2"),
    "labels of an unconditional": row({"data": {"labels": [0]}}, "takes no labels; remove the key", teacher="plain"),
    "labels of a text teacher": row({"data": {"labels": [0]}}, "takes prompts; remove the key", teacher="text"),
    "prompts of a label teacher": row(
        {"data": {"prompts": "{root}/prompts.txt"}}, "data.prompts", "takes no prompts; remove the key"
    ),
    "shown prompts of a label teacher": row(
        {"data": {"shown": ["a cat"]}}, "data.shown", "takes no prompts; remove the key"
    ),
    "no prompts": row(
        {"data": {"prompts": None}},
        "set data.prompts (a file), data.prompt_dataset or data.prompts_from_images",
        teacher="text",
    ),
    "captions of a label teacher": row(
        {"data": {"prompts_from_images": True, "images": {"npz": "{root}/good.npz"}}},
        "data.prompts_from_images",
        "takes no prompts; remove the key",
    ),
    "captions that are none": row(
        {"data": {"prompts": None, "prompts_from_images": True, "images": {"npz": "{root}/good.npz"}}},
        "data.images: {root}/good.npz has no captions",
        teacher="text",
    ),
    "prompts of another kind": row(
        {"data": {"prompts": "{root}/label/model_index.json"}}, "a JSON object without one list", teacher="text"
    ),
    "a column of lines": row(
        {"data": {"prompt_column": "text"}}, "data.prompt_column = text: {root}/prompts.txt has lines", teacher="text"
    ),
    "prompts gone": row({"data": {"prompts": "{root}/gone.txt"}}, "{root}/gone.txt: no such file", teacher="text"),
    "prompts empty": row({"data": {"prompts": "{root}/blank.txt"}}, "{root}/blank.txt: no prompts", teacher="text"),
    "flow, several steps, fresh noise": row(
        {"sampler": {"steps": 4}}, "sampler.transition = renoise", "set sampler.transition=ode", teacher="flow"
    ),
    "flow, a start": row({"sampler": {"start": 500}}, "sampler.start: a flow student", "remove", teacher="flow"),
    "tcd in a pipeline without eta": row(
        {"sampler": {"steps": 2, "transition": "tcd", "eta": 0.5}}, "sampler.eta = 0.5", "0.3"
    ),
    "tcd on flow": row({"sampler": {"transition": "tcd"}}, "sampler.transition = tcd", "only VP", teacher="flow"),
    "fewer steps too": row({"sampler": {"steps": 4, "also_steps": [3]}}, "also_steps: 3", "divisor of steps = 4"),
    "start outside": row({"sampler": {"start": 1000}}, "sampler.start = 1000", "1 to 999"),
    "steps that do not divide": row({"sampler": {"steps": 3, "start": 10}}, "sampler.steps = 3", "divisor"),
    "pso: another transition than the model's": row(
        merge(ONLINE, {"sampler": {"transition": "renoise"}}),
        "sampler.transition = renoise: the scheduler of {root}/label, DDIMScheduler, moves by ode",
        "set sampler.transition=ode",
    ),
    "msd: more students than labels": row(
        {"msd": {"students": 4}}, "msd.students = 4: there are only 3 labels; use fewer"
    ),
    "msd: a table of too few": row(
        {"msd": {"students": 2, "partition": "table", "table": [[0], [1]]}},
        "msd.table: label 2 belongs to no student; add it to one",
    ),
    "msd: a table of too many": row(
        {"msd": {"students": 2, "partition": "table", "table": [[0], [1, 2, 3]]}},
        "msd.table: label 3 is not one of the run's 0..2",
    ),
    "msd: a label twice": row(
        {"msd": {"students": 2, "partition": "table", "table": [[0], [1, 2, 0]]}}, "msd.table: label 0 stands twice"
    ),
    "msd: labels by prompts' partition": row(
        {"msd": {"students": 2, "partition": "medians"}}, "msd.partition = medians: for a teacher of labels use one of"
    ),
    "msd: prompts by labels' partition": row(
        {"msd": {"students": 2}}, "msd.partition = order: for a teacher of prompts use one of medians", teacher="text"
    ),
    "msd: no conditions": row({"msd": {"students": 2}}, "takes no conditions", teacher="plain"),
    "msd: more students than prompts": row(
        {"msd": {"students": 4, "partition": "medians"}}, "there are only 2 prompts; use fewer", teacher="text"
    ),
    "lora targets": row(
        {"roles": {"weights": "shared", "lora": {"targets": ["to_x"]}}},
        "roles.lora.targets: the teacher has no module named 'to_x'",
        dry=False,
    ),
}

IMAGES = {
    "npz missing": row({"npz": "{root}/gone.npz"}, "{root}/gone.npz: no such file", "data.images.npz"),
    "npz unreadable": row({"npz": "{root}/prompts.txt"}, "{root}/prompts.txt: not a readable .npz"),
    "npz of another size": row({"npz": "{root}/large.npz"}, "9x9, the teacher needs 8x8", "data.images.resize=true"),
    "npz without labels": row({"npz": "{root}/unlabelled.npz"}, "has no labels, which this teacher's images need"),
    "npz with too high a label": row({"npz": "{root}/labels.npz"}, "labels 0..3 are outside 0..2"),
    "folder missing": row({"folder": "{root}/gone"}, "{root}/gone: no such folder", "data.images.folder"),
    "folder without images": row({"folder": "{root}/flux"}, "{root}/flux: no images in it"),
    "folder with another size": row(
        {"folder": "{root}/pictures"}, "0.png: the image is 16x16", "needs 8x8", "resize", teacher="plain"
    ),
    "folder with a broken file": row(
        {"folder": "{root}/spoilt", "max_unreadable": 0},
        "1.png: not a readable image",
        "remove or replace",
        teacher="plain",
    ),
    "folder without captions": row(
        {"folder": "{root}/pictures"},
        "{root}/pictures has no captions, which this teacher's images need",
        teacher="text",
    ),
    "folder without classes": row(
        {"folder": "{root}/small"}, "{root}/small has no labels", "put the pictures into a folder for each class"
    ),
    "folder of other classes": row({"folder": "{root}/classes"}, "2 classes by name (ant, bee)", "the teacher knows 3"),
    "folder without the column": row(
        {"folder": "{root}/small", "label_column": "kind"}, "data.images.label_column = kind", "no metadata.jsonl"
    ),
    "captions for a label teacher": row(
        {"folder": "{root}/small", "caption_column": "text"}, "need labels; name their column with", ".label_column"
    ),
    "no colour": row(
        {"npz": "{root}/good.npz", "background": "whitish"}, "data.images.background: whitish is no colour"
    ),
    "dataset missing": row({"dataset": "{root}/gone"}, "dataset '{root}/gone' (split 'train') cannot be loaded"),
}


def fill(value, root: Path):
    """``{root}`` in every string of a nested value."""
    if isinstance(value, dict):
        return {k: fill(v, root) for k, v in value.items()}
    return value.replace("{root}", str(root)) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Teachers and data, good and bad."""
    root = tmp_path_factory.mktemp("bad")
    tiny.save_pixels(root / "label", "v", labels=3, null=True)
    tiny.save_pixels(root / "no_null", "v", labels=3)
    tiny.save_pixels(root / "plain", "v")
    tiny.save_pixels(root / "flow", "flow", labels=3)
    tiny.save_stable_diffusion(root / "text")
    for name in ("bad_index", "broken", "no_scheduler"):
        shutil.copytree(root / "label", root / name)
    (root / "bad_index" / "model_index.json").write_text("{")
    weights = root / "broken" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    shutil.rmtree(root / "no_scheduler" / "scheduler")
    (root / "flux").mkdir()
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (root / "flux" / "model_index.json").write_text(json.dumps(index))

    generator = np.random.default_rng(0)
    small = generator.integers(0, 255, (4, 8, 8), dtype=np.uint8)
    np.savez(root / "good.npz", images=small, labels=np.arange(4) % 3)
    np.savez(root / "large.npz", images=np.zeros((4, 9, 9), np.uint8), labels=np.zeros(4, int))
    np.savez(root / "unlabelled.npz", images=small)
    np.savez(root / "labels.npz", images=small, labels=np.arange(4))
    for folder, side in (("pictures", 16), ("spoilt", 8), ("small", 8), ("classes/ant", 8), ("classes/bee", 8)):
        (root / folder).mkdir(parents=True)
        for index in range(2):
            picture = generator.integers(0, 255, (side, side, 3), dtype=np.uint8)
            Image.fromarray(picture).save(root / folder / f"{index}.png")
    (root / "spoilt" / "1.png").write_bytes(b"spoilt")
    (root / "prompts.txt").write_text("a cat\na dog\n")
    (root / "blank.txt").write_text("\n \n")
    return root


@dataclass
class Try:
    """A good config in a folder of its own, to be spoilt."""

    root: Path
    folder: Path
    teacher: str = "label"
    raw: dict = field(init=False)

    def __post_init__(self):
        data = {"prompts": str(self.root / "prompts.txt")} if self.teacher == "text" else {}
        self.raw = {
            "method": "dmd2",
            "output": str(self.folder / "run"),
            "teacher": {"path": str(self.root / self.teacher)},
            "data": data,
            "train": {"updates": 2, "batch_size": 2, "sample_count": 2, "checkpoint_every": 1, "trackers": []},
            "evaluation": {"enabled": False},
            "dmd2": {"fake_score_updates": 1},
        }

    @property
    def output(self) -> Path:
        return Path(self.raw["output"])

    def run(self, changes: dict | None = None, *arguments: str) -> Result:
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(merge(self.raw, fill(changes or {}, self.root))))
        return stepdistill("distill", path, *arguments)


def tree(path: Path) -> dict[str, str] | None:
    """Every file under ``path`` with its digest, None where there is nothing."""
    if not path.exists():
        return None
    files = [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def assert_refused(attempt: Try, result: Result, says: tuple[str, ...], before=None) -> None:
    assert result.code == 2, result.err
    for part in says:
        assert fill(part, attempt.root) in result.error
    assert tree(attempt.output) == before
    assert not [p for p in attempt.folder.rglob("*") if p.name.endswith(".tmp")]


def check_row(root: Path, folder: Path, bad: Bad, changes: dict) -> None:
    attempt = Try(root, folder, bad.teacher)
    result = attempt.run(changes, *bad.overrides)
    assert_refused(attempt, result, bad.says)
    if bad.dry:
        dry = attempt.run(changes, *bad.overrides, "--dry-run")
        assert (dry.code, dry.error) == (2, result.error)
        assert not attempt.output.exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name, root, tmp_path):
    check_row(root, tmp_path, CONFIGS[name], merge({"teacher": {"path": "{root}/gone"}}, CONFIGS[name].changes))


@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_and_conditions(name, root, tmp_path):
    check_row(root, tmp_path, TEACHERS[name], TEACHERS[name].changes)


@pytest.mark.parametrize("name", IMAGES)
def test_images(name, root, tmp_path):
    bad = IMAGES[name]
    check_row(root, tmp_path, bad, {"dmd2": GAN, "data": {"images": bad.changes}})


def test_the_good_configs_are_good(root, tmp_path):
    """So that a row fails for its own reason."""
    for teacher in ("label", "no_null", "plain", "flow", "text"):
        result = Try(root, tmp_path, teacher).run({}, "--dry-run")
        assert result.code == 0, result.err
    gan = {"dmd2": GAN, "data": {"images": {"npz": "{root}/good.npz"}}}
    several = {"msd": {"students": 2}, "stages": [{**STAGES[0], "shared": True}, STAGES[1]]}
    tuned = merge(ONLINE, {"sampler": {"transition": "ode"}, "pso": {"rollout_transition": "renoise"}})
    for changes in (gan, several, tuned):
        result = Try(root, tmp_path).run(changes, "--dry-run")
        assert result.code == 0, result.err
    result = Try(root, tmp_path, "text").run({"msd": {"students": 2, "partition": "medians"}}, "--dry-run")
    assert result.code == 0, result.err


@pytest.mark.parametrize("content", [None, b"a: [1", b"\xff\xfe", b"- 1"])
def test_config_files(content, tmp_path):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    result = stepdistill("distill", path)
    assert result.code == 2
    assert str(path) in result.error


# -- output folders and checkpoints ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory) -> Try:
    """A run of two updates."""
    attempt = Try(root, tmp_path_factory.mktemp("finished"))
    result = attempt.run()
    assert result.code == 0, result.err
    return attempt


@pytest.fixture
def held(finished, root, tmp_path) -> Try:
    """A copy of the finished run."""
    shutil.copytree(finished.output, tmp_path / "run")
    return Try(root, tmp_path)


@pytest.mark.parametrize(
    ("changes", "arguments", "says"),
    [
        ({}, (), ("holds a run", "--resume", "output=FOLDER")),
        ({"seed": 5}, ("--resume",), ("its config differs: seed (0 there, 5 now)", "output=FOLDER")),
        ({"teacher": {"path": "{root}/plain"}}, ("--resume",), ("its config differs: teacher.path",)),
    ],
)
def test_an_output_folder_that_holds_another_run(held, changes, arguments, says):
    before = tree(held.output)
    assert_refused(held, held.run(changes, *arguments), says, before)


@pytest.mark.parametrize("arguments", [(), ("--resume",)])
def test_an_output_folder_of_something_else(root, tmp_path, arguments):
    attempt = Try(root, tmp_path)
    attempt.output.mkdir()
    (attempt.output / "thesis.tex").write_text("years")
    before = tree(attempt.output)
    assert_refused(attempt, attempt.run({}, *arguments), ("not empty and holds no run; choose another",), before)


def test_an_output_that_is_a_file_or_lies_under_one(root, tmp_path):
    attempt = Try(root, tmp_path)
    attempt.output.write_text("")
    assert_refused(attempt, attempt.run(), ("that is a file; name a folder",), tree(attempt.output))
    below = {"output": str(attempt.output / "deeper")}
    assert_refused(attempt, attempt.run(below), ("deeper: ", "run is a file; name a folder"), tree(attempt.output))


def spoil_weights(newest: Path, root: Path) -> None:
    file = newest / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")


def foreign_state(newest: Path, root: Path) -> None:
    (newest / "state.json").write_text(json.dumps({"epoch": 3}))


def other_method(newest: Path, root: Path) -> None:
    state = json.loads((newest / "state.json").read_text())
    state["meta"]["method"] = "other"
    del state["sha256"]
    (newest / "state.json").write_text(json.dumps(state))


def other_counters(newest: Path, root: Path) -> None:
    state = json.loads((newest / "state.json").read_text())
    state["meta"]["counters"] = 3
    del state["sha256"]
    (newest / "state.json").write_text(json.dumps(state))


def changed_counter(newest: Path, root: Path) -> None:
    state = json.loads((newest / "state.json").read_text())
    state["meta"]["counters"]["student"] -= 1
    (newest / "state.json").write_text(json.dumps(state))


def counter_of_words(newest: Path, root: Path) -> None:
    state = json.loads((newest / "state.json").read_text())
    state["meta"]["counters"]["student"] = "two"
    del state["sha256"]
    (newest / "state.json").write_text(json.dumps(state))


def files_elsewhere(newest: Path, root: Path) -> None:
    state = json.loads((newest / "state.json").read_text())
    state["files"] = {f"../{newest.name}/{name}": digest for name, digest in state["files"].items()}
    del state["sha256"]
    (newest / "state.json").write_text(json.dumps(state))


def other_teacher(newest: Path, root: Path) -> None:
    """A whole checkpoint of a run with another teacher."""
    attempt = Try(root, newest.parent.parent.parent / "elsewhere", "plain")
    attempt.folder.mkdir()
    assert attempt.run().code == 0
    shutil.rmtree(newest)
    shutil.copytree(attempt.output / "checkpoints" / newest.name, newest)


CHECKPOINTS = {
    "damaged": (spoil_weights, ("student.safetensors is damaged", "delete", "the one before it")),
    "foreign": (foreign_state, ("state.json is damaged", "delete")),
    "of another method": (other_method, ("written by method 'other', not 'dmd2'",)),
    "with another state": (other_counters, ("does not fit this run",)),
    "with a changed counter": (changed_counter, ("state.json is damaged", "not what was written")),
    "with a counter of words": (counter_of_words, ("does not fit this run (its counters are no counts)",)),
    "with files elsewhere": (files_elsewhere, ("state.json is damaged (it names other files)",)),
    "of another teacher": (other_teacher, ("the weights of its unet are not those that the run was started with",)),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_on_resume(held, name):
    spoil, says = CHECKPOINTS[name]
    newest = max((held.output / "checkpoints").iterdir())
    spoil(newest, held.root)
    before = tree(held.output)
    assert_refused(held, held.run({"train": {"updates": 3}}, "--resume"), says, before)


def test_following_the_advice_goes_on_from_the_one_before(held):
    newest = max((held.output / "checkpoints").iterdir())
    spoil_weights(newest, held.root)
    assert f"delete {newest}" in held.run({}, "--resume").error
    shutil.rmtree(newest)
    result = held.run({}, "--resume")
    assert result.code == 0, result.err
    assert "resumed at student update 1" in result.out


# -- no space left -----------------------------------------------------------------------------------------


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_no_space_for_a_checkpoint_keeps_the_run(held, monkeypatch):
    from stepdistill import checkpoint

    before = tree(held.output / "checkpoints")
    more = {"train": {"updates": 4}}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        result = held.run(more, "--resume")
    assert result.code == 2
    assert "cannot be written (No space left on device); free some space" in result.error
    assert "the last whole checkpoint is" in result.error
    assert tree(held.output / "checkpoints") == before
    result = held.run(more, "--resume")
    assert result.code == 0, result.err
    assert "resumed at student update 2" in result.out


@pytest.mark.parametrize("what", ["metrics", "student", "config"])
def test_no_space_elsewhere(root, tmp_path, monkeypatch, what):
    from stepdistill import run
    from stepdistill.pipelines import export

    attempt = Try(root, tmp_path)
    if what == "metrics":
        monkeypatch.setattr(run.RunFolder, "append", full)
    elif what == "config":
        monkeypatch.setattr(run.files, "write_text", full)
    else:
        monkeypatch.setattr(export, "model_card", full)
    result = attempt.run({"train": {"log_every": 1}})
    assert result.code == 2
    assert "no space left" in result.error.lower()
    assert not (attempt.output / "student").exists()
    assert not list(tmp_path.rglob("*.tmp"))
