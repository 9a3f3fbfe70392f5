"""Judges and statistics whose files are damaged, or of other keys, shapes and types: one line, and no silent change."""

from __future__ import annotations

import io
import json
import shutil
import time
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stepdistill import assets
from stepdistill.errors import UserError
from stepdistill.eval.extractors.load import load_extractor
from stepdistill.eval.measure.reference_statistics import ReferenceStatistics
from stepdistill.readers import read_tensors


def spoil(file, change):
    """Rewrite a file of ours after ``change(tensors, metadata)``, its digest as it was or made anew."""
    tensors, metadata = read_tensors(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)


@pytest.mark.parametrize("asset", ["fashion_mnist", "emoji"])
@pytest.mark.parametrize("name", ["mean", "cov", "features"])
def test_a_changed_number_of_statistics_is_noticed(asset, name, tmp_path):
    file = shutil.copy(assets.ROOT / asset / "reference.safetensors", tmp_path)
    ReferenceStatistics.load(file)
    spoil(file, lambda tensors, _: tensors[name].view(-1)[3].add_(0.25))
    with pytest.raises(UserError, match=r"its content is not what was written: the digest differs"):
        ReferenceStatistics.load(file)


def test_a_changed_fact_of_statistics_is_noticed(tmp_path):
    file = shutil.copy(assets.ROOT / "emoji" / "reference.safetensors", tmp_path)
    spoil(file, lambda _, metadata: metadata.update(facts=json.dumps({**json.loads(metadata["facts"]), "n": 3})))
    with pytest.raises(UserError, match="the digest differs"):
        ReferenceStatistics.load(file)


def without_digest(metadata):
    del metadata["sha256"]


STATISTICS = {
    "a missing tensor": lambda t, m: t.pop("cov"),
    "a tensor too many": lambda t, m: t.update(more=torch.zeros(1)),
    "a mean of two dimensions": lambda t, m: t.update(mean=torch.zeros(4, 4)),
    "another width": lambda t, m: t.update(mean=torch.zeros(3)),
    "integers": lambda t, m: t.update(mean=torch.zeros(len(t["mean"]), dtype=torch.int64)),
    "no facts": lambda t, m: m.pop("facts"),
    "facts that are no JSON": lambda t, m: m.update(facts="{"),
    "facts that are a list": lambda t, m: m.update(facts="[]"),
    "a fact of another type": lambda t, m: m.update(facts=json.dumps({**json.loads(m["facts"]), "n": "many"})),
    "a fact too many": lambda t, m: m.update(facts=json.dumps({**json.loads(m["facts"]), "more": 1})),
    "a shape of one number": lambda t, m: m.update(facts=json.dumps({**json.loads(m["facts"]), "shape": 3})),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_of_other_keys_and_shapes_are_one_line(name, tmp_path):
    file = shutil.copy(assets.ROOT / "fashion_mnist" / "reference.safetensors", tmp_path)

    def change(tensors, metadata):
        without_digest(metadata)
        STATISTICS[name](tensors, metadata)

    spoil(file, change)
    with pytest.raises(UserError, match=r"reference\.safetensors: not whole statistics") as caught:
        ReferenceStatistics.load(file)
    assert "\n" not in str(caught.value)


NETWORKS = {
    "a missing tensor": lambda t, m: t.pop("feature.weight"),
    "a tensor too many": lambda t, m: t.update(more=torch.zeros(1)),
    "another shape": lambda t, m: t.update({"feature.weight": torch.zeros(2, 2)}),
    "no architecture": lambda t, m: m.pop("architecture"),
    "an architecture of a list": lambda t, m: m.update(architecture="[1]"),
    "an architecture of words": lambda t, m: m.update(
        architecture=json.dumps({**json.loads(m["architecture"]), "width": "wide"})
    ),
    "an architecture of 10^9": lambda t, m: m.update(
        architecture=json.dumps({**json.loads(m["architecture"]), "width": 10**9})
    ),
    "no name": lambda t, m: m.pop("name"),
    "notes that are no JSON": lambda t, m: m.update(notes="{"),
}


@pytest.mark.parametrize("asset", ["fashion_mnist/features.safetensors", "emoji/matching.safetensors"])
@pytest.mark.parametrize("name", NETWORKS)
def test_judges_of_other_keys_and_shapes_are_one_line(asset, name, tmp_path):
    file = shutil.copy(assets.ROOT / asset, tmp_path)

    def change(tensors, metadata):
        without_digest(metadata)
        NETWORKS[name](tensors, metadata)

    spoil(file, change)
    with pytest.raises(UserError, match=r"safetensors: not a whole (feature|matching) network") as caught:
        load_extractor(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asset", ["fashion_mnist/features.safetensors", "emoji/matching.safetensors"])
def test_a_changed_weight_of_a_judge_is_noticed(asset, tmp_path):
    file = shutil.copy(assets.ROOT / asset, tmp_path)
    spoil(file, lambda tensors, _: tensors["feature.weight"].view(-1)[0].add_(1e-3))
    with pytest.raises(UserError, match="the digest differs"):
        load_extractor(str(file))


def test_a_judge_in_torchscript_with_a_flipped_bit_is_noticed(tmp_path):
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    module.num_features = 3
    file = tmp_path / "judge.pt"
    torch.jit.script(module).save(file)
    raw = bytearray(file.read_bytes())
    place = raw.find(module[1].weight.detach().numpy().tobytes())
    raw[place + 2] ^= 64
    file.write_bytes(raw)
    with pytest.raises(UserError, match=r"judge\.pt: not a TorchScript file .*checksum differs"):
        load_extractor(str(file))


def header(shape, dtype="<f8"):
    """An .npy file that says ``shape`` and holds 8 bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + b"\0" * 8


@pytest.mark.parametrize(
    ("mu", "message"),
    [
        (header((10**13,)), "says float64 .* and holds 8"),
        (header((10**6, 10**7)), "and holds 8"),
        (header((1,), "|O"), "Python objects"),
        (b"\x93NUMPY\x09\x00" + b"\0" * 100, "NumPy's format"),
        (b"nothing", "not an .npz with arrays mu and sigma"),
        (b"", "not an .npz with arrays mu and sigma"),
        (header((1,), "<U2"), "not an .npz with arrays mu and sigma"),
    ],
)
def test_moments_are_looked_at_before_they_are_read(mu, message, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("mu.npy", mu)
        archive.writestr("sigma.npy", header((1, 1)))
    started = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        ReferenceStatistics.load(tmp_path / "a.npz")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 2
