"""Draws do not depend on how many processes share the work."""

from __future__ import annotations

import pytest
import torch

from stepdistill.noise import Noise

DRAWS = {
    "randn": lambda noise, count: noise.randn(count, 2, 3),
    "randn_float64": lambda noise, count: noise.randn(count, 2, dtype=torch.float64),
    "randn_like": lambda noise, count: noise.randn_like(torch.zeros(count, 5)),
    "randn_like_float64": lambda noise, count: noise.randn_like(torch.zeros(count, 5, dtype=torch.float64)),
    "randint": lambda noise, count: noise.randint(3, 17, count),
    "uniform": lambda noise, count: noise.uniform(count),
}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", DRAWS)
def test_the_processes_rows_together_are_the_single_process_draw(name, world):
    draw, single = DRAWS[name], Noise(7)
    ranks = [Noise(7, rank=rank, world=world) for rank in range(world)]
    for _ in range(3):  # in step, however often
        whole = draw(single, 8)
        parts = [draw(noise, 8 // world) for noise in ranks]
        assert torch.equal(torch.cat(parts), whole)
    assert whole.unique().numel() > 1


@pytest.mark.parametrize("world", [2, 4])
def test_shared_draws_are_equal_on_all_ranks_and_keep_them_in_step(world):
    ranks = [Noise(3, rank=rank, world=world) for rank in range(world)]
    integers = [[noise.shared_randint(0, 9) for noise in ranks] for _ in range(20)]
    floats = [[noise.shared_uniform() for noise in ranks] for _ in range(20)]
    assert all(len(set(row)) == 1 for row in [*integers, *floats])
    assert len({row[0] for row in integers}) > 1
    assert len({row[0] for row in floats}) == 20
    single = Noise(3)
    for _ in range(20):
        single.shared_randint(0, 9)
    for _ in range(20):
        single.shared_uniform()
    assert torch.equal(torch.cat([noise.randn(1, 4) for noise in ranks]), single.randn(world, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_noise_like_a_sample_has_its_shape_and_dtype(dtype):
    drawn = Noise(5).randn_like(torch.zeros(400, 5, dtype=dtype))
    assert drawn.dtype == dtype
    assert drawn.shape == (400, 5)
    assert drawn.float().std().item() == pytest.approx(1, abs=0.05)


def test_ranges_include_both_ends():
    noise = Noise(0)
    assert set(noise.randint(2, 5, 400).tolist()) == {2, 3, 4, 5}
    assert {noise.shared_randint(2, 5) for _ in range(200)} == {2, 3, 4, 5}
    drawn = noise.uniform(1000)
    assert 0 <= drawn.min() < 0.02 < 0.98 < drawn.max() < 1


def test_a_choice_of_one_draws_nothing():
    noise = Noise(0)
    before = noise.get_state()
    assert noise.shared_randint(4, 4) == 4
    assert torch.equal(noise.get_state(), before)


def test_state_round_trip_repeats_the_draws():
    noise = Noise(11)
    noise.randn(5)
    state = noise.get_state().clone()
    first = (noise.randn(3, 2), noise.randint(0, 99, 6), noise.shared_uniform())
    other = Noise(12)
    other.set_state(state)
    again = (other.randn(3, 2), other.randint(0, 99, 6), other.shared_uniform())
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert first[2] == again[2]


def test_other_seeds_give_other_draws_and_torchs_own_generator_is_untouched():
    before = torch.get_rng_state()
    assert not torch.equal(Noise(0).randn(4), Noise(1).randn(4))
    assert torch.equal(torch.get_rng_state(), before)
