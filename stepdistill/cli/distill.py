"""Commands that train: distill, compare, pairs; and the list of methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepdistill.errors import UserError

from .options import Overrides, check_readable

if TYPE_CHECKING:
    from stepdistill.trainers.plans.plan import Plan

app = typer.Typer()


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
    check_readable(config, overrides)

    from stepdistill.trainers.loop.stopping import Interrupted
    from stepdistill.trainers.plans.processes import CommandFailed
    from stepdistill.trainers.plans.resolve import read_plan

    from .quiet import quiet_libraries

    quiet_libraries()
    plan = read_plan(config, overrides)
    if student is not None:
        plan = plan.part(student)
    if dry_run:
        show(plan, resume)
        return
    try:
        plan.run(resume)
    except (Interrupted, CommandFailed) as stop:
        raise typer.Exit(stop.exit_code) from None


def show(plan: Plan, resume: bool) -> None:
    """A dry run: print what a plan would do."""
    plan.check_folder(resume)
    for text in plan.describe():
        print(text)


@app.command(epilog="Example: stepdistill compare configs/benchmark/score_methods.yaml")
def compare(
    config: Annotated[Path, typer.Argument(help="a YAML config that names several runs")],
    overrides: Overrides = None,
    only: Annotated[str | None, typer.Option(help="make this run alone, or the runs of this name at all seeds")] = None,
    finished: Annotated[bool, typer.Option("--finished", help="make no run; show what is finished")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the runs and try each; write nothing")] = False,
) -> None:
    """Several methods at equal network passes: curves over training, a table, pictures.  Goes on where it stopped."""
    check_readable(config, overrides)

    from stepdistill.trainers.loop.stopping import Interrupted
    from stepdistill.trainers.plans.processes import CommandFailed
    from stepdistill.trainers.plans.resolve import read_comparison

    from .quiet import quiet_libraries

    comparison = read_comparison(config, overrides)
    quiet_libraries()
    if finished and only is not None:
        raise UserError("give --only or --finished, not both: one makes a run, the other none")
    if only is not None:
        comparison = comparison.part(only)
    if dry_run:
        show(comparison, resume=True)
        return
    try:
        if finished:
            comparison.show_finished()
        else:
            comparison.run()
    except Interrupted as stop:
        print(f"{stop}: saved; go on with the same command")
        raise typer.Exit(stop.exit_code) from None
    except CommandFailed as failed:  # it has printed why
        raise typer.Exit(failed.exit_code) from None


@app.command(epilog="Example: stepdistill pairs configs/dmd2/sd15_warmup.yaml --part 0/4")
def pairs(
    config: Annotated[Path, typer.Argument(help="a YAML config of method regression, or a recipe with such a stage")],
    overrides: Overrides = None,
    part: Annotated[str, typer.Option(help="i/n: this machine's share, the i-th of n from 0")] = "0/1",
) -> None:
    """Make the teacher's noise-sample pairs that a regression trains on; goes on where it stopped."""
    check_readable(config, overrides)

    from stepdistill.trainers.plans.pairs import make_pairs_of, share_of
    from stepdistill.trainers.plans.resolve import read_plan

    from .quiet import quiet_libraries

    share = share_of(part)
    plan = read_plan(config, overrides)
    quiet_libraries()
    make_pairs_of(plan, share, str(config))


@app.command(epilog="Example: stepdistill methods")
def methods() -> None:
    """List the methods."""
    from stepdistill.trainers.methods.registry import METHODS

    for name, method in METHODS.items():
        print(f"{name:12s} {method.title}")
    print(f"{'msd':12s} a section for any of them: several students of one teacher (2410.23274)")
