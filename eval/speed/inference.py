"""What a call costs, part by part: ``stepdistill benchmark inference``.

Which calls of which pipelines are timed; :mod:`.speed_up` says what the times mean.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from stepdistill import assets, files
from stepdistill.attention.choice import try_on_heads
from stepdistill.attention.kernels import AUTO, BACKENDS
from stepdistill.errors import UserError, reading
from stepdistill.eval.show.run_files import read_config
from stepdistill.eval.stock_pipeline import StockPipeline
from stepdistill.families.random_sizes import PIPELINE_SIZES, random_pipeline
from stepdistill.pipelines import accelerate
from stepdistill.stock.folders import hub_folder

from .latency import Latency, measure_latency

ALL = "all"


@dataclass(frozen=True)
class Row:
    """One measured call; ``setup`` is how the pipeline was accelerated, "stock" for not at all."""

    name: str
    steps: int
    setup: str
    latency: Latency
    peak: float | None

    def milliseconds(self, part: str) -> float:
        return 1000 * self.latency.seconds * self.latency.shares[part]

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "steps": self.steps,
            "setup": self.setup,
            "peak_gib": self.peak,
        } | self.latency.as_dict()


@dataclass(frozen=True)
class Inference:
    """What to measure: a student and its teacher, as stock pipelines.

    Attributes:
        attention: backends that the student is measured through besides, ``all`` for each that runs here.
        compile: whether each accelerated row comes compiled as well.
    """

    student: StockPipeline
    teacher: StockPipeline
    steps: int
    teacher_steps: int
    guidance_scale: float | None = None
    student_guidance: float | None = None
    batch_size: int = 1
    attention: tuple[str, ...] = ()
    compile: bool = False
    repeats: int = 5

    def run(self) -> list[Row]:
        """The teacher, the student, and the student accelerated; with a bar over the rows."""
        backends = self._list_backends()
        setups: list[tuple[str, dict[str, Any] | None]] = [("stock", None), ("accelerated", {"attention": AUTO})]
        setups += [(name, {"attention": name, "fuse_qkv": False}) for name in backends]
        if self.compile:
            setups += [(f"{name}, compiled", {**how, "compile": True}) for name, how in setups if how is not None]
        rows = []
        with tqdm(total=1 + len(setups), desc="inference", unit="row") as bar:
            rows.append(self._measure("teacher", self.teacher, self.teacher_steps, self.guidance_scale, "stock", None))
            bar.update()
            for setup, arguments in setups:
                rows.append(self._measure("student", self.student, self.steps, self.student_guidance, setup, arguments))
                bar.update()
        return rows

    def _list_backends(self) -> list[str]:
        device, network = self.student.device, self.student.denoiser
        dtype = next(network.parameters()).dtype

        def find_obstacle(name: str) -> str | None:
            return try_on_heads(name, device, dtype, [network], gradients=False)

        if ALL in self.attention:
            return [name for name in BACKENDS if not name.endswith("_hub") and find_obstacle(name) is None]
        for name in self.attention:
            if name not in BACKENDS:
                raise UserError(f"--attention {name}: use all, or one of {', '.join(sorted(BACKENDS))}")
            if (reason := find_obstacle(name)) is not None:
                raise UserError(f"--attention {name}: it does not run on this {device.type} ({reason})")
        return list(self.attention)

    def _measure(
        self,
        name: str,
        stock: StockPipeline,
        steps: int,
        guidance: float | None,
        setup: str,
        arguments: dict[str, Any] | None,
    ) -> Row:
        device = stock.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        faster = contextlib.nullcontext() if arguments is None else accelerate(stock.first, **arguments)
        with faster:
            warmup = 3 if arguments is not None and arguments.get("compile") else 1
            latency = measure_latency(stock, steps, self.batch_size, guidance, self.repeats, warmup)
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
        return Row(name, steps, setup, latency, peak)


def choose_inference(
    student: str | None,
    teacher: str | None,
    random_size: str | None,
    device: str,
    dtype: torch.dtype,
    **settings: Any,
) -> Inference:
    """What is to be measured: a student's folder and its teacher's, or a pipeline of random weights.

    Raises:
        UserError: both or neither are named, or as :func:`load_inference` and :func:`make_random_inference`.
    """
    if student is not None and random_size is None:
        return load_inference(student, teacher, device, dtype, **settings)
    if random_size is not None and student is None:
        return make_random_inference(random_size, device, dtype, **settings)
    raise UserError("name a student's folder, or a --random-size")


def load_inference(student: str, teacher: str | None, device: str, dtype: torch.dtype, **settings: Any) -> Inference:
    """A student's folder and its teacher's: by default the one that its run's config names, or its provenance.

    Raises:
        UserError: no such folder, or a student that does not say its teacher.
    """
    pipeline = StockPipeline.load(assets.resolve(student), device, dtype)
    facts = {"teacher": teacher} if teacher else pipeline.provenance | _read_teacher(Path(student).parent)
    if facts.get("teacher") is None:
        raise UserError(f"{student}: does not say what it was distilled from; name its teacher by --teacher")
    steps = settings.pop("steps", None) or pipeline.default_steps or 1
    folder = hub_folder(assets.resolve(facts["teacher"]), facts.get("teacher_revision"))
    if teacher is None and not Path(folder).is_dir():
        raise UserError(
            f"{student}: was distilled from {facts['teacher']}, which is no folder here nor in the hub's cache; name "
            "it by --teacher"
        )
    teacher_pipeline = StockPipeline.load(folder, device, dtype, variant=facts.get("teacher_variant"))
    return Inference(pipeline, teacher_pipeline, steps, student_guidance=pipeline.default_guidance, **settings)


def _read_teacher(run: Path) -> dict[str, Any]:
    """Where the teacher of a run is, as its provenance has it but with the whole path; {} where it is no run."""
    section = read_config(run).get("teacher")
    if not isinstance(section, dict) or not isinstance(section.get("path"), str):
        return {}
    return {"teacher": section["path"], **{f"teacher_{key}": section.get(key) for key in ("revision", "variant")}}


def make_random_inference(size: str, device: str, dtype: torch.dtype, **settings: Any) -> Inference:
    """A pipeline with random weights as teacher, and as its one-step student.

    Raises:
        UserError: an unknown size.
    """
    if size not in PIPELINE_SIZES:
        raise UserError(f"--random-size {size}: sizes are {', '.join(PIPELINE_SIZES)}")
    stock = StockPipeline(random_pipeline(size, dtype).to(device), size)
    steps = settings.pop("steps", None) or 1
    return Inference(stock, stock, steps, student_guidance=0.0, **settings)


def check_replaceable(path: Path | None) -> None:
    """Refuse to write measurements over a file of something else.

    Raises:
        UserError: it holds no measurements, or cannot be read.
    """
    if path is None or not path.exists():
        return
    with reading(path, "name another --output", "is no benchmark of stepdistill's, so it is not written over"):
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not all({"name", "steps", "setup"} <= row.keys() for row in rows):
            raise ValueError("other keys")


def write_rows(path: Path, rows: list[Row]) -> None:
    """One JSON list.

    Raises:
        UserError: it cannot be written.
    """
    files.write_json(path, [row.as_dict() for row in rows])
