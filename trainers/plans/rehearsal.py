"""What a dry run takes, the run takes: everything that a config names is loaded or looked at, one update is tried on
two samples, and the untouched student is exported as the trained one will be, before anything is trained.

Small networks (up to ``SMALL`` parameters) are rehearsed in full, in a temporary folder: the run's own trainer on a few
conditions and pictures makes one update; the student is written, loaded by stock diffusers and called, and its pictures
are compared with the sampler's.  Of larger ones nothing of their size is built or written: the files that their roles
start from are read, the scheduler's timesteps are set, pipeline and model card are made in memory.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stepdistill import checkpoint
from stepdistill.data.router import Router
from stepdistill.errors import UserError
from stepdistill.eval.run_evaluation import MeasuredRun
from stepdistill.eval.stock_pipeline import StockPipeline
from stepdistill.families.base import Family
from stepdistill.pipelines import export_student
from stepdistill.pipelines.export import model_card
from stepdistill.roles.lora import read_lora
from stepdistill.roles.role import Role
from stepdistill.roles.settings import RolesSettings
from stepdistill.sampler import FewStepSampler
from stepdistill.trainers.loop.trainer import Trainer

from .build import Fit, build_trainer, check_fit, provenance
from .job import Job
from .prepare import Prepared

SMALL = 100_000_000
"""Parameters of a teacher up to which a run is rehearsed in full."""
FEW = 8
"""Conditions and pictures that a rehearsal uses."""
TOLERANCE = 2e-3
"""How far a picture of the exported student may be from the sampler's, of a range of 1, in float32."""
STARTS = ("student_from", "fake_score_from", "lora_from", "lora_under")
"""Keys of ``roles`` that name weights."""


def rehearse(prepared: Prepared, router: Router | None = None, waits: bool = False) -> Fit:
    """Everything that a run would load and do first, on a teacher that nothing else will use.

    Args:
        prepared: the run, its teacher and its sampler.
        router: of several students, in place of the one in the file.
        waits: the weights that ``roles`` names are made by an earlier stage, which has not run.

    Returns:
        What the run trains on, in full.

    Raises:
        UserError: the run would not get to its end.
    """
    job, family, sampler = prepared.job, prepared.family, prepared.sampler
    fit = check_fit(job, family, router)
    if not waits:
        check_starts(job.config.roles, family)
    if count_parameters(family) > SMALL:
        check_export(job, family, sampler)
        return fit
    with tempfile.TemporaryDirectory() as folder, _random_state_restored():
        trainer = build_trainer(_shorten(job, folder, waits), None, family=family, fit=_first_few(fit), sampler=sampler)
        if not job.needs.teacher_pairs:  # they are the run's first work
            trainer.iteration()
            _check_finite(trainer)
        try_export(job, trainer, Path(folder) / "student")
    return fit


def count_parameters(family: Family) -> int:
    return sum(p.numel() for p in family.network.parameters())


@contextlib.contextmanager
def _random_state_restored() -> Iterator[None]:
    """Random state and bars as if nothing had been done."""
    with torch.random.fork_rng(), contextlib.redirect_stderr(io.StringIO()):
        yield


def _shorten(job: Job, folder: str, waits: bool) -> Job:
    """The job on two samples, writing to ``folder``."""
    config = job.config
    train = config.train.model_copy(update={"batch_size": min(2, config.train.batch_size), "gradient_accumulation": 1})
    roles = config.roles.model_copy(update=dict.fromkeys(STARTS)) if waits else config.roles
    short = config.model_copy(update={"output": folder, "train": train, "roles": roles})
    return replace(job, config=short, cache=Path(folder))


def _first_few(fit: Fit) -> Fit:
    images = fit.images
    if images is not None:
        usable = [index for index in fit.subset or range(len(images)) if index not in images.unreadable]
        images = images.subset(usable[:FEW])
    return replace(fit, items=fit.items[:FEW], all_items=fit.items[:FEW], images=images, subset=None)


def _check_finite(trainer: Trainer) -> None:
    skipped = [role for role, count in trainer.skipped.items() if count]
    if skipped:
        advice = trainer.advice(skipped[0])
        raise UserError(
            f"a first update of the {skipped[0]} on two samples has gradients that are not finite; {advice}"
        )


# -- what the config names ---------------------------------------------------------------------------------


def check_starts(roles: RolesSettings, family: Family) -> None:
    """Refuse weights named in ``roles`` that are missing or do not fit the teacher.

    Raises:
        UserError: one of them.
    """
    if roles.student_from is not None and roles.network is None:
        family.read_weights(roles.student_from)
    modules = {name for name, _ in family.network.named_modules()}
    for key in ("lora_from", "lora_under"):
        path = getattr(roles, key)
        if path is None:
            continue
        odd = sorted(read_lora(path, f"roles.{key}").factors.keys() - modules)
        if odd:
            raise UserError(f"roles.{key} = {path}: it is not a LoRA for this teacher (no module {odd[0]})")
    if roles.fake_score_from is not None and checkpoint.latest(Path(roles.fake_score_from) / "checkpoints") is None:
        raise UserError(
            f"roles.fake_score_from = {roles.fake_score_from}: no whole checkpoint there; name the folder of a run "
            "with a fake score"
        )


# -- the export --------------------------------------------------------------------------------------------


def check_export(job: Job, family: Family, sampler: FewStepSampler) -> None:
    """The student's scheduler, pipeline and model card, made in memory.

    Raises:
        UserError: the stock scheduler does not give the sampler's timesteps.
    """
    scheduler = family.student_scheduler(sampler)
    check_timesteps(scheduler, sampler)
    facts = {"steps": sampler.steps, "version": "", "call": family.call(sampler)}
    pipeline = family.pipeline(family.network, scheduler)
    model_card("student", pipeline, facts)
    if job.config.roles.weights == "shared" and not _names_lora_targets(job, family):
        raise UserError("roles.lora.targets: the teacher has none of these modules; leave the key out")


def _names_lora_targets(job: Job, family: Family) -> bool:
    lora = job.config.roles.student_lora or job.config.roles.lora
    targets = lora.targets or family.lora_targets
    return isinstance(targets, str) or any(
        name == target or name.endswith(f".{target}")
        for name, _ in family.network.named_modules()
        for target in targets
    )


def check_timesteps(scheduler: Any, sampler: FewStepSampler) -> None:
    """Refuse a scheduler whose timesteps are not those that the student is trained at.

    Raises:
        UserError: they differ, or the scheduler refuses their number.
    """
    try:
        scheduler.set_timesteps(sampler.steps)
    except Exception as error:  # of diffusers, several kinds
        raise UserError(
            f"sampler.steps = {sampler.steps}: {type(scheduler).__name__} of the export refuses it ({error}); use fewer"
        ) from None
    times = torch.tensor(sampler.times, dtype=torch.float64)
    expected = sampler.schedule.network_time(times).double()
    actual = scheduler.timesteps.double().cpu()[: sampler.steps]
    if len(actual) != len(expected) or not torch.allclose(actual, expected, rtol=1e-4, atol=1e-3):
        raise UserError(
            f"sampler: {type(scheduler).__name__} of the export samples at {_list_times(actual)}, and the student "
            f"would be trained at {_list_times(expected)}; choose other steps, start or transition"
        )


def _list_times(times: torch.Tensor) -> str:
    return ", ".join(f"{t:g}" for t in times[:8].tolist())


_TRIED: set[str] = set()
"""What was tried already in this process: students that differ in their weights alone are tried once."""


def check_student(job: Job, trainer: Trainer) -> None:
    """The export of a run's student before its first update: in full for small networks, else in memory.

    Raises:
        UserError: it cannot be exported, or draws other pictures than it would be trained to.
    """
    if count_parameters(trainer.family) > SMALL:
        check_export(job, trainer.family, trainer.sampler)
        return
    with tempfile.TemporaryDirectory() as folder, _random_state_restored(), trainer.roles.meter.paused():
        try_export(job, trainer, Path(folder) / "student")


def _describe_student(trainer: Trainer) -> str:
    family, role = trainer.family, trainer.roles.student
    parts: list[Any] = [role.network, family.scheduler]
    configs = [dict(part.config) for part in parts]
    return json.dumps([*configs, family.name, repr(trainer.sampler), role.adapter, str(role.lora)], default=str)


def try_export(job: Job, trainer: Trainer, folder: Path) -> None:
    """Write the student as it is to ``folder``, load it by stock diffusers, call it, compare with the sampler.

    Raises:
        UserError: it cannot be written, loaded or called, or draws other pictures.
    """
    try_teacher(job, trainer.family)
    if (kind := _describe_student(trainer)) in _TRIED:
        return
    family, sampler, role = trainer.family, trainer.sampler, trainer.roles.student
    facts = provenance(job, trainer)
    export_student(family, role, sampler, folder, facts, also_steps=job.config.sampler.also_steps)
    stock = StockPipeline.load(folder, family.device)
    stock.path = "of the untouched student"
    check_timesteps(copy.deepcopy(stock.first.scheduler), sampler)
    items = (
        [trainer.parts.conditions.items[i % len(trainer.parts.conditions.items)] for i in range(2)]
        if trainer.parts.conditions.items
        else []
    )
    noise = torch.randn(2, *family.sample_shape, generator=torch.Generator().manual_seed(0))
    steps, guidance = sampler.steps, stock.default_guidance
    pixels = stock.generate(items or None, noise, steps, torch.Generator().manual_seed(1), guidance)
    expected = _sample_pictures(family, role, sampler, items, noise)
    difference = (pixels.to(expected) - expected).abs().max().item()
    exact = role.autocast_dtype is None and all(p.dtype == torch.float32 for p in family.network.parameters())
    if exact and difference > TOLERANCE:
        raise UserError(
            f"the untouched student, exported as {type(stock.first).__name__}, draws other pictures than it is trained "
            f"to ({difference:.2g} of a range of 1); this teacher's scheduler is not understood, please report it"
        )
    _TRIED.add(kind)


def try_teacher(job: Job, family: Family) -> None:
    """Draw one picture with the teacher as the evaluation will.

    Raises:
        UserError: stock diffusers cannot load or call it so.
    """
    if not job.config.evaluation.enabled:
        return
    measured = MeasuredRun.from_config(job.config, job.method.make_record(job.config))
    target = measured.list_targets(Path(job.config.output))[0]
    if (kind := str((target.path, target.steps, target.guidance_scale, target.null_label, target.variant))) in _TRIED:
        return
    stock = target.load(family.device)
    labels, noise = stock.labels[:1], torch.zeros(1, *stock.noise_shape)
    items = {"none": None, "label": labels, "prompt": [""]}[stock.condition_kind]
    generator = torch.Generator().manual_seed(0)
    stock.generate(items, noise, job.config.teacher.steps, generator, target.guidance_scale)
    _TRIED.add(kind)


@torch.no_grad()
def _sample_pictures(
    family: Family, role: Role, sampler: FewStepSampler, items: list, noise: torch.Tensor
) -> torch.Tensor:
    """The sampler's pictures (B, C, H, W) in [0, 1], the noise between steps drawn as the stock pipelines do."""
    generator = torch.Generator().manual_seed(1)
    condition = family.encode_conditions(items) if items else {}

    def draw(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    samples = sampler.sample(role, noise.to(family.device), condition, draw)
    return (family.decode(samples) + 1) / 2
