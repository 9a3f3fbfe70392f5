"""From a config to a trainer that is ready to run: everything between the command line and the loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from stepdistill import assets, checkpoint
from stepdistill.attention.kernels import NATIVE
from stepdistill.conditions import label_ranges, quote_line
from stepdistill.data.images import ImageSet
from stepdistill.data.latents import check_posterior, load_latents
from stepdistill.data.preference_pairs import read_preferences
from stepdistill.data.prompts import content_notes
from stepdistill.data.router import Router
from stepdistill.data.sources import load_images, load_prompts
from stepdistill.data.streams import ConditionSource, PairSource, PreferenceSource, RealSource
from stepdistill.data.teacher_pairs import PairPlan, PairSet, make_pairs
from stepdistill.devices import DTYPES
from stepdistill.digests import digest_networks
from stepdistill.errors import UserError, first_line
from stepdistill.eval.extractors.load import load_extractor
from stepdistill.eval.measure.reference_statistics import ReferenceStatistics
from stepdistill.families import load_family
from stepdistill.families.base import Family
from stepdistill.judges.load import load_clip
from stepdistill.judges.lpips import load_lpips
from stepdistill.judges.perception import load_perceptual
from stepdistill.judges.rewards import check_models, load_rewards
from stepdistill.roles.recorded import NodeStore
from stepdistill.roles.roles import Roles
from stepdistill.run import CACHE, RunFolder
from stepdistill.sampler import FewStepSampler, SignalSampler
from stepdistill.settings import RunSettings
from stepdistill.trainers.loop.ranks import on_main
from stepdistill.trainers.loop.trainer import Trainer
from stepdistill.trainers.methods.base import Parts, Shares

from .job import Job

PROMPTS_MEASURED = 100_000
"""Prompts whose length is looked at before a run."""


def condition_items(
    config: RunSettings, family: Family, notes: list[str] | None = None, images: ImageSet | None = None
) -> list:
    """The labels or prompts that the student is trained on.

    Args:
        notes: gets a line on each thing that a user should know of the prompts.
        images: the config's real images, where they are read already.

    Raises:
        UserError: labels out of range, no prompts for a text-conditional teacher, prompts for another.
    """
    settings = config.data
    if family.condition_kind == "prompt":
        if settings.labels != "all":
            raise UserError(f"data.labels: the teacher {config.teacher.path} takes prompts; remove the key")
        prompts = load_prompts(settings, notes, images)
        if prompts is None:
            raise UserError(
                "data: this teacher takes prompts; set data.prompts (a file), data.prompt_dataset or "
                "data.prompts_from_images"
            )
        return prompts
    for key in ("prompts", "prompt_dataset", "prompts_from_images", "shown"):
        if getattr(settings, key):
            raise UserError(f"data.{key}: the teacher {config.teacher.path} takes no prompts; remove the key")
    if family.condition_kind == "none":
        if settings.labels != "all":
            raise UserError(f"data.labels: the teacher {config.teacher.path} takes no labels; remove the key")
        return []
    labels = list(family.labels) if settings.labels == "all" else settings.labels
    for label in labels:
        if label not in family.labels:
            known = label_ranges(family.labels)
            raise UserError(f"data.labels: {label} is outside {known}, the labels of the teacher's classes")
    return labels


def check_named(job: Job, family: Family) -> None:
    """Refuse rewards and CLIP models of the method's sections that are not on this machine; your own are tried.

    Raises:
        UserError: one is missing, or is none.
    """
    items = {"none": [], "label": [*family.labels[:1]] * 2, "prompt": ["a picture"] * 2}[family.condition_kind]
    for name in job.sections:
        check_models(getattr(job.config, name), family.image_shape, items)


def check_judge(config: RunSettings, family: Family) -> None:
    """Refuse an extractor and reference that could not measure this teacher's pictures.

    Raises:
        UserError: they are missing, or do not fit each other or the pictures.
    """
    settings = config.evaluation
    if settings.enabled and settings.extractor is not None:
        reference = ReferenceStatistics.load(assets.resolve(settings.reference))
        extractor = load_extractor(settings.extractor, "cpu")
        reference.check(extractor, family.image_shape)
        extractor(torch.zeros(2, *family.image_shape, dtype=torch.uint8))


def check_teacher_steps(job: Job, family: Family) -> None:
    """Refuse numbers of the teacher's steps that its schedule, or its stock scheduler, does not have.

    Raises:
        UserError: one that is used is too high.
    """
    config, scheduler = job.config, family.scheduler
    tunes = job.method.make_record(config).baseline == "untuned"  # a model of few steps, which is no teacher of many
    if tunes or not (config.evaluation.enabled or job.needs.teacher_pairs):
        return
    evaluated = config.evaluation.teacher_steps if config.evaluation.enabled else []
    for key, steps in [("teacher.steps", config.teacher.steps), *(("evaluation.teacher_steps", n) for n in evaluated)]:
        levels = family.schedule.num_levels
        if steps > levels:
            raise UserError(f"{key} = {steps}: more than the {levels} timesteps of the teacher; set {levels} or fewer")
        try:
            type(scheduler).from_config(scheduler.config).set_timesteps(steps)
        except Exception as error:  # each scheduler has its own words
            name, reason = type(scheduler).__name__, first_line(error)
            raise UserError(f"{key} = {steps}: the teacher's {name} does not take so many ({reason})") from None


FAINT = 1e-3
"""An alpha below which x0, read off eps, is mostly the network's error; Stable Diffusion's last one is 0.068."""
CLEAR = 0.05
"""An alpha to start at in place of a faint one."""


def teacher_notes(family: Family, sampler: FewStepSampler) -> list[str]:
    """What a user should know of the teacher before a run, a line each."""
    notes = []
    if not family.knows_null:
        count = len(family.labels)
        notes.append(
            f"the teacher's folder does not say which label is the null one, so all {count} are taken for classes; if "
            f"one stands for no class (often the last, {count - 1}, as of ImageNet's 1001), set teacher.null_label"
        )
    if family.kind == "eps":
        alphas, _ = family.schedule.alpha_sigma(family.schedule.level(torch.arange(family.schedule.num_levels)))
        signal = isinstance(sampler, SignalSampler)
        alpha = alphas[-1 if signal else int(sampler.times[0])].item()
        clear = int((alphas >= CLEAR).sum()) - 1
        remedy = f"; with sampler.start={clear} it is {1 / CLEAR:.0f} times" if clear > 0 and not signal else ""
        if alpha < FAINT:
            notes.append(
                f"the teacher predicts eps, and alpha is {alpha:.2g} where the student starts: an error of its eps is "
                f"{1 / alpha:,.0f} times as large in x0{remedy}"
            )
    return notes


@dataclass(frozen=True)
class Fit:
    """What a job trains on: its condition items (of all students: ``all_items``), its real images and which of them,
    the hash of the router that gave it its part, and what a user should know of the prompts and of the method's own
    data."""

    items: list
    all_items: list
    images: ImageSet | None = None
    subset: list[int] | None = None
    router: str | None = None
    notes: tuple[str, ...] = ()
    method_lines: tuple[str, ...] = ()

    def lines(self, family: Family) -> list[str]:
        """What is trained on, a line each: the first prompts, how many are cut, the images, and notes on both."""
        lines = []
        if family.condition_kind == "prompt":
            shown = ", ".join(quote_line(item) for item in self.items[:3])
            lines += [f"{len(self.items):,} prompts: {shown}", *self.notes, *content_notes(self.items)]
            lines += _cut(family, self.items, "prompts")
        if self.images is not None:
            lines += [f"images {self.images.source}: {self.images.described}", *self.images.notes]
            lines += self.images.skipped_note
            if family.condition_kind == "prompt":
                lines += _cut(family, [label for label in self.images.labels if label], "captions")
        return [*lines, *self.method_lines]


def _cut(family: Family, texts: list[str], what: str) -> list[str]:
    """A line on texts that the teacher's encoder does not read to their end, where there are any."""
    cut = family.prompts_cut(texts[:PROMPTS_MEASURED])
    if not cut:
        return []
    of = f" of the first {PROMPTS_MEASURED:,}" if len(texts) > PROMPTS_MEASURED else ""
    return [f"{len(cut):,} {what}{of} are longer than the text encoder reads, and are cut: {quote_line(texts[cut[0]])}"]


def check_fit(job: Job, family: Family, router: Router | None = None) -> Fit:
    """The condition items and real images of a job, once they and its settings are known to fit the teacher.

    Args:
        router: of several students, in place of the one in the file.

    Raises:
        UserError: they do not.  Nothing has been written then.
    """
    config, needs = job.config, job.needs
    if needs.null_condition:
        family.null_condition(1)
    if config.roles.network is not None:
        with torch.device("meta"):
            family.altered_network(config.roles.network)
    method_lines = job.method.check(config, family)
    items, images, notes, captions = [], None, [], config.data.prompts_from_images
    if not captions:
        items = condition_items(config, family, notes)
    if needs.images:
        check_posterior(config.data.images.posterior, "data.images.posterior", family)
        images = load_images(config.data.images, family.image_shape, family.conditions)
    if captions:
        items = condition_items(config, family, notes, images)
    subset = None if images is None else images.usable
    fit = Fit(items, items, images, subset, None, tuple(notes), tuple(method_lines))
    if config.data.part is None:
        return fit
    return _part(job, family, fit, router or Router.load(Path(config.data.part.router)))


def _part(job: Job, family: Family, fit: Fit, router: Router) -> Fit:
    """One student's share of items and images; images of conditions that no student draws are left out."""
    part = job.config.data.part
    if part.student >= router.students:
        raise UserError(f"data.part.student = {part.student}: {part.router} has students 0..{router.students - 1}")
    encoder = None
    if router.encoder is not None:
        encoder = family.prompt_encoder
        if encoder.fingerprint != router.encoder:
            raise UserError(f"{part.router}: made with another text encoder or tokenizer; make it anew in a new folder")

    def of_part(values: list) -> list[int]:
        if router.kind == "labels":
            labels = set(router.parameters["labels"][part.student])
            return [index for index, value in enumerate(values) if value in labels]
        folder = Path(part.router).parent / CACHE
        routes = router.route_cached(values, lambda prompts: encoder(prompts)[1], folder)
        return [index for index, route in enumerate(routes) if route == part.student]

    items, images, subset = fit.items, fit.images, fit.subset
    part_items = [items[index] for index in of_part(items)]
    if not part_items:
        raise UserError(f"msd: none of the run's conditions is of student {part.student}; use fewer students")
    if images is not None and job.needs.divides_images:
        usable = range(len(images)) if subset is None else subset
        subset = [usable[index] for index in of_part([images.labels[index] for index in usable])]
        if not subset:
            raise UserError(f"data.images: none of its images is of student {part.student}'s conditions; add some")
    return replace(fit, items=part_items, subset=subset, router=router.hash)


def make_accelerator(**arguments: Any) -> Accelerator:
    """Device and processes: CUDA where there is one, else the CPU (schedules need float64, which MPS lacks)."""
    return Accelerator(cpu=not torch.cuda.is_available(), **arguments)


def load_teacher(config: RunSettings) -> Family:
    """The config's teacher, frozen."""
    teacher = config.teacher
    return load_family(
        assets.resolve(teacher.path),
        teacher.family,
        teacher.revision,
        teacher.variant,
        DTYPES[teacher.dtype],
        teacher.null_label,
    )


def build_trainer(
    job: Job,
    run: RunFolder | None,
    accelerator: Accelerator | None = None,
    family: Family | None = None,
    fit: Fit | None = None,
    sampler: FewStepSampler | None = None,
) -> Trainer:
    """Load the teacher and data, make roles and the method's trainer.

    Args:
        family: a teacher already loaded (or analytic); read from the config otherwise.
        fit: what it trains on, checked already; read from the config otherwise.
        sampler: the student's, made already from this teacher; made from the config otherwise.

    Raises:
        UserError: anything in the config that does not fit the teacher or the data.
    """
    accelerator = accelerator or make_accelerator()
    return Trainer(job.method, make_parts(job, accelerator, run, family, fit, sampler), run, accelerator)


def make_parts(
    job: Job,
    accelerator: Accelerator,
    run: RunFolder | None = None,
    family: Family | None = None,
    fit: Fit | None = None,
    sampler: FewStepSampler | None = None,
) -> Parts:
    """Roles, streams of data and judges of a job, each made once.  Arguments are those of :func:`build_trainer`.

    Raises:
        UserError: weights, data or judges that the config names are missing, or do not fit the teacher.
    """
    config, needs, device = job.config, job.needs, accelerator.device
    family = family or load_teacher(config)
    teacher_digests = digest_networks(family.networks())
    family.to(device)
    sampler = sampler or job.method.make_sampler(config, family)
    fit = check_fit(job, family) if fit is None else fit
    cache = job.cache or Path(config.output) / CACHE
    torch.manual_seed(config.seed)
    train = config.train
    roles = Roles(family, config.roles, train.autocast_dtype, train.gradient_checkpointing, job.method.has_fake_score)
    roles = roles.to(device)
    parts = Parts(
        config=config,
        family=family,
        roles=roles,
        sampler=sampler,
        conditions=ConditionSource(family, fit.items, config.seed + 1, fit.all_items),
        shares=Shares(accelerator.process_index, accelerator.num_processes),
        nodes=NodeStore(run.nodes if run else None, accelerator.is_main_process),
        teacher_digests=teacher_digests,
        router=fit.router,
        describe_data=lambda: fit.lines(family),
    )
    if fit.images is not None:
        latents, std = load_latents(family, fit.images, cache, config.data.images.posterior)
        parts.real = RealSource(family, fit.images, latents, config.seed + 2, fit.subset, std)
    if needs.pixels:
        parts.decode = family.decoder(needs.decoder)
    parts.rewards = load_rewards(list(needs.rewards), device)
    if needs.clip is not None:
        parts.clip = load_clip(needs.clip, device)
    if needs.perceptual is not None:
        parts.perceptual = load_perceptual(needs.perceptual, device)
    if needs.lpips:
        parts.lpips = load_lpips().to(device)
    if needs.negatives is not None:
        parts.negatives = ConditionSource(family, needs.negatives.read(), config.seed)
    if needs.preferences is not None:
        parts.preferences = _preferences(job, family, cache)
    if needs.teacher_pairs is not None:
        parts.teacher_pairs = make_pair_source(needs.teacher_pairs, job, family, fit, accelerator)
    return parts


def _preferences(job: Job, family: Family, cache: Path) -> PreferenceSource:
    settings, seed = job.needs.preferences, job.config.seed
    pairs = read_preferences(settings, family.image_shape, family.conditions)
    sources = []
    for images in pairs.sets:
        latents, std = load_latents(family, images, cache, settings.posterior)
        sources.append(RealSource(family, images, latents, seed, std=std))
    return PreferenceSource(family, pairs, sources, seed + 4)


def make_pair_source(plan: PairPlan, job: Job, family: Family, fit: Fit, accelerator: Accelerator) -> PairSource:
    """The teacher's pairs, which are made when they are first used; each process makes its share."""
    part = (accelerator.process_index, accelerator.num_processes)
    autocast_dtype = job.config.train.autocast_dtype

    def make() -> PairSet:
        make_pairs(family, fit.all_items, plan.recipe, plan.folder, plan.batch, part, autocast_dtype)
        accelerator.wait_for_everyone()
        return PairSet(plan.folder, family, fit.all_items, plan.recipe)

    return PairSource(family, make, job.config.seed + 4)


def build_stored(job: Job, run: RunFolder) -> Trainer:
    """The trainer of a run with what its newest checkpoint holds, for its student; its data are not read.

    Raises:
        UserError: there is no whole checkpoint, or it is of another run.
    """
    family = load_teacher(job.config)
    items = {"none": [], "label": [0], "prompt": [""]}[family.condition_kind]
    part = job.config.data.part
    router = None if part is None else Router.load(Path(part.router)).hash
    trainer = build_trainer(job, None, family=family, fit=Fit(items, items, router=router))
    if not restore_latest(trainer, run):
        raise UserError(f"{run.path}: the run has no whole checkpoint yet")
    return trainer


def restore_latest(trainer: Trainer, run: RunFolder) -> bool:
    """Take over the run's newest whole checkpoint; False where there is none yet.  Nothing is written.

    Raises:
        UserError: it is damaged, or of another run.
    """
    last = checkpoint.load_latest(run.checkpoints)
    if last is None:
        return False
    path, tensors, meta = last
    trainer.restore(tensors, meta, str(path))
    return True


def resume(trainer: Trainer, run: RunFolder) -> bool:
    """Go on from the run's newest whole checkpoint, with the rows of metrics up to it; False where there is none yet.

    Raises:
        UserError: it is damaged, or of another run, or the metrics cannot be written.
    """
    resumed = restore_latest(trainer, run)

    def keep_rows() -> None:
        note = run.drop_metrics_after(trainer.counters["iteration"] if resumed else -1)
        if note is not None:
            print(f"note: {note}")
        written = run.last_iteration()  # a run that was stopped again has them in its file and its checkpoint
        recorder = trainer.recorder
        recorder.unwritten = [row for row in recorder.unwritten if row["iteration"] > written]

    on_main(trainer.accelerator, keep_rows)
    return resumed


def provenance(job: Job, trainer: Trainer) -> dict[str, Any]:
    """What an exported student says of how it was made."""
    config, part = job.config, job.config.data.part
    msd = {} if part is None else {"msd": {"router": trainer.parts.router, "student": part.student}}
    changed = {} if config.roles.network is None else {"network": config.roles.network}
    which = {"revision": config.teacher.revision, "variant": config.teacher.variant}
    return {
        "method": job.method.name,
        "teacher": config.teacher.path,
        **{f"teacher_{key}": value for key, value in which.items() if value is not None},
        "student_updates": trainer.counters["student"],
        "network_passes": trainer.passes,
        "weights": config.roles.weights,
        "attention": trainer.attention or NATIVE,
        "precision": config.train.precision,
        "seed": config.seed,
        "settings": {section: getattr(config, section).model_dump(mode="json") for section in job.sections},
        **changed,
        **msd,
    }
