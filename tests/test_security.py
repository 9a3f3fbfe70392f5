"""What a config, a name or an exported folder cannot do: leave its place, run a command, tell of the machine."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import tiny
import yaml
from console import stepdistill
from safetensors import safe_open

from stepdistill import assets
from stepdistill.config import check, merge
from stepdistill.errors import UserError, printable
from stepdistill.eval.extractors.load import load_extractor
from stepdistill.pipelines import merge_students
from stepdistill.stock.folders import check_stamp, without_places
from stepdistill.trainers.plans.comparison_settings import ComparisonSettings


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("private-place")
    tiny.save_stable_diffusion(root / "text")
    tiny.save_pixels(root / "label", "v", labels=3, null=True)
    (root / "prompts.txt").write_text("a cat\na dog\n")
    return root


def distill(root, output, changes, *arguments):
    raw = {
        "method": "dmd2",
        "output": str(output),
        "teacher": {"path": str(root / "label")},
        "train": {"updates": 1, "batch_size": 2, "sample_count": 2, "trackers": []},
        "roles": {"weights": "shared", "lora": {"rank": 2}},
        "evaluation": {"enabled": False},
        "dmd2": {"fake_score_updates": 1},
    }
    config = root / "config.yaml"
    config.write_text(yaml.safe_dump(merge(raw, changes)))
    return stepdistill("distill", config, *arguments)


# -- places ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../..", "..", "emoji/../../cli.py", "/etc/passwd", "emoji/../../../tests", "a\0b"])
def test_an_asset_lies_among_the_assets(name):
    with pytest.raises(UserError, match="no such asset; shipped are"):
        assets.resolve(f"asset:{name}")


@pytest.mark.parametrize("name", ["../assets/fashion_mnist", "./fashion_mnist", "fashion_mnist/../emoji"])
def test_an_extractors_name_is_a_name(name):
    with pytest.raises(UserError, match="not known; use a shipped one"):
        load_extractor(name)


@pytest.mark.parametrize(
    "name",
    ["../x", "a/b", "a\\b", "..", ".hidden", "", " ", "a ", "x" * 101, "a\x1b[31m", "a\nb", "grid.png", "Table.md"],
)
def test_a_comparisons_runs_lie_in_its_folder(name):
    with pytest.raises(UserError, match=r"runs: .*(cannot be the name of a run's folder|is a file of the comparison)"):
        check(ComparisonSettings, {"output": "o", "passes": 1, "runs": {name: "a.yaml"}}, "compare.yaml")


def test_names_of_runs_as_they_are_written():
    names = ["DMD2", "DisBack (DMD2)", "MSD, 2 students (DMD2)", "Übung 3", "a.b"]
    settings = check(ComparisonSettings, {"output": "o", "passes": 1, "runs": dict.fromkeys(names, "a.yaml")}, "c")
    assert list(settings.runs) == names


@pytest.mark.parametrize("name", ["../x", "a/b", ".x", "", "x" * 101, "a\n", "a b"])
def test_a_stages_folder_lies_in_the_recipes(name, root, tmp_path):
    result = distill(root, tmp_path / "run", {"stages": [{"name": name}]})
    assert result.code == 2
    assert "stages[1]" in result.error
    assert not (tmp_path / "run").exists()


# -- commands ----------------------------------------------------------------------------------------------------


def commands(text):
    """The printed lines that are commands, as a shell splits them."""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("stepdistill ")]
    return [shlex.split(line.partition("   ")[0]) for line in lines]


@pytest.mark.parametrize("name", ["a b", "$(touch x)", "a;b", "it's", 'say "so"', "`id`", "-x"])
def test_printed_commands_name_the_folder_that_there_is(name, root, tmp_path):
    result = distill(root, tmp_path / name, {"roles": {"weights": "full"}})
    assert result.code == 0, result.err
    sample = next(command for command in commands(result.out) if command[1] == "sample")
    assert sample[2] == str(tmp_path / name / "student")
    call = result.out.partition("Pipeline.from_pretrained(")[2].partition(")\n")[0].partition(")  ")[0].rstrip(")")
    assert json.loads(call.removesuffix(")")) == str(tmp_path / name / "student")


def test_the_commands_of_several_students_are_quoted(root, tmp_path):
    output = f"output={tmp_path / 'a b$(x)'}"
    result = distill(root, tmp_path / "run", {"msd": {"students": 2}}, output, "--dry-run")
    assert result.code == 0, result.err
    told = commands(result.out)
    assert len(told) == 4
    assert all(command[:3] == ["stepdistill", "distill", str(root / "config.yaml")] for command in told)
    assert all(output in command for command in told)


def test_nothing_that_a_terminal_obeys_is_printed(root, tmp_path):
    assert printable("a\x1b[31mred\r\nb\x07\x9b") == "a\\x1b[31mred b\\x07\\x9b"
    result = distill(root, tmp_path / "a\x1b[2Jb", {})
    assert result.code == 2
    assert "control characters" in result.error
    result = stepdistill("distill", root / "config.yaml", "trainn\x1b[31m=1")
    assert result.code == 2
    assert "\x1b" not in result.err


# -- what is told ------------------------------------------------------------------------------------------------


def told(folder: Path) -> str:
    """Everything readable in an exported folder."""
    texts = []
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                texts.append(json.dumps(file.metadata()))
        elif path.is_file():
            texts.append(path.read_bytes().decode("utf-8", errors="replace"))
    return "\n".join(texts)


@pytest.mark.slow
def test_an_exported_folder_does_not_tell_where_it_was_made(root, tmp_path):
    data = {"prompts": str(root / "prompts.txt")}
    text = {"teacher": {"path": str(root / "text")}, "data": data}
    for name, changes in (("text", text), ("label", {})):
        result = distill(root, tmp_path / "run-of" / name, changes)
        assert result.code == 0, result.err
    again = {**text, "roles": {"lora_from": str(tmp_path / "run-of" / "text" / "student")}}
    assert distill(root, tmp_path / "run-of" / "again", again).code == 0
    several = {**text, "msd": {"students": 2, "partition": "medians"}, "roles": {"weights": "full"}}
    result = distill(root, tmp_path / "run-of" / "several", several)
    assert result.code == 0, result.err
    students = [tmp_path / "run-of" / name / "student" for name in ("text", "label", "again", "several")]
    merged = merge_students(str(students[0]), str(students[2]), 0.5, tmp_path / "run-of" / "merged")
    for folder in (*students, merged):
        text = told(folder)
        assert "private-place" not in text, folder
        assert "run-of" not in text, folder
        assert str(tmp_path.parent) not in text, folder
        assert "stepdistill" in text
    stamp = json.loads((students[0] / "scheduler" / "scheduler_config.json").read_text())["_stepdistill"]
    assert stamp["teacher"] == "text"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/teachers/sd", "sd"),
        ("~/teachers/sd/", "sd"),
        ("../sd", "sd"),
        ("C:\\models\\sd", "sd"),
        ("local-dir:/home/me/clip", "local-dir:clip"),
        ("runwayml/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"),
        ("/root/.cache/huggingface/hub/models--owner--name/snapshots/abc/unet", "owner/name"),
        ("asset:emoji/teacher", "asset:emoji/teacher"),
        ("stepdistill.judges.rewards:Brightness", "stepdistill.judges.rewards:Brightness"),
        ("A photo depicts ", "A photo depicts "),
        ("/", "folder"),
    ],
)
def test_a_path_is_told_by_its_last_name(text, expected):
    assert without_places({"a": [text]}) == {"a": [expected]}


@pytest.mark.parametrize(
    "stamp",
    [
        3,
        [1],
        "x",
        {"steps": "four"},
        {"steps": 0},
        {"steps": True},
        {"steps": 10**9},
        {"call": [1]},
        {"call": {"num_inference_steps": "1"}},
        {"call": {"num_inference_steps": 10**9}},
        {"call": {"__class__": 1}},
        {"call": {"eta": float("nan")}},
        {"also_steps": 2},
        {"null_label": "none"},
        {"label_names": "abc"},
        {"msd": []},
        {"teacher": 3},
    ],
)
def test_what_a_folder_says_of_itself_is_looked_at(stamp):
    with pytest.raises(UserError, match="the entry _stepdistill is damaged"):
        check_stamp({"_stepdistill": stamp}, "student x: its scheduler")
