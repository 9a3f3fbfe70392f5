"""Configs: parents, overrides, and one line for what is wrong."""

from __future__ import annotations

import importlib
import os
import pkgutil
from pathlib import Path

import pytest
import yaml
from toys import toy_config

import stepdistill
import stepdistill.eval
import stepdistill.trainers
from stepdistill import plain_yaml
from stepdistill.config import Section, apply_overrides, check, dump_yaml, expand_path, merge, read_yaml
from stepdistill.errors import UserError
from stepdistill.settings import RunSettings
from stepdistill.trainers.plans.job import make_job
from stepdistill.trainers.plans.resolve import read_job, resolve


def write(path, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


# -- files and their parents -------------------------------------------------------------------------------


def test_parents_are_found_beside_the_child_and_overridden_by_it(tmp_path):
    write(tmp_path / "all.yaml", a=1, deep={"x": 1, "y": 2}, items=[1, 2])
    write(tmp_path / "sub" / "middle.yaml", inherits="../all.yaml", a=2, deep={"y": 3})
    child = write(tmp_path / "sub" / "child.yaml", inherits="middle.yaml", items=[3], deep={"z": 4})
    assert read_yaml(child) == {"a": 2, "deep": {"x": 1, "y": 3, "z": 4}, "items": [3]}


@pytest.mark.parametrize("chain", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_a_circle_of_parents_is_refused(tmp_path, chain):
    for name, parent in zip(chain, [*chain[1:], chain[0]], strict=True):
        write(tmp_path / f"{name}.yaml", inherits=f"{parent}.yaml")
    with pytest.raises(UserError, match="comes back to itself"):
        read_yaml(tmp_path / "a.yaml")


def test_two_children_of_one_parent_are_no_circle(tmp_path):
    write(tmp_path / "top.yaml", a=1)
    write(tmp_path / "left.yaml", inherits="top.yaml", b=2)
    assert read_yaml(write(tmp_path / "right.yaml", inherits="left.yaml", c=3)) == {"a": 1, "b": 2, "c": 3}


def test_of_several_parents_the_later_is_over_the_earlier_and_the_child_over_both(tmp_path):
    write(tmp_path / "method.yaml", a=1, deep={"x": 1, "y": 1, "z": 1})
    write(tmp_path / "teacher.yaml", b=2, deep={"y": 2, "z": 2})
    child = write(tmp_path / "child.yaml", inherits=["method.yaml", "teacher.yaml"], deep={"z": 3})
    assert read_yaml(child) == {"a": 1, "b": 2, "deep": {"x": 1, "y": 2, "z": 3}}


def test_many_parents_are_refused_however_they_are_nested(tmp_path):
    write(tmp_path / "0.yaml", a=1)
    for i in range(1, 20):
        write(tmp_path / f"{i}.yaml", inherits=[f"{i - 1}.yaml"] * 2)
    assert read_yaml(tmp_path / "3.yaml") == {"a": 1}
    with pytest.raises(UserError, match="one of more than 30 configs to inherit from"):
        read_yaml(tmp_path / "19.yaml")


def test_a_missing_parent_names_parent_and_child(tmp_path):
    child = write(tmp_path / "child.yaml", inherits="gone.yaml")
    with pytest.raises(UserError, match=r"child\.yaml: inherits: .*gone\.yaml does not exist"):
        read_yaml(child)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: [1, 2", "not valid YAML"),
        (b"a: \xff\xfe", "not UTF-8 text, from byte 3 on"),
        (b"- 1\n- 2\n", "mapping of keys to values, not a list"),
        (b"just words", "mapping of keys to values, not a str"),
        (b"inherits: 3\n", "inherits must be the path of another config, or a list of such, not 3"),
        (b"inherits: [a.yaml, 3]\n", "or a list of such, not 3"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, content, says):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


DAMAGED = {
    "a date keeps its text": ("a: 2024-01-02", {"a": "2024-01-02"}),
    "a time of day keeps its text": ("a: 12:30", {"a": "12:30"}),
    "leading zeros keep their text": ("a: 010", {"a": "010"}),
    "merged mappings": ("a: &m {x: 1, y: 2}\nb: {<<: *m, y: 3}", {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}),
    "the first of merged lists wins": (
        "a: [{x: 1}, {x: 2}]\nb: {<<: [{x: 1}, {x: 2}]}",
        {"a": [{"x": 1}, {"x": 2}], "b": {"x": 1}},
    ),
    "no integer": ("a: !!int abc", "line 1: 'abc' is no int"),
    "no truth": ("a: !!bool maybe", "line 1: 'maybe' is no bool"),
    "an object": ("a: !!python/object/apply:os.system [true]", "line 1: the tag .*os.system is not read"),
    "a timestamp": ("a: !!timestamp 2024-01-02", "the tag .*timestamp is not read"),
    "nested lists": ("a: " + "[" * 500 + "]" * 500, "nested more than 30 deep"),
    "nested blocks": ("- " * 100_000 + "x", "nested more than 30 deep"),
    "nested by aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 40)),
        "nested more than 30 deep",
    ),
    "a bomb of aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 25)),
        "more than 100,000 values, aliases expanded",
    ),
    "an alias in itself": ("a: &x [*x]", "the alias .x stands inside of what it means"),
    "an alias of nothing": ("a: *x", "the alias .x has no anchor before it"),
    "a key twice": ("train:\n  updates: 3\n  updates: 4", "line 3: the key 'updates' stands twice"),
    "a key that is true": ("on: 1", "the key on is read as True, not as text; put it in quotes"),
    "a key that is a number": ("1: 2", "the key 1 is read as 1"),
    "a key that is nothing": ("~: 2", "the key ~ is read as None"),
    "a key that is a list": ("? [a]\n: 1", "a list or mapping cannot be a key"),
    "two documents": ("a: 1\n---\nb: 2", "line 2: a second document starts"),
    "half a character": ('a: "\\ud800"', "not valid YAML"),
    "NUL": ('a: "\\0"', "NUL or half of a surrogate pair"),
    "5000 digits": ("a: " + "9" * 5000, "a number of 5000 digits"),
    "2 MiB": ("a: " + "x" * 2**21, "larger than 1,048,576 bytes"),
}


@pytest.mark.parametrize("loader", [yaml.SafeLoader, getattr(yaml, "CSafeLoader", None)])
@pytest.mark.parametrize("name", DAMAGED)
def test_what_a_file_and_an_override_may_hold(name, loader, tmp_path, monkeypatch):
    if loader is None:
        pytest.skip("PyYAML without libyaml")
    monkeypatch.setattr(plain_yaml, "_LOADER", loader)
    content, expected = DAMAGED[name]
    path = tmp_path / "a.yaml"
    path.write_text(content)
    if isinstance(expected, dict):
        assert read_yaml(path) == expected
        assert apply_overrides({}, [f"v={content}"]) == {"v": expected}
        return
    with pytest.raises(UserError, match=expected) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 400
    if name == "2 MiB":
        return
    with pytest.raises(UserError, match="the value is not valid YAML") as caught:
        apply_overrides({}, [f"v={content}"])
    assert len(str(caught.value)) < 400


def test_every_shipped_config_reads_as_the_yaml_that_it_is():
    for path in (Path(__file__).parents[1] / "configs").rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert plain_yaml.parse(text) == yaml.safe_load(text), path


def test_what_is_no_plain_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for path, says in (
        (tmp_path / "pipe", "a pipe or a device"),
        (Path("/dev/zero"), "a pipe or a device"),
        (tmp_path / "link", "no such config file"),
    ):
        with pytest.raises(UserError, match=says):
            read_yaml(path)
    with pytest.raises(UserError, match="a pipe or a device"):
        read_yaml(write(tmp_path / "child.yaml", inherits="pipe"))


def test_a_long_chain_of_parents_is_refused(tmp_path):
    write(tmp_path / "0.yaml", a=1)
    for i in range(1, 40):
        write(tmp_path / f"{i}.yaml", inherits=f"{i - 1}.yaml")
    assert read_yaml(tmp_path / "30.yaml") == {"a": 1}
    with pytest.raises(UserError, match="one of more than 30 configs to inherit from"):
        read_yaml(tmp_path / "39.yaml")


@pytest.mark.parametrize("override", ["=1", "a..b=1", ".a=1", "a.=1", " =1", "a.b", ".".join("a" * 40) + "=1"])
def test_an_override_without_a_key_is_refused(override):
    with pytest.raises(UserError, match=r"an override is key=value or key\.sub=value"):
        apply_overrides({}, [override])


def test_no_file_a_folder_and_a_path_through_a_file(tmp_path):
    file = write(tmp_path / "a.yaml", a=1)
    for path, says in ((tmp_path / "b.yaml", "no such config"), (tmp_path, "a folder"), (file / "c", "cannot be read")):
        with pytest.raises(UserError, match=says):
            read_yaml(path)


def test_an_empty_file_is_an_empty_config(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    assert read_yaml(tmp_path / "empty.yaml") == {}


def test_merge_replaces_all_but_mappings_and_leaves_its_arguments():
    parent, child = {"a": {"b": 1, "c": [1]}, "d": {"e": 1}}, {"a": {"c": [2]}, "d": 3}
    assert merge(parent, child) == {"a": {"b": 1, "c": [2]}, "d": 3}
    assert parent == {"a": {"b": 1, "c": [1]}, "d": {"e": 1}}
    assert child == {"a": {"c": [2]}, "d": 3}


# -- overrides ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a=2", {"a": 2, "s": {"x": 1}}),
        ("s.y=true", {"a": 1, "s": {"x": 1, "y": True}}),
        ("s.t.u=[1, two]", {"a": 1, "s": {"x": 1, "t": {"u": [1, "two"]}}}),
        ("s={x: 5, z: null}", {"a": 1, "s": {"x": 5, "z": None}}),
        ("a=", {"a": None, "s": {"x": 1}}),
        ("a=x=y", {"a": "x=y", "s": {"x": 1}}),
        ("a.b=1", {"a": {"b": 1}, "s": {"x": 1}}),
    ],
)
def test_overrides_are_yaml(override, expected):
    assert apply_overrides({"a": 1, "s": {"x": 1}}, [override]) == expected


def test_later_overrides_win():
    assert apply_overrides({}, ["a.b=1", "a.c=2", "a.b=3"]) == {"a": {"b": 3, "c": 2}}


@pytest.mark.parametrize("override", ["novalue", "=3", " =3", "a=[1"])
def test_bad_overrides_are_named(override):
    with pytest.raises(UserError) as caught:
        apply_overrides({}, [override])
    assert repr(override) in str(caught.value)


def test_overrides_reach_the_checked_config(tmp_path):
    path = write(tmp_path / "c.yaml", **toy_config())
    job = read_job(
        path, ["train.updates=7", "optimizer.student.lr=3e-4", "dmd2.gan.max_level=10", "data.labels=[2, 0]"]
    )
    assert job.config.train.updates == 7
    assert job.config.train.batch_size == 8  # beside it in the file
    assert job.config.optimizer.student.lr == 3e-4  # what YAML 1.1 reads as text
    assert job.settings.gan.max_level == 10
    assert job.config.data.labels == [2, 0]


# -- the check ---------------------------------------------------------------------------------------------


def refused(**changes) -> str:
    with pytest.raises(UserError) as caught:
        make_job(toy_config(**changes), "my.yaml")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_unknown_key_is_named_beside_the_known_ones():
    top = refused(lerning_rate=1)
    assert "unknown key 'lerning_rate'" in top
    assert "known keys here: data, dmd2, evaluation" in top
    deep = refused(optimizer={"student": {"learning_rate": 1}})
    assert "unknown key 'optimizer.student.learning_rate'" in deep
    assert "betas, clip, decay, eps, lr, warmup, weight_decay" in deep
    method = refused(dmd2={"gan": {"weight": 1}})
    assert "unknown key 'dmd2.gan.weight'" in method
    assert "discriminator_weight" in method


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"train": {"updates": "many"}}, ["train.updates = 'many'", "integer"]),
        ({"train": {"updates": 1.5}}, ["train.updates = 1.5", "integer"]),
        ({"output": 3}, ["output = 3", "string"]),
        ({"train": "none"}, ["train = 'none'"]),
        ({"dmd2": None}, ["dmd2 = None"]),
        ({"roles": {"weights": "half"}}, ["roles.weights = 'half'", "'full', 'shared' or 'mixed'"]),
        ({"optimizer": {"student": {"betas": [0.9]}}}, ["optimizer.student.betas"]),
        ({"train": {"batch_size": 0}}, ["train.batch_size = 0", "greater than or equal to 1"]),
        ({"optimizer": {"student": {"lr": 0}}}, ["optimizer.student.lr = 0", "greater than 0"]),
        ({"optimizer": {"student": {"lr": float("nan")}}}, ["optimizer.student.lr = nan", "finite number"]),
        ({"train": {"ema_decay": 1.0}}, ["train.ema_decay = 1.0", "less than 1"]),
        ({"sampler": {"steps": 65}}, ["sampler.steps = 65", "less than or equal to 64"]),
        ({"dmd2": {"guidance_scale": 0.5}}, ["dmd2.guidance_scale = 0.5", "greater than or equal to 1"]),
        ({"dmd2": {"min_level": 500, "max_level": 100}}, ["min_level = 500 is above max_level = 100"]),
        ({"data": {"labels": []}}, ["labels is empty"]),
        ({"evaluation": {"extractor": "x"}}, ["extractor and reference go together"]),
    ],
)
def test_wrong_types_and_ranges_say_key_value_and_what_is_allowed(changes, parts):
    message = refused(**changes)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("key", ["method", "output", "teacher", "train"])
def test_a_missing_key_is_named(key):
    raw = {k: v for k, v in toy_config().items() if k != key}
    with pytest.raises(UserError, match=f"^my.yaml: key '{key}' is missing"):
        make_job(raw, "my.yaml")


@pytest.mark.parametrize("name", ["dmd3", "", None, 3, ["dmd2"], {"dmd2": 1}])
def test_an_unknown_method_lists_the_known(name):
    raw = {**toy_config(), "method": name}
    with pytest.raises(UserError, match=r"unknown; methods are dmd2"):
        make_job(raw, "my.yaml")


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trackio" else real(name))
    assert "pip install trackio" in refused(train={"trackers": ["trackio"]})
    assert make_job(toy_config(train={"trackers": ["tensorboard"]})).config.train.trackers == ["tensorboard"]


def test_sections_of_other_methods_are_set_aside_but_checked(monkeypatch):
    from stepdistill.trainers.methods.dmd2 import DMD2
    from stepdistill.trainers.methods.registry import METHODS

    class Other(DMD2):
        name = "other"

    monkeypatch.setitem(METHODS, "other", Other)
    job = make_job(toy_config(other={"guidance_scale": 2.0}, dmd2={"guidance_scale": 3.0}))
    assert job.unused == ("other",)
    assert job.settings.guidance_scale == 3.0
    assert not hasattr(job.config, "other")
    switched = make_job(toy_config(method="other", other={"guidance_scale": 2.0}, dmd2={"guidance_scale": 3.0}))
    assert switched.unused == ("dmd2",)
    assert switched.settings.guidance_scale == 2.0
    assert "unknown key 'guidance'" in refused(other={"guidance": 2.0})


def test_what_is_saved_reads_back_as_the_same_config(tmp_path):
    job = make_job(toy_config(dmd2={"guidance_scale": 2.5}, train={"max_minutes": 3}))
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(job.config))
    assert read_job(path).config.model_dump() == job.config.model_dump()


def test_a_checked_config_cannot_be_changed():
    config = check(RunSettings, {k: v for k, v in toy_config().items() if k != "dmd2"}, "here")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 4


# -- paths -------------------------------------------------------------------------------------------------

PATHS = {"path", "folder", "npz", "dataset", "output", "prompts", "pairs", "decoder", "weights", "pretrained", "data"}
PATHS |= {"extractor", "reference", "router", "idx_images", "idx_labels", "reference_data", "config"}


def sections(parent=Section):
    for child in parent.__subclasses__():
        yield child
        yield from sections(child)


def test_every_path_of_every_section_takes_home_and_variables():
    for package in (stepdistill, stepdistill.trainers, stepdistill.eval):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith(".__main__"):
                importlib.import_module(module.name)
    plain = {
        (section.__name__, name)
        for section in sections()
        if section.__module__.startswith("stepdistill")
        for name, field in section.model_fields.items()
        if name in PATHS and field.annotation in (str, str | None, dict[str, str]) and not field.metadata
    }
    in_words = {("Preset", "prompts"), ("Preset", "reference")}  # what the files are
    assert plain == in_words | {("PartRecord", "folder")}  # which no user writes


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~/a", "/home/me/a"),
        ("$PLACE/a", "/data/a"),
        ("${PLACE}x/a", "/datax/a"),
        ("dinov2:~/a", "dinov2:/home/me/a"),
        ("local-dir:$PLACE/a", "local-dir:/data/a"),
        ("owner/name", "owner/name"),
        ("a~/b", "a~/b"),
        ("asset:emoji/teacher", "asset:emoji/teacher"),
    ],
)
def test_a_path_is_read_as_a_shell_would(monkeypatch, path, expected):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PLACE", "/data")
    assert expand_path(path) == expected


@pytest.mark.parametrize("path", ["", "  ", "$NOWHERE/a", "${NOWHERE}", "~nobody-of-this-name/a", "a\0b"])
def test_a_path_that_names_nothing_is_refused(monkeypatch, path):
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(ValueError, match=r"name a file|not set|no user|no file name"):
        expand_path(path)


def test_a_parent_may_lie_in_a_folder_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(tmp_path / "elsewhere"))
    write(tmp_path / "elsewhere" / "all.yaml", a=1)
    assert read_yaml(write(tmp_path / "child.yaml", inherits="$PLACE/all.yaml", b=2)) == {"a": 1, "b": 2}
    with pytest.raises(UserError, match=r"child\.yaml: inherits = \$NOWHERE/all\.yaml: \$NOWHERE is not set"):
        read_yaml(write(tmp_path / "child.yaml", inherits="$NOWHERE/all.yaml"))


def test_the_output_of_stages_and_of_several_students_takes_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(tmp_path))
    raw = {**toy_config(), "output": "$PLACE/run"}
    stages = resolve({**raw, "stages": [{"name": "one"}, {"name": "two"}]})
    assert stages.output == tmp_path / "run"
    assert [stage.output for stage in stages.stages] == [tmp_path / "run" / "01-one", tmp_path / "run" / "02-two"]
    assert stages.config["output"] == str(tmp_path / "run")
    several = resolve({**raw, "msd": {"students": 2}})
    assert several.output == tmp_path / "run"
    assert several.students[1].output == tmp_path / "run" / "student-1"
    for section in ({"stages": [{"name": "one"}]}, {"msd": {"students": 2}}):
        with pytest.raises(UserError, match=r"config: output = \$NOWHERE/run: \$NOWHERE is not set"):
            resolve({**raw, **section, "output": "$NOWHERE/run"})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": {"updates": 10**400}}, "train.updates = "),
        ({"train": {"batch_size": 10**12}}, "train.batch_size = 1000000000000: should be less than or equal to 65536"),
        ({"seed": 2**53 + 1}, "seed = 9007199254740993: should be less than or equal to 4294967280"),
        ({"optimizer": {"student": {"betas": [0.9, 2]}}}, "betas.1 = 2: should be less than 1"),
        ({"optimizer": {"student": {"betas": [-0.1, 0.9]}}}, "betas.0 = -0.1: should be greater than or equal to 0"),
        ({"optimizer": {"student": {"lr": 1e300}}}, "lr = 1e+300: at most 1e+12 is allowed"),
        ({"optimizer": {"student": {"lr": float("nan")}}}, "lr = nan: should be a finite number"),
        (
            {"roles": {"weights": "full", "network": {"layers_per_block": 10**30}}},
            "network = 1000000000000000000000000000000: ",
        ),
        ({"output": "x" * 300}, "output: a name longer than 255 bytes"),
        ({"output": "a\ud800"}, "output: the path has control characters, or others that no file name can have"),
        ({"train": {"updates": "9" * 10_000}}, "train.updates = '99999"),
    ],
)
def test_numbers_and_names_have_bounds(changes, says):
    message = refused(**changes)
    assert says in message
    assert len(message) < 500
