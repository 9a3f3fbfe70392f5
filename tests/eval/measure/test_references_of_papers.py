"""References from folders and published moments, and what is done to pictures, against clean-fid called directly."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import center_crop

from stepdistill.errors import UserError
from stepdistill.eval.extractors.inception import FILE_NAME
from stepdistill.eval.extractors.load import load_extractor
from stepdistill.eval.measure.distances import frechet_distance, kernel_distance, mean_and_covariance
from stepdistill.eval.measure.evaluate import evaluate
from stepdistill.eval.measure.preprocessing import Preprocessing, read_preprocessed_folder
from stepdistill.eval.measure.processes import Processes
from stepdistill.eval.measure.reference_statistics import ReferenceStatistics
from stepdistill.eval.measure.references import load_reference
from stepdistill.eval.measure.settings import Protocol
from stepdistill.eval.measure.targets import Target

fid = pytest.importorskip("cleanfid.fid", reason="clean-fid is an optional package", exc_type=ImportError)
ONE = Processes()


class Inception(torch.nn.Module):
    """The published file's two ways in: ``layers`` of 3x299x299 in [-1, 1], and bytes of any size with a resize."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d((32, 64)), torch.nn.Conv2d(3, 1, 1))

    def forward(self, x, return_features: bool = False):
        x = torch.nn.functional.interpolate(x, size=[299, 299], mode="bilinear", align_corners=False)
        return self.layers((x - 128) / 128)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("inception")
    torch.jit.save(torch.jit.script(Inception()), folder / FILE_NAME)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Wide, tall, square and grey ones, none of the size that is measured."""
    folder = tmp_path_factory.mktemp("val2014")
    generator = np.random.default_rng(0)
    for i, shape in enumerate([(60, 91, 3), (80, 45, 3), (50, 50, 3), (61, 40)] * 3):
        smooth = Image.fromarray(generator.integers(0, 256, (9, 7, *shape[2:]), dtype=np.uint8))
        smooth.resize(shape[1::-1], Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    return folder


def as_dmd2(array):
    """``CenterCropLongEdge`` and the resize of DMD2's evaluator, with side 32."""
    image = center_crop(Image.fromarray(array), min(array.shape[:2]))
    return np.array(image.resize((32, 32), Image.LANCZOS))


def test_a_folders_statistics_are_clean_fids_own_with_dmd2s_transform(inception, photos, tmp_path, capsys):
    from cleanfid.inception_torchscript import InceptionV3W

    network = InceptionV3W(str(inception), download=False)
    features = fid.get_folder_features(
        str(photos), network, num_workers=0, device="cpu", verbose=False, custom_image_tranform=as_dmd2
    )
    extractor = load_extractor(f"inception:{inception}")
    stored = Preprocessing(32, "floor", "stored")
    reference = load_reference(str(photos), "inception", extractor, stored, tmp_path, ONE)
    assert (reference.n, reference.source, reference.shape) == (12, photos.name, (3, 32, 32))
    assert reference.resize == "crop centre, to the shorter side, PIL lanczos to 32x32"
    np.testing.assert_allclose(reference.mean, features.mean(0), atol=1e-6)
    np.testing.assert_allclose(reference.cov, np.cov(features, rowvar=False), atol=1e-6)
    # kept, so that the second time nothing is read
    (saved,) = tmp_path.iterdir()
    assert saved.name.startswith("reference-")
    before = saved.stat().st_mtime_ns
    again = load_reference(str(photos), "inception", extractor, Preprocessing(32, files="stored"), tmp_path, ONE)
    assert again.fingerprint == reference.fingerprint
    assert saved.stat().st_mtime_ns == before
    # and a file of it is as good as the folder, for the same size alone
    assert load_reference(str(saved), "inception", extractor, stored, tmp_path, ONE).n == 12
    with pytest.raises(UserError, match="make the reference of the folder of pictures again"):
        load_reference(str(saved), "inception", extractor, Preprocessing(64), tmp_path, ONE)
    with pytest.raises(UserError, match="set resize=SIDE"):
        load_reference(str(photos), "inception", extractor, Preprocessing(), tmp_path, ONE)


def test_drawn_pictures_are_treated_as_the_folder_is(photos):
    preprocessing = Preprocessing(32)
    images = read_preprocessed_folder(photos, preprocessing)
    for i, file in enumerate(sorted(photos.iterdir())):
        array = np.array(Image.open(file).convert("RGB"))
        processed = preprocessing(torch.from_numpy(array).permute(2, 0, 1)[None])
        assert torch.equal(processed[0].permute(1, 2, 0), torch.from_numpy(as_dmd2(array)))
        assert torch.equal(((images.batch([i]) + 1) * 127.5).round().byte(), processed)
    grey = torch.randint(0, 256, (2, 1, 40, 50), dtype=torch.uint8)
    assert torch.equal(preprocessing(grey), preprocessing(grey.expand(-1, 3, -1, -1))[:, :1])
    assert Preprocessing()(grey) is grey


def test_bytes_are_rounded_or_cut():
    pixels = torch.tensor([0.0, 0.9 / 255, 1.0, 1.2, -0.1])
    assert Preprocessing().to_bytes(pixels).tolist() == [0, 1, 255, 255, 0]
    assert Preprocessing(bytes="floor").to_bytes(pixels).tolist() == [0, 0, 255, 255, 0]


def test_the_resize_inside_is_clean_fids_legacy_tensorflow(inception):
    from cleanfid.inception_torchscript import InceptionV3W

    pictures = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    clean, inside = load_extractor(f"inception:{inception}"), load_extractor(f"inception_tensorflow:{inception}")
    expected = InceptionV3W(str(inception), download=False, resize_inside=True)(pictures.float())
    torch.testing.assert_close(inside(pictures), expected)
    assert not torch.allclose(clean(pictures), inside(pictures))
    assert clean.fingerprint != inside.fingerprint
    assert inside.resize == "inside: TensorFlow's bilinear to 299x299"


def test_distances_are_clean_fids_on_the_same_features():
    generator = np.random.default_rng(0)
    real = generator.normal(size=(300, 12)).astype(np.float32)
    fake = (generator.normal(size=(200, 12)) @ generator.normal(size=(12, 12)) * 0.5 + 0.2).astype(np.float32)
    a, b = torch.from_numpy(real), torch.from_numpy(fake)
    distance = frechet_distance(*mean_and_covariance(a), *mean_and_covariance(b))
    assert distance == pytest.approx(fid.fid_from_feats(real.astype(float), fake.astype(float)), rel=1e-9)
    kid, _ = kernel_distance(a[:200], b, subsets=1, subset_size=200)
    assert kid == pytest.approx(fid.kernel_distance(real[:200], fake, 1, 200), rel=1e-4)


@pytest.fixture
def moments(tmp_path, reference_file):
    reference = ReferenceStatistics.load(reference_file)
    np.savez(tmp_path / "published.npz", mu=reference.mean.numpy(), sigma=reference.cov.numpy())
    return tmp_path / "published.npz"


def test_published_moments_give_the_distance_and_nothing_else(
    tmp_path, moments, label_folder, network_file, reference_file
):
    settings = Protocol(samples=20, batch_size=8, extractor=str(network_file), reference=str(moments))
    target = Target("teacher", label_folder, 1)
    (row,) = evaluate([target], settings, tmp_path / "a.json")
    whole = settings.model_copy(update={"reference": str(reference_file), "kid_subset_size": 15, "kid_subsets": 2})
    (other,) = evaluate([target], whole, tmp_path / "b.json")
    assert row["frechet"] == pytest.approx(other["frechet"], rel=1e-12)
    assert (row["kid_mean"], other["kid_mean"] is None) == (None, False)
    with pytest.raises(UserError, match=r"published\.npz: holds moments alone, and precision and recall need features"):
        evaluate([target], settings.model_copy(update={"precision_recall": True}), tmp_path / "c.json")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, "no such file of reference statistics"),
        ({"images": np.zeros(2)}, "not an .npz with arrays mu and sigma"),
        ({"mu": np.zeros(8), "sigma": np.zeros(8)}, "are not moments"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "of 5 features, and extractor tiny gives 8"),
    ],
)
def test_files_that_hold_no_moments_are_one_line(tmp_path, network_file, arrays, message):
    path = tmp_path / "given.npz"
    if arrays is not None:
        np.savez(path, **arrays)
    with pytest.raises(UserError) as error:
        load_reference(str(path), "tiny", load_extractor(str(network_file)), Preprocessing(), tmp_path, ONE)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
