"""Every row of the table of teachers: what it says of itself is so, and its exported students are our sampler."""

from __future__ import annotations

from dataclasses import replace

import pytest
import several
import torch
from teacher_table import TEACHERS
from test_export import build

from stepdistill.errors import UserError
from stepdistill.eval.stock_pipeline import StockPipeline
from stepdistill.families import load_family
from stepdistill.pipelines import MSDPipeline, export_student
from stepdistill.sampler import FewStepSampler, few_step_times

TRANSITIONS = ("renoise", "ode", "tcd", "ancestral")
ITEMS = {"label": [2, 0], "prompt": ["a cat", "two dogs"]}
STEPS = [(name, 1, TEACHERS[name].transitions[0]) for name in TEACHERS]
STEPS += [(name, 4, transition) for name, row in TEACHERS.items() for transition in row.transitions]


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    dtypes = {name: row.sections.get("teacher", {}).get("dtype", "float32") for name, row in TEACHERS.items()}
    return {
        name: load_family(str(row.save(root / name)), dtype=getattr(torch, dtypes[name]))
        for name, row in TEACHERS.items()
    }


@pytest.mark.parametrize("name", TEACHERS)
def test_a_row_says_what_its_teacher_is(name, families):
    row, family = TEACHERS[name], families[name]
    assert (family.name, family.has_null) == (row.family, row.has_null)
    smaller = family.altered_network(row.small)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in family.network.parameters())


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_expresses_the_transitions_of_its_row_and_no_others(name, transition, families):
    family = families[name]

    def schedule() -> None:
        family.student_scheduler(FewStepSampler(family.schedule, few_step_times(family.schedule, 4), transition))

    if transition in TEACHERS[name].transitions:
        schedule()
    else:
        with pytest.raises(UserError, match=f"sampler.transition = {transition}"):
            schedule()


@pytest.mark.parametrize(("name", "steps", "transition"), STEPS)
@torch.no_grad()
def test_what_is_evaluated_is_our_sampler(name, steps, transition, tmp_path):
    """The exported student as an evaluation calls it, against the sampler that it was trained with."""
    case = (*TEACHERS[name].export_case(steps)[:5], transition, "full")
    family, roles, sampler = build(case, tmp_path / "teacher")
    sampler = replace(sampler, eta=0.3)
    stock = StockPipeline.load(export_student(family, roles.student, sampler, tmp_path / "student", {}))
    assert stock.noise_shape == family.sample_shape
    items, noise = ITEMS[stock.condition_kind], torch.randn(2, *family.sample_shape)
    seeded = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    pixels = stock.generate(items, noise, steps, seeded(), stock.default_guidance)
    generator = seeded()
    draw = lambda like: torch.randn(like.shape, generator=generator)  # noqa: E731
    samples = sampler.sample(roles.student, noise, family.encode_conditions(items), draw)
    torch.testing.assert_close(pixels, (family.decode(samples) + 1) / 2, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", TEACHERS)
def test_several_students_draw_as_our_sampler(name, tmp_path):
    created = several.gathered_of(tmp_path, "several", TEACHERS[name].export_case(1), 2)
    items = several.PROMPTS[:4] if created.family.condition_kind == "prompt" else [2, 0, 1, 1]
    noise = torch.randn(4, *created.family.sample_shape)
    pipe = MSDPipeline.from_pretrained(created.folder)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(**several.conditioned(created, items), latents=noise, output_type="pt").images
    torch.testing.assert_close(drawn, created.sample(items, noise, [0] * 4), rtol=0, atol=5e-5)
    assert {0, 1} == set(created.route(items)) or created.family.condition_kind == "prompt"
