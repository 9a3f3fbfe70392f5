"""Several students: what each one sees, that none changes another, and going on at any point."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import signal
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
import yaml
from console import stepdistill
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from stepdistill import checkpoint
from stepdistill.config import merge
from stepdistill.data import teacher_pairs as pairs
from stepdistill.data.router import Router
from stepdistill.data.streams import RealSource
from stepdistill.errors import UserError
from stepdistill.eval.stock_pipeline import StockPipeline
from stepdistill.families import load_family
from stepdistill.readers import digest_tensors
from stepdistill.roles.role import Role
from stepdistill.trainers.loop.trainer import Trainer
from stepdistill.trainers.methods.regression import Regression
from stepdistill.trainers.plans import finish
from stepdistill.trainers.plans.build import build_trainer, check_fit, load_teacher, resume
from stepdistill.trainers.plans.job import make_job
from stepdistill.trainers.plans.resolve import resolve
from stepdistill.trainers.plans.student_configs import SEED_STEP

LABELS = 4
GAN = {"fake_score_updates": 2, "gan": {"student_weight": 0.01}}
TABLE = {"students": 2, "partition": "table", "table": [[3, 0], [1, 2]]}
REGRESSION = {"count": 6, "shard": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("msd")
    tiny.save_pixels(folder / "teacher", "v", labels=LABELS, null=True)
    pixels = np.random.default_rng(0).integers(0, 255, (16, 8, 8), dtype=np.uint8)
    np.savez(folder / "images.npz", images=pixels, labels=np.arange(16) % LABELS)
    return folder


def raw_config(root: Path, output: Path, **changes) -> dict:
    raw = {
        "method": "dmd2",
        "output": str(output),
        "seed": 3,
        "teacher": {"path": str(root / "teacher"), "steps": 3},
        "data": {"images": {"npz": str(root / "images.npz")}},
        "optimizer": {"student": {"lr": 1e-2}, "fake_score": {"lr": 1e-2}},
        "train": {"updates": 2, "batch_size": 2, "log_every": 1, "sample_count": 2, "trackers": []},
        "evaluation": {"enabled": False},
        "dmd2": GAN,
    }
    return merge(raw, changes)


def small_stages(**changes) -> dict:
    """A shared first stage for a smaller student, then each student's own."""
    tsm = {"name": "tsm", "method": "tsm", "shared": True, "sampler": {"steps": 3, "transition": "ode"}}
    return {"roles": {"network": {"block_out_channels": [4, 8]}}, "stages": [merge(tsm, changes), {"name": "dm"}]}


def write(folder: Path, raw: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def run(path: Path, *arguments, report: bool = False) -> str:
    """What a run that ends well prints; drawing the report's curves takes longer than all else here."""
    with contextlib.nullcontext() if report else mock.patch.object(finish, "write_report"):
        result = stepdistill("distill", path, *arguments)
    assert result.code == 0, result.err
    return result.out


def digests(folder: Path) -> dict[str, str]:
    """Every weight file under a folder, by its tensors."""
    weights = {str(p.relative_to(folder)): digest_tensors(load_file(p)) for p in sorted(folder.rglob("*.safetensors"))}
    assert weights
    return weights


def files(folder: Path) -> dict[str, str]:
    """Every file under a folder, by its bytes."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def rows(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def students_of(raw: dict):
    """The checked students, once their router is written as a run writes it."""
    several = resolve(raw)
    several.make_router(load_teacher(several.job.config)).save(several.router_file)
    return several


# -- one student is its base method ------------------------------------------------------------------------


def assert_the_same_run(one: Path, other: Path) -> None:
    """Weights of all roles, optimizers and noise to the bit, and the numbers that were logged."""
    tensors, _ = checkpoint.load(checkpoint.latest(one / "checkpoints"))
    again, _ = checkpoint.load(checkpoint.latest(other / "checkpoints"))
    assert {"student", "optimizer-student", "noise"} <= tensors.keys() == again.keys()
    first, second = ({name: digest_tensors(group) for name, group in part.items()} for part in (tensors, again))
    assert first == second
    assert rows(one) == rows(other)
    assert len(rows(one)) == 2
    assert digests(one / "student") == digests(other / "student")


def test_one_student_is_its_base_method_to_the_bit(root, tmp_path):
    run(write(tmp_path / "base", raw_config(root, tmp_path / "one")))
    run(write(tmp_path / "msd", raw_config(root, tmp_path / "several", msd={"students": 1})))
    assert_the_same_run(tmp_path / "one", tmp_path / "several" / "student-0")
    tensors, _ = checkpoint.load(checkpoint.latest(tmp_path / "one" / "checkpoints"))
    assert {"fake_score", "discriminator"} <= tensors.keys()


THREE = [
    {"name": "warm", "method": "regression", "regression": REGRESSION},
    {"name": "dm", "dmd2": {"gan": {"student_weight": 0.0}}},
    {"name": "adm", "take": "both", "optimizer": {"student": {"lr": 5e-3}}},
]
"""The paper's order: pairs, distribution matching, then with a discriminator."""


@pytest.fixture(scope="module")
def recipe_run(root, tmp_path_factory) -> Path:
    """A plain recipe of three stages, run through."""
    folder = tmp_path_factory.mktemp("recipe")
    run(write(folder, raw_config(root, folder / "one", stages=THREE)))
    return folder / "one"


def test_one_student_of_a_recipe_is_the_recipe_to_the_bit(root, recipe_run, tmp_path):
    run(write(tmp_path, raw_config(root, tmp_path / "several", stages=THREE, msd={"students": 1})))
    for stage in ("01-warm", "02-dm", "03-adm"):
        assert_the_same_run(recipe_run / stage, tmp_path / "several" / "student-0" / stage)
    assert digests(recipe_run / "01-warm" / "pairs") == digests(tmp_path / "several" / "pairs")
    gathered = tmp_path / "several" / "student" / "student-0"
    assert digests(gathered) == digests(recipe_run / "student")


# -- what a student sees -----------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch) -> dict[str, list[int]]:
    """The labels that each role is called with, and those of the real images."""
    labels: dict[str, list[int]] = {}
    call, batch = Role.__call__, RealSource.batch

    def spied_call(self, x_t, t, condition):
        assert len(condition["label"]) == len(x_t)
        labels.setdefault(self.name, []).extend(condition["label"].tolist())
        return call(self, x_t, t, condition)

    def spied_batch(self, *arguments):
        real = batch(self, *arguments)
        labels.setdefault("real", []).extend(real.items)
        return real

    monkeypatch.setattr(Role, "__call__", spied_call)
    monkeypatch.setattr(RealSource, "batch", spied_batch)
    return labels


@pytest.mark.parametrize("partition", [TABLE, {"students": 2, "partition": "order"}])
def test_a_student_sees_its_own_conditions_alone(partition, root, tmp_path, seen):
    """Teacher, student, fake score and the discriminator's real images, over several updates of each student."""
    several = students_of(raw_config(root, tmp_path, msd=partition))
    parts = partition.get("table") or [[0, 1], [2, 3]]
    for k, student in enumerate(several.students):
        seen.clear()
        trainer = build_trainer(student.job, None)
        for _ in range(6):
            trainer.iteration()
            trainer.counters["iteration"] += 1
        assert seen.keys() == {"student", "teacher", "fake_score", "real"}
        for name, labels in seen.items():
            assert set(labels) == set(parts[k]), name
        assert len(seen["real"]) == 6 * 2
        assert trainer.parts.router == Router.load(several.router_file).hash


def test_every_student_has_a_seed_of_its_own_and_the_first_the_runs(root, tmp_path):
    several = resolve(raw_config(root, tmp_path, msd={"students": 3}))
    assert [student.job.config.seed for student in several.students] == [3, 3 + SEED_STEP, 3 + 2 * SEED_STEP]
    assert SEED_STEP > 10  # the offsets within a run


def test_regression_pairs_are_the_same_for_all_and_made_once(root, tmp_path, monkeypatch):
    written, batches = [], []
    own_write, own_batch = pairs._write, Regression.next_batch

    def spied_write(*arguments):
        written.append(arguments)
        return own_write(*arguments)

    def spied_batch(self):
        batches.append((Path(self.config.output).name, own_batch(self), self.parts.teacher_pairs.pairs))
        return batches[-1][1]

    monkeypatch.setattr(pairs, "_write", spied_write)
    monkeypatch.setattr(Regression, "next_batch", spied_batch)
    changes = {"method": "regression", "regression": REGRESSION, "train": {"batch_size": 3}, "msd": TABLE}
    run(write(tmp_path, raw_config(root, tmp_path / "out", **changes)))
    assert len(written) == 2  # six in shards of four
    assert len(list((tmp_path / "out" / "pairs").iterdir())) == 2
    assert not list((tmp_path / "out").glob("student-*/pairs"))
    students = ("student-0", "student-1")
    index = {name: {i for who, batch, _ in batches if who == name for i in batch.indices} for name in students}
    assert index == {name: set(range(6)) for name in students}
    sets = {name: next(pairs_set for who, _, pairs_set in batches if who == name) for name in students}
    for key in ("noise", "x0"):
        assert torch.equal(*(getattr(sets[name], key) for name in students))
    assert sets["student-0"].items == sets["student-1"].items
    assert set(sets["student-0"].items) == set(range(LABELS))


@pytest.mark.parametrize(("images", "parts"), [("all", [[0, 1, 2, 3]] * 2), ("own", [[3, 0], [1, 2]])])
def test_score_matching_sees_all_images_unless_asked_for_its_own(images, parts, root, tmp_path):
    raw = raw_config(root, tmp_path, method="tsm", tsm={"images": images}, train={"batch_size": 4}, msd=TABLE)
    for labels, student in zip(parts, students_of(raw).students, strict=True):
        trainer = build_trainer(student.job, None)
        batches = [trainer.method.next_batch() for _ in range(4)]
        index = [i for batch in batches for i in batch.indices]
        assert set(index) == {i for i in range(16) if i % LABELS in labels}
        assert {label for batch in batches for label in batch.condition["label"].tolist()} == set(labels)
    assert "images: all" in yaml.safe_dump(resolve(raw_config(root, tmp_path, method="tsm", msd=TABLE)).config)


def test_images_of_no_own_condition_are_refused(root, tmp_path):
    np.savez(tmp_path / "zeros.npz", images=np.zeros((4, 8, 8), np.uint8), labels=[0, 3, 0, 3])
    raw = raw_config(root, tmp_path / "out", data={"images": {"npz": str(tmp_path / "zeros.npz")}}, msd=TABLE)
    several = students_of(raw)
    assert build_trainer(several.students[0].job, None).parts.real.subset == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"data\.images: none of its images is of student 1's conditions"):
        build_trainer(several.students[1].job, None)


def test_prompts_are_divided_by_the_text_encoder(tmp_path):
    tiny.save_stable_diffusion(tmp_path / "teacher")
    prompts = [f"{a} {b}" for a in ("a cat", "big dogs", "my ship", "an owl") for b in ("in fog", "at sea", "by night")]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    data = {"prompts": str(tmp_path / "prompts.txt"), "images": None}
    medians = {"students": 4, "partition": "medians"}
    raw = raw_config(tmp_path, tmp_path / "out", data=data, dmd2={"gan": {"student_weight": 0.0}}, msd=medians)
    several = students_of(raw)
    family = load_teacher(several.job.config)
    fits = [check_fit(student.job, family) for student in several.students]
    assert sorted(item for fit in fits for item in fit.items) == sorted(prompts)
    assert [len(fit.items) for fit in fits] == [3, 3, 3, 3]
    assert all(fit.all_items == prompts for fit in fits)
    router = Router.load(several.router_file)
    assert [router.route(fit.items, lambda prompts: family.prompt_encoder(prompts)[1]) for fit in fits] == [
        [k] * 3 for k in range(4)
    ]
    with torch.no_grad():
        next(family.text_encoder.parameters()).add_(0.01)
    with pytest.raises(UserError, match="made with another text encoder or tokenizer"):
        check_fit(several.students[0].job, family)


# -- one by one, in any order ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_turn(root, tmp_path_factory) -> Path:
    """Two students trained in one go."""
    folder = tmp_path_factory.mktemp("in_turn")
    printed = run(write(folder, raw_config(root, folder / "out", msd=TABLE, train={"updates": 3})), report=True)
    assert "student 0 of 0..1" in printed
    assert "MSDPipeline.from_pretrained" in printed
    return folder / "out"


def test_other_commands_know_the_folder_of_several_students(in_turn, tmp_path):
    result = stepdistill("sample", in_turn, "--count", 4, "--output", tmp_path / "grid.png")
    assert result.code == 0, result.err
    result = stepdistill("evaluate", in_turn)
    assert result.code == 0, result.err
    assert "no distance was measured" in result.out
    assert (in_turn / "grid.png").is_file()
    result = stepdistill("export", in_turn)
    assert result.code == 2
    assert "several students (msd); name the config, or the run folder, of one student" in result.error
    result = stepdistill("export", in_turn / "student-1", "--output", tmp_path / "one")
    assert result.code == 0, result.err
    assert digests(tmp_path / "one") == digests(in_turn / "student" / "student-1")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_students_may_be_trained_apart_and_in_any_order(order, root, in_turn, tmp_path):
    path = write(tmp_path, raw_config(root, tmp_path / "out", msd=TABLE, train={"updates": 3}))
    first, second = (tmp_path / "out" / f"student-{k}" for k in order)
    assert "1 of 2 students are finished" in run(path, "--student", order[0])
    before = files(first)
    assert not second.exists()
    printed = run(path, "--student", order[1])
    assert "2 of 2 students are finished; gather them without --student, with --resume" in printed
    assert files(first) == before
    assert not (tmp_path / "out" / "student").exists()
    assert run(path, "--resume").count("finished before") == 2
    assert files(first) == before
    assert digests(tmp_path / "out" / "student") == digests(in_turn / "student")
    assert digests(second) == digests(in_turn / second.name)
    assert digests(first / "student") != digests(second / "student")
    assert (tmp_path / "out/student/router.json").read_bytes() == (in_turn / "router.json").read_bytes()


def test_students_say_whose_they_are(in_turn):
    router = Router.load(in_turn / "router.json")
    for k in range(2):
        facts = DiffusionPipeline.from_pretrained(in_turn / "student" / f"student-{k}").scheduler.config["_stepdistill"]
        assert facts["msd"] == {"router": router.hash, "student": k}
    assert router.parameters["labels"] == [[0, 3], [1, 2]]
    page = (in_turn / "report.html").read_text()
    for k in range(2):
        assert f"Curves: student {k}" in page
        assert f"Samples over time: student {k}" in page


def test_a_finished_run_is_not_run_again(root, in_turn):
    path = in_turn.parent / "config.yaml"
    before = digests(in_turn)
    assert "add --resume" in stepdistill("distill", path).error
    assert run(path, "--resume").count("finished before") == 2
    assert digests(in_turn) == before
    assert run(path, "--student", 1).count("finished before") == 1
    changed = write(in_turn.parent / "changed", raw_config(root, in_turn, msd={"students": 2}, train={"updates": 3}))
    assert "its config differs: msd.partition" in stepdistill("distill", changed, "--resume").error


def test_a_run_stopped_in_the_second_student_goes_on_to_the_same_weights(root, in_turn, tmp_path, monkeypatch):
    """SIGTERM after its first update."""
    path = write(tmp_path, raw_config(root, tmp_path / "out", msd=TABLE, train={"updates": 3}))
    after = Trainer._after_update

    def stop(self, bar, counter):
        after(self, bar, counter)
        if self.run.path.name == "student-1":
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_after_update", stop)
        result = stepdistill("distill", path)
    assert result.code == 128 + signal.SIGTERM
    assert "saved at student update 1; go on with --resume" in result.out
    assert not (tmp_path / "out" / "student").exists()
    assert not (tmp_path / "out" / "student-1" / "student").exists()
    printed = run(path, "--resume")
    assert printed.count("finished before") == 1
    assert "resumed at student update 1" in printed
    assert digests(tmp_path / "out" / "student") == digests(in_turn / "student")
    assert rows(tmp_path / "out" / "student-1") == rows(in_turn / "student-1")


# -- shared stages and smaller students --------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(root, tmp_path_factory) -> tuple[Path, list[list[str]], str]:
    """Its folder, the commands that the dry run printed, and all that it printed; nothing is run yet."""
    folder = tmp_path_factory.mktemp("small students")
    path = write(folder, raw_config(root, folder / "the run", msd={"students": 5}, **small_stages()))
    printed = run(path, "msd.students=2", "train.updates=2", "--dry-run")
    assert not (folder / "the run").exists()
    lines = [line for line in printed.splitlines() if line.startswith("stepdistill distill ")]
    return folder / "the run", [shlex.split(line)[1:] for line in lines], printed


def test_the_dry_run_says_who_draws_what_and_a_command_for_each(small):
    folder, commands, printed = small
    typed = ["distill", str(folder.parent / "config.yaml"), "msd.students=2", "train.updates=2"]
    assert commands == [
        typed,
        [*typed, "--student", "shared"],
        [*typed, "--student", "0"],
        [*typed, "--student", "1"],
        [*typed, "--resume"],
    ]
    for text in ("student 0: labels 0, 1", "student 1: labels 2, 3", "partition order"):
        assert text in printed
    # shared: 2 updates x 2 x 4 passes; a student: 2 updates x 2 x (4 + 2 x 4 + the discriminator's 6 x 2 + 2)
    assert "224 network passes in all, 104 a student, 16 shared" in printed


@pytest.fixture(scope="module")
def small_run(small) -> Path:
    """The printed commands, each run; a student before the shared stages is refused."""
    folder, (_, shared, *others), _ = small
    early = stepdistill(*others[0])
    assert early.code == 2
    assert "--student 0: the shared stages come first; run them with --student shared" in early.error
    assert not folder.exists()
    for command in (shared, *others):
        run(*command[1:])
    return folder


def test_the_printed_commands_make_the_students(small_run):
    assert {path.name for path in small_run.iterdir() if path.is_dir()} == {
        "shared",
        "student-0",
        "student-1",
        "student",
    }
    assert json.loads((small_run / "student" / "msd.json").read_text())["students"] == 2
    apart = [digests(small_run / "student" / f"student-{k}") for k in range(2)]
    assert apart[0] != apart[1]


def test_shared_stages_run_once_on_every_condition(small_run):
    config = yaml.safe_load((small_run / "shared" / "01-tsm" / "config.yaml").read_text())
    assert config["data"]["part"] is None
    for k in range(2):
        config = yaml.safe_load((small_run / f"student-{k}" / "01-dm" / "config.yaml").read_text())
        assert config["roles"]["student_from"] == str(small_run / "shared" / "01-tsm" / "student")
        assert config["data"]["part"] == {"router": str(small_run / "router.json"), "student": k}


def test_a_smaller_student_is_exported_as_it_is(small_run, root):
    teacher = DiffusionPipeline.from_pretrained(root / "teacher").unet
    for folder in (small_run / "shared/01-tsm/student", small_run / "student/student-1"):
        unet = DiffusionPipeline.from_pretrained(folder).unet
        assert tuple(unet.config.block_out_channels) == (4, 8)
        assert unet.num_parameters() < 0.8 * teacher.num_parameters()
    facts = json.loads((small_run / "student/student-1/scheduler/scheduler_config.json").read_text())["_stepdistill"]
    assert facts["network"] == {"block_out_channels": [4, 8]}


def test_the_second_stage_starts_from_the_firsts_exported_weights(small_run, root):
    several = resolve(raw_config(root, small_run, msd={"students": 2}, **small_stages()))
    trainer = build_trainer(several.students[1].stages[0].job, None)
    exported = load_file(small_run / "shared/01-tsm/student/unet/diffusion_pytorch_model.safetensors")
    state = trainer.roles.student.network.state_dict()
    key = "class_embedding.weight"
    assert state.keys() == exported.keys()
    assert torch.equal(state[key][:LABELS], exported[key])  # the null label is not exported
    assert all(torch.equal(state[k], exported[k]) for k in state if k != key)
    fake_score, teacher = trainer.roles.fake_score.network, trainer.family.network
    assert digest_tensors(fake_score.state_dict()) == digest_tensors(teacher.state_dict())


def test_no_shared_stage_to_run_is_said(root, tmp_path):
    path = write(tmp_path, raw_config(root, tmp_path / "out", msd=TABLE))
    assert "--student shared: no stage has shared = true" in stepdistill("distill", path, "--student", "shared").error
    assert not (tmp_path / "out").exists()


# -- the fake score goes on --------------------------------------------------------------------------------


def test_take_both_goes_on_with_student_and_fake_score(root, recipe_run):
    recipe = resolve(raw_config(root, recipe_run, stages=THREE))
    before, stage = recipe.stages[1:]
    trainer = build_trainer(stage.job, None)
    tensors, _ = checkpoint.load(checkpoint.latest(before.folder.checkpoints))
    for role in (trainer.roles.fake_score, trainer.roles.student):
        state = role.state_dict()
        cut = {
            k: v[:LABELS] if k == "class_embedding.weight" and role.name == "student" else v for k, v in state.items()
        }
        saved = {k: v[: len(cut[k])] for k, v in tensors[role.name].items()}
        assert digest_tensors(cut) == digest_tensors(saved)
    assert digest_tensors(trainer.roles.fake_score.state_dict()) != digest_tensors(trainer.family.network.state_dict())
    assert stage.job.config.roles.fake_score_from == str(before.output)
    assert resume(trainer, stage.folder)  # a stopped stage's own checkpoint comes after
    assert digest_tensors(trainer.roles.fake_score.state_dict()) != digest_tensors(tensors["fake_score"])


def test_take_both_goes_on_with_loras(root, tmp_path):
    stages = [{"name": "dm"}, {"name": "more", "take": "both"}]
    raw = raw_config(root, tmp_path / "out", roles={"weights": "shared", "lora": {"rank": 2}}, stages=stages)
    run(write(tmp_path, raw))
    before, stage = resolve(raw).stages
    trainer = build_trainer(stage.job, None)
    tensors, _ = checkpoint.load(checkpoint.latest(before.folder.checkpoints))
    for role in (trainer.roles.student, trainer.roles.fake_score):
        assert any(value.any() for key, value in role.state_dict().items() if "lora_B" in key)
        assert digest_tensors(role.state_dict()) == digest_tensors(tensors[role.name])
    other = merge(raw, {"stages": [stages[0], merge(stages[1], {"roles": {"weights": "full"}})]})
    with pytest.raises(UserError, match=r"roles\.fake_score_from = .*hold both runs' roles in the same way"):
        build_trainer(resolve(other).stages[1].job, None)


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        (
            [{"name": "a", "method": "tsm"}, {"name": "b", "take": "both"}],
            "stages[2]: take = both: a's method has no fake score; use take = student",
        ),
        (
            [{"name": "a"}, {"name": "b", "method": "tsm", "take": "both"}],
            "stages[2]: take = both: this stage's method has no fake score",
        ),
        (
            [{"name": "a"}, {"name": "b", "take": "both", "roles": {"fake_score_from": "x"}}],
            "stages[2]: roles.fake_score_from is what take = both sets",
        ),
        ([{"name": "a", "take": "both"}], "there is no stage before the first"),
    ],
)
def test_take_both_is_refused_where_there_is_no_fake_score(stages, says, root, tmp_path):
    result = stepdistill("distill", write(tmp_path, raw_config(root, tmp_path / "out", stages=stages)))
    assert result.code == 2
    assert says in result.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["nothing", "tsm"])
def test_fake_score_from_a_run_without_one_is_refused(where, root, small_run, tmp_path):
    run_folder = tmp_path if where == "nothing" else small_run / "shared" / "01-tsm"
    says = "no whole checkpoint there" if where == "nothing" else "its method has no fake score; remove the key"
    raw = raw_config(root, tmp_path / "out", roles={"fake_score_from": str(run_folder)})
    result = stepdistill("distill", write(tmp_path, raw))
    assert result.code == 2
    assert says in result.error
    assert not (tmp_path / "out" / "config.yaml").exists()


# -- students of another size ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        ({"network": {"channels": [4, 8]}}, ("roles.network: channels cannot be changed", "block_out_channels")),
        ({"network": {"in_channels": 3}}, ("roles.network: in_channels cannot be changed",)),
        ({"network": {"num_class_embeds": 9}}, ("roles.network: num_class_embeds cannot be changed",)),
        ({"network": {"block_out_channels": [6, 8]}}, ("no UNet2DModel can be built so", "divisible")),
        ({"network": {"block_out_channels": [4, 8, 8]}}, ("no UNet2DModel can be built so",)),
        ({"network": {"block_out_channels": [2, 2], "norm_num_groups": 2}}, ("fewer channels than one head",)),
        ({"network": {"block_out_channels": "wide"}}, ("no UNet2DModel can be built so",)),
        (
            {"network": {"block_out_channels": [4, 8]}, "weights": "shared"},
            ("a student of another size is no LoRA on the teacher; set weights to full or mixed",),
        ),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_impossible_networks_are_refused_before_anything_is_written(roles, says, several, root, tmp_path):
    changes = {"msd": {"students": 2}} if several else {}
    path = write(tmp_path, raw_config(root, tmp_path / "out", roles=roles, **changes))
    for arguments in ((), ("--dry-run",)):
        result = stepdistill("distill", path, *arguments)
        assert result.code == 2
        assert all(text in result.error for text in says)
        assert not (tmp_path / "out").exists()


def test_a_student_of_another_size_takes_no_weights_of_the_teachers_shape(root, tmp_path):
    roles = {"network": {"block_out_channels": [4, 8]}, "student_from": str(root / "teacher")}
    result = stepdistill("distill", write(tmp_path, raw_config(root, tmp_path / "out", roles=roles)))
    assert result.code == 2
    assert "its unet is not of the student's architecture" in result.error


def test_some_of_the_labels_are_divided_and_evaluated_alone(root, tmp_path):
    """Label 1 is drawn by none; its real images are seen by none."""
    output = tmp_path / "out"
    changes = {"data": {"labels": [0, 2, 3]}, "msd": {"students": 2}}
    run(write(tmp_path, raw_config(root, output, **changes)))
    assert stepdistill("evaluate", output).code == 0
    assert (output / "grid.png").is_file()
    stock = StockPipeline.load(output / "student")
    assert stock.labels == [0, 2, 3]
    result = stepdistill("sample", output, "--label", "1", "--output", tmp_path / "x.png")
    assert (result.code, "outside 0, 2, 3" in result.error) == (2, True)
    assert stepdistill("sample", output, "--count", "3", "--output", tmp_path / "x.png").code == 0
    for k, labels in enumerate(([0, 2], [3])):
        config = yaml.safe_load((output / f"student-{k}" / "config.yaml").read_text())
        fit = check_fit(make_job(config), load_family(str(root / "teacher")))
        assert fit.items == labels
        assert {fit.images.labels[i] for i in fit.subset} == set(labels)


def test_pairs_of_several_students_are_made_beforehand(root, tmp_path):
    output = tmp_path / "out"
    changes = {"method": "regression", "regression": {"count": 4, "shard": 2}, "msd": {"students": 2}}
    path = write(tmp_path, raw_config(root, output, **changes))
    assert stepdistill("pairs", path, "--part", "1/2").code == 0
    assert [file.name for file in (output / "pairs").iterdir()] == ["pairs-00001.safetensors"]
    assert stepdistill("pairs", path).code == 0
    before = digests(output / "pairs")
    printed = stepdistill("distill", path, "--dry-run").out
    assert "36 network passes in all, 24 a student" in printed  # 4 pairs of 3 steps once, 2 updates of 2 x 3 each
    run(path)
    assert digests(output / "pairs") == before
