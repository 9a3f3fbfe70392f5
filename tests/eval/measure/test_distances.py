import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from stepdistill.data.arrays import read_array_images
from stepdistill.data.pixels import signed_to_bytes, unit_to_bytes
from stepdistill.errors import UserError
from stepdistill.eval.extractors.load import as_extractor
from stepdistill.eval.extractors.small import FeatureNetwork
from stepdistill.eval.measure.distances import frechet_distance, kernel_distance, mean_and_covariance
from stepdistill.eval.measure.reference_statistics import ReferenceStatistics, make_reference


def gaussian(count, width, seed, scale=1.0, shift=0.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * scale + shift


def test_frechet_distance_of_gaussians_with_commuting_covariances():
    """``|m|^2 + sum (sqrt a - sqrt b)^2`` in the common eigenbasis."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator))
    a, b = torch.rand(2, 6, dtype=torch.float64, generator=generator) + 0.1
    mean = torch.randn(6, dtype=torch.float64, generator=generator)
    expected = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    distance = frechet_distance(mean, basis @ a.diag() @ basis.T, 0 * mean, basis @ b.diag() @ basis.T)
    assert distance == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_distance_of_gaussians_that_do_not_commute():
    """In two dimensions ``tr sqrt(A B) = sqrt(tr(A B) + 2 sqrt(det(A B)))``."""
    a = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.5], [-0.5, 3.0]], dtype=torch.float64)
    mean = torch.tensor([1.0, -2.0], dtype=torch.float64)
    product = a @ b
    root = (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    expected = 5.0 + a.trace() + b.trace() - 2 * root
    assert frechet_distance(mean, a, 0 * mean, b) == pytest.approx(expected.item(), rel=1e-12)
    assert frechet_distance(mean, a, mean, a) == pytest.approx(0, abs=1e-12)


def test_equal_to_torchmetrics_called_directly(pictures, network_file):
    """From cached statistics, the number that torchmetrics gives when it sees all pictures itself."""
    network = FeatureNetwork.load(network_file)
    reference = make_reference(pictures, as_extractor(network), kid_features=200)
    real = signed_to_bytes(pictures.batch(list(range(200))))
    fake = (real.float() * 0.8 + 20).byte()[:150]
    features = as_extractor(network)(fake)
    frechet = FrechetInceptionDistance(feature=network)
    kernel = KernelInceptionDistance(feature=network, subsets=1, subset_size=150)
    for metric, shown in ((frechet, real), (kernel, real[:150])):
        metric.update(shown, real=True)
        metric.update(fake, real=False)
    assert reference.frechet(features) == pytest.approx(float(frechet.compute()), rel=1e-4)
    assert reference.frechet(features) > 1e-3
    # with every feature in the one subset nothing is left to chance
    distance, _ = kernel_distance(as_extractor(network)(real[:150]), features, subsets=1, subset_size=150)
    assert distance == pytest.approx(float(kernel.compute()[0]), rel=1e-4)


def test_kernel_distance_by_hand():
    """``k(x, y) = (x y + 1)^3`` in one dimension on two points each."""
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])

    def kernel(a, b):
        return (a * b + 1) ** 3

    expected = kernel(0, 1) + kernel(2, 3) - (kernel(0, 2) + kernel(0, 3) + kernel(1, 2) + kernel(1, 3)) / 2
    assert kernel_distance(x, y, subsets=1)[0] == pytest.approx(expected)


def test_kernel_distance_is_seeded_and_leaves_the_global_state():
    a, b = gaussian(300, 4, 0), gaussian(300, 4, 1, shift=0.5)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = kernel_distance(a, b, 3, 50, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert first == kernel_distance(a, b, 3, 50, seed=1) != kernel_distance(a, b, 3, 50, seed=2)
    assert kernel_distance(a, b, 20, 100)[0] > 10 * abs(kernel_distance(a, gaussian(300, 4, 2), 20, 100)[0])


def test_a_reference_comes_back(tmp_path, reference_file):
    reference = ReferenceStatistics.load(reference_file)
    again = ReferenceStatistics.load(reference.save(tmp_path / "again.safetensors"))
    assert again.fingerprint == reference.fingerprint
    assert (again.mean.dtype, again.cov.dtype, again.features.dtype) == (torch.float64, torch.float64, torch.half)
    assert (again.n, again.shape, again.source) == (200, (1, 16, 16), "made up")
    assert again.features.shape == (100, 8)


def test_moments_are_those_of_all_features(pictures, reference_file, network_file):
    reference = ReferenceStatistics.load(reference_file)
    extractor = as_extractor(FeatureNetwork.load(network_file))
    features = extractor(signed_to_bytes(pictures.batch(list(range(200))))).double()
    torch.testing.assert_close(reference.mean, features.mean(0))
    centred = features - features.mean(0)
    torch.testing.assert_close(reference.cov, centred.T @ centred / 199)
    assert mean_and_covariance(features)[1].dtype == torch.float64


def test_a_references_features_are_a_seeded_random_subset(pictures, network_file):
    """Pictures often lie sorted by class: the first ones are of one kind."""
    extractor = as_extractor(FeatureNetwork.load(network_file))
    whole = extractor(signed_to_bytes(pictures.batch(list(range(200))))).half()

    def places(seed, count=40):
        features = make_reference(pictures, extractor, kid_features=count, seed=seed).features
        places_found = (features[:, None] == whole).all(2).nonzero()
        assert len(features) == count == len(places_found)  # each is one of the pictures', and of one only
        return places_found[:, 1]

    first = places(0)
    assert len(first.unique()) == 40
    assert first.max() > 160
    assert first.double().mean().item() == pytest.approx(99.5, abs=30)  # three standard errors
    assert torch.equal(first, places(0))
    assert not torch.equal(first, places(1))


def test_another_extractor_is_refused(reference_file, network_file):
    reference = ReferenceStatistics.load(reference_file)
    reference.check(as_extractor(FeatureNetwork.load(network_file)))
    other = FeatureNetwork.load(network_file)
    with torch.no_grad():
        other.feature.weight[0, 0] += 1
    with pytest.raises(UserError, match="make the reference again") as error:
        reference.check(as_extractor(other))
    assert "\n" not in str(error.value)


def test_pictures_of_another_size_are_refused(reference_file, network_file):
    reference = ReferenceStatistics.load(reference_file)
    with pytest.raises(UserError, match="make a reference of that size"):
        reference.check(as_extractor(FeatureNetwork.load(network_file)), (1, 32, 32))


def test_references_that_are_none_are_refused(tmp_path, network_file):
    (tmp_path / "rubbish").write_bytes(b"rubbish")
    for path, message in (
        (tmp_path / "none", "no such file of reference"),
        (tmp_path / "rubbish", "not a readable"),
        (network_file, "not a file of reference statistics"),
    ):
        with pytest.raises(UserError, match=message):
            ReferenceStatistics.load(path)


def test_one_picture_is_no_reference(pictures, network_file):
    one = read_array_images(torch.zeros(1, 16, 16).byte().numpy(), None, (1, 16, 16), False, "one")
    with pytest.raises(UserError, match="at least 2 pictures"):
        make_reference(one, as_extractor(FeatureNetwork.load(network_file)))


def test_pixels_round_to_the_nearest_byte():
    levels = torch.arange(256)
    assert torch.equal(unit_to_bytes(levels / 255 + 0.0015), levels.byte())
    assert torch.equal(signed_to_bytes(levels / 127.5 - 1 - 0.003), levels.byte())
    assert unit_to_bytes(torch.tensor([-0.5, 1.5])).tolist() == [0, 255]
