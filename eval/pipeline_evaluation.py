"""What ``stepdistill evaluate`` does, in one process or shared among several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepdistill.errors import UserError
from stepdistill.eval.measure.evaluate import evaluate
from stepdistill.eval.measure.presets import make_protocol
from stepdistill.eval.measure.processes import Processes
from stepdistill.eval.measure.results import output_file
from stepdistill.eval.measure.targets import Target
from stepdistill.eval.measure.tools import read_prompts
from stepdistill.eval.show.grid import check_picture, draw_grid
from stepdistill.locks import Lock

from .run_evaluation import describe_results, evaluate_run, read_label_names

OUTPUT = Path("evaluation.json")
"""Where the measurements of pipelines go by default."""
SEED = 1234
"""Without a preset, which has its own."""


def protocol_settings(clip: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Options of the command line as raw settings of a protocol, without those that were not given.

    Args:
        clip: those of the CLIP model.
    """
    settings = {"clip": {key: value for key, value in clip.items() if value is not None}, **options}
    return {key: value for key, value in settings.items() if not (value is None or value is False or value in ({}, []))}


def evaluate_targets(
    targets: list[str],
    preset: str | None,
    settings: dict[str, Any],
    overrides: list[str],
    output: Path = OUTPUT,
    picture: Path | None = None,
    keep_samples: Path | None = None,
) -> None:
    """Measure run folders as their configs say, or any pipelines under one protocol.

    Args:
        settings: as :func:`protocol_settings` gives them.

    Raises:
        UserError: run folders and pipelines together, an option that does not go with a run, or as
            :func:`evaluate_runs` and :func:`evaluate_pipelines`.
    """
    runs = [Path(target) for target in targets if (Path(target) / "config.yaml").is_file()]
    if not runs:
        if preset is None:
            settings = {"seed": SEED, **settings}
        evaluate_pipelines(targets, preset, settings, overrides, output, picture, keep_samples)
        return
    if len(runs) != len(targets):
        raise UserError("give run folders or pipelines, not both")
    for_pipelines = [preset, overrides, keep_samples, picture, output != OUTPUT, settings.keys() - {"samples"}]
    if any(for_pipelines):
        raise UserError(
            f"{runs[0]}: a run is measured as its config says, --samples aside; for all else name {runs[0]}/student"
        )
    evaluate_runs(runs, settings.get("samples"))


def evaluate_runs(runs: list[Path], samples: int | None) -> None:
    """Each run's teacher and student, as its config says.

    Raises:
        UserError: a run that another process writes, that has no student, or settings that do not fit.
    """
    processes = Processes.join()
    for run in runs:
        with processes.hold(Lock(run)):
            text = evaluate_run(run, processes.device, samples, processes)
        if processes.main:
            print(text)
    processes.leave()


def evaluate_pipelines(
    targets: list[str],
    preset: str | None,
    settings: dict[str, Any],
    overrides: list[str],
    output: Path,
    picture: Path | None = None,
    keep_samples: Path | None = None,
) -> None:
    """Pipelines under one protocol: the JSON file, and in the first process the table, its protocol and the picture.

    Raises:
        UserError: a target or setting that is wrong, files that are missing, another protocol's output.
    """
    check_picture(picture)
    protocol = make_protocol(preset, settings, overrides)
    parsed = [Target.parse(target) for target in targets]
    processes = Processes.join()
    rows = evaluate(parsed, protocol, output, processes.device, processes, keep_samples, same_protocol=True)
    if processes.main:
        print(describe_results(output_file(output), rows))
        if picture is not None:
            texts = read_prompts(protocol)
            names = read_label_names(Path(parsed[0].path))
            path = draw_grid(
                parsed,
                picture,
                2,
                seed=protocol.seed,
                device=processes.device,
                label_names=names,
                prompts=texts and texts[:10],
            )
            print(f"picture {path}")
    processes.leave()
