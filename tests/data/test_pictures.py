"""Pictures as a viewer shows them, in every reader: upright by EXIF, on a colour where they are transparent."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import ExifTags, Image, ImageOps

from stepdistill.config import check
from stepdistill.data.arrays import read_npz
from stepdistill.data.columns import read_dataset
from stepdistill.data.folders import read_folder
from stepdistill.data.pictures import fit, make_opaque, mirror_half, open_picture, size_upright, turn_upright
from stepdistill.data.preference_pairs import PreferenceSettings, read_preferences
from stepdistill.data.sources import load_images
from stepdistill.errors import UserError
from stepdistill.eval.measure.preprocessing import Preprocessing, read_preprocessed_folder
from stepdistill.eval.measure.presets import PRESETS
from stepdistill.eval.measure.settings import Protocol
from stepdistill.settings import ImagesSettings

COLOUR, GREY = (3, 4, 6), (1, 4, 6)
STORED = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
"""A picture of 4x6 as it is stored; with orientation 6 it is shown at 6x4."""
SHOWN = np.rot90(STORED, -1)


def turned(array: np.ndarray = STORED, orientation: int = 6, form: str = "PNG") -> bytes:
    """A picture file that asks to be turned."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    Image.fromarray(array).save(file, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    return file.getvalue()


def as_pixels(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32).copy()).permute(2, 0, 1) / 127.5 - 1


# -- orientation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_every_orientation_is_turned_upright(orientation, form):
    expected = {
        1: STORED,
        2: STORED[:, ::-1],
        3: STORED[::-1, ::-1],
        4: STORED[::-1],
        5: STORED.transpose(1, 0, 2),
        6: np.rot90(STORED, -1),
        7: STORED[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(STORED),
    }
    image = open_picture(io.BytesIO(turned(orientation=orientation, form=form)), "x")
    assert size_upright(image) == expected[orientation].shape[1::-1]
    np.testing.assert_array_equal(np.asarray(turn_upright(image)), expected[orientation])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_orientation_that_cannot_be_read_is_none():
    image = Image.fromarray(STORED)
    image.info["exif"] = b"Exif\0\0MM\0*\0\0\xff\xff\0\x01"
    assert turn_upright(image).size == size_upright(image) == (4, 6)


def test_a_folder_turns_its_pictures(tmp_path):
    (tmp_path / "a.png").write_bytes(turned())
    assert torch.equal(read_folder(tmp_path, COLOUR).batch([0])[0], as_pixels(SHOWN))
    with pytest.raises(UserError, match="the image is 6x4, the teacher needs 4x6"):  # as it is shown
        read_folder(tmp_path, (3, 6, 4))


def test_a_dataset_turns_its_pictures(tmp_path):
    Dataset.from_dict({"image": [{"bytes": turned(), "path": None}]}).save_to_disk(tmp_path / "set")
    assert torch.equal(read_dataset(str(tmp_path / "set"), COLOUR).batch([0])[0], as_pixels(SHOWN))


def test_preference_pairs_are_turned(tmp_path):
    for side in ("winner", "loser"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "a.png").write_bytes(turned())
    column = [{"bytes": turned(), "path": None}]
    Dataset.from_dict({"winner": column, "loser": column}).save_to_disk(tmp_path / "set")
    for source in ({"folder": str(tmp_path)}, {"dataset": str(tmp_path / "set"), "prompt_column": None}):
        pairs = read_preferences(PreferenceSettings(**source), COLOUR)
        for part in (0, 1):
            assert torch.equal(pairs.sets[part].batch([0])[0], as_pixels(SHOWN))


def test_a_reference_folder_is_read_as_shown_and_by_papers_protocols_as_stored(tmp_path):
    (tmp_path / "a.png").write_bytes(turned(np.kron(STORED, np.ones((4, 4, 1), dtype=np.uint8))))
    shown = read_preprocessed_folder(tmp_path, Preprocessing(8)).batch([0])
    stored = read_preprocessed_folder(tmp_path, Preprocessing(8, files="stored")).batch([0])
    image = Image.open(tmp_path / "a.png").convert("RGB")
    assert torch.equal(stored[0], as_pixels(Preprocessing(8).process_image(image)))
    assert torch.equal(shown[0], as_pixels(Preprocessing(8).process_image(ImageOps.exif_transpose(image))))
    assert not torch.equal(shown, stored)
    # the statistics of one are not taken for the other's
    assert Preprocessing(8).description != Preprocessing(8, files="stored").description
    for name in ("coco30k", "coco10k-sdxl"):
        assert PRESETS[name].settings["reference_files"] == "stored"
    assert Protocol().reference_files == "shown"


# -- transparency ------------------------------------------------------------------------------------------


def transparent(kind: str) -> Image.Image:
    """2 x 4 x 3 pixels of (200, 40, 10), or its grey, the left half transparent; below it is something else."""
    array = np.full((4, 6, 4), (200, 40, 10, 255), dtype=np.uint8)
    array[:, :3] = (1, 2, 3, 0)
    image = Image.fromarray(array)
    match kind:
        case "RGBA":
            return image
        case "LA":
            return image.convert("LA")
        case "P":
            palette = Image.fromarray((array[..., 3] > 0).astype(np.uint8), "P")
            palette.putpalette([1, 2, 3, 200, 40, 10])
            palette.info["transparency"] = 0
            return palette
        case "RGB":
            image = image.convert("RGB")
            image.info["transparency"] = (1, 2, 3)
            return image


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB"])
@pytest.mark.parametrize(("background", "below"), [("white", (255, 255, 255)), ("#102030", (16, 32, 48))])
def test_what_is_transparent_shows_the_background(tmp_path, kind, background, below):
    transparent(kind).save(tmp_path / "a.png")
    pixels = fit(open_picture(tmp_path / "a.png", "a"), COLOUR, False, "a", background)
    above = (200, 40, 10) if kind != "LA" else (round(0.299 * 200 + 0.587 * 40 + 0.114 * 10),) * 3
    assert (pixels[:, :3] == below).all()
    assert (pixels[:, 3:] == above).all()


def test_half_transparent_pixels_are_mixed():
    image = Image.new("RGBA", (6, 4), (0, 100, 200, 128))
    np.testing.assert_allclose(fit(image, COLOUR, False, "a")[0, 0], [127, 177, 227], atol=1)
    assert fit(image, GREY, False, "a").shape == (4, 6, 1)


def test_a_picture_without_transparency_stays_what_it_is():
    for mode in ("RGB", "L", "CMYK", "P"):
        image = Image.new(mode, (6, 4))
        assert make_opaque(image) is image


def test_every_reader_puts_transparent_pictures_on_the_configs_colour(tmp_path):
    image = transparent("RGBA")
    for folder in ("images", "winner", "loser"):
        (tmp_path / folder).mkdir()
        image.save(tmp_path / folder / "a.png")
    columns = {"image": [image], "winner": [image], "loser": [image]}
    Dataset.from_dict(columns).save_to_disk(tmp_path / "set")
    np.savez(tmp_path / "a.npz", images=np.asarray(image)[None])
    sources = {"folder": "images", "dataset": "set", "npz": "a.npz"}
    for background, below in (("white", 255), ("black", 0)):
        sets = [
            load_images(ImagesSettings(**{key: str(tmp_path / name)}, background=background), COLOUR)
            for key, name in sources.items()
        ]
        for source in ({"folder": str(tmp_path)}, {"dataset": str(tmp_path / "set"), "prompt_column": None}):
            sets += read_preferences(PreferenceSettings(**source, background=background), COLOUR).sets
        assert len(sets) == 7
        for images in sets:
            pixels = ((images.batch([0])[0] + 1) * 127.5).round()
            assert (pixels[:, :, :3] == below).all()
            assert (pixels[:, 0, 4] == torch.tensor([200.0, 40, 10])).all()
    shown = read_preprocessed_folder(tmp_path / "images", Preprocessing(4)).batch([0])
    assert shown[0, 0, 0, 0] == 1  # a reference's is white


def test_latents_of_another_background_are_not_taken(tmp_path):
    transparent("RGBA").save(tmp_path / "a.png")
    np.savez(tmp_path / "a.npz", images=np.asarray(transparent("RGBA"))[None])
    for read, path in ((read_folder, tmp_path), (read_npz, tmp_path / "a.npz")):
        white, black = (read(path, COLOUR, background=colour).fingerprint for colour in ("white", "black"))
        assert white != black


def test_winners_and_losers_of_a_dataset_are_told_apart(tmp_path):
    """Their latents are kept under their fingerprints: of one fingerprint, a loser would be its winner."""
    Dataset.from_dict({"winner": [transparent("RGBA")], "loser": [transparent("P")]}).save_to_disk(tmp_path / "set")
    pairs = read_preferences(PreferenceSettings(dataset=str(tmp_path / "set"), prompt_column=None), COLOUR)
    assert pairs.sets[0].fingerprint != pairs.sets[1].fingerprint


@pytest.mark.parametrize("text", ["whitish", "#12", ""])
def test_a_background_that_is_no_colour_is_refused(text):
    with pytest.raises(UserError, match=r"background: .*is no colour; write a name such as white, or '#rrggbb'"):
        check(ImagesSettings, {"folder": "a", "background": text}, "config")


def test_mirrored_turns_about_half_of_the_pictures_left_to_right():
    images = torch.rand(400, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    result = mirror_half(images, torch.Generator().manual_seed(1))
    same = (result == images).flatten(1).all(1)
    turned = (result == images.flip(-1)).flatten(1).all(1)
    assert (same ^ turned).all()
    assert 150 < turned.sum() < 250
    assert torch.equal(result, mirror_half(images, torch.Generator().manual_seed(1)))
