"""The command line: ``stepdistill COMMAND``.  The one module of the library that knows the rooms above it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from stepdistill.errors import UserError

app = typer.Typer(
    help="Distil a diffusion teacher into a student that needs one step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
teacher_app = typer.Typer(help="Make a small teacher of your own, and what evaluating it needs.", no_args_is_help=True)
benchmark_app = typer.Typer(help="Measure what a step costs.", no_args_is_help=True)
app.add_typer(teacher_app, name="teacher")
app.add_typer(benchmark_app, name="benchmark")

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="override the config's keys")]


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except OSError as error:
        if error.errno == 28:
            _fail(f"no space left on the device ({error.filename or 'while writing'}); free some and try again")
        raise
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # no command given: typer has no public name for it
            print(error.format_message(), file=sys.stderr)
            sys.exit(error.exit_code)
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's usage errors
            _fail(error.format_message(), error.exit_code)
        raise
    if isinstance(code, int):  # what a command gave typer.Exit comes back as a value
        sys.exit(code)


def _fail(message: str, code: int = 2) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"stepdistill: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(code)


# -- distill -----------------------------------------------------------------------------------------------


@app.command(epilog="Example: stepdistill distill configs/quickstart.yaml train.updates=100 output=runs/short")
def distill(
    config: Annotated[Path, typer.Argument(help="a YAML config")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in the output folder")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, print the plan, write nothing")] = False,
    student: Annotated[str | None, typer.Option(help="of several students (msd): this one alone, 0.., shared")] = None,
) -> None:
    """Distil a teacher: train, export the student, evaluate it, write the report."""
    from stepdistill.config import apply_overrides, read_yaml
    from stepdistill.trainers import launch
    from stepdistill.trainers.base import Interrupted

    raw = apply_overrides(read_yaml(config), overrides or [])
    try:
        launch.distill(raw, str(config), resume, dry_run, student, (str(config), *(overrides or [])))
    except Interrupted as stop:
        raise typer.Exit(stop.exit_code) from None


@app.command("evaluate", epilog="Example: stepdistill evaluate runs/quickstart")
def evaluate_command(
    targets: Annotated[list[str], typer.Argument(help="run folders, or pipelines as [NAME=]PATH[@STEPS]")],
    samples: Annotated[int | None, typer.Option(min=2, help="pictures from each")] = None,
    extractor: Annotated[str | None, typer.Option(help="asset:NAME, a file, inception, module:attribute")] = None,
    reference: Annotated[str | None, typer.Option(help="reference statistics")] = None,
    seed: Annotated[int, typer.Option()] = 1234,
    prompts: Annotated[str | None, typer.Option(help="a file, one prompt a line")] = None,
    clip_model: Annotated[str | None, typer.Option(help="open_clip's model name, e.g. ViT-g-14")] = None,
    clip_weights: Annotated[str | None, typer.Option(help="a local weight file for --clip-model")] = None,
    reward: Annotated[list[str] | None, typer.Option(help="its mean too, module:attribute; may be repeated")] = None,
    latency: Annotated[bool, typer.Option("--latency", help="time single calls too")] = False,
    picture: Annotated[Path | None, typer.Option(help="a PNG of all pipelines on the same noise")] = None,
    output: Annotated[Path, typer.Option(help="the JSON file, for pipelines")] = Path("evaluation.json"),
) -> None:
    """Fréchet and kernel distance, latency, CLIP score.  A run's teacher and student, or any pipelines."""
    import torch

    from stepdistill.trainers import launch

    launch.quiet_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = [t for t in targets if (Path(t) / "config.yaml").is_file()]
    if runs:
        from stepdistill.eval.of_run import evaluate_run

        if len(runs) != len(targets):
            raise UserError("give run folders or pipelines, not both")
        for run in runs:
            print(evaluate_run(Path(run), device, samples))
        return
    from stepdistill import assets
    from stepdistill.config import check
    from stepdistill.data import read_prompts
    from stepdistill.eval.evaluate import EvaluationSettings, Target, evaluate
    from stepdistill.eval.of_run import label_names
    from stepdistill.eval.pictures import grid, table

    given = {"samples": samples, "extractor": extractor, "reference": reference, "seed": seed, "prompts": prompts}
    raw = {k: v for k, v in given.items() if v is not None}
    if clip_model is not None:
        raw["clip"] = {"model": clip_model, "pretrained": clip_weights}
    raw |= {"rewards": [{"reward": name} for name in reward or []], "latency": latency}
    settings = check(EvaluationSettings, raw, "evaluate")
    parsed = []
    for target in targets:
        name, _, place = target.rpartition("=")
        path, _, steps = place.rpartition("@") if "@" in place else (place, "", "")
        if steps and not steps.isdigit():
            raise UserError(f"{target}: what follows @ is a number of steps")
        parsed.append(Target(name or Path(path).name, assets.resolve(path), int(steps) if steps else None))
    print(table(evaluate(parsed, settings, output, device)))
    if picture is not None:
        texts = None if prompts is None else read_prompts(prompts)[:10]
        names = label_names(Path(parsed[0].path))
        print(f"picture {grid(parsed, picture, 2, seed=seed, device=device, label_names=names, prompts=texts)}")


@app.command(epilog="Example: stepdistill export runs/quickstart --output students/fashion")
def export(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    output: Annotated[Path | None, typer.Option(help="where to write; RUN/student by default")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    average: Annotated[bool, typer.Option(help="the averaged weights, if the run has them")] = True,
) -> None:
    """Write the student of a run's newest checkpoint as a stock diffusers folder."""
    import contextlib

    from stepdistill.pipelines import export_student
    from stepdistill.run import RunFolder
    from stepdistill.trainers import launch
    from stepdistill.trainers.job import DTYPES, build_trainer, provenance, read_job
    from stepdistill.trainers.job import resume as resume_run

    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: use one of {', '.join(DTYPES)}")
    folder = _run_folder(run)
    launch.quiet_libraries()
    job = read_job(folder / "config.yaml")
    trainer = build_trainer(job, None)
    if not resume_run(trainer, RunFolder(folder)):
        raise UserError(f"{run}: the run has no whole checkpoint yet")
    with trainer.averaged() if average else contextlib.nullcontext():
        facts = provenance(job, trainer)
        target = output or folder / "student"
        also = job.config.sampler.also_steps
        path = export_student(
            trainer.family, trainer.roles.student, trainer.sampler, target, facts, DTYPES[dtype], also
        )
    print(f"student {path}")


@app.command(epilog="Example: stepdistill pairs configs/dmd2/sdxl_warmup.yaml --part 0/4")
def pairs(
    config: Annotated[Path, typer.Argument(help="a YAML config of method regression, or a recipe with such a stage")],
    overrides: Overrides = None,
    part: Annotated[str, typer.Option(help="i/n: this machine's share, the i-th of n from 0")] = "0/1",
) -> None:
    """Make the teacher's noise-sample pairs that a regression trains on; goes on where it stopped."""
    from stepdistill.config import apply_overrides, read_yaml
    from stepdistill.pairs import make_pairs
    from stepdistill.trainers import launch
    from stepdistill.trainers.job import check_fit, load_teacher, make_accelerator, make_job
    from stepdistill.trainers.msd import is_multi_student, make_multi_student
    from stepdistill.trainers.recipe import Recipe, is_recipe, make_recipe
    from stepdistill.trainers.regression import Regression

    raw = apply_overrides(read_yaml(config), overrides or [])
    whole = make_multi_student(raw, str(config)).base if is_multi_student(raw) else None
    if whole is None:
        whole = make_recipe(raw, str(config)) if is_recipe(raw) else make_job(raw)
    jobs = [stage.job for stage in whole.stages] if isinstance(whole, Recipe) else [whole]
    jobs = [job for job in jobs if job.method is Regression]
    if not jobs:
        raise UserError(f"{config}: no stage with method = regression; nothing needs pairs")
    index, _, count = part.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"--part {part}: give i/n with i below n, such as 0/4")
    launch.quiet_libraries()
    for job in jobs:
        family = load_teacher(job.config)
        family.to(make_accelerator().device)
        items = check_fit(job, family).all_items
        folder, own = Regression.folder(job.config), job.config.regression
        make_pairs(family, items, Regression.recipe(job.config), folder, own.pair_batch, (int(index), int(count)))
        print(f"pairs {folder}")


@app.command(epilog="Example: stepdistill merge runs/full/student runs/lora/student --output students/merged")
def merge(
    first: Annotated[str, typer.Argument(help="an exported student, A")],
    second: Annotated[str, typer.Argument(help="another of the same architecture and steps, B")],
    output: Annotated[Path, typer.Option(help="where to write the merged student")],
    weight: Annotated[float, typer.Option(min=0, max=1, help="of A; B has the rest")] = 0.5,
) -> None:
    """Interpolate two students' weights: weight A + (1 - weight) B (SwiftBrush version 2)."""
    from stepdistill import assets
    from stepdistill.pipelines import merge_students
    from stepdistill.trainers import launch

    launch.quiet_libraries()
    print(f"student {merge_students(assets.resolve(first), assets.resolve(second), weight, output)}")


def _run_folder(path: Path) -> Path:
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: not a run folder (no config.yaml in it)")
    return path


@app.command(epilog="Example: stepdistill sample runs/quickstart/student --count 40 --output grid.png")
def sample(
    pipeline: Annotated[str, typer.Argument(help="an exported student, a run folder, or any diffusers folder")],
    count: Annotated[int, typer.Option(min=1)] = 40,
    steps: Annotated[int | None, typer.Option(min=1, help="the student's own number by default")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="for text-conditional pipelines; may be repeated")] = None,
    label: Annotated[list[int] | None, typer.Option(help="for class-conditional ones; may be repeated")] = None,
    guidance_scale: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int, typer.Option()] = 0,
    output: Annotated[Path, typer.Option(help="the picture to write")] = Path("samples.png"),
) -> None:
    """Draw a grid of pictures with a stock pipeline."""
    import torch

    from stepdistill import assets
    from stepdistill.eval.stock import StockPipeline, is_pipeline
    from stepdistill.trainers import launch
    from stepdistill.trainers.grids import save_grid

    launch.quiet_libraries()
    path = assets.resolve(pipeline)
    if is_pipeline(Path(path) / "student"):
        path = str(Path(path) / "student")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stock = StockPipeline.load(path, device)
    conditions = _given_conditions(stock, prompt, label, count)
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(count, *stock.noise_shape, generator=generator)
    steps = steps or stock.default_steps or 25
    try:
        pixels = stock.generate(conditions, noise, steps, generator, guidance_scale)
    except ValueError as error:  # a scheduler's own word on its steps
        raise UserError(f"--steps {steps}: {pipeline} cannot be sampled so: {error}") from None
    try:
        save_grid(pixels * 2 - 1, output)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {output}: cannot be written ({error})") from None
    print(f"{count} pictures in {output}")


def _given_conditions(stock, prompts: list[str] | None, labels: list[int] | None, count: int) -> list | None:
    from stepdistill.eval.stock import spoken

    if stock.condition_kind == "prompt":
        if not prompts:
            raise UserError("this pipeline takes prompts: add --prompt 'a photo of a cat'")
        return [prompts[i % len(prompts)] for i in range(count)]
    if prompts:
        raise UserError("--prompt: this pipeline takes no prompts")
    if stock.condition_kind == "none":
        if labels:
            raise UserError("--label: this pipeline takes no labels")
        return None
    for value in labels or []:
        if value not in stock.labels:
            raise UserError(f"--label {value}: outside {spoken(stock.labels)}")
    chosen = labels or stock.labels
    return [chosen[i % len(chosen)] for i in range(count)]


@app.command(epilog="Example: stepdistill compare configs/compare/score_methods.yaml")
def compare(
    config: Annotated[Path, typer.Argument(help="a YAML config that names several runs")],
    overrides: Overrides = None,
    only: Annotated[str | None, typer.Option(help="make one run alone, e.g. in a process of its own")] = None,
) -> None:
    """Several methods at equal network passes: distances over training as a picture.  Goes on where it stopped."""
    import torch

    from stepdistill.config import apply_overrides, check, read_yaml
    from stepdistill.trainers import launch
    from stepdistill.trainers.base import Interrupted
    from stepdistill.trainers.compare import CompareSettings
    from stepdistill.trainers.compare import compare as run_all

    settings = check(CompareSettings, apply_overrides(read_yaml(config), overrides or []), str(config))
    launch.quiet_libraries()
    try:
        print(run_all(settings, config.parent, only, "cuda" if torch.cuda.is_available() else "cpu"))
    except Interrupted as stop:
        print(f"{stop}: saved; go on with the same command")
        raise typer.Exit(stop.exit_code) from None


@app.command(epilog="Example: stepdistill report runs/quickstart")
def report(run: Annotated[Path, typer.Argument(help="a run folder")]) -> None:
    """Write RUN/report.html: one self-contained page."""
    from stepdistill.eval.report import write_report

    print(f"report {write_report(run)}")


@app.command(epilog="Example: stepdistill methods")
def methods() -> None:
    """List the methods."""
    from stepdistill.trainers import METHODS

    for name, method in METHODS.items():
        print(f"{name:12s} {method.title}")
    print(f"{'msd':12s} a section beside any of them: several students of one teacher (2410.23274)")


# -- teachers ----------------------------------------------------------------------------------------------


@teacher_app.command("train", epilog="Example: stepdistill teacher train configs/teachers/fashion_mnist.yaml")
def teacher_train(config: Annotated[Path, typer.Argument(help="a YAML config")], overrides: Overrides = None) -> None:
    """Train a small class-conditional pixel teacher; resumes if it was stopped."""
    import torch

    from stepdistill.config import apply_overrides, check, read_yaml
    from stepdistill.trainers import launch
    from stepdistill.trainers.teacher import TeacherConfig, train_teacher

    launch.quiet_libraries()
    checked = check(TeacherConfig, apply_overrides(read_yaml(config), overrides or []), str(config))
    path = train_teacher(checked, "cuda" if torch.cuda.is_available() else "cpu")
    print(f"teacher {path}")


@teacher_app.command(
    "features", epilog="Example: stepdistill teacher features configs/teachers/fashion_mnist_features.yaml"
)
def teacher_features(
    config: Annotated[Path, typer.Argument(help="a YAML config")], overrides: Overrides = None
) -> None:
    """Train a feature network for evaluation, make reference statistics, pack real images."""
    import torch

    from stepdistill.config import apply_overrides, check, read_yaml
    from stepdistill.eval.prepare import FeatureConfig, prepare_assets

    checked = check(FeatureConfig, apply_overrides(read_yaml(config), overrides or []), str(config))
    for name, path in prepare_assets(checked, "cuda" if torch.cuda.is_available() else "cpu").items():
        print(f"{name} {path}")


# -- benchmarks --------------------------------------------------------------------------------------------


@benchmark_app.command("step", epilog="Example: stepdistill benchmark step configs/quickstart.yaml --seconds 20")
def benchmark_step(
    config: Annotated[Path, typer.Argument(help="a run's YAML config")],
    overrides: Overrides = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="about how long to measure")] = 20.0,
    random_size: Annotated[str | None, typer.Option(help="random weights instead: sd-small, sd15")] = None,
) -> None:
    """What an update costs over its floor: the same networks' passes alone, timed in the same run."""
    from stepdistill.trainers import launch
    from stepdistill.trainers.benchmark import measure_step
    from stepdistill.trainers.job import read_job

    job = read_job(config, overrides)
    launch.quiet_libraries()
    print(measure_step(job, seconds, random_size))


if __name__ == "__main__":
    main()
