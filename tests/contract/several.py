"""Gathered students without a training: exported with weights of their own, their router beside them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from teacher_table import FAMILIES

from stepdistill.data.partition import PartitionSettings, make_router
from stepdistill.data.router import Router
from stepdistill.families import load_family
from stepdistill.families.base import Family
from stepdistill.families.calls import CONDITION_ARGUMENTS
from stepdistill.pipelines import export_student, export_students
from stepdistill.roles.roles import Roles
from stepdistill.roles.settings import RolesSettings
from stepdistill.sampler import FewStepSampler, few_step_times

LABELS = 6
PROMPTS = [
    f"{a} {b}" for a, b in product(["a cat", "big dogs", "my ship", "an owl"], ["in fog", "at sea", "by night", ""])
]


@dataclass
class Several:
    """A gathered folder, and what it was made of."""

    folder: Path
    family: Family
    students: list
    sampler: FewStepSampler
    router: Router

    def route(self, items: list) -> list[int]:
        return self.router.route(items, lambda prompts: self.family.prompt_encoder(prompts)[1])

    def sample(self, items: list, noise: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        """Our sampler on each sample by itself, with the student of its condition: pixels in [0, 1]."""
        drawn = []
        for item, k, start, seed in zip(items, self.route(items), noise, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            draw = lambda like, fixed=generator: torch.randn(like.shape, generator=fixed)  # noqa: E731
            condition = self.family.encode_conditions([item])
            with torch.no_grad():
                drawn.append(self.sampler.sample(self.students[k], start[None], condition, draw))
        return (self.family.decode(torch.cat(drawn)) + 1) / 2


def gathered(root: Path, name: str, kind: str, steps: int, count: int, transition: str = "renoise") -> Several:
    """``count`` students of a tiny teacher with the scheduler ``kind``: of labels, or of prompts where it is SD's."""
    if kind.startswith("sd_"):
        return gathered_of(root, name, ("stable_diffusion", kind, "prompt", steps, None, transition, "full"), count)
    return gathered_of(root, name, ("unet2d", kind, LABELS, steps, None, transition, "full"), count, size=16)


def gathered_of(root: Path, name: str, case: tuple, count: int, **network) -> Several:
    """``count`` students of the teacher of one of test_export's cases; ``network``: arguments of a pixel network."""
    family_name, kind, conditions, steps, _, transition, _ = case
    family = load_family(str(FAMILIES[family_name](root / f"{name}-teacher", kind, conditions, **network)))
    settings = {"partition": "medians"} if family.condition_kind == "prompt" else {}
    items = PROMPTS if family.condition_kind == "prompt" else list(family.labels)
    encoder = family.prompt_encoder if family.condition_kind == "prompt" else None
    router = make_router(PartitionSettings(students=count, **settings), items, family.condition_kind, encoder)
    sampler = FewStepSampler(family.schedule, few_step_times(family.schedule, steps), transition)
    students, folders = [], []
    for k in range(count):
        student = Roles(family, RolesSettings(), fake_score=False).student
        generator = torch.Generator().manual_seed(k)
        with torch.no_grad():
            for parameter in student.parameters().values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        facts = {"method": "test", "teacher": "tiny", "msd": {"router": router.hash, "student": k}}
        folders.append(export_student(family, student, sampler, root / f"{name}-alone" / str(k), facts))
        students.append(student)
    return Several(export_students(folders, router, root / name), family, students, sampler, router)


def conditioned(several: Several, items: list) -> dict:
    """The arguments of the gathered pipeline's call that say what is drawn."""
    return {CONDITION_ARGUMENTS[several.family.condition_kind]: items}
