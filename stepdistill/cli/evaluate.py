"""Commands that measure and show: evaluate, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import MOST_SEED

app = typer.Typer()


@app.command(epilog="Example: stepdistill evaluate A B --preset coco30k --reference val2014 --prompts c.txt")
def evaluate(
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
    from stepdistill.eval.pipeline_evaluation import evaluate_targets, protocol_settings

    from .quiet import quiet_libraries

    quiet_libraries()
    settings = protocol_settings(
        samples=samples,
        extractor=extractor,
        reference=reference,
        seed=seed,
        seeds=seeds,
        prompts=prompts,
        clip={"model": clip_model, "pretrained": clip_weights},
        rewards=[{"reward": name} for name in reward or []],
        precision_recall=precision_recall,
        diversity=diversity,
        latency=latency,
    )
    evaluate_targets(targets, preset, settings, set_ or [], output, picture, keep_samples)


@app.command(epilog="Example: stepdistill report runs/quickstart")
def report(
    run: Annotated[list[Path], typer.Argument(help="a run folder; of several, one page that compares them")],
    output: Annotated[Path, typer.Option(help="the page of several runs")] = Path("report.html"),
) -> None:
    """Write RUN/report.html, one self-contained page; or one page of several runs side by side."""
    from stepdistill.eval.show.comparison_page import write_comparison
    from stepdistill.eval.show.run_page import write_report

    page = write_report(run[0]) if len(run) == 1 else write_comparison(run, output)
    print(f"report {page}")
