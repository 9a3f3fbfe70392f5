"""Preference pairs from folders and datasets: who wins, what is left out, what is refused."""

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image

from stepdistill.conditions import NONE, Conditions
from stepdistill.config import check
from stepdistill.data.preference_pairs import PreferenceSettings, read_preferences
from stepdistill.errors import UserError

SHAPE = (3, 8, 8)
PROMPTS = Conditions("prompt")


def picture(grey, size=(8, 8)):
    return Image.new("RGB", size, (grey, grey, grey))


def grey_of(pairs):
    """The grey values of (winner, loser) of each pair."""
    values = []
    for sides in pairs.order:
        pixels = [pairs.sets[part].batch([index])[0] for part, index in sides]
        assert all(part.shape == SHAPE for part in pixels)
        values.append(tuple(round((part.mean().item() + 1) * 127.5) for part in pixels))
    return values


def write(root, side, name, grey, caption=None, size=(8, 8)):
    file = root / side / name
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(grey, size).save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption)


def folder(root, conditions=NONE, **changes):
    return read_preferences(PreferenceSettings(folder=str(root), **changes), SHAPE, conditions)


def dataset(path, conditions=NONE, **changes):
    return read_preferences(PreferenceSettings(dataset=path, **changes), SHAPE, conditions)


def saved(path, split=None, **columns):
    """A dataset's folder; pictures are given as their grey values."""
    columns = {
        k: [picture(g) for g in v] if k in ("winner", "loser", "jpg_0", "jpg_1") else v for k, v in columns.items()
    }
    dataset = Dataset.from_dict(columns)
    (dataset if split is None else DatasetDict({split: dataset})).save_to_disk(str(path))
    return str(path)


# -- folders -----------------------------------------------------------------------------------------------


def test_a_folder_with_captions(tmp_path):
    for index, name in enumerate(["b.png", "a.png", "c.png"]):
        write(tmp_path, "winner", name, 200 + index, f"caption of {name[0]}")
        write(tmp_path, "loser", name, 10 + index)
    pairs = folder(tmp_path, PROMPTS)
    assert len(pairs) == 3
    assert grey_of(pairs) == [(201, 11), (200, 10), (202, 12)]  # by name
    assert pairs.labels == ["caption of a", "caption of b", "caption of c"]


def test_a_folder_with_a_sub_folder_for_each_label(tmp_path):
    for index, name in enumerate(["cat/x.png", "cat/y.png", "dog/x.png"]):
        write(tmp_path, "winner", name, 200 + index)
        write(tmp_path, "loser", name, 10 + index)
    pairs = folder(tmp_path, Conditions("label", range(2)))
    assert grey_of(pairs) == [(200, 10), (201, 11), (202, 12)]
    assert pairs.labels == [0, 0, 1]


def test_a_folder_with_metadata_of_the_winners(tmp_path):
    for name in ("a.png", "b.png"):
        write(tmp_path, "winner", name, 200)
        write(tmp_path, "loser", name, 10)
    rows = '{"file_name": "a.png", "text": "a", "alt": "A"}\n{"file_name": "b.png", "text": "b", "alt": "B"}\n'
    (tmp_path / "winner" / "metadata.jsonl").write_text(rows)
    assert folder(tmp_path, PROMPTS).labels == ["a", "b"]
    assert folder(tmp_path, PROMPTS, prompt_column="alt").labels == ["A", "B"]


def test_a_folder_without_captions_has_no_conditions(tmp_path):
    write(tmp_path, "winner", "a.png", 200)
    write(tmp_path, "loser", "a.png", 100)
    pairs = folder(tmp_path)
    assert pairs.labels is None
    assert grey_of(pairs) == [(200, 100)]


@pytest.mark.parametrize("side", ["winner", "loser"])
def test_a_picture_without_partner_is_named(tmp_path, side):
    for name in ("a.png", "b.png"):
        write(tmp_path, "winner", name, 200)
        write(tmp_path, "loser", name, 100)
    write(tmp_path, side, "odd.png", 50)
    with pytest.raises(UserError, match=r"in one of winner and loser alone: odd\.png"):
        folder(tmp_path)


@pytest.mark.parametrize("side", ["winner", "loser"])
def test_a_missing_side_is_named(tmp_path, side):
    write(tmp_path, "loser" if side == "winner" else "winner", "a.png", 200)
    with pytest.raises(UserError, match=f"it has no folder '{side}'"):
        folder(tmp_path)


def test_a_missing_folder_and_empty_ones_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere: it has no folder 'winner'"):
        folder(tmp_path / "nowhere")
    for side in ("winner", "loser"):
        (tmp_path / side).mkdir()
    with pytest.raises(UserError, match="no images in it"):
        folder(tmp_path)


def test_pictures_of_another_size_are_refused_or_resized(tmp_path):
    write(tmp_path, "winner", "a.png", 200)
    write(tmp_path, "loser", "a.png", 100, size=(16, 12))
    with pytest.raises(UserError, match="the image is 16x12, the teacher needs 8x8"):
        folder(tmp_path)
    assert grey_of(folder(tmp_path, resize=True)) == [(200, 100)]


# -- datasets ----------------------------------------------------------------------------------------------


def test_a_dataset_of_winners_losers_and_prompts(tmp_path):
    path = saved(tmp_path / "set", winner=[200, 210, 220], loser=[10, 20, 30], prompt=["one", "two", "three"])
    pairs = dataset(path, PROMPTS)
    assert grey_of(pairs) == [(200, 10), (210, 20), (220, 30)]
    assert pairs.labels == ["one", "two", "three"]


def test_a_dataset_with_labels_or_without_conditions(tmp_path):
    path = saved(tmp_path / "set", winner=[200, 210], loser=[10, 20], kind=[4, 2])
    assert dataset(path, Conditions("label", range(5)), prompt_column="kind").labels == [4, 2]
    assert dataset(path).labels is None
    with pytest.raises(UserError, match=r"has no labels, .* need; set pso\.pairs\.prompt_column"):
        dataset(path, Conditions("label", range(5)), prompt_column=None)
    with pytest.raises(UserError, match=r"labels 2\.\.4 are outside 0\.\.3"):
        dataset(path, Conditions("label", range(4)), prompt_column="kind")


def test_a_split_is_chosen(tmp_path):
    path = saved(tmp_path / "set", "test", winner=[200], loser=[10], prompt=["one"])
    assert len(read_preferences(PreferenceSettings(dataset=path, split="test"), SHAPE)) == 1
    with pytest.raises(UserError, match="split 'train'"):
        read_preferences(PreferenceSettings(dataset=path), SHAPE)


PICK = {
    "winner_column": "jpg_0",
    "loser_column": "jpg_1",
    "prompt_column": "caption",
    "preference_column": "label_0",
}


def test_a_column_of_preferences_turns_pairs_and_leaves_ties_out(tmp_path):
    path = saved(
        tmp_path / "set",
        jpg_0=[10, 20, 30, 40, 50],
        jpg_1=[110, 120, 130, 140, 150],
        caption=list("abcde"),
        label_0=[1.0, 0.0, 0.5, 0.51, 0.3],
    )
    pairs = dataset(path, PROMPTS, **PICK)
    assert grey_of(pairs) == [(10, 110), (120, 20), (40, 140), (150, 50)]
    assert pairs.labels == list("abde")
    assert len(pairs) == 4
    assert pairs.order[1] == ((1, 1), (0, 1))


def test_whole_numbers_are_preferences_too(tmp_path):
    path = saved(tmp_path / "set", jpg_0=[10, 20], jpg_1=[110, 120], caption=["a", "b"], label_0=[0, 1])
    assert grey_of(read_preferences(PreferenceSettings(dataset=path, **PICK), SHAPE)) == [(110, 10), (20, 120)]


def test_ties_alone_are_refused(tmp_path):
    path = saved(tmp_path / "set", jpg_0=[10, 20], jpg_1=[110, 120], caption=["a", "b"], label_0=[0.5, 0.5])
    with pytest.raises(UserError, match="holds no pair that is not a tie"):
        read_preferences(PreferenceSettings(dataset=path, **PICK), SHAPE)


@pytest.mark.parametrize("values", [["yes", "no"], [1.0, None], [1.0, float("nan")]])
def test_a_preference_that_is_no_number_is_refused(tmp_path, values):
    path = saved(tmp_path / "set", jpg_0=[10, 20], jpg_1=[110, 120], caption=["a", "b"], label_0=values)
    with pytest.raises(UserError, match="preference_column = label_0: its values are no numbers"):
        read_preferences(PreferenceSettings(dataset=path, **PICK), SHAPE)


@pytest.mark.parametrize("key", PICK)
def test_a_column_that_is_not_there_is_named(tmp_path, key):
    path = saved(tmp_path / "set", jpg_0=[10], jpg_1=[110], caption=["a"], label_0=[1.0])
    with pytest.raises(UserError, match=r"has no column 'nothing'; it has jpg_0, jpg_1, caption, label_0"):
        dataset(path, PROMPTS, **{**PICK, key: "nothing"})


def test_a_dataset_that_is_not_there_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded"):
        read_preferences(PreferenceSettings(dataset=str(tmp_path / "empty")), SHAPE)


@pytest.mark.parametrize("raw", [{}, {"folder": "a", "dataset": "b"}])
def test_one_source_is_named(raw):
    with pytest.raises(UserError, match="set exactly one of folder, dataset"):
        check(PreferenceSettings, raw, "config")


def test_the_pictures_of_a_pair_are_read_by_value(tmp_path):
    """Not by their mean alone: the pixels of a PNG, from 0..255 to -1..1."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    for side, values in zip(("winner", "loser"), pixels, strict=True):
        (tmp_path / side).mkdir()
        Image.fromarray(values).save(tmp_path / side / "a.png")
    pairs = folder(tmp_path)
    ((winner, loser),) = pairs.order
    for (part, index), values in zip((winner, loser), pixels, strict=True):
        expected = torch.from_numpy(values).permute(2, 0, 1).float() / 127.5 - 1
        assert torch.equal(pairs.sets[part].batch([index])[0], expected)
