"""Folders of classes: no label shifts in silence."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from stepdistill.conditions import Conditions, number_classes
from stepdistill.data.listing import list_pictures
from stepdistill.data.sources import load_images
from stepdistill.errors import UserError
from stepdistill.settings import ImagesSettings

SHAPE = (1, 4, 4)


def draw(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(root / name)
    return root


def read(root: Path, num_labels: int = 3, **settings):
    return load_images(ImagesSettings(folder=str(root), **settings), SHAPE, Conditions("label", range(num_labels)))


def labels(root: Path, num_labels: int = 3) -> dict[str, int]:
    """The label of the first picture in each top folder."""
    images = read(root, num_labels)
    files = list_pictures(root, "key").files
    return {file.relative_to(root).parts[0]: label for file, label in zip(files, images.labels, strict=True)}


def assert_refused(root: Path, *parts: str, num_labels: int = 3, **settings) -> None:
    with pytest.raises(UserError) as caught:
        read(root, num_labels, **settings)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


# -- numbers -----------------------------------------------------------------------------------------------


def test_whole_numbers_are_the_labels(tmp_path):
    """Sorted as text they were 0, 1, 10, 2: folder 10 had label 2."""
    draw(tmp_path, *(f"{label}/a.png" for label in range(11)))
    assert labels(tmp_path, 11) == {str(label): label for label in range(11)}


def test_numbers_may_have_leading_zeros_and_gaps(tmp_path):
    draw(tmp_path, "003/a.png", "010/a.png", "000/a.png")
    assert labels(tmp_path, 11) == {"003": 3, "010": 10, "000": 0}


def test_a_number_outside_the_teachers_labels_is_refused(tmp_path):
    draw(tmp_path, "1/a.png", "2/a.png", "3/a.png")
    assert_refused(tmp_path, "labels 1..3 are outside 0..2")


def test_the_same_number_twice_is_refused(tmp_path):
    draw(tmp_path, "1/a.png", "01/a.png")
    assert_refused(tmp_path, "'01' and '1' differ in writing alone")


def test_numbers_and_names_together_are_refused(tmp_path):
    draw(tmp_path, "0/a.png", "1/a.png", "other/a.png")
    assert_refused(tmp_path, "'0' is a number and 'other' is none", "name every class by its label")


def test_an_empty_numbered_folder_shifts_nothing_and_is_named(tmp_path):
    draw(tmp_path, "0/a.png", "2/a.png")
    (tmp_path / "1").mkdir()
    assert labels(tmp_path) == {"0": 0, "2": 2}
    assert "classes without a picture: 1" in read(tmp_path).notes


# -- names -------------------------------------------------------------------------------------------------


def test_names_count_in_sorted_order(tmp_path):
    draw(tmp_path, "cat/a.png", "ant/a.png", "bee/deep/a.png", "cat/b.png")
    assert labels(tmp_path) == {"ant": 0, "bee": 1, "cat": 2}
    assert read(tmp_path).described == "4 pictures of labels 0 ant (1), 1 bee (1), 2 cat (2)"


def test_names_must_be_as_many_as_the_teachers_classes(tmp_path):
    """Of five of ten classes every label would be another's."""
    draw(tmp_path, "cat/a.png", "ant/a.png")
    assert_refused(tmp_path, "2 classes by name (ant, cat)", "the teacher knows 10", num_labels=10)


def test_an_empty_class_keeps_its_place(tmp_path):
    draw(tmp_path, "ant/a.png", "cat/a.png")
    (tmp_path / "bee").mkdir()
    assert labels(tmp_path) == {"ant": 0, "cat": 2}
    images = read(tmp_path)
    assert "classes without a picture: bee" in images.notes
    assert images.described == "2 pictures of labels 0 ant (1), 1 bee (0), 2 cat (1)"


def test_an_empty_folder_that_is_no_class_is_named(tmp_path):
    draw(tmp_path, "ant/a.png", "bee/a.png", "cat/a.png")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "boxes.json").write_text("{}")
    assert_refused(tmp_path, "4 classes by name", "without a picture: annotations")


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git", "lost+found"])
def test_folders_of_systems_are_no_classes(tmp_path, hidden):
    draw(tmp_path, "ant/a.png", "bee/a.png", "cat/a.png", f"{hidden}/b.png", f"cat/{hidden}/c.png")
    assert labels(tmp_path) == {"ant": 0, "bee": 1, "cat": 2}
    images = read(tmp_path)
    assert len(images) == 3
    assert any(note.startswith("passed over: ") and hidden in note for note in images.notes)


def test_what_macs_leave_beside_pictures_is_passed_over(tmp_path):
    draw(tmp_path, "ant/a.png", "bee/a.png", "cat/a.png")
    (tmp_path / "ant" / "._a.png").write_bytes(b"no picture")
    assert len(read(tmp_path)) == 3


def test_pictures_beside_the_folders_of_classes_are_named(tmp_path):
    """One of them took the labels of all."""
    draw(tmp_path, "ant/a.png", "bee/a.png", "cat/a.png", "loose.png")
    assert_refused(tmp_path, "loose.png", "next to the folders of classes")


def test_pictures_without_any_folder_have_no_labels(tmp_path):
    draw(tmp_path, "a.png")
    assert_refused(tmp_path, "has no labels, which this teacher's images need", "a folder for each class")


def test_splits_are_no_classes(tmp_path):
    draw(tmp_path, "train/a.png", "Test/b.png")
    assert_refused(tmp_path, "Test, train", "none of classes", num_labels=2)
    draw(tmp_path / "other", "x/ant/a.png", "y/ant/a.png")
    assert_refused(tmp_path / "other", "x, y", "these lie deeper; name one of them", num_labels=2)


@pytest.mark.parametrize("names", [("Cat", "cat"), ("Straße", "STRASSE"), (unicodedata.normalize("NFD", "é"), "é")])
def test_names_that_differ_in_writing_alone_are_refused(tmp_path, names):
    draw(tmp_path, *(f"{name}/a.png" for name in names))
    assert_refused(tmp_path, "differ in writing alone", "are they one class?", num_labels=2)


def test_the_order_of_names_is_that_of_composed_letters():
    decomposed = unicodedata.normalize("NFD", "é")
    assert decomposed < "f" < "é"
    assert number_classes(["f", "é"], "x") == {"f": 0, "é": 1}
    assert number_classes(["f", decomposed], "x") == {"f": 0, decomposed: 1}


def test_numbers_inside_names_are_pointed_out(tmp_path):
    draw(tmp_path, "class1/a.png", "class10/a.png", "class2/a.png")
    assert labels(tmp_path) == {"class1": 0, "class10": 1, "class2": 2}
    assert "classes are in the order of text: 'class10' is label 1, before 'class2'" in read(tmp_path).notes
    draw(tmp_path / "even", "class01/a.png", "class02/a.png", "class10/a.png")
    assert read(tmp_path / "even").notes == []


# -- links and rights --------------------------------------------------------------------------------------


def test_links_are_followed(tmp_path):
    """A class behind a link was not there, and the ones behind it moved up."""
    draw(tmp_path / "elsewhere", "pictures/a.png")
    root = draw(tmp_path / "set", "ant/a.png", "cat/a.png")
    (root / "bee").symlink_to(tmp_path / "elsewhere" / "pictures")
    (root / "cat" / "b.png").symlink_to(tmp_path / "elsewhere" / "pictures" / "a.png")
    assert labels(root) == {"ant": 0, "bee": 1, "cat": 2}
    assert len(read(root)) == 4


@pytest.mark.parametrize("name", ["bee", "ant/b.png", "itself"])
def test_a_link_to_nothing_is_named(tmp_path, name):
    draw(tmp_path, "ant/a.png", "cat/a.png")
    (tmp_path / name).symlink_to(tmp_path / ("itself" if name == "itself" else "gone"))
    assert_refused(tmp_path, str(tmp_path / name), "a link to nothing")


def test_a_link_to_a_folder_above_is_named(tmp_path):
    draw(tmp_path, "ant/a.png", "bee/a.png")
    (tmp_path / "bee" / "all").symlink_to(tmp_path)
    assert_refused(tmp_path, str(tmp_path / "bee" / "all"), "a link back to a folder that it lies in")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    draw(tmp_path, "ant/a.png", "bee/a.png", "cat/a.png")
    scandir = os.scandir

    def denied(path):
        if Path(path).name == "bee":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert_refused(tmp_path, str(tmp_path / "bee"), "cannot be read (Permission denied)")


# -- what is not read --------------------------------------------------------------------------------------


def test_pictures_of_other_kinds_are_counted(tmp_path):
    draw(tmp_path, "ant/a.png", "bee/a.png", "cat/a.png", "cat/b.tif", "cat/c.tif")
    assert any(note.startswith("pictures that are not read: 2 of .tif (.bmp") for note in read(tmp_path).notes)
    draw(tmp_path / "other", "ant/b.tif")
    assert_refused(tmp_path / "other", "no images in it", "1 of .tif")


def test_a_teacher_without_labels_takes_any_folder(tmp_path):
    draw(tmp_path, "loose.png", "0/a.png", "other/a.png", "OTHER/a.png")
    (tmp_path / "empty").mkdir()
    assert len(load_images(ImagesSettings(folder=str(tmp_path)), SHAPE)) == 4


# -- metadata ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "label": 2}\n{"file_name": "sub/b.png", "label": 0}\n'),
        ("metadata.csv", "file_name,label\na.png,2\nsub/b.png,0\n"),
    ],
)
def test_labels_of_the_metadata_go_before_folders(tmp_path, name, content):
    draw(tmp_path, "a.png", "sub/b.png")
    (tmp_path / name).write_text(content)
    assert read(tmp_path).labels == [2, 0]


def test_class_names_of_the_metadata_count_in_sorted_order(tmp_path):
    draw(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "metadata.csv").write_text("file_name,kind\na.png,cat\nb.png,ant\nc.png,bee\n")
    assert read(tmp_path, label_column="kind").labels == [2, 0, 1]
    assert_refused(tmp_path, "2", "3 classes by name (ant, bee, cat)", num_labels=2, label_column="kind")
    assert_refused(tmp_path, "no column 'sort'; it has kind", label_column="sort")
    (tmp_path / "metadata.csv").write_text("file_name,kind\na.png,cat\nb.png,ant\n")
    assert_refused(tmp_path, "c.png: its metadata must give it one label", label_column="kind")


def test_a_column_without_metadata_is_refused(tmp_path):
    draw(tmp_path, "0/a.png")
    assert_refused(tmp_path, "data.images.label_column = kind", "has no metadata.jsonl", label_column="kind")


def test_names_get_the_teachers_own_labels(tmp_path):
    """Of a teacher whose null label is 0 the classes are 1, 2, 3."""
    draw(tmp_path, "ant/a.png", "bee/a.png", "cat/a.png")
    images = load_images(ImagesSettings(folder=str(tmp_path)), SHAPE, Conditions("label", range(1, 4)))
    assert images.labels == [1, 2, 3]
    assert images.described == "3 pictures of labels 1 ant (1), 2 bee (1), 3 cat (1)"
