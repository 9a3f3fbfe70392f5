import sys
import types

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from stepdistill import assets
from stepdistill.errors import UserError
from stepdistill.eval.extractors import inception
from stepdistill.eval.extractors.load import as_extractor, load_extractor
from stepdistill.eval.extractors.small import FeatureNetwork
from stepdistill.eval.measure.reference_statistics import ReferenceStatistics
from stepdistill.trainers.teachers.judge_labels import (
    FeatureConfig,
    balanced_subset,
    pack_images,
    prepare_assets,
    train_features,
)


class Means(torch.nn.Module):
    """The mean of each row: a stand-in for anyone's extractor."""

    num_features = 16

    def forward(self, images):
        return images.float().mean((1, 3)) / 255


def test_bytes_and_unit_floats_are_the_same_picture():
    network = FeatureNetwork(3, num_features=5, width=8).eval()
    images = torch.randint(0, 256, (2, 3, 20, 33), dtype=torch.uint8)
    assert network(images).shape == (2, 5)
    torch.testing.assert_close(network(images), network(images.double() / 255))


def test_calibration_centres_and_scales_and_leaves_the_classes():
    torch.manual_seed(0)
    network = FeatureNetwork(1, num_features=5, width=8).eval()
    images = torch.randint(0, 256, (70, 1, 16, 16), dtype=torch.uint8)
    before, logits = network(images), network.logits(images)
    network.calibrate(images, batch_size=32)
    after = network(images)
    torch.testing.assert_close(after.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    assert after.var(0).mean().item() == pytest.approx(1, rel=1e-5)
    factor = before.std(0) / after.std(0)
    torch.testing.assert_close(factor, factor[:1].expand(5))
    assert torch.equal(network.logits(images), logits)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 15, 16), (1, 16, 65)])
def test_pictures_of_other_shapes_are_refused(shape):
    with pytest.raises(UserError, match="use an extractor made for these"):
        FeatureNetwork()(torch.zeros(1, *shape, dtype=torch.uint8))


def test_a_saved_network_comes_back(tmp_path):
    network = FeatureNetwork(1, 4, num_features=6, width=16, name="mine").eval()
    network.notes = {"accuracy": 0.5}
    again = FeatureNetwork.load(network.save(tmp_path / "deep" / "f.safetensors"))
    images = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    assert torch.equal(network(images), again(images))
    assert (again.name, again.notes, again.num_features) == ("mine", {"accuracy": 0.5}, 6)
    assert again.fingerprint() == network.fingerprint()


def test_the_fingerprint_knows_weights_and_architecture():
    torch.manual_seed(0)
    network = FeatureNetwork(width=8)
    before = network.fingerprint()
    with torch.no_grad():
        network.feature.bias[0] += 1e-6
    assert network.fingerprint() != before
    torch.manual_seed(0)
    assert FeatureNetwork(width=8).fingerprint() == before


def test_extractors_by_name(tmp_path, network_file, monkeypatch):
    images = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    extractor = load_extractor(str(network_file))
    assert extractor.metric == "frechet[tiny]"
    assert extractor(images).shape == (3, 8)
    module = types.ModuleType("somebodys_metrics")
    module.Means = Means
    monkeypatch.setitem(sys.modules, "somebodys_metrics", module)
    python = load_extractor("somebodys_metrics:Means")
    assert python.metric == "frechet[Means]"
    torch.testing.assert_close(python(images), images.float().mean((1, 3)) / 255)


def test_a_torchscript_file_is_an_extractor(tmp_path):
    class Rows(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.num_features = 16

        def forward(self, images):
            return images.float().mean((1, 3))

    torch.jit.save(torch.jit.script(Rows()), tmp_path / "rows.pt")
    images = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    extractor = load_extractor(str(tmp_path / "rows.pt"))
    assert extractor.metric == "frechet[rows]"
    torch.testing.assert_close(extractor(images), images.float().mean((1, 3)))


def test_the_shipped_network_is_good_and_has_its_reference():
    extractor = load_extractor("fashion_mnist")
    reference = ReferenceStatistics.load(assets.ROOT / "fashion_mnist" / "reference.safetensors")
    assert extractor.metric == "frechet[fashion_mnist_features]"
    assert extractor.module.notes["accuracy"] > 0.9
    reference.check(extractor, (1, 16, 16))
    assert reference.cov.trace().item() == pytest.approx(64, rel=1e-4)
    assert (reference.n, reference.features.shape) == (60000, (5000, 64))
    with np.load(assets.ROOT / "fashion_mnist" / "images.npz") as packed:
        images, labels = packed["images"], packed["labels"]
    assert (images.shape, images.dtype) == ((6000, 16, 16), np.uint8)
    assert np.bincount(labels).tolist() == [600] * 10
    pixels = torch.from_numpy(images[:1500])[:, None]
    right = (extractor.module.logits(pixels).argmax(1).numpy() == labels[:1500]).mean()
    assert right > 0.9
    # dense features, as a Gaussian fit wants them: no direction that is mostly silent
    assert (extractor(pixels).abs() < 1e-4).float().mean() < 0.01
    # 1500 of the very pictures are near, the same pictures in negative are not
    assert reference.frechet(extractor(pixels)) * 20 < reference.frechet(extractor(255 - pixels))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing_known", "not known; use a shipped one"),
        ("missing.safetensors", "no such feature network"),
        ("asset:fashion_mnist/none.safetensors", "no such asset"),
        ("missing.pt", "no such file"),
        ("no_such_module_here:Thing", "cannot be imported"),
        ("math:Thing", "has no 'Thing'"),
        ("math:floor", "num_features"),
        ("torch.nn:Identity", "num_features"),
    ],
)
def test_wrong_extractors_are_refused(spec, message, monkeypatch):
    if spec == "math:floor":  # something callable that gives no module
        monkeypatch.setattr("math.floor", lambda: 3)
        message = "must be a torch.nn.Module"
    with pytest.raises(UserError) as error:
        load_extractor(spec)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_foreign_files_are_refused(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    (tmp_path / "rubbish.safetensors").write_bytes(b"rubbish")
    (tmp_path / "rubbish.pt").write_bytes(b"rubbish")
    for name, message in (
        ("foreign.safetensors", "not a feature network"),
        ("rubbish.safetensors", "not a readable"),
        ("rubbish.pt", "not a TorchScript file"),
    ):
        with pytest.raises(UserError, match=message):
            load_extractor(str(tmp_path / name))


def test_an_extractor_that_gives_another_width_is_refused():
    module = Means()
    module.num_features = 7
    with pytest.raises(UserError, match=r"must give \(2, 7\)"):
        as_extractor(module)(torch.zeros(2, 1, 16, 16, dtype=torch.uint8))


class InceptionLike(torch.nn.Module):
    """``layers`` as in the real file, 2048 features of 3x299x299 pixels in [-1, 1]."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d((32, 64)), torch.nn.Conv2d(3, 1, 1))

    def forward(self, x):
        return self.layers(x)


def test_missing_inception_weights_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "default_location", lambda: tmp_path / inception.FILE_NAME)
    with pytest.raises(UserError) as error:
        load_extractor("inception")
    message = str(error.value)
    assert str(tmp_path / inception.FILE_NAME) in message
    assert inception.URL in message
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_only_the_official_weights_make_a_fid(tmp_path, monkeypatch):
    pytest.importorskip("cleanfid.resize", reason="clean-fid is an optional package", exc_type=ImportError)
    torch.manual_seed(0)
    file = tmp_path / inception.FILE_NAME
    torch.jit.save(torch.jit.script(InceptionLike()), file)
    stranger = load_extractor(f"inception:{file}")
    assert stranger.metric == "frechet[inception_unknown_weights]"
    monkeypatch.setattr(inception, "SHA256", inception.files.digest(file))
    known = load_extractor(f"inception:{tmp_path}")
    assert (known.metric, known.kernel_metric) == ("FID", "KID")
    grey = torch.full((2, 1, 40, 30), 192, dtype=torch.uint8)
    expected = known.module.network(torch.full((2, 3, 299, 299), 0.5)).reshape(2, -1)
    torch.testing.assert_close(known(grey), expected)


def write_npz(path, images):
    pixels = images.batch(list(range(len(images))))
    np.savez(path, images=((pixels + 1) * 127.5).round().byte()[:, 0].numpy(), labels=images.labels)
    return {"npz": str(path)}


def test_prepare_assets_learns_and_is_reproducible(tmp_path, pictures, capsys):
    data = write_npz(tmp_path / "data.npz", pictures)

    def prepare(name):
        config = FeatureConfig(
            output=str(tmp_path / name),
            source="made up",
            train=data,
            test=data,
            num_labels=3,
            num_features=8,
            width=8,
            epochs=8,
            batch_size=20,
            kid_features=50,
            packed_images=30,
        )
        return prepare_assets(config)

    first, second = prepare("a"), prepare("b")
    network = FeatureNetwork.load(first["features"])
    assert network.notes["accuracy"] > 0.95
    assert "test pictures labelled correctly" in capsys.readouterr().out
    assert network.fingerprint() == FeatureNetwork.load(second["features"]).fingerprint()
    reference = ReferenceStatistics.load(first["reference"])
    assert reference.fingerprint == ReferenceStatistics.load(second["reference"]).fingerprint
    assert (reference.n, reference.source, len(reference.features)) == (200, "made up", 50)
    reference.check(as_extractor(network))
    with np.load(first["images"]) as packed:
        assert np.bincount(packed["labels"]).tolist() == [10, 10, 10]


@pytest.mark.parametrize("mirror", [False, True])
def test_mirrored_training_cannot_tell_left_from_right_alone(tmp_path, mirror):
    generator = np.random.default_rng(0)
    labels = np.arange(200) % 4
    images = generator.integers(0, 60, (200, 16, 16), dtype=np.uint8)
    halves = [np.s_[:, :8], np.s_[:, 8:], np.s_[:8], np.s_[8:]]
    for image, label in zip(images, labels, strict=True):
        image[halves[label]] += 150
    np.savez(tmp_path / "halves.npz", images=images, labels=labels)
    data = {"npz": str(tmp_path / "halves.npz")}
    options = {"num_labels": 4, "num_features": 8, "width": 8, "epochs": 8, "batch_size": 20, "mirror": mirror}
    network = train_features(FeatureConfig(output=str(tmp_path), source="x", train=data, test=data, **options))
    logits = network.logits(torch.from_numpy(images)[:, None]).numpy()
    assert (logits.argmax(1) == labels)[labels >= 2].mean() > 0.95
    gap = np.where(labels == 0, 1, -1) * (logits[:, 0] - logits[:, 1])  # how sure of the side
    side = gap[labels < 2].mean()
    assert abs(side) < 1 if mirror else side > 2


def test_packed_pictures_are_the_chosen_ones(tmp_path, pictures):
    chosen = balanced_subset(pictures.labels, 30, seed=3)
    assert chosen == balanced_subset(pictures.labels, 30, seed=3) != balanced_subset(pictures.labels, 30, seed=4)
    with np.load(pack_images(pictures, 30, 3, tmp_path / "images.npz")) as packed:
        again = torch.from_numpy(packed["images"])[:, None].float() / 127.5 - 1
        torch.testing.assert_close(again, pictures.batch(chosen))
        assert packed["labels"].tolist() == [pictures.labels[i] for i in chosen]
    with pytest.raises(UserError, match="label 0 has 67 pictures, 100 are needed"):
        balanced_subset(pictures.labels, 300, seed=0)


def test_labels_outside_the_config_are_refused(tmp_path, pictures):
    data = write_npz(tmp_path / "data.npz", pictures)
    config = FeatureConfig(output=str(tmp_path / "out"), source="made up", train=data, test=data, num_labels=2)
    with pytest.raises(UserError, match="outside 0, 1"):
        prepare_assets(config)
    assert not (tmp_path / "out").exists()


def test_data_needs_one_source():
    for wrong in ({}, {"npz": "a", "idx_images": "b", "idx_labels": "c"}, {"idx_images": "b"}):
        with pytest.raises(ValidationError):
            FeatureConfig(output="x", source="x", train=wrong, test={"npz": "a"})
