"""Commands on students as stock pipelines: export, merge, sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import MOST_SEED

app = typer.Typer()


@app.command(epilog="Example: stepdistill export runs/quickstart --output students/fashion")
def export(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    output: Annotated[Path | None, typer.Option(help="where to write; RUN/student by default")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    average: Annotated[bool, typer.Option(help="the averaged weights, if the run has them")] = True,
) -> None:
    """Write the student of a run's newest checkpoint as a stock diffusers folder."""
    from stepdistill.devices import dtype_named
    from stepdistill.trainers.plans.finish import export_again
    from stepdistill.trainers.plans.resolve import read_run

    from .quiet import quiet_libraries

    number_format = dtype_named(dtype, "--dtype")
    quiet_libraries()
    job, folder = read_run(run)
    print(f"student {export_again(job, folder, output, number_format, average)}")


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

    from .quiet import quiet_libraries

    quiet_libraries()
    print(f"student {merge_students(assets.resolve(first), assets.resolve(second), weight, output)}")


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
    from stepdistill.data.grid import save_grid
    from stepdistill.eval.show.samples import SampleOptions, draw_samples

    from .quiet import quiet_libraries

    quiet_libraries()
    options = SampleOptions(count, steps, prompt, label, guidance_scale, negative_prompt, negative_scale, seed)
    save_grid(draw_samples(pipeline, options, variant) * 2 - 1, output)
    print(f"{count} pictures in {output}")
