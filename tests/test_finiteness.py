"""What is not finite is seen in any dtype and shape, and named by what came first."""

import math

import pytest
import tiny
import torch

from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.finiteness import Watch, finite_rows, first_not_finite, is_finite

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_one_element_that_is_not_finite_are_seen(dtype, value):
    values = torch.randn(4, 2, 3, 3).to(dtype)
    values[1, 1, 2, 0] = value
    assert finite_rows(values).tolist() == [True, False, True, True]
    assert not is_finite(values)
    assert is_finite(values[2:])


def test_large_finite_numbers_are_finite():
    values = torch.full((1000,), torch.finfo(torch.float32).max)  # their sum is not
    assert is_finite(values)


@pytest.mark.parametrize("values", [torch.zeros(3, 0), torch.arange(3), torch.tensor([True, False, True])])
def test_what_cannot_be_infinite_is_finite(values):
    assert finite_rows(values).tolist() == [True, True, True]


def test_scalars_and_vectors_have_rows_too():
    assert finite_rows(torch.tensor([1.0, math.nan])).tolist() == [True, False]
    assert not is_finite(torch.tensor(math.inf))
    assert first_not_finite([("a", torch.tensor(1.0)), ("b", torch.tensor(math.nan))]) == "b"
    assert first_not_finite([("a", torch.tensor(1.0))]) is None


def test_the_first_that_is_not_finite_is_the_cause_and_says_when():
    watch, bad = Watch(), torch.full((3, 2), math.nan)
    watch.note("student", torch.zeros(3, 2), torch.tensor([1, 2, 3]))
    assert watch.first() is None
    watch.note("teacher", bad.where(torch.tensor([[True], [False], [True]]), 0), torch.tensor([700, 3, 999]))
    watch.note("fake_score", bad, torch.tensor([5, 5, 5]))
    cause = watch.first()
    assert (cause.name, cause.timesteps, cause.when) == ("teacher", (700.0, 999.0), " at timesteps 700 to 999")
    watch.clear()
    watch.note("real data", bad)
    assert (watch.first().name, watch.first().when) == ("real data", "")


def test_a_note_keeps_no_graph():
    values = torch.ones(2, 2, requires_grad=True)
    watch = Watch()
    watch.note("student", values * 2)
    assert not any(flags.requires_grad for _, flags, _ in watch._notes)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_teacher_with_weights_that_are_not_finite_is_refused_by_the_tensors_name(part, tmp_path):
    from diffusers import StableDiffusionPipeline

    folder = tiny.save_stable_diffusion(tmp_path / "teacher")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    name, parameter = list(getattr(pipeline, part).named_parameters())[3]
    with torch.no_grad():
        parameter.view(-1)[0] = math.nan
    pipeline.save_pretrained(folder)
    with pytest.raises(
        UserError, match=rf"^teacher {folder}: its {part} has weights that are not finite \({name} holds"
    ):
        load_family(str(folder))
