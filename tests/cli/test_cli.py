"""The commands: help, plans, whole runs, stopping and going on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from console import stepdistill
from PIL import Image
from safetensors.torch import load_file

from stepdistill import checkpoint
from stepdistill.trainers.methods.registry import METHODS

COMMANDS = [
    ["distill"],
    ["evaluate"],
    ["compare"],
    ["export"],
    ["merge"],
    ["pairs"],
    ["sample"],
    ["report"],
    ["methods"],
    ["teacher", "train"],
    ["teacher", "emoji"],
    ["teacher", "cifar10"],
    ["teacher", "features"],
    ["benchmark", "inference"],
    ["benchmark", "step"],
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny.save_pixels(tmp_path_factory.mktemp("cli") / "teacher", "v", labels=3, null=True)


def write_config(folder: Path, teacher: Path, **train) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    raw = {
        "method": "dmd2",
        "output": str(folder / "run"),
        "seed": 2,
        "teacher": {"path": str(teacher), "steps": 3},
        "optimizer": {"student": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
        "train": {
            "updates": 4,
            "batch_size": 2,
            "log_every": 1,
            "sample_every": 2,
            "sample_count": 4,
            "checkpoint_every": 2,
            "ema_decay": 0.9,
            "trackers": [],
            **train,
        },
        "evaluation": {"enabled": False},
        "dmd2": {"fake_score_updates": 2},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def newest(folder: Path) -> Path:
    return checkpoint.latest(folder / "run" / "checkpoints")


def assert_same_checkpoint(a: Path, b: Path) -> None:
    """Bit for bit, but for the time it took."""
    (tensors_a, meta_a), (tensors_b, meta_b) = checkpoint.load(a), checkpoint.load(b)
    assert {**meta_a, "seconds": 0} == {**meta_b, "seconds": 0}
    assert tensors_a.keys() == tensors_b.keys()
    for group, tensors in tensors_a.items():
        assert tensors.keys() == tensors_b[group].keys()
        for key, value in tensors.items():
            assert torch.equal(value, tensors_b[group][key]), f"{group}/{key}"


# -- help --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(command):
    result = stepdistill(*command, "--help")
    assert result.code == 0
    assert f"Example: stepdistill {' '.join(command)}" in " ".join(result.out.split())


def test_no_command_is_missing_here():
    def listed(*group: str) -> list[str]:
        text = stepdistill(*group, "--help").out.split("Commands:")[1]
        return re.findall(r"^  (\w[\w-]*) ", text, re.MULTILINE)

    groups = [name for name in listed() if name in ("teacher", "benchmark")]
    commands = [[name] for name in listed() if name not in groups]
    commands += [[group, name] for group in groups for name in listed(group)]
    assert sorted(commands) == sorted(COMMANDS)


def test_without_a_command_the_commands_are_shown():
    result = stepdistill()
    assert result.code == 2
    assert "Commands:\n" in result.err
    assert "stepdistill: " not in result.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["distil"], "No such command 'distil'"),
        (["distill"], "Missing argument"),
        (["distill", "--fast"], "No such option: --fast"),
        (["sample", "x", "--count", "0"], "--count"),
        (["sample", "x", "--count", "many"], "valid integer"),
    ],
)
def test_wrong_usage_is_one_line(arguments, says):
    result = stepdistill(*arguments)
    assert result.code == 2
    assert says in result.error


def test_methods_lists_every_method_with_its_title():
    result = stepdistill("methods")
    assert result.code == 0
    assert len(result.out.splitlines()) == len(METHODS) + 1
    assert re.search(r"^msd +a section for any of them", result.out, re.MULTILINE)
    for name, method in METHODS.items():
        assert re.search(rf"^{name} +{re.escape(method.title)}$", result.out, re.MULTILINE)


# -- a whole run -------------------------------------------------------------------------------------------


def test_dry_run_prints_the_plan_and_writes_nothing(teacher, tmp_path):
    config = write_config(tmp_path, teacher)
    result = stepdistill("distill", config, "train.updates=9", "sampler.steps=2", "--dry-run")
    assert result.code == 0, result.err
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    resolved = yaml.safe_load(result.out.split("# the plan")[0])
    assert resolved["train"]["updates"] == 9
    assert resolved["dmd2"]["max_level"] == 980  # defaults are shown
    plan = result.out.split("# the plan")[1]
    for part in ("family unet2d", "predicts v", "1x8x8", "3 labels", "2 steps at t = 999, 499", "9 student updates"):
        assert part in plan


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory) -> Path:
    """The folder of a run of four updates, with TensorBoard on."""
    folder = tmp_path_factory.mktemp("whole")
    result = stepdistill("distill", write_config(folder, teacher, trackers=["tensorboard"]))
    assert result.code == 0, result.err
    assert "Done." in result.out
    assert f'DiffusionPipeline.from_pretrained("{folder / "run" / "student"}")' in result.out
    return folder


def test_a_run_leaves_what_its_folder_promises(whole):
    run = whole / "run"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["train"]["updates"] == 4
    assert config["optimizer"]["student"]["clip"] == 10.0  # resolved: defaults included
    environment = json.loads((run / "environment.json").read_text())
    assert environment["seed"] == 2
    assert environment["command"].startswith("stepdistill distill")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["updates/student"] for row in rows] == [1, 2, 3, 4]
    assert [row["iteration"] for row in rows] == [1, 3, 5, 7]
    assert {"loss/student", "loss/fake_score", "grad_norm/student", "seconds", "passes"} <= rows[-1].keys()
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["000000.png", "000002.png", "000004.png"]
    assert [p.name for p in checkpoint.folders(run / "checkpoints")] == ["step-00000003", "step-00000007"]
    assert json.loads((run / "student" / "model_index.json").read_text())["_class_name"] == "ConsistencyModelPipeline"
    assert "<html" in (run / "report.html").read_text()
    assert list((run / "logs").rglob("events.out.tfevents.*"))
    assert not list(run.rglob("*.tmp"))


def test_resume_with_more_updates_goes_on_as_if_never_stopped(whole, teacher, tmp_path):
    first = write_config(tmp_path, teacher)
    assert stepdistill("distill", first, "train.updates=2").code == 0
    result = stepdistill("distill", first, "--resume")
    assert result.code == 0, result.err
    assert "resumed at student update 2" in result.out
    assert_same_checkpoint(newest(tmp_path), newest(whole))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]["updates"] == 4
    names = ["student/unet/diffusion_pytorch_model.safetensors", "samples/000004.png"]
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (whole / "run" / name).read_bytes()
    rows = [[json.loads(r) for r in (p / "run" / "metrics.jsonl").read_text().splitlines()] for p in (whole, tmp_path)]
    assert [{**a, "seconds": 0} for a in rows[0]] == [{**b, "seconds": 0} for b in rows[1]]


def test_the_time_limit_saves_and_ends_well(teacher, tmp_path):
    config = write_config(tmp_path, teacher)
    result = stepdistill("distill", config, "train.max_minutes=1e-9")
    assert result.code == 0, result.err
    assert "train.max_minutes = 1e-09 reached: saved at student update 1; go on with --resume" in result.out
    assert newest(tmp_path).name == "step-00000001"
    assert not (tmp_path / "run" / "student").exists()


def test_too_many_non_finite_updates_stop_with_step_and_role(teacher, tmp_path, monkeypatch):
    config = write_config(tmp_path, teacher, non_finite_limit=2)
    losses = METHODS["dmd2"].fake_score_losses
    calls = []

    def sometimes(self, x0, batch):
        calls.append(0)
        factor = float("nan") if len(calls) > 4 else 1.0
        return {k: (w * factor, loss) for k, (w, loss) in losses(self, x0, batch).items()}

    monkeypatch.setattr(METHODS["dmd2"], "fake_score_losses", sometimes)
    result = stepdistill("distill", config)
    assert result.code == 2
    for part in ("stopped at iteration 5", "2 non-finite gradients of the fake_score", "optimizer.fake_score.lr"):
        assert part in result.error
    assert f"the last whole checkpoint is {newest(tmp_path)}" in result.error


# -- after training ----------------------------------------------------------------------------------------


def test_report_is_written_again(whole):
    page = whole / "run" / "report.html"
    page.unlink()
    result = stepdistill("report", whole / "run")
    assert result.code == 0, result.err
    assert page.stat().st_size > 1000


def test_export_writes_the_average_or_not(whole, tmp_path):
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert stepdistill("export", whole / "run", "--output", tmp_path / "a").code == 0
    assert (tmp_path / "a" / weights).read_bytes() == (whole / "run" / "student" / weights).read_bytes()
    assert stepdistill("export", whole / "run", "--output", tmp_path / "b", "--no-average").code == 0
    raw = load_file(newest(whole) / "student.safetensors")
    exported = load_file(tmp_path / "b" / weights)
    assert torch.equal(exported["conv_in.weight"], raw["conv_in.weight"])
    assert not torch.equal(load_file(tmp_path / "a" / weights)["conv_in.weight"], raw["conv_in.weight"])
    assert stepdistill("export", whole / "run", "--output", tmp_path / "c", "--dtype", "bfloat16").code == 0
    assert load_file(tmp_path / "c" / weights)["conv_in.weight"].dtype == torch.bfloat16


def test_bad_exports_are_one_line_and_harm_nothing(whole, tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    cases = {
        "holds no student that stepdistill exported; choose another": [whole / "run", "--output", tmp_path],
        "use one of float32": [whole / "run", "--output", tmp_path / "x", "--dtype", "int8"],
        "not a run folder": [tmp_path],
    }
    for says, arguments in cases.items():
        result = stepdistill("export", *arguments)
        assert result.code == 2
        assert says in result.error
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_reports_and_evaluations_of_what_is_no_run(tmp_path):
    for command in ("report", "evaluate"):
        result = stepdistill(command, tmp_path)
        assert result.code == 2
        assert str(tmp_path) in result.error


@pytest.mark.parametrize("which", ["run", "run/student"])
def test_sample_draws_a_picture(whole, tmp_path, which):
    picture = tmp_path / "deep" / "grid.png"
    result = stepdistill("sample", whole / which, "--count", "12", "--label", "2", "--output", picture)
    assert result.code == 0, result.err
    assert "12 pictures" in result.out
    with Image.open(picture) as image:
        assert image.size == (10 * 8 * 6, 2 * 8 * 6)  # ten across, 8 pixels enlarged to 48
    again = tmp_path / "again.png"
    assert stepdistill("sample", whole / which, "--count", "12", "--label", "2", "--output", again).code == 0
    assert again.read_bytes() == picture.read_bytes()
    other = ["sample", whole / which, "--count", "12", "--label", "2", "--output", again, "--seed", "1"]
    assert stepdistill(*other).code == 0
    assert again.read_bytes() != picture.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--label", "3"], "--label 3: outside 0..2"),
        (["--label", "-1"], "--label -1: outside 0..2"),
        (["--prompt", "a cat"], "takes no prompts"),
        (["--guidance-scale", "3"], "has no guidance"),
        (["--steps", "7"], "steps"),
        (["--output", "{there}/config.yaml/x.png"], "cannot be written"),
        (["--output", "{there}/x.nopicture"], "cannot be written"),
    ],
)
def test_bad_samples_are_one_line(whole, tmp_path, arguments, says):
    arguments = [a.replace("{there}", str(whole)) for a in arguments]
    result = stepdistill("sample", whole / "run" / "student", "--output", tmp_path / "x.png", *arguments)
    assert result.code == 2
    assert says in result.error
    assert not (tmp_path / "x.png").exists()


def test_samples_of_nothing(tmp_path):
    for path in (tmp_path, tmp_path / "gone"):
        result = stepdistill("sample", path)
        assert result.code == 2
        assert str(path) in result.error


# -- killing -----------------------------------------------------------------------------------------------


def start(config: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "stepdistill", "distill", str(config), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.fixture(scope="module")
def stopped(teacher, tmp_path_factory):
    """Two endless runs in processes of their own: one killed, one asked to end, each after two checkpoints."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("killed", "ended")}
    configs = {name: write_config(folder, teacher, sample_every=50) for name, folder in folders.items()}
    processes = {name: start(config, "train.updates=100000") for name, config in configs.items()}
    waiting, until = {"killed": signal.SIGKILL, "ended": signal.SIGTERM}, time.monotonic() + 120
    try:
        while waiting:
            for name in list(waiting):
                assert processes[name].poll() is None, processes[name].communicate()[0]
                if len(checkpoint.folders(folders[name] / "run" / "checkpoints")) == 2:
                    processes[name].send_signal(waiting.pop(name))
            assert time.monotonic() < until, "no checkpoints in two minutes"
            time.sleep(0.01)
        ended = {
            name: (process.communicate(timeout=60)[0], process.returncode, folders[name], configs[name])
            for name, process in processes.items()
        }
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()
    return ended


def reached(folder: Path) -> int:
    return json.loads((newest(folder) / "state.json").read_text())["meta"]["counters"]["student"]


@pytest.fixture(scope="module")
def unbroken(stopped, teacher, tmp_path_factory) -> tuple[Path, int]:
    """The same run without a stop, to a little more than either reached."""
    updates = 2 + max(reached(folder) for _, _, folder, _ in stopped.values())
    folder = tmp_path_factory.mktemp("unbroken")
    config = write_config(folder, teacher, sample_every=50)
    assert stepdistill("distill", config, f"train.updates={updates}").code == 0
    return folder, updates


@pytest.mark.parametrize("name", ["killed", "ended"])
def test_a_stopped_run_goes_on_bit_for_bit(stopped, unbroken, name):
    _, _, folder, config = stopped[name]
    whole, updates = unbroken
    before = reached(folder)
    result = stepdistill("distill", config, f"train.updates={updates}", "--resume")
    assert result.code == 0, result.err
    assert f"resumed at student update {before}" in result.out
    assert_same_checkpoint(newest(folder), newest(whole))
    iterations = [json.loads(r)["iteration"] for r in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert iterations == [1 + 2 * i for i in range(updates)]  # no row twice, none missing
    assert not list((folder / "run").rglob("*.tmp"))


def test_sigkill_is_sigkill(stopped):
    assert stopped["killed"][1] == -signal.SIGKILL


def test_sigterm_saves_and_says_how_to_go_on(stopped):
    out, code, _, _ = stopped["ended"]
    assert code == 128 + signal.SIGTERM
    match = re.search(r"^terminated: saved at student update (\d+); go on with --resume$", out, re.MULTILINE)
    assert match, out
    assert int(match[1]) >= 4
    assert "Traceback" not in out


LIGHT = """
import sys
from stepdistill.cli.main import main
sys.argv = ["stepdistill", *sys.argv[1:]]
try:
    main()
finally:
    print(sorted({"torch", "diffusers"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--help"], 0, "Usage"),
        (["distill", "--help"], 0, "Example: stepdistill distill"),
        (["distill", "gone.yaml"], 2, "gone.yaml: no such config file"),
        (["compare", "gone.yaml"], 2, "gone.yaml: no such config file"),
        (["teacher", "train", "bad.yaml"], 2, "bad.yaml: not valid YAML"),
        (["distill", "good.yaml", "seed"], 2, "an override is key=value"),
    ],
)
def test_help_and_files_that_cannot_be_read_are_answered_without_torch(arguments, code, says, tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1")
    (tmp_path / "good.yaml").write_text("a: 1")
    command = [sys.executable, "-c", LIGHT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


WAITING = """
import os, sys
from stepdistill.cli.main import main
assert "torch" not in sys.modules
sys.argv = ["stepdistill", "methods"]
main()
import subprocess
assert "torch" in sys.modules
print(subprocess.run(["printenv", "OMP_WAIT_POLICY"], capture_output=True, text=True).stdout)
"""


@pytest.mark.parametrize(
    ("users", "policy"), [(None, "PASSIVE"), pytest.param("ACTIVE", "ACTIVE", marks=pytest.mark.slow)]
)
def test_threads_wait_passively_beside_other_work_unless_the_user_says_otherwise(users, policy):
    """Set before torch loads its OpenMP, and handed on to the processes that a command starts."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {} if users is None else {"OMP_WAIT_POLICY": users}
    done = subprocess.run([sys.executable, "-c", WAITING], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert policy in done.stdout.splitlines()
