"""Columns of datasets as people have them: pictures in every form, labels with and without names, captions in lists."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from stepdistill.conditions import Captions, Conditions, as_caption, draw_caption
from stepdistill.config import check
from stepdistill.data.columns import read_dataset
from stepdistill.data.images import ImageSet
from stepdistill.data.preference_pairs import PreferenceSettings, read_preferences
from stepdistill.data.sources import load_images, read_named_prompts
from stepdistill.data.streams import ConditionSource, RealSource
from stepdistill.errors import UserError
from stepdistill.settings import ImagesSettings, PromptColumnSettings

SHAPE = (3, 4, 6)
PROMPTS = Conditions("prompt")
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray = PIXELS[0]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def saved(path: Path, features: Features | None = None, **columns) -> str:
    Dataset.from_dict(columns, features=features).save_to_disk(str(path))
    return str(path)


def images_of(path: str, conditions: Conditions, **settings) -> ImageSet:
    return load_images(ImagesSettings(dataset=path, **settings), SHAPE, conditions)


# -- pictures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["images", "bytes", "dicts of bytes", "dicts of paths", "paths", "relative paths", "arrays"]
)
def test_pictures_are_read_in_every_form(tmp_path, form):
    files = []
    for index, pixels in enumerate(PIXELS):
        files.append(tmp_path / f"{index}.png")
        Image.fromarray(pixels).save(files[-1])
    column = {
        "images": [Image.fromarray(pixels) for pixels in PIXELS],
        "bytes": [encoded(pixels) for pixels in PIXELS],
        "dicts of bytes": [{"bytes": encoded(pixels), "path": None} for pixels in PIXELS],
        "dicts of paths": [{"bytes": None, "path": str(file)} for file in files],
        "paths": [str(file) for file in files],
        "relative paths": [file.name for file in files],
        "arrays": [pixels.tolist() for pixels in PIXELS],
    }[form]
    path = saved(tmp_path / "set", image=column)
    if form == "relative paths":  # beside the dataset's files
        for file in files:
            file.rename(Path(path) / file.name)
    batch = read_dataset(path, SHAPE).batch([2, 0, 1])
    expected = torch.from_numpy(PIXELS[[2, 0, 1]]).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(batch, expected)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (b"no picture", "not a readable image"),
        ({"bytes": None, "path": None}, "'image' holds no readable image"),
        ("nowhere.png", "no file 'nowhere.png'"),
        ([[0.5, 0.5], [0.1, 0.2]], "pixels are whole numbers in 0..255"),
        ([[0, 256], [0, 1]], "pixels are whole numbers in 0..255"),
        (None, "'image' holds no readable image"),
    ],
)
def test_what_is_no_picture_is_named_with_its_row(tmp_path, value, says):
    path = saved(tmp_path / "set", image=[value])
    with pytest.raises(UserError, match="set\\[0\\]") as caught:
        read_dataset(path, SHAPE)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300  # not with its bytes


def test_pick_a_pic_is_read_as_it_is(tmp_path):
    """Its pictures are plain bytes, its labels how much the first one is preferred."""
    greys = [np.full((4, 6, 3), value, dtype=np.uint8) for value in (10, 20, 30, 110, 120, 130)]
    pictures = [encoded(grey) for grey in greys]
    path = saved(
        tmp_path / "set",
        jpg_0=pictures[:3],
        jpg_1=pictures[3:],
        caption=["a cat", "a dog", "a tie"],
        label_0=[1.0, 0.0, 0.5],
        are_different=[True, True, True],
    )
    columns = {"winner_column": "jpg_0", "loser_column": "jpg_1", "prompt_column": "caption"}
    settings = PreferenceSettings(dataset=path, preference_column="label_0", **columns)
    pairs = read_preferences(settings, SHAPE, PROMPTS)
    assert pairs.labels == ["a cat", "a dog"]
    shown = [[pairs.sets[part].batch([index])[0] for part, index in sides] for sides in pairs.order]
    values = [[round((pixels.mean().item() + 1) * 127.5) for pixels in sides] for sides in shown]
    assert values == [[10, 110], [120, 20]]


def test_one_column_for_both_sides_is_refused():
    with pytest.raises(UserError, match="winner_column and loser_column are both 'jpg_0'; name two columns"):
        check(PreferenceSettings, {"dataset": "a", "winner_column": "jpg_0", "loser_column": "jpg_0"}, "config")


# -- labels ------------------------------------------------------------------------------------------------


def with_labels(path: Path, names: list[str] | None, labels: list) -> str:
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=names) if names else Value("int64")})
    return saved(path, features, image=[Image.fromarray(PIXELS[0])] * len(labels), label=labels)


def test_a_datasets_own_names_keep_its_labels(tmp_path):
    path = with_labels(tmp_path / "set", ["zebra", "ant", "bee"], [1, 0, 2, 0])
    images = images_of(path, Conditions("label", range(3)), label_column="label")
    assert images.labels == [1, 0, 2, 0]
    assert images.names == {"zebra": 0, "ant": 1, "bee": 2}
    assert images.described == "4 pictures of labels 0 zebra (2), 1 ant (1), 2 bee (1)"
    with pytest.raises(UserError, match=r"3 classes by name \(zebra, ant, bee\), and the teacher knows 10"):
        images_of(path, Conditions("label", range(10)), label_column="label")


def test_names_that_are_numbers_are_the_labels(tmp_path):
    """The imagefolder builder sorts folders as text: its label of folder 10 is 2."""
    path = with_labels(tmp_path / "set", ["0", "1", "10", "2"], [2, 3, 0])
    assert images_of(path, Conditions("label", range(11)), label_column="label").labels == [10, 2, 0]


def test_a_row_without_a_label_is_left_out(tmp_path):
    path = with_labels(tmp_path / "set", ["a", "b"], [1, -1, 0])
    images = images_of(path, Conditions("label", range(2)), label_column="label")
    assert images.usable == [0, 2]
    assert images.notes[0] == "1 of 3 have no condition and are left out"


def test_names_as_text_count_in_sorted_order(tmp_path):
    columns = {"image": [Image.fromarray(PIXELS[0])] * 4, "kind": ["cat", "ant", "bee", "ant"]}
    path = saved(tmp_path / "set", **columns)
    assert images_of(path, Conditions("label", range(3)), label_column="kind").labels == [2, 0, 1, 0]
    with pytest.raises(UserError, match="3 classes by name"):
        images_of(path, Conditions("label", range(4)), label_column="kind")


def test_class_names_of_an_npz_count_in_sorted_order(tmp_path):
    np.savez(tmp_path / "a.npz", images=PIXELS, labels=np.array(["cat", "ant", "bee"]))
    images = load_images(ImagesSettings(npz=str(tmp_path / "a.npz")), SHAPE, Conditions("label", range(3)))
    assert images.labels == [2, 0, 1]


@pytest.mark.parametrize("values", [[0.5, 1.0, 2.0], [[0], [1], [2]]])
def test_what_is_no_label_is_named_with_row_and_type(tmp_path, values):
    path = saved(tmp_path / "set", image=[Image.fromarray(PIXELS[0])] * 3, label=values)
    with pytest.raises(UserError, match=f"column 'label': row 0: {type(values[0]).__name__} .* is no label"):
        images_of(path, Conditions("label", range(3)), label_column="label")


@pytest.mark.parametrize(
    ("conditions", "columns_named", "says"),
    [
        (PROMPTS, {}, r"has no captions, which this teacher's images need; set caption_column .*image, label, text"),
        (
            Conditions("label", range(3)),
            {},
            r"has no labels, which this teacher's images need; set caption_column or label",
        ),
        (
            PROMPTS,
            {"label_column": "text"},
            r"'text': this teacher's images need captions; .* data.images.caption_column",
        ),
        (
            Conditions("label", range(3)),
            {"caption_column": "label"},
            r"need labels; name their column .*\.label_column",
        ),
        (PROMPTS, {"caption_column": "label"}, r"column 'label': row 0: int 0 is no text"),
    ],
)
def test_the_column_that_is_needed_is_named(tmp_path, conditions, columns_named, says):
    path = saved(tmp_path / "set", image=[Image.fromarray(PIXELS[0])] * 2, label=[0, 1], text=["a", "b"])
    with pytest.raises(UserError, match=says):
        images_of(path, conditions, **columns_named)


def test_labels_and_captions_are_not_both():
    with pytest.raises(UserError, match="set label_column or caption_column, not both"):
        check(ImagesSettings, {"dataset": "a", "label_column": "a", "caption_column": "b"}, "config")


# -- captions ----------------------------------------------------------------------------------------------


def test_a_list_of_captions_is_several_of_one_thing():
    caption = as_caption(["a cat", " one cat sitting ", None, ""], "x")
    assert caption == "a cat"
    assert caption.every == ("a cat", "one cat sitting")
    assert as_caption(["one"], "x") == "one"
    assert not isinstance(as_caption(["one"], "x"), Captions)
    assert as_caption([], "x") is as_caption(None, "x") is as_caption([None, ""], "x") is None


@pytest.mark.parametrize("value", [3, 0.5, {"raw": "a cat"}, b"a cat", [3], [["a"], ["b", "c"]], True])
def test_what_is_no_caption_is_named_with_its_type(value):
    with pytest.raises(UserError, match=r"row 7: .*(is no text; name a column of texts|a list of lists)"):
        as_caption(value, "row 7")


def test_each_of_several_captions_is_drawn_by_seed_and_position():
    caption = Captions(["a", "b", "c"])
    draws = [draw_caption(caption, 5, position) for position in range(300)]
    assert {draws.count(text) for text in "abc"} <= set(range(70, 131))
    assert draws == [draw_caption(caption, 5, position) for position in range(300)]
    assert draws != [draw_caption(caption, 6, position) for position in range(300)]
    assert all(type(text) is str for text in draws)
    assert draw_caption("alone", 5, 1) == "alone"
    assert draw_caption(3, 5, 1) == 3


class OneHot:
    """Encodes a text as its first letter's number."""

    condition_kind, device = "prompt", torch.device("cpu")

    def encode_conditions(self, items):
        assert all(type(item) is str for item in items)
        return {"text": torch.tensor([[float(ord(item[0]))] for item in items])}

    def encode_images(self, pixels):
        return pixels


@pytest.mark.parametrize("most_encoded", [20_000, 0])
def test_prompts_are_drawn_alike_by_any_processes_and_again(most_encoded):
    items = ["x", Captions(["a", "b", "c"]), Captions(["d", "e"])]
    source = ConditionSource(OneHot(), items, 3, most_encoded=most_encoded)
    condition, whole = source.batch(0, 60)
    assert condition["text"][:, 0].tolist() == [float(ord(text)) for text in whole]
    assert {"a", "b", "c", "d", "e", "x"} == set(whole)
    again = ConditionSource(OneHot(), items, 3, most_encoded=most_encoded)
    parts = [again.batch(start, 5)[1] for start in range(0, 60, 5)]
    assert [text for part in parts for text in part] == whole


def test_captions_of_pictures_are_drawn_alike_by_any_processes_and_again(tmp_path):
    column = [["a red cat", "b"], ["c"], None]
    path = saved(tmp_path / "set", image=[Image.fromarray(p) for p in PIXELS], sentences=column)
    images = images_of(path, PROMPTS, caption_column="sentences")
    assert images.usable == [0, 1]
    assert images.notes == ["1 of 3 have no condition and are left out"]
    assert images.described == '3 pictures, the first is of "a red cat"'
    whole = RealSource(OneHot(), images, None, 4, images.usable).batch(0, 40)
    assert {"a red cat", "b", "c"} == set(whole.items)
    assert set(whole.indices) == {0, 1}
    for item, index, text in zip(whole.items, whole.indices, whole.condition["text"][:, 0], strict=True):
        assert item in (("a red cat", "b"), ("c",))[index]
        assert text == ord(item[0])
    parts = [RealSource(OneHot(), images, None, 4, images.usable).batch(start, 8).items for start in range(0, 40, 8)]
    assert [text for part in parts for text in part] == whole.items


def test_prompts_of_a_column_of_lists(tmp_path):
    """They were the prompt "['a cat', 'one cat sitting']"."""
    path = saved(tmp_path / "set", sentences=[["a cat", "one cat sitting"], None, ["a dog"]])
    notes = []
    prompts = read_named_prompts(None, PromptColumnSettings(name=path, column="sentences"), notes=notes)
    assert prompts == ["a cat", "a dog"]
    assert prompts[0].every == ("a cat", "one cat sitting")
    assert notes == ["1 of 3 rows are empty and are passed over"]


@pytest.mark.parametrize(("values", "says"), [([{"raw": "a"}], "row 0: dict"), ([1, 2], "row 0: int 1 is no text")])
def test_prompts_of_another_type_are_refused(tmp_path, values, says):
    path = saved(tmp_path / "set", text=values)
    with pytest.raises(UserError, match=says):
        read_named_prompts(None, PromptColumnSettings(name=path))
