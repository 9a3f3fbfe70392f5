"""Commands that measure cost: an update, a call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Overrides, check_readable

app = typer.Typer(help="Measure what a step costs.", no_args_is_help=True)


@app.command(epilog="Example: stepdistill benchmark step configs/quickstart.yaml --seconds 20")
def step(
    config: Annotated[Path, typer.Argument(help="a run's YAML config")],
    overrides: Overrides = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="about how long to measure")] = 20.0,
    random_size: Annotated[str | None, typer.Option(help="random weights instead: sd-small, sd15")] = None,
) -> None:
    """What an update costs over its floor: the same networks' passes alone, timed in the same run."""
    check_readable(config, overrides)

    from stepdistill.trainers.loop.cost import measure_step
    from stepdistill.trainers.plans.resolve import read_job

    from .quiet import quiet_libraries

    job = read_job(config, overrides)
    quiet_libraries()
    print(measure_step(job, seconds, random_size))


@app.command(epilog="Example: stepdistill benchmark inference runs/quickstart/student")
def inference(
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
    from stepdistill.devices import best_device, dtype_named
    from stepdistill.eval.speed import inference
    from stepdistill.eval.speed.speed_up import describe

    from .quiet import quiet_libraries

    number_format = dtype_named(dtype, "--dtype")
    inference.check_replaceable(output)
    quiet_libraries()
    case = inference.choose_inference(
        student,
        teacher,
        random_size,
        best_device(),
        number_format,
        steps=steps,
        teacher_steps=teacher_steps,
        guidance_scale=guidance_scale,
        compile=compiled,
        attention=tuple(attention or ()),
        batch_size=batch_size,
        repeats=repeats,
    )
    rows = case.run()
    print(describe(case, rows))
    if output is not None:
        inference.write_rows(output, rows)
