"""Running what a config says, whole: train, export, evaluate in a fresh process, report.  One run, a recipe of stages,
or several students."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object

from stepdistill.attention.choice import require_backend
from stepdistill.attention.kernels import AUTO
from stepdistill.config import dump_yaml, read_yaml
from stepdistill.data.router import Router
from stepdistill.digests import check_same
from stepdistill.errors import UserError, writing
from stepdistill.eval.measure.processes import environment_without_launcher
from stepdistill.eval.show.run_page import write_report
from stepdistill.families.base import Family
from stepdistill.locks import Lock
from stepdistill.pipelines import export_student, export_students
from stepdistill.pipelines.msd import is_msd_folder
from stepdistill.run import RunFolder
from stepdistill.sampler import FewStepSampler
from stepdistill.stock.folders import check_replaceable, is_whole
from stepdistill.trainers.loop.ranks import locked, on_main
from stepdistill.trainers.loop.trainer import Interrupted, Trainer
from stepdistill.trainers.methods.regression import Regression

from .build import (
    Fit,
    build_stored,
    build_trainer,
    check_fit,
    check_judge,
    check_named,
    check_teacher_steps,
    condition_items,
    load_teacher,
    make_accelerator,
    provenance,
    resume,
    teacher_notes,
)
from .job import Job, make_job
from .rehearsal import check_student, parameters_of, rehearse
from .resolve import read_job
from .stages import Recipe, Stage, is_recipe, make_recipe, write_config
from .students import SHARED, MultiStudent, is_multi_student, jobs_of, make_multi_student


def quiet_libraries() -> None:
    """No bars and notices of other libraries between ours."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def distill(
    raw: dict[str, Any],
    where: str,
    go_on: bool = False,
    dry_run: bool = False,
    student: str | None = None,
    command: tuple[str, ...] = (),
) -> None:
    """What ``stepdistill distill`` does with a raw config.

    Args:
        where: the config's name, for errors.
        student: of several students, the one to train, ``shared`` for what comes before them; all in turn by default.
        command: the config and overrides as typed, for the commands that ``dry_run`` prints.

    Raises:
        UserError: anything wrong with the config, teacher, data or folder.
        Interrupted: stopped; what there is is saved.
    """
    quiet_libraries()
    if is_multi_student(raw):
        several = make_multi_student(raw, where)
        if student not in (None, SHARED) and not (student.isdigit() and int(student) < several.settings.students):
            raise UserError(f"--student {student}: students are 0..{several.settings.students - 1}, or {SHARED}")
        if student == SHARED and several.shared is None:
            raise UserError(f"--student {SHARED}: no stage has shared = true")
        if dry_run:
            several.check_folder(go_on or student is not None)
            print_students(several, command)
        else:
            run_students(several, go_on, student)
        return
    if student is not None:
        raise UserError(f"--student {student}: the config has one student; add a section msd for several")
    if is_recipe(raw):
        recipe = make_recipe(raw, where)
        if dry_run:
            recipe.check_folder(go_on)
            print_recipe(recipe)
        else:
            run_recipe(recipe, go_on)
        return
    job = make_job(raw, where)
    run = RunFolder(job.config.output)
    if dry_run:
        run.check(job.config, go_on)
        print_plan(job)
        return
    main_process = train(job, run, go_on)
    end_processes()
    if main_process:
        evaluate_and_report(job.config.evaluation.enabled, run)


# -- one run -----------------------------------------------------------------------------------------------


def train(
    job: Job,
    run: RunFolder,
    go_on: bool,
    before: Callable[[], None] | None = None,
    around: Callable[[Trainer], contextlib.AbstractContextManager] = contextlib.nullcontext,
    beside: Sequence[Job] = (),
) -> bool:
    """One run up to its exported student; whether this is the main process.

    Args:
        before: called before it writes.
        around: entered with the trainer when it is ready, left when it has trained.
        beside: other runs of the same whole (stages, students), which have the same teacher.

    Raises:
        UserError: anything that stops it, another process that writes in its folder among them.
        Interrupted: stopped; what there is is saved.
    """
    trackers = list(job.config.train.trackers) or None
    accelerator = make_accelerator(log_with=trackers, project_dir=str(run.path / "logs"))
    on_main(accelerator, lambda: run.check(job.config, go_on))
    with locked(accelerator, run.lock()):
        exists = on_main(accelerator, lambda: run.check(job.config, go_on))  # again: nobody else writes now
        on_main(accelerator, run.tidy)
        on_main(accelerator, lambda: check_replaceable(run.student))
        _train(job, run, accelerator, exists, before, around, beside)
    return accelerator.is_main_process


def _train(
    job: Job,
    run: RunFolder,
    accelerator: Accelerator,
    exists: bool,
    before: Callable[[], None] | None,
    around: Callable[[Trainer], contextlib.AbstractContextManager],
    beside: Sequence[Job],
) -> None:
    config = job.config
    dtype = config.train.autocast_dtype or torch.float32
    require_backend(config.train.attention, "train.attention", accelerator.device, dtype, gradients=True)
    family = load_teacher(config)
    sampler = checked_sampler(job, family)
    trainer = build_trainer(job, run, accelerator, family)
    check_teacher(job, trainer, beside)
    trainer.use_attention()
    if not exists:
        on_main(accelerator, lambda: check_student(job, trainer))
    main_process = accelerator.is_main_process

    def begin() -> None:
        if before is not None:
            before()
        if not exists:
            run.create(config, config.seed, trainer.teacher_digests)

    on_main(accelerator, begin)
    if main_process:
        for other in job.unused:
            print(f"note: the section '{other}' is not used by method {job.method.name}")
        print_notes(family, sampler)
        alone = job.cache is None  # a recipe's sections and images are for some of its stages
        unused = config.data.images is not None and not config.data.prompts_from_images
        if alone and unused and not job.method.wants_images(job.settings):
            print(f"note: data.images is not used: these settings of {job.method.name} train without real images")
        for line in trainer.trained_on.lines(family):
            print(line)
        print(f"attention {trainer.attention}{', the fastest here' * (config.train.attention == AUTO)}")
        with writing(run.path / "logs"):
            accelerator.init_trackers("stepdistill")
    accelerator.wait_for_everyone()
    if exists:
        resumed = resume(trainer, run)
        on_main(accelerator, lambda: run.write_config(config))  # what may change (train.updates) counts from here
        on_main(accelerator, lambda: run.write_environment(config.seed, trainer.teacher_digests))
        if main_process and resumed:
            print(f"resumed at student update {trainer.counters['student']}")
    try:
        with around(trainer):
            trainer.fit()
    except Interrupted as stop:
        if main_process:
            print(f"{stop}: saved at student update {trainer.counters['student']}; go on with --resume")
        accelerator.end_training()
        end_processes()
        raise
    if main_process:
        print("".join(f"{line}\n" for line in trainer.skipped_lines()), end="")
    trainer.check_trained()
    on_main(accelerator, lambda: export(job, trainer, run))
    accelerator.end_training()


def check_teacher(job: Job, trainer: Trainer, beside: Sequence[Job] = ()) -> None:
    """Refuse another teacher than the one that this run, or another of the same whole, was started with.

    Raises:
        UserError: it names the network and both digests; or the processes have teachers that differ.
    """
    teacher = job.config.teacher
    everywhere = gather_object([trainer.teacher_digests])
    if any(digests != everywhere[0] for digests in everywhere):
        raise UserError(f"teacher {teacher.path}: not the same weights in every process; copy them to every machine")

    def check() -> None:
        for other in (job, *(other for other in beside if other.config.teacher == teacher)):
            check_same(RunFolder(other.config.output).teacher, trainer.teacher_digests, teacher.path)

    on_main(trainer.accelerator, check)


def end_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def checked_sampler(job: Job, family: Family) -> FewStepSampler:
    """The student's sampler; what could not be trained, exported or measured in the end is refused now."""
    sampler = job.method.make_sampler(job.config, family)
    family.student_scheduler(sampler)
    check_teacher_steps(job, family)
    check_named(job, family)
    check_judge(job.config, family)
    return sampler


def export(job: Job, trainer: Trainer, run: RunFolder) -> None:
    """The student of a run, to its folder."""
    with trainer.averaged():
        facts, also = provenance(job, trainer), job.config.sampler.also_steps
        export_student(trainer.family, trainer.roles.student, trainer.sampler, run.student, facts, also_steps=also)


def export_again(run: RunFolder, output: Path | None, dtype: torch.dtype, average: bool) -> Path:
    """The student of a run's newest checkpoint, to ``output``, or to its folder by default.

    The run is read only, and may be in training, unless the student goes to its folder.

    Args:
        average: the averaged weights, if the run has them.

    Raises:
        UserError: no whole checkpoint, a run that another process writes, or a folder that is not written over.
    """
    target = run.student if output is None else output
    inside = target.absolute() == run.student.absolute()
    with Lock(run.path, remedy="or name another folder by --output") if inside else contextlib.nullcontext():
        if inside:
            run.tidy()
        job = read_job(run.path / "config.yaml")
        roles = job.config.roles
        inputs = (job.config.teacher.path, roles.student_from, roles.lora_from, roles.lora_under)
        check_replaceable(target, inputs)
        trainer = build_stored(job, run)
        trainer.check_trained()
        with trainer.averaged() if average else contextlib.nullcontext():
            facts, also = provenance(job, trainer), job.config.sampler.also_steps
            return export_student(
                trainer.family, trainer.roles.student, trainer.sampler, target, facts, dtype, also, inputs
            )


def print_plan(job: Job) -> None:
    """What a run would do, from the config and the teacher; nothing is written."""
    config = job.config
    print(dump_yaml(config).rstrip())
    family = load_teacher(config)
    sampler = checked_sampler(job, family)
    parameters, student = parameters_of(family), _student_line(job, sampler, family)
    fit = rehearse(job, family, sampler)
    items = fit.items
    train = config.train
    kind = {"none": "no conditions", "label": f"{len(items)} labels", "prompt": f"{len(items)} prompts"}
    print(f"""
# the plan
teacher   {config.teacher.path}: family {family.name}, {parameters / 1e6:.2f}M parameters, predicts {family.kind},
          samples {"x".join(map(str, family.sample_shape))}, {kind[family.condition_kind]}
student   {student}
method    {job.method.name}: {job.method.title}
training  {train.updates} student updates of {train.batch_size * train.gradient_accumulation} samples a process,
          {job.method.planned_passes(config):,} network passes on one (one picture each; backward is two)
{"".join(f"          {line}{chr(10)}" for line in job.method.plan(config))}{_data_lines(fit, family)}\
writes    {config.output}""")
    print_notes(family, sampler)


def _data_lines(fit: Fit, family: Family) -> str:
    """What is trained on, as a plan shows it."""
    lines = fit.lines(family)
    return "".join(f"{'data      ' if n == 0 else ' ' * 10}{line}\n" for n, line in enumerate(lines))


def print_notes(family: Family, sampler: FewStepSampler) -> None:
    """What a user should know of the teacher, a line each."""
    for note in teacher_notes(family, sampler):
        print(f"note: {note}")


def _student_line(job: Job, sampler: FewStepSampler, family: Family) -> str:
    changes = job.config.roles.network
    size = ""
    if changes is not None:
        own, whole = (sum(p.numel() for p in n.parameters()) for n in (family.altered_network(changes), family.network))
        size = f", {own / 1e6:.2f}M parameters ({own / whole - 1:+.0%})"
    return f"{sampler.steps} step{'s' * (sampler.steps > 1)} at t = {', '.join(f'{t:g}' for t in sampler.times)}{size}"


# -- recipes -----------------------------------------------------------------------------------------------


def run_recipe(recipe: Recipe, go_on: bool) -> None:
    """Every stage that is not finished, then the recipe's student, evaluation and report."""
    main_process = train_recipe(recipe, go_on)
    end_processes()
    if main_process:
        evaluate_and_report(recipe.last.job.config.evaluation.enabled, recipe.run)


def train_recipe(recipe: Recipe, go_on: bool, beside: Sequence[Job] = ()) -> bool:
    """The stages up to the recipe's student; whether this is the main process.

    Args:
        beside: runs of other students.
    """
    accelerator = make_accelerator()
    on_main(accelerator, lambda: recipe.check_folder(go_on))
    with locked(accelerator, recipe.run.lock()):
        exists = on_main(accelerator, lambda: recipe.check_folder(go_on))  # again: nobody else writes now
        on_main(accelerator, recipe.run.tidy)
        on_main(accelerator, lambda: check_replaceable(recipe.run.student))
        _train_stages(recipe, accelerator, exists, [*(stage.job for stage in recipe.stages), *beside])
    return accelerator.is_main_process


def _train_stages(recipe: Recipe, accelerator: Accelerator, exists: bool, beside: Sequence[Job]) -> None:
    main_process = accelerator.is_main_process
    for stage in [stage for stage in recipe.stages if not stage.finished][1:]:
        rehearse_stage(stage)
    for number, stage in enumerate(recipe.stages, 1):
        title = f"stage {number} of {len(recipe.stages)}, {stage.name}"
        if on_main(accelerator, lambda stage=stage: _is_finished(stage.run)):
            if main_process:
                print(f"{title}: finished before, in {stage.run.path}")
            continue
        if main_process:
            print(f"{title}: {stage.job.method.title}")
        begin = None if exists else lambda: write_config(recipe.output, recipe.config)
        train(stage.job, stage.run, True, begin, beside=beside)

    def finish() -> None:
        write_config(recipe.output, recipe.config)
        recipe.finish()

    on_main(accelerator, finish)


def _is_finished(run: RunFolder) -> bool:
    """Whether a run has its student; what a kill at its end left is removed then."""
    if not is_whole(run.student):
        return False
    with contextlib.suppress(UserError), run.lock():
        run.tidy()
    return True


def rehearse_stage(stage: Stage, router: Router | None = None) -> Fit:
    """What :func:`rehearse` does for a stage that may have to wait for the one that it takes from."""
    family = load_teacher(stage.job.config)
    waits = stage.source is not None and not stage.source.finished
    return rehearse(stage.job, family, checked_sampler(stage.job, family), router, waits)


def print_recipe(recipe: Recipe) -> None:
    """What a recipe would do, stage by stage, with its cost; nothing is written."""
    print(f"# the recipe: {len(recipe.stages)} stages in {recipe.output}")
    total = sum(stage.passes for stage in recipe.stages)
    for number, stage in enumerate(recipe.stages, 1):
        job, config = stage.job, stage.job.config
        family = load_teacher(config)
        sampler = checked_sampler(job, family)
        fit = rehearse_stage(stage)
        taken = "the teacher's weights" if stage.source is None else f"{stage.settings.take} of {stage.source.name}"
        samples = config.train.updates * config.train.batch_size * config.train.gradient_accumulation
        print(f"""
{number:2d}. {stage.name}{"  (finished)" if stage.finished else ""}
    method    {job.method.name}: {job.method.title}
    takes     {taken}; weights {config.roles.weights}
    student   {_student_line(job, sampler, family)}
    training  {config.train.updates} updates, {samples:,} samples a process
{"".join(f"              {line}{chr(10)}" for line in job.method.plan(config))}    cost      \
{stage.passes:,} network passes ({stage.passes / total:.0%})""")
        print("".join(f"    {line}\n" for line in _data_lines(fit, family).splitlines()), end="")
        if number == len(recipe.stages):
            print(f"\ncost of all  {total:,} network passes (one picture each; backward is two)\n")
            print_notes(family, sampler)
            print(f"# the last stage's config, resolved\n{dump_yaml(config).rstrip()}")


# -- several students --------------------------------------------------------------------------------------


def run_students(several: MultiStudent, go_on: bool, only: str | None, closing: bool = True) -> None:
    """The shared stages, then every student that is not finished, then all of them together; or one of these alone.

    A student of its own (``only``) may start while others are trained elsewhere.

    Args:
        closing: evaluate, report and say what to do next when all are there.
    """
    several.check_folder(go_on or only is not None)
    if only not in (None, SHARED) and several.shared is not None and not several.shared.last.finished:
        raise UserError(f"--student {only}: the shared stages come first; run them with --student {SHARED}")
    accelerator = make_accelerator()
    family = load_teacher(several.job.config)
    checked_sampler(several.job, family)
    with locked(accelerator, several.lock()):
        router = _begin_students(several, family, accelerator, go_on or only is not None)
    if several.shared is not None and (only is None or only == SHARED):
        _one(several.shared, RunFolder(several.shared.output), "what all share", True, accelerator, several.jobs)
    if only == SHARED:
        end_processes()
        return
    count = several.settings.students
    for k in range(count) if only is None else [int(only)]:
        title = f"student {k} of 0..{count - 1}"
        beside = [*several.jobs, *(jobs_of(several.shared) if several.shared else [])]
        _one(several.students[k], several.folder(k), title, go_on or only is None, accelerator, beside)
    end_processes()
    if not accelerator.is_main_process:
        return
    done = sum(several.finished(k) for k in range(count))
    if only is not None:
        rest = "; gather them without --student, with --resume" if done == count else ""
        print(f"{done} of {count} students are finished{rest}")
        return
    with several.lock():
        several.run.tidy()
        write_config(several.output, several.config)
        export_students([several.folder(k).student for k in range(count)], router, several.run.student)
    if closing:
        evaluate_and_report(several.job.config.evaluation.enabled, several.run)


def rehearse_students(several: MultiStudent, family: Family, router: Router) -> None:
    """Every student's conditions, and what comes before its first update of the shared stages and of student 0."""
    for job in several.jobs:
        check_fit(job, family, router)
    for work in (several.shared, several.students[0]):
        if isinstance(work, Recipe):
            for stage in work.stages:
                if not stage.finished:
                    rehearse_stage(stage, router)
        elif work is not None:
            teacher = load_teacher(work.config)
            rehearse(work, teacher, checked_sampler(work, teacher), router)


def _begin_students(several: MultiStudent, family: Family, accelerator: Accelerator, go_on: bool) -> Router:
    """The router and the config of the whole, written unless they are there."""
    exists = on_main(accelerator, lambda: several.check_folder(go_on))
    on_main(accelerator, lambda: check_replaceable(several.run.student))
    router = several.make_router(family)
    if not exists:
        rehearse_students(several, family, router)

        def write() -> None:
            router.save(several.router_file)
            write_config(several.output, several.config)

        on_main(accelerator, write)
    return router


def _one(
    work: Job | Recipe, run: RunFolder, title: str, go_on: bool, accelerator: Accelerator, beside: Sequence[Job]
) -> None:
    """A run or recipe of one student, unless it is finished; ``beside``: the runs of the others."""
    if on_main(accelerator, lambda: _is_finished(run)):
        if accelerator.is_main_process:
            print(f"{title}: finished before, in {run.path}")
        return
    if accelerator.is_main_process:
        print(f"{title}, in {run.path}")
    if isinstance(work, Recipe):
        train_recipe(work, go_on, beside)
    else:
        train(work, run, go_on, beside=beside)


def print_students(several: MultiStudent, command: tuple[str, ...]) -> None:
    """Who draws what, what it costs, and a command for each; nothing is written."""
    job = several.job
    family = load_teacher(job.config)
    sampler = checked_sampler(job, family)
    fit = check_fit(job, family)
    router = several.make_router(family)
    rehearse_students(several, family, router)
    works = [*several.students] if several.shared is None else [several.shared, *several.students]
    costs = [_cost(work) for work in works]
    shared = f", {costs[0]:,} shared" if several.shared else ""
    again = (several.settings.students - 1) * _pairs_cost(several.students[0])  # made once
    own = several.settings
    print(f"""# {own.students} students of {job.config.teacher.path}, in {several.output}
partition {own.partition}, router {router.hash[:12]}
student   {_student_line(job, sampler, family)}
{_data_lines(fit, family)}cost      {sum(costs) - again:,} network passes in all, {costs[-1]:,} a student{shared}""")
    print_notes(family, sampler)
    sizes = _sizes(router, several, family)
    for k in range(own.students):
        print(f"  student {k}: {sizes[k]}{'  (finished)' if several.finished(k) else ''}")
    print("\n# one after the other\n" + _command(command))
    print("# or one job each" + (", the shared stages first" if several.shared else ""))
    if several.shared is not None:
        print(_command(command, "--student", SHARED))
    for k in range(own.students):
        print(_command(command, "--student", str(k)))
    print("# then, to gather and measure them\n" + _command(command, "--resume"))
    print(f"\n# the last student's config, resolved\n{dump_yaml(several.jobs[-1].config).rstrip()}")


def _cost(work: Job | Recipe) -> int:
    return sum(job.method.planned_passes(job.config) for job in jobs_of(work))


def _pairs_cost(work: Job | Recipe) -> int:
    return sum(job.method.passes_before(job.config) for job in jobs_of(work) if job.method is Regression)


def _sizes(router: Router, several: MultiStudent, family: Family) -> list[str]:
    """What each student draws, in words."""
    if router.kind == "labels":
        return [f"labels {', '.join(map(str, part))}" for part in router.parameters["labels"]]
    encoder = family.prompt_encoder
    routes = router.route(condition_items(several.job.config, family), lambda prompts: encoder(prompts)[1])
    return [f"{routes.count(k):,} prompts ({routes.count(k) / len(routes):.1%})" for k in range(router.students)]


def _command(command: tuple[str, ...], *more: str) -> str:
    return shlex.join(["stepdistill", "distill", *command, *more])


def apart(arguments: list[str]) -> int:
    """``stepdistill ARGUMENTS`` in a process of its own; its exit code.  A Ctrl-C, or a SIGTERM passed on, stops that
    one, which saves."""
    child = subprocess.Popen([sys.executable, "-P", "-m", "stepdistill", *arguments])
    previous = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),  # the terminal has told the child too
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: child.terminate()),
    }
    try:
        return child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# -- after training ----------------------------------------------------------------------------------------


def evaluate_and_report(enabled: bool, run: RunFolder) -> None:
    """Evaluate in a fresh process that loads the student as anyone would, then write the report."""
    if enabled:
        command = [sys.executable, "-P", "-m", "stepdistill", "evaluate", str(run.path)]
        done = subprocess.run(command, check=False, env=environment_without_launcher())
        if done.returncode:
            again = shlex.join(["stepdistill", "evaluate", str(run.path)])
            raise UserError(f"the evaluation ended with exit code {done.returncode}; try: {again}")
    write_report(run.path)
    _last_screen(run)


def _last_screen(run: RunFolder) -> None:
    several = is_msd_folder(run.student)
    what = "several students, each a stock diffusers folder" if several else "a stock diffusers folder"
    folder = json.dumps(str(run.student), ensure_ascii=False)
    call = f"{'MSD' if several else 'Diffusion'}Pipeline.from_pretrained({folder})"
    data = read_yaml(run.path / "config.yaml").get("data") or {}
    asks = data.get("shown") or ["PROMPT"] * any(
        data.get(key) for key in ("prompts", "prompt_dataset", "prompts_from_images")
    )
    prompt = f" --prompt {shlex.quote(asks[0])}" if asks else ""
    grid = f"\n  pictures   {run.path / 'grid.png'}" if (run.path / "grid.png").exists() else ""
    print(f"""
Done.
  student    {run.student}  ({what}: {call})
  report     {run.path / "report.html"}{grid}
Next:
  stepdistill sample {shlex.quote(str(run.student))} --count 40{prompt}         more pictures
  stepdistill distill CONFIG method=... output=...   the same with another method (stepdistill methods)
  stepdistill distill CONFIG teacher.path=... output=...   your own teacher""")
