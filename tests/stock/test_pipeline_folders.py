"""Whether a pipeline's folder is whole, and what may be written over."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
from console import stepdistill

from stepdistill.errors import UserError
from stepdistill.stock.folders import check_replaceable, find_missing, is_exported, is_whole


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    tiny.save_pixels(folder / "pixels", "v", labels=3, null=True)
    tiny.save_stable_diffusion(folder / "latents")
    return folder


def stamp(folder):
    """As an export does; gives the folder."""
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_stepdistill": {"version": "0.1.0", "steps": 1}}))
    return folder


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_without_any_one_of_its_files_a_pipeline_is_not_whole(teachers, tmp_path, kind):
    assert is_whole(teachers / kind)
    needed = {"model_index.json", "config.json", "scheduler_config.json", "tokenizer_config.json", "tokenizer.json"}
    for file in sorted((teachers / kind).rglob("*")):
        if file.is_dir():
            continue
        copy = shutil.copytree(teachers / kind, tmp_path / "copy", dirs_exist_ok=True)
        part = file.relative_to(teachers / kind)
        (copy / part).unlink()
        assert is_whole(copy) == (file.name not in needed and file.suffix != ".safetensors"), part


def test_weights_cut_short_and_missing_shards_are_named(teachers, tmp_path):
    copy = shutil.copytree(teachers / "pixels", tmp_path / "copy")
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert find_missing(copy) == "unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(whole)
    index = {"weight_map": {"a": file.name, "b": "diffusion_pytorch_model-2.safetensors"}}
    (copy / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert find_missing(copy) == "unet/diffusion_pytorch_model-2.safetensors"


def test_only_what_stepdistill_exported_is_written_over(teachers, tmp_path):
    copy = shutil.copytree(teachers / "pixels", tmp_path / "copy")
    with pytest.raises(UserError, match="holds no student that stepdistill exported"):
        check_replaceable(copy)
    stamp(copy)
    assert is_exported(copy)
    check_replaceable(copy)
    with pytest.raises(UserError, match="written over what it is made from"):
        check_replaceable(tmp_path / "." / "copy", (copy,))
    with pytest.raises(UserError, match="holds no teacher that stepdistill trained"):
        check_replaceable(copy, teacher=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="that is a file"):
        check_replaceable(tmp_path / "file")
    check_replaceable(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".lock").write_text("")
    check_replaceable(tmp_path / "empty")


def test_merge_writes_over_neither_input_nor_another_pipeline(teachers, tmp_path):
    for name in "ab":
        stamp(shutil.copytree(teachers / "pixels", tmp_path / name))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for output, says in (("a", "made from"), ("b", "made from"), ("../pixels", "holds no student")):
        place = teachers / "pixels" if output.startswith("..") else tmp_path / output
        result = stepdistill("merge", tmp_path / "a", tmp_path / "b", "--output", place)
        assert result.code == 2
        assert says in result.error
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
