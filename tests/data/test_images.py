"""Folders and datasets of images, and prompts: exact values, and one line for what cannot be read."""

from __future__ import annotations

import io

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features
from PIL import Image
from pixels import as_batch, assert_refused, random_pixels

from stepdistill.conditions import Conditions
from stepdistill.data import columns
from stepdistill.data.arrays import read_array_images
from stepdistill.data.columns import read_dataset
from stepdistill.data.folders import read_folder
from stepdistill.data.prompts import read_prompts
from stepdistill.data.sources import read_named_prompts
from stepdistill.settings import PromptColumnSettings

GRAY, COLOUR = (1, 4, 6), (3, 4, 6)
PROMPTS = Conditions("prompt")


# -- folders -----------------------------------------------------------------------------------------------


def save(path, array: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return array


def test_a_flat_folder_is_sorted_and_has_no_labels(tmp_path):
    arrays = [save(tmp_path / f"{i}.png", random_pixels(1, (4, 6, 3), i)[0]) for i in (2, 0, 1)]
    (tmp_path / "notes.md").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    images = read_folder(tmp_path, COLOUR)
    assert torch.equal(images.batch([0, 1, 2]), as_batch(np.stack([arrays[1], arrays[2], arrays[0]])))
    assert images.labels is None


def test_sub_folders_are_labels_in_sorted_order(tmp_path):
    for name in ("cat/b.png", "ant/a.PNG", "cat/deep/c.bmp", "bee/x.png"):
        save(tmp_path / name, random_pixels(1, (4, 6))[0])
    images = read_folder(tmp_path, GRAY, conditions=Conditions("label", range(3)))
    images.prepare(Conditions("label", range(3)), "data.images")
    assert images.labels == [0, 1, 2, 2]  # ant, bee, cat, cat
    assert read_folder(tmp_path, GRAY).labels is None  # of a teacher without conditions


def test_text_files_beside_the_pictures_are_captions(tmp_path):
    for index in range(2):
        save(tmp_path / f"{index}.png", random_pixels(1, (4, 6))[0])
        (tmp_path / f"{index}.txt").write_text(f" a picture of {index}\n", encoding="utf-8-sig")
    assert read_folder(tmp_path, GRAY, conditions=PROMPTS).labels == ["a picture of 0", "a picture of 1"]
    (tmp_path / "1.txt").write_bytes(b"\xff\xfe\x00")
    assert_refused(lambda: read_folder(tmp_path, GRAY, conditions=PROMPTS), "1.txt", "UTF-8")


def test_a_wrong_size_names_file_sizes_and_remedy(tmp_path):
    save(tmp_path / "a.png", random_pixels(1, (4, 6))[0])
    save(tmp_path / "b.png", random_pixels(1, (5, 6))[0])  # not the first: all are looked at
    assert_refused(
        lambda: read_folder(tmp_path, GRAY),
        str(tmp_path / "b.png"),
        "6x5",
        "the teacher needs 6x4",
        "data.images.resize=true",
    )


@pytest.mark.parametrize("size", [(8, 20), (12, 12), (4, 6), (40, 60), (3, 3)])
def test_resizing_crops_the_centre_and_uses_lanczos(tmp_path, size):
    height, width = size
    array = save(tmp_path / "a.png", random_pixels(1, (height, width, 3))[0])
    result = read_folder(tmp_path, COLOUR, resize=True).batch([0])
    side = min(width / 6, height / 4)  # the largest 6:4 window, in the middle
    left, top = (width - 6 * side) / 2, (height - 4 * side) / 2
    box = (left, top, width - left, height - top)
    expected = Image.fromarray(array).resize((6, 4), Image.Resampling.LANCZOS, box=box)
    assert result.shape == (1, 3, 4, 6)
    assert torch.equal(result, as_batch(np.asarray(expected)[None]))


def test_the_centre_is_what_stays():
    """Red left, green middle, blue right: a square teacher sees green alone."""
    from stepdistill.data.pictures import fit

    strip = np.zeros((8, 24, 3), dtype=np.uint8)
    for part in range(3):
        strip[:, 8 * part : 8 * part + 8, part] = 255
    result = fit(Image.fromarray(strip), (3, 8, 8), True, "strip")
    assert (result == np.array([0, 255, 0], dtype=np.uint8)).all()


def test_pictures_that_cannot_be_read(tmp_path):
    save(tmp_path / "a.png", random_pixels(1, (4, 6))[0])
    (tmp_path / "b.png").write_bytes(b"not a picture")
    assert_refused(lambda: read_folder(tmp_path, GRAY), "b.png: not a readable image", "remove or replace")


def test_a_picture_cut_short_is_named_when_it_is_read(tmp_path):
    save(tmp_path / "a.png", random_pixels(1, (64, 64, 3))[0])
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    images = read_folder(tmp_path, (3, 64, 64))
    assert_refused(lambda: images.batch([0]), "a.png: not a readable image")


def test_sixteen_bits_are_refused_rather_than_clipped(tmp_path):
    Image.fromarray(np.full((4, 6), 40000, dtype=np.uint16)).save(tmp_path / "a.png")
    assert_refused(lambda: read_folder(tmp_path, GRAY), "a.png", "8 bits a channel")


def test_folders_without_pictures(tmp_path):
    assert_refused(lambda: read_folder(tmp_path, GRAY), "no images in it", ".png")
    assert_refused(lambda: read_folder(tmp_path / "gone", GRAY), "gone: no such folder", "data.images.folder")


# -- Hugging Face datasets ---------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    array = random_pixels(3, (4, 6, 3))
    columns = {
        "image": [Image.fromarray(a) for a in array],
        "label": [2, 0, 1],
        "text": ["a cat ", None, ""],
        "nested": [a[..., 0].tolist() for a in array],
    }
    DatasetDict({"train": Dataset.from_dict(columns)}).save_to_disk(tmp_path / "set")
    Dataset.from_dict(columns).save_to_disk(tmp_path / "one")
    return tmp_path, array


def test_dataset_pictures_labels_and_captions(dataset):
    root, array = dataset
    for name in ("set", "one"):
        images = read_dataset(str(root / name), COLOUR, label_column="label")
        assert torch.equal(images.batch([2, 0, 1]), as_batch(array)[[2, 0, 1]])
        assert images.labels == [2, 0, 1]
        assert len(images) == 3
    plain = read_dataset(str(root / "one"), GRAY, image_column="nested")
    assert torch.equal(plain.batch([0, 1, 2]), as_batch(array[..., 0]))
    assert plain.labels is None


def test_dataset_that_does_not_fit(dataset, tmp_path):
    root, _ = dataset
    name = str(root / "set")
    assert_refused(lambda: read_dataset(name, COLOUR, image_column="img"), "no column 'img'", "image, label, text")
    assert_refused(lambda: read_dataset(name, COLOUR, label_column="class"), "no column 'class'")
    assert_refused(lambda: read_dataset(name, COLOUR, split="test"), "split 'test'", "cannot be loaded")
    assert_refused(lambda: read_dataset(name, (3, 8, 8)), f"{name}[0]: the image is 6x4", "data.images.resize=true")
    assert_refused(
        lambda: read_dataset(name, COLOUR, image_column="text"), f"{name}[0]", "'text' holds no readable image"
    )
    assert_refused(lambda: read_dataset(str(tmp_path / "gone"), COLOUR), "gone", "cannot be loaded")
    assert read_dataset(name, (3, 8, 8), resize=True).batch([0]).shape == (1, 3, 8, 8)


def test_an_empty_dataset_is_refused(monkeypatch):
    monkeypatch.setattr(columns, "open_dataset", lambda *_: Dataset.from_dict({"image": []}))
    assert_refused(lambda: read_dataset("owner/name", COLOUR), "dataset 'owner/name' (split 'train') is empty")


def test_no_picture_but_the_first_is_decoded_before_it_is_drawn(tmp_path):
    """And none of another column with it."""
    file = io.BytesIO()
    Image.fromarray(random_pixels(1, (4, 6))[0]).save(file, "PNG")
    good, bad = {"bytes": file.getvalue(), "path": None}, {"bytes": b"no picture", "path": None}
    features = Features({"image": datasets.Image(), "other": datasets.Image()})
    rows = {"image": [good, bad, good], "other": [bad, bad, bad]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    images = read_dataset(str(tmp_path / "set"), GRAY)
    assert images.batch([0, 2]).shape == (2, 1, 4, 6)
    assert_refused(lambda: images.batch([1]), "set[1]: not a readable image")


def test_prompt_column_skips_what_is_no_text(dataset):
    root, _ = dataset
    notes = []
    assert read_named_prompts(None, PromptColumnSettings(name=str(root / "set")), notes=notes) == ["a cat"]
    assert notes == ["2 of 3 rows are empty and are passed over"]
    column = PromptColumnSettings(name=str(root / "set"), column="caption")
    assert_refused(lambda: read_named_prompts(None, column), "no column 'caption'; it has image, label, text, nested")
    Dataset.from_dict({"text": ["", None]}).save_to_disk(root / "blank")
    blank = PromptColumnSettings(name=str(root / "blank"))
    assert_refused(lambda: read_named_prompts(None, blank), "blank': no prompts in it")


# -- prompts -----------------------------------------------------------------------------------------------


def test_prompts_are_lines_without_blanks(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffa cat\n\n  a red bus \r\n\t\nein Bär", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["a cat", "a red bus", "ein Bär"]


def test_prompt_files_that_cannot_serve(tmp_path):
    (tmp_path / "blank.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes("ein Bär".encode("latin-1"))
    assert_refused(lambda: read_prompts(tmp_path / "blank.txt"), "blank.txt: no prompts in it; write one a line")
    assert_refused(lambda: read_prompts(tmp_path / "latin.txt"), "latin.txt: not a readable text file", "UTF-8")
    assert_refused(lambda: read_prompts(tmp_path / "gone.txt"), "gone.txt: no such file", "data.prompts")
    assert_refused(lambda: read_prompts(tmp_path), "no images in it")


def test_fingerprint_changes_with_any_image(tmp_path):
    """A cache of latents is keyed by it: a picture changed in the middle must not be served from the old one."""
    pixels = np.random.default_rng(0).integers(0, 255, (5, 8, 8), dtype=np.uint8)
    changed = pixels.copy()
    changed[2, 3, 3] ^= 1
    prints = [read_array_images(p, None, (1, 8, 8), False, "made up").fingerprint for p in (pixels, pixels, changed)]
    assert prints[0] == prints[1] != prints[2]
    for index in range(3):
        Image.fromarray(pixels[index]).save(tmp_path / f"{index}.png")
    before = read_folder(tmp_path, (1, 8, 8)).fingerprint
    assert read_folder(tmp_path, (1, 8, 8)).fingerprint == before
    Image.fromarray(changed[2]).save(tmp_path / "1.png")
    assert read_folder(tmp_path, (1, 8, 8)).fingerprint != before
