"""The order of conditions and images is a function of (seed, position)."""

from __future__ import annotations

import pytest

from stepdistill.data.order import Order


def test_every_epoch_is_another_permutation():
    order = Order(11, 5)
    epochs = [order.indices(11 * e, 11) for e in range(4)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 16, 40])
def test_any_slicing_gives_the_same_sequence(cut):
    whole = Order(7, 3).indices(0, 40)
    order = Order(7, 3)
    assert [i for at in range(0, 40, cut) for i in order.indices(at, min(cut, 40 - at))] == whole


def test_no_epoch_of_one_seed_is_an_epoch_of_another():
    """Seed s at epoch e + 1 is not seed s + 1 at epoch e, as a sum of both would have it."""
    epochs = {(seed, epoch): tuple(Order(50, seed).indices(50 * epoch, 50)) for seed in range(5) for epoch in range(5)}
    assert len(set(epochs.values())) == 25


def test_order_is_a_function_of_seed_and_position():
    order = Order(10, 1)
    late = order.indices(95, 20)
    order.indices(0, 5)
    assert order.indices(95, 20) == late == Order(10, 1).indices(95, 20)
    assert Order(10, 2).indices(95, 20) != late
