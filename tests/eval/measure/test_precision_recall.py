"""Precision, recall and diversity against loops that do what the equations say, one pair at a time."""

import math

import pytest
import torch

from stepdistill.errors import UserError
from stepdistill.eval.measure import precision_recall as manifold
from stepdistill.eval.measure.precision_recall import diversity, precision_recall


def by_hand(real, fake, k):
    """Kynkäänniemi et al., eq. 1 and 2, in Python's own numbers."""

    def distance(a, b):
        return math.dist(a.tolist(), b.tolist())

    def radius(points, i):
        return sorted(distance(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    def share(points, around):
        radii = [radius(around, i) for i in range(len(around))]
        inside = [any(distance(p, around[i]) <= radii[i] for i in range(len(around))) for p in points]
        return sum(inside) / len(points)

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block", [7, 1000])
def test_precision_and_recall_are_the_equations(k, block):
    generator = torch.Generator().manual_seed(k)
    real = torch.randn(40, 5, generator=generator)
    fake = 0.5 * torch.randn(40, 5, generator=generator) + 0.3
    expected = by_hand(real, fake, k)
    assert precision_recall(real, fake, k, block=block) == expected
    assert 0 < expected[1] < expected[0]  # narrower than the data: precise, and with gaps


def test_a_point_on_the_edge_is_inside():
    """On integers nothing rounds: a ball's own radius counts, and a copy of a point is a neighbour at distance 0."""
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randint(0, 6, (2, 30, 2), generator=generator).float()
    assert precision_recall(real, fake, 3) == by_hand(real, fake, 3)
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert precision_recall(line, torch.tensor([[4.0], [5.0], [40.0], [41.0]]), 1) == (0.25, 0.25)


def test_far_from_the_origin_and_in_half_precision_nothing_is_lost():
    generator = torch.Generator().manual_seed(1)
    real, fake = (torch.randn(2, 50, 3, generator=generator, dtype=torch.float64)).half()
    assert precision_recall(real, fake) == precision_recall(real.double() + 2**20, fake.double() + 2**20)


def test_sizes_are_made_equal_and_too_few_are_refused():
    generator = torch.Generator().manual_seed(2)
    real, fake = torch.randn(20, 2, generator=generator), torch.randn(50, 2, generator=generator)
    assert precision_recall(real, fake) == precision_recall(real, fake[:20])
    assert precision_recall(fake, real) == precision_recall(fake[:20], real)
    with pytest.raises(UserError, match="0 reference features and 50 pictures"):
        precision_recall(real[:0], fake)


def test_diversity_is_the_mean_distance_within_conditions(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(9, 4, generator=generator)
    conditions = ["a", "b", "a", "c", "b", "a", "a", "b", "b"]
    means = []
    for name in "ab":  # c has one picture
        rows = [features[i] for i, condition in enumerate(conditions) if condition == name]
        pairs = [float((x - y).norm()) for i, x in enumerate(rows) for y in rows[i + 1 :]]
        means.append(sum(pairs) / len(pairs))
    assert diversity(features, conditions) == pytest.approx(sum(means) / 2, rel=1e-6)
    assert diversity(features, range(9)) is None
    monkeypatch.setattr(manifold, "MOST_OF_A_CONDITION", 3)
    assert diversity(features, [0] * 9) == diversity(features[:3], [0] * 3)


def test_copies_have_no_diversity():
    features = torch.randn(1, 6, generator=torch.Generator().manual_seed(4)).expand(5, -1)
    assert diversity(features, [1] * 5) == 0
