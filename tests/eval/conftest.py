from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import save_pixels, save_stable_diffusion

from stepdistill.data.arrays import read_array_images
from stepdistill.eval.extractors.load import as_extractor
from stepdistill.eval.extractors.small import FeatureNetwork
from stepdistill.eval.measure.reference_statistics import make_reference


@pytest.fixture(scope="session")
def label_folder(tmp_path_factory) -> Path:
    """Three labels and a null label that is the last one."""
    return save_pixels(tmp_path_factory.mktemp("pipelines") / "label", labels=3, null=True, size=16)


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory) -> Path:
    """Another network of the same shape, with provenance as an export has it."""
    provenance = {"method": "dmd2", "steps": 1, "call": {"num_inference_steps": 1}}
    return save_pixels(
        tmp_path_factory.mktemp("pipelines") / "student", provenance=provenance, labels=3, seed=1, size=16
    )


@pytest.fixture(scope="session")
def stable_diffusion_folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stable_diffusion")
    return save_stable_diffusion(root / "pipeline")


@pytest.fixture(scope="session")
def pictures():
    """200 grey 16x16 pictures of three kinds: a bright left, top or middle, in noise."""
    generator = np.random.default_rng(0)
    labels = np.arange(200) % 3
    pixels = generator.integers(0, 80, (200, 16, 16))
    for label, place in enumerate((np.s_[:, :, :8], np.s_[:, :8], np.s_[:, 4:12, 4:12])):
        chosen = pixels[labels == label]
        chosen[place] += 150
        pixels[labels == label] = chosen
    return read_array_images(pixels.astype(np.uint8), labels, (1, 16, 16), False, "made up")


@pytest.fixture(scope="session")
def network_file(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    network = FeatureNetwork(1, 3, num_features=8, width=8, name="tiny")
    return network.save(tmp_path_factory.mktemp("extractor") / "features.safetensors")


@pytest.fixture(scope="session")
def reference_file(network_file, pictures) -> Path:
    reference = make_reference(pictures, as_extractor(FeatureNetwork.load(network_file)), kid_features=100)
    return reference.save(network_file.with_name("reference.safetensors"))
