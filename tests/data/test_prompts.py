"""Prompts from the files and folders that people have them in, and captions beside pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from stepdistill.conditions import Conditions
from stepdistill.config import check
from stepdistill.data.prompts import content_notes, read_prompts
from stepdistill.data.sources import load_images, load_prompts
from stepdistill.errors import UserError
from stepdistill.settings import DataSettings, ImagesSettings

PROMPTS = ["a cat, sitting", 'a "red" bus', "ein Bär"]
QUOTED = ['"a cat, sitting"', '"a ""red"" bus"', "ein Bär"]


def table(separator: str = ",", header: str = "id,prompt", columns: int = 2) -> str:
    rows = [separator.join([str(i), text][-columns:]) for i, text in enumerate(QUOTED)]
    return "\n".join([header.replace(",", separator), *rows]) + "\n"


FILES = {
    "a.txt": "\n".join(PROMPTS),
    "no_suffix": "\n".join(PROMPTS),
    "a.csv": table(),
    "semicolons.csv": table(";"),
    "TABS.TSV": table("\t"),
    "a.jsonl": "\n".join(json.dumps({"file_name": f"{i}.png", "text": p}) for i, p in enumerate(PROMPTS)),
    "texts.jsonl": "\n".join(json.dumps(p, ensure_ascii=False) for p in PROMPTS),
    "a.ndjson": "\n\n".join(json.dumps({"caption": p}) for p in PROMPTS),
    "texts.json": json.dumps(PROMPTS),
    "objects.json": json.dumps([{"prompt": p, "seed": 1} for p in PROMPTS]),
    "columns.json": json.dumps({"version": 2, "prompts": PROMPTS}),
    "coco.json": json.dumps({"info": {}, "images": [], "annotations": [{"id": 1, "caption": p} for p in PROMPTS]}),
    "lines.json": "\n".join(json.dumps({"text": p}) for p in PROMPTS),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_file_is_read_by_its_suffix(tmp_path, name, ends, mark):
    (tmp_path / name).write_bytes((mark + FILES[name]).replace("\n", ends).encode())
    notes = []
    assert read_prompts(tmp_path / name, notes=notes) == PROMPTS
    assert notes == []


def test_parquet_is_read(tmp_path):
    Dataset.from_dict({"id": [1, 2, 3], "caption": [["a", "b"], ["c"], None]}).to_parquet(tmp_path / "a.parquet")
    notes = []
    prompts = read_prompts(tmp_path / "a.parquet", notes=notes)
    assert prompts == ["a", "c"]
    assert prompts[0].every == ("a", "b")
    assert notes == ["1 of 3 rows are empty and are passed over"]


def test_a_folder_of_a_saved_dataset_is_read(tmp_path):
    dataset = Dataset.from_dict({"text": PROMPTS})
    dataset.save_to_disk(tmp_path / "one")
    DatasetDict({"train": dataset}).save_to_disk(tmp_path / "split")
    assert read_prompts(tmp_path / "one") == read_prompts(tmp_path / "split") == PROMPTS


# -- columns -----------------------------------------------------------------------------------------------


def test_of_several_usual_columns_the_first_is_read_and_the_others_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("caption,Text,other\nlong,short,x\n")
    notes = []
    assert read_prompts(tmp_path / "a.csv", notes=notes) == ["short"]
    assert notes == [
        f"{tmp_path}/a.csv: texts are read from column 'Text', not caption; data.prompt_column names another"
    ]
    assert read_prompts(tmp_path / "a.csv", column="other") == ["x"]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.parquet"])
def test_a_column_that_is_not_there_is_named(tmp_path, name):
    rows = {"title": ["x"], "url": ["y"]}
    content = {
        "a.csv": "title,url\nx,y\n",
        "a.jsonl": '{"title": "x", "url": "y"}\n',
        "a.json": '[{"title": "x", "url": "y"}]',
    }
    if name == "a.parquet":
        Dataset.from_dict(rows).to_parquet(tmp_path / name)
    else:
        (tmp_path / name).write_text(content[name])
    with pytest.raises(UserError, match=r"it has title, url: name one with data\.prompt_column"):
        read_prompts(tmp_path / name)
    with pytest.raises(UserError, match="no column 'text'; it has title, url"):
        read_prompts(tmp_path / name, column="text")
    assert read_prompts(tmp_path / name, column="title") == ["x"]


def test_a_column_of_lines_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(UserError, match=r"data\.prompt_column = text: .* has lines, no columns"):
        read_prompts(tmp_path / "a.txt", column="text")


# -- what is wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "a.csv",
            "id,text\n1,a cat, sitting\n",
            "line 2 has more fields than the header's 2; quote texts that hold ','",
        ),
        ("a.csv", 'id,text\n1,"a cat\n2,b\n', "cannot be read (unexpected end of data)"),
        ("a.csv", "a cat\na dog\n", "no column is called text, prompt, caption; it has a cat"),
        ("a.csv", "text,text\na,b\n", "must name the columns, each once"),
        ("a.csv", "", "must name the columns"),
        ("a.csv", "text\n", "no prompts in it"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "row 2 is a list; rows are objects"),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', "row 2: int 3 is no text"),
        ("a.jsonl", '{"text": {"en": "a"}}\n', "row 1: dict"),
        ("a.json", '{"a": 1}', "a JSON object without one list"),
        ("a.json", "[1, 2]", "row 1 is a int"),
        ("a.json", "{", "line 1: not JSON"),
        ("a.parquet", "no parquet", "not a readable Parquet file"),
        ("a.txt", '{"text": "a"}\n', "its lines are JSON; call it a.jsonl"),
        ("a.yaml", "- a\n", "files of .yaml are not read; write one prompt a line into a .txt file"),
        ("a.gz", "x", "files of .gz are not read"),
        ("a.txt", "a\n".encode("utf-16"), "it is UTF-16"),
        ("a.csv", "text\na\n".encode("utf-16-le"), "it is UTF-16"),
        ("a.jsonl", '{"text": "Bär"}'.encode("latin-1"), "not a readable text file"),
        ("a.csv", "text\nBär\n".encode("latin-1"), "save it as UTF-8"),
    ],
)
def test_a_file_that_cannot_serve_is_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_prompts(tmp_path / name)
    assert says in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gone.txt", "gone.csv", "gone.json", "gone.parquet", "gone"])
def test_a_missing_file_is_named_with_its_key(tmp_path, name):
    with pytest.raises(UserError, match=f"{name}: no such file; set data.prompts to a text file"):
        read_prompts(tmp_path / name)


def test_a_line_ends_at_line_feeds_alone(tmp_path):
    """Python's own splitlines() cuts a prompt at any of these."""
    prompt = "a\u2028b\x0bc\x1cd\x85e"
    (tmp_path / "a.txt").write_text(f"{prompt}\nf", encoding="utf-8")
    assert read_prompts(tmp_path / "a.txt") == [prompt, "f"]


def test_what_looks_like_a_comment_is_a_prompt_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("# my prompts\na cat\na cat\n#tag\na cat\n")
    prompts = read_prompts(tmp_path / "a.txt")
    assert prompts == ["# my prompts", "a cat", "a cat", "#tag", "a cat"]
    assert content_notes(prompts) == [
        "2 begin with '#' and are prompts like all others, such as \"# my prompts\"",
        "2 are repeated",
    ]
    assert content_notes(["a", "b"]) == []


# -- captions of pictures ----------------------------------------------------------------------------------


def draw(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(root / name)
    return root


def captions(root: Path, **settings):
    return load_images(ImagesSettings(folder=str(root), **settings), (1, 4, 4), Conditions("prompt"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", '{"file_name": "b.png", "text": "b"}\n{"file_name": "./a.png", "text": ["a", "A"]}\n'),
        ("metadata.csv", "file_name,text\nb.png,b\na.png,a\na.png,A\n"),  # a row for each caption
    ],
)
def test_captions_of_the_metadata(tmp_path, name, content):
    draw(tmp_path, "a.png", "b.png")
    (tmp_path / name).write_text(content)
    images = captions(tmp_path)
    assert images.labels == ["a", "b"]
    assert images.labels[0].every == ("a", "A")
    assert read_prompts(tmp_path) == ["a", "b"]  # and as prompts


def test_metadata_lies_in_any_folder(tmp_path):
    draw(tmp_path, "train/x/a.png", "val/b.png")
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "x/a.png", "caption": "a"}\n')
    (tmp_path / "val" / "metadata.csv").write_text("file_name,caption\nb.png,b\n")
    assert captions(tmp_path).labels == ["a", "b"]


def test_a_column_of_the_metadata_is_named(tmp_path):
    draw(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "short", "caption": "long", "alt": "x"}\n')
    images = captions(tmp_path)
    assert images.labels == ["short"]
    (note,) = images.notes
    assert note.endswith("texts are read from column 'text', not caption; data.images.caption_column names another")
    assert captions(tmp_path, caption_column="alt").labels == ["x"]
    with pytest.raises(UserError, match="no column 'gone'; it has text, caption, alt"):
        captions(tmp_path, caption_column="gone")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "a"}\n', "1 of 2 pictures have no caption: .*b.png"),
        ("metadata.csv", "file_name,text\na.png,a\nb.png,b\nc.png,c\n", "1 of its pictures are not there: .*c.png"),
        ("metadata.csv", "name,text\na.png,a\n", "no column 'file_name'; it has name, text"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": 1}\n', "has no captions, which this teacher's images need"),
        ("a.txt", "a", "1 of 2 pictures have no caption: .*b.png"),
        ("notes.txt", "a", "has no captions, .*; write NAME.txt next to each picture, or metadata.jsonl"),
    ],
)
def test_a_missing_caption_is_named(tmp_path, name, content, says):
    draw(tmp_path, "a.png", "b.png")
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says):
        captions(tmp_path)


def test_two_files_of_metadata_in_one_folder_are_refused(tmp_path):
    draw(tmp_path, "a.png")
    for name in ("metadata.csv", "metadata.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"metadata\.csv and metadata.jsonl; keep one of them"):
        captions(tmp_path)


# -- prompts of a config -----------------------------------------------------------------------------------


def test_captions_of_the_images_serve_as_prompts(tmp_path):
    draw(tmp_path / "set", "a.png", "b.png")
    for name in ("a", "b"):
        (tmp_path / "set" / f"{name}.txt").write_text(f"picture {name}")
    Dataset.from_dict({"image": [Image.new("L", (4, 4))] * 2, "text": ["picture a", "picture b"]}).save_to_disk(
        tmp_path / "saved"
    )
    for images in ({"folder": str(tmp_path / "set")}, {"dataset": str(tmp_path / "saved"), "caption_column": "text"}):
        settings = DataSettings(images=images, prompts_from_images=True)
        assert load_prompts(settings) == ["picture a", "picture b"]
        loaded = load_images(settings.images, (1, 4, 4), Conditions("prompt"))
        assert load_prompts(settings, images=loaded) == ["picture a", "picture b"]


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"prompts_from_images": True}, "prompts_from_images: there are no images; set images"),
        ({"prompts_from_images": True, "prompts": "a", "images": {"npz": "b"}}, "the prompts are named already"),
        ({"prompt_column": "text"}, "prompt_column names a column of the file prompts"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(raw, says):
    with pytest.raises(UserError, match=says):
        check(DataSettings, raw, "config")
