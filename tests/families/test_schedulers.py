"""The exported scheduler has the teacher's own table, whatever its betas are called."""

from __future__ import annotations

import inspect
import warnings
from types import SimpleNamespace

import console
import diffusers
import pytest
import tiny
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from stepdistill.families.schedulers import betas_of, betas_with_product, student_scheduler
from stepdistill.sampler import FewStepSampler, few_step_times
from stepdistill.schedule import from_scheduler

BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp")
TAKEN = {"renoise": (1, 4), "ode": (1, 4), "tcd": (1, 4), "ancestral": (1, 4)}


def teachers_schedulers():
    """Every scheduler of the installed diffusers with a table of alphas, with each beta schedule that it takes."""
    cases = {}
    for name in sorted(n for n in dir(diffusers) if n.endswith("Scheduler")):
        kind = getattr(diffusers, name)
        try:
            taken = inspect.signature(kind.__init__).parameters
        except ImportError:  # of a package that is not installed
            continue
        for betas in BETAS if "beta_schedule" in taken else ():
            try:
                with warnings.catch_warnings(action="ignore"):
                    scheduler = kind(beta_schedule=betas)
            except (NotImplementedError, ValueError, ImportError):
                continue
            if hasattr(scheduler, "alphas_cumprod"):
                cases[f"{name}-{betas}"] = scheduler
    return cases


CASES = teachers_schedulers()


def family_of(scheduler):
    schedule, kind = from_scheduler(scheduler)
    return SimpleNamespace(scheduler=scheduler, schedule=schedule, kind=kind, passes_eta=True)


def test_the_names_that_only_some_schedulers_know_are_among_them():
    assert {"DDPMScheduler-sigmoid", "DDPMScheduler-laplace", "HeunDiscreteScheduler-exp"} <= CASES.keys()
    assert len(CASES) > 60


@pytest.mark.parametrize("name", CASES)
def test_the_students_table_is_the_teachers(name):
    family = family_of(CASES[name])
    table = family.schedule.alphas_cumprod
    for transition, counts in TAKEN.items():
        for steps in counts:
            for start in (None, 399):
                times = few_step_times(family.schedule, steps, start)
                scheduler = student_scheduler(family, FewStepSampler(family.schedule, times, transition))
                ours = scheduler.alphas_cumprod.double()
                assert len(ours) == times[0] + 1
                if name.startswith("CogVideoX"):  # its table is of no betas: shifted afterwards
                    torch.testing.assert_close(ours, table[: len(ours)], rtol=1e-4, atol=0)
                else:
                    assert torch.equal(ours, table[: len(ours)])


@pytest.mark.parametrize("table", [(0.9, 0.5, 0.01, 1e-6, 2.4e-9), (0.99, 0.3, 0.0)])
def test_betas_of_a_table_are_exact_to_their_rounding(table):
    betas = torch.tensor(betas_of(torch.tensor(table, dtype=torch.float64)), dtype=torch.float32)
    torch.testing.assert_close((1 - betas).cumprod(0).double(), torch.tensor(table).double(), rtol=3e-4, atol=0)


@pytest.mark.parametrize("count", [2, 3, 41, 200])
@pytest.mark.parametrize("product", [2.4287349909002387e-09, 6e-10, 4e-5, 0.0047, 0.5, 0.0])
def test_few_betas_keep_a_tiny_product(product, count):
    """Two even ones alone were 1e-3 off at a cosine schedule's 2.4e-9."""
    betas = torch.tensor(betas_with_product(product, count), dtype=torch.float32)
    assert len(betas) == count
    assert ((betas >= 0) & (betas <= 1)).all()
    assert float((1 - betas).cumprod(0)[-1]) == pytest.approx(product, rel=4e-6)


@pytest.mark.slow
def test_a_teacher_with_betas_of_its_own_runs_to_its_end(tmp_path):
    """Dry run, training, export and evaluation; before, the export failed for good."""
    betas = "sigmoid"
    DDPMPipeline(tiny.unet(), DDPMScheduler(beta_schedule=betas)).save_pretrained(tmp_path / "teacher")
    (tmp_path / "config.yaml").write_text(f"""
method: dmd2
output: {tmp_path / "run"}
teacher: {{path: {tmp_path / "teacher"}, steps: 3}}
train: {{updates: 1, batch_size: 2, sample_count: 2, trackers: []}}
""")
    for options in (["--dry-run"], []):
        done = console.stepdistill("distill", tmp_path / "config.yaml", *options)
        assert done.code == 0, done.err
    student = diffusers.LCMScheduler.from_pretrained(tmp_path / "run" / "student", subfolder="scheduler")
    assert torch.equal(student.alphas_cumprod, DDPMScheduler(beta_schedule=betas).alphas_cumprod)
    assert (tmp_path / "run" / "grid.png").is_file()
