"""The picture-caption judge: words, files, its score and features, and that training makes captions find pictures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from stepdistill.config import check
from stepdistill.errors import UserError
from stepdistill.eval.extractors.load import load_extractor
from stepdistill.eval.measure.reference_statistics import ReferenceStatistics
from stepdistill.judges.clip import ClipSettings
from stepdistill.judges.contrastive import MatchingNetwork, is_matching
from stepdistill.judges.load import load_clip
from stepdistill.trainers.teachers.captioned import Entry, caption_of, read_pictures, write_pictures
from stepdistill.trainers.teachers.judge_captions import MatchingConfig, prepare_matching, rank_captions

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (30, 60, 220)}
PLACES = {"left": np.s_[:, :8], "right": np.s_[:, 8:], "top": np.s_[:8], "bottom": np.s_[8:]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """16x16 pictures, a half of one colour on white, twelve kinds by eight noisy copies, the first of each held out."""
    generator = np.random.default_rng(0)
    images, entries = [], []
    for colour, value in COLOURS.items():
        for place, part in PLACES.items():
            for copy in range(8):
                picture = np.full((16, 16, 3), 255, np.int64)
                picture[part] = value
                images.append((picture + generator.integers(-20, 21, picture.shape)).clip(0, 255).astype(np.uint8))
                name = f"{colour} {place}"
                split = "held-out-pair" if copy == 0 else "train"
                entries.append(Entry(caption_of(name, "plain"), name, "plain", [], split))
    folder = tmp_path_factory.mktemp("captioned")
    write_pictures(folder, np.stack(images), entries, [])
    return folder


@pytest.fixture(scope="module")
def files(data, tmp_path_factory):
    raw = {"kind": "matching", "output": str(tmp_path_factory.mktemp("assets")), "source": "halves", "data": str(data)}
    raw |= {"name": "halves", "num_features": 8, "width": 8, "steps": 120, "batch_size": 24, "shift": 0}
    return prepare_matching(check(MatchingConfig, raw, "test"))


def test_trained_captions_find_their_pictures(data, files):
    network = MatchingNetwork.load(files["matching"])
    images, entries = read_pictures(data)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    count, first, tenth = rank_captions(network, pixels, entries, "held-out-pair", "cpu")
    assert count == 12
    assert first > 0.9  # captions of the same kind tie, and none of another kind is above
    assert tenth >= first
    torch.manual_seed(0)
    untrained = MatchingNetwork(16, 8, 8, name="untrained")
    assert rank_captions(untrained, pixels, entries, "held-out-pair", "cpu")[1] < 0.5
    assert rank_captions(network, pixels, entries, "held-out-name", "cpu") == (0, 0.0, 0.0)
    assert network.notes["ranks"]["held-out-pair"][0] == 12


def test_the_score_is_the_plain_cosine(data, files):
    network = MatchingNetwork.load(files["matching"])
    scorer = load_clip(ClipSettings(model=str(files["matching"])))
    assert "not CLIP" in scorer.tag
    images, entries = read_pictures(data)
    pixels = torch.from_numpy(images[:12]).permute(0, 3, 1, 2)
    captions = [entry.caption for entry in entries[:12]]
    scores = scorer(pixels, captions)
    with torch.no_grad():
        sides = network.encode_image(pixels), network.encode_text(network.tokenize(captions))
    torch.testing.assert_close(scores, torch.nn.functional.cosine_similarity(*sides))
    wrong = scorer(pixels, ["blue right, plain style"] * 12)
    assert (scores > wrong).all()
    leaf = (pixels.float() / 127.5 - 1).requires_grad_()
    cosine = scorer.cosine(leaf, captions)
    torch.testing.assert_close(cosine.detach(), scores, atol=1e-4, rtol=0)
    assert torch.autograd.grad(cosine.sum(), leaf)[0].abs().sum() > 0


def test_features_are_calibrated_and_the_reference_is_theirs(data, files):
    extractor = load_extractor(str(files["matching"]))
    assert (extractor.name, extractor.num_features, extractor.metric) == ("halves", 8, "frechet[halves]")
    images, entries = read_pictures(data)
    trained = torch.from_numpy(images[[e.split == "train" for e in entries]]).permute(0, 3, 1, 2)
    features = extractor(trained)
    assert features.mean(0).abs().max() < 1e-4
    assert features.var(0).mean().item() == pytest.approx(1, rel=1e-3)
    reference = ReferenceStatistics.load(files["reference"])
    assert reference.n == len(trained)
    assert reference.frechet(features) == pytest.approx(0, abs=1e-3)
    reference.check(extractor, (3, 16, 16))
    with pytest.raises(UserError, match=r"takes pictures of \(3, 16, 16\), not \(3, 8, 8\)"):
        extractor(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_words():
    network = MatchingNetwork(16, 8, 8)
    rows = network.tokenize(["Red, left", "left red", "", "a " * 99])
    assert sorted(rows[0].tolist()) == sorted(rows[1].tolist())
    assert (rows[2] == 0).all()
    assert (rows[3] > 0).all()
    assert rows.min() == 0
    assert rows.max() < network.buckets
    with torch.no_grad():
        both = network.encode_text(rows[:2])
    torch.testing.assert_close(both[0], both[1])


def test_what_is_no_such_file(tmp_path, network_file):
    (tmp_path / "odd.safetensors").write_bytes(b"odd")
    assert not is_matching(tmp_path / "odd.safetensors")
    assert not is_matching(network_file)
    for path, message in (
        (tmp_path / "none.safetensors", "no such file"),
        (tmp_path / "odd.safetensors", "not a readable safetensors file"),
        (network_file, "no matching network of stepdistill's"),
    ):
        with pytest.raises(UserError, match=message):
            load_clip(ClipSettings(model=str(path)))


def test_the_reference_may_be_of_other_pictures_than_the_network_learns_from(data, tmp_path):
    images, entries = read_pictures(data)
    some = [i for i, entry in enumerate(entries) if entry.name.startswith("red")]
    write_pictures(tmp_path / "some", images[some], [entries[i] for i in some], [])
    raw = {"kind": "matching", "output": str(tmp_path / "out"), "source": "halves", "data": str(data), "steps": 1}
    raw |= {"num_features": 8, "width": 8, "batch_size": 8, "reference_data": str(tmp_path / "some")}
    files = prepare_matching(check(MatchingConfig, raw, "test"))
    reference = ReferenceStatistics.load(files["reference"])
    assert reference.n == sum(entries[i].split == "train" for i in some) == 28
    judge = load_extractor(str(files["matching"]), "cpu")
    trained = [i for i in some if entries[i].split == "train"]
    features = judge(torch.from_numpy(images[trained]).permute(0, 3, 1, 2))
    torch.testing.assert_close(reference.mean.double(), features.double().mean(0), atol=1e-5, rtol=1e-4)


def test_reference_pictures_that_do_not_fit_are_answered_before_the_training(data, tmp_path):
    images, entries = read_pictures(data)
    held_out = [replace(entry, split="held-out-name") for entry in entries]
    write_pictures(tmp_path / "untrained", images, held_out, [])
    write_pictures(tmp_path / "larger", np.repeat(np.repeat(images, 2, 1), 2, 2), entries, [])
    raw = {"kind": "matching", "output": str(tmp_path / "out"), "source": "x", "data": str(data), "steps": 1}
    for name, message in (
        ("gone", r"reference_data: .*gone/images.npz is not there"),
        ("untrained", r"reference_data: .*untrained has no picture of split train"),
        ("larger", r"reference_data: .*larger has pictures of (\d+)x\1, data's are"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_matching(check(MatchingConfig, {**raw, "reference_data": str(tmp_path / name)}, "test"))
    with pytest.raises(UserError, match=r"data: .*untrained has no picture of split train"):
        prepare_matching(check(MatchingConfig, {**raw, "data": str(tmp_path / "untrained")}, "test"))
    assert not (tmp_path / "out").exists()
