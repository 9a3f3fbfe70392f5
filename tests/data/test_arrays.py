"""Images in .npz and idx files: exact values, and one line for what cannot be read."""

from __future__ import annotations

import gzip
import io
import re
import struct

import numpy as np
import pytest
import torch
from pixels import as_batch, assert_refused, random_pixels

from stepdistill.conditions import Conditions
from stepdistill.data.arrays import read_idx, read_npz, write_npz
from stepdistill.errors import UserError

GRAY, COLOUR = (1, 4, 6), (3, 4, 6)
PROMPTS = Conditions("prompt")


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3)])
def test_what_is_written_is_read(tmp_path, shape):
    images = random_pixels(5, shape)
    path = write_npz(tmp_path / "new" / "set.npz", images.reshape(5, 4, 6, -1), np.arange(5, dtype=np.uint8))
    read = read_npz(path, COLOUR if len(shape) == 3 else GRAY)
    assert torch.equal(read.batch(list(range(5))), as_batch(images))
    assert read.labels == list(range(5))
    assert [p.name for p in path.parent.iterdir()] == ["set.npz"]


# -- arrays ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "taken"), [((4, 6), GRAY), ((4, 6, 1), GRAY), ((4, 6, 3), COLOUR)])
def test_npz_pixels_are_exact_and_in_range(tmp_path, shape, taken):
    array = random_pixels(5, shape)
    array.reshape(-1)[:2] = 0, 255
    np.savez(tmp_path / "a.npz", images=array, labels=np.arange(5))
    images = read_npz(tmp_path / "a.npz", taken)
    batch = images.batch([3, 0, 3])
    assert batch.dtype == torch.float32
    assert torch.equal(batch, as_batch(array)[[3, 0, 3]])
    assert batch[1].min() == -1
    assert batch[1].max() == 1
    assert images.labels == [0, 1, 2, 3, 4]
    assert len(images) == images.size == 5


def test_npz_captions_are_what_they_were(tmp_path):
    captions = ["a cat", "", "ein Löwe, naïve, 虎"]
    write_npz(tmp_path / "a.npz", random_pixels(3, (4, 6, 3)), np.array(captions))
    images = read_npz(tmp_path / "a.npz", COLOUR)
    assert images.labels == captions
    assert all(type(caption) is str for caption in images.labels)


@pytest.mark.parametrize(
    ("labels", "part"),
    [
        (None, "a.npz: its images have no class labels"),
        (np.array(["a", "b", "c"]), "a.npz: its images have no class labels"),
        (np.array([0, 1, 3]), "a.npz: labels 0..3 are outside 0..2"),
        (np.array([-1, 1, 2]), "a.npz: labels -1..2 are outside 0..2"),
    ],
)
def test_class_labels_are_refused_when_they_are_none(tmp_path, labels, part):
    images = read_npz(write_npz(tmp_path / "a.npz", random_pixels(3, (4, 6)), labels), GRAY)
    with pytest.raises(UserError, match=re.escape(part)):
        images.classes(3)


def test_npz_without_labels_and_with_gray_for_a_colour_teacher(tmp_path):
    array = random_pixels(2, (4, 6))
    np.savez_compressed(tmp_path / "a.npz", images=array)
    images = read_npz(tmp_path / "a.npz", COLOUR)
    assert images.labels is None
    assert torch.equal(images.batch([0, 1]), as_batch(array).expand(2, 3, 4, 6))


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({"pictures": random_pixels(2, (4, 6))}, ["no array named 'images'", "pictures"]),
        ({"images": random_pixels(2, (4, 6)).astype(np.float32)}, ["must be uint8", "float32 (2, 4, 6)"]),
        ({"images": random_pixels(2, (4,))}, ["must be uint8 of shape (N, H, W)", "(2, 4)"]),
        ({"images": random_pixels(0, (4, 6))}, ["(0, 4, 6)"]),
        ({"images": random_pixels(2, (3, 4, 6))}, ["C 1, 3 or 4", "(2, 3, 4, 6)"]),
        ({"images": random_pixels(3, (4, 6)), "labels": np.arange(2)}, ["3 images but 2 labels"]),
        (
            {"images": random_pixels(2, (4, 6)), "labels": np.array([0.5, 1])},
            ["labels must be integers", "float64 (2,)"],
        ),
        ({"images": random_pixels(2, (4, 6)), "labels": np.eye(2, dtype=int)}, ["labels must be integers", "(2, 2)"]),
        ({"images": random_pixels(2, (4, 6)), "labels": np.int64(1)}, ["labels must be integers"]),
        (
            {"images": random_pixels(2, (4, 6)), "labels": np.array([b"a", b"b"])},
            ["labels must be integers or captions"],
        ),
        ({"images": random_pixels(2, (4, 6)), "labels": np.array(["a"])}, ["2 images but 1 labels"]),
        ({"images": np.array([None, 1], dtype=object)}, ["not a readable .npz"]),
        (
            {"images": random_pixels(2, (6, 6))},
            ["[0]: the image is 6x6, the teacher needs 6x4", "data.images.resize=true"],
        ),
    ],
)
def test_npz_that_does_not_fit(tmp_path, arrays, parts):
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    assert_refused(lambda: read_npz(path, GRAY), str(path), *parts)


def test_npz_files_that_are_none(tmp_path):
    whole = io.BytesIO()
    np.savez(whole, images=random_pixels(9, (4, 6)))
    damaged = bytearray(whole.getvalue())
    damaged[150] ^= 0xFF
    array = io.BytesIO()
    np.save(array, random_pixels(2, (4, 6)))
    contents = {
        "cut.npz": whole.getvalue()[:-40],
        "damaged.npz": bytes(damaged),
        "text.npz": b"not an archive",
        "empty.npz": b"",
        "one.npy": array.getvalue(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert_refused(lambda name=name: read_npz(tmp_path / name, GRAY), name, "not a readable .npz")
    assert_refused(
        lambda: read_npz(tmp_path / "gone.npz", GRAY), "gone.npz: no such file; set data.images.npz to an existing .npz"
    )


# -- idx ---------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_plain_and_gzipped(tmp_path, pack):
    array, labels = random_pixels(4, (4, 6)), np.array([3, 1, 0, 2], dtype=np.uint8)
    (tmp_path / "images").write_bytes(pack(idx(array)))
    (tmp_path / "labels").write_bytes(pack(idx(labels)))
    images = read_idx(tmp_path / "images", tmp_path / "labels", GRAY)
    assert torch.equal(images.batch([0, 1, 2, 3]), as_batch(array))
    assert images.labels == [3, 1, 0, 2]
    assert read_idx(tmp_path / "images", None, GRAY).labels is None


def test_idx_that_cannot_be_read(tmp_path):
    whole, packed = idx(random_pixels(4, (4, 6))), gzip.compress(idx(random_pixels(4, (4, 6))))
    damaged = packed[:20] + bytes(20) + packed[40:]
    contents = {
        "short": (whole[:-5], "cut short"),
        "header": (whole[:9], "cut short"),
        "png": (b"\x89PNG1234", "not an idx file"),
        "empty": (b"", "not an idx file"),
        "cut.gz": (packed[:-12], "not readable"),
        "damaged.gz": (damaged, "not readable"),
    }
    for name, (content, says) in contents.items():
        (tmp_path / name).write_bytes(content)
        assert_refused(lambda name=name: read_idx(tmp_path / name, None, GRAY), name, says)
    assert_refused(lambda: read_idx(tmp_path / "gone", None, GRAY), "gone: no such file")
