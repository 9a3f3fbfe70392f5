"""What a call costs, part by part: ``stepdistill benchmark inference``.

A student's call should cost its network passes.  Text encoder and decoder run once whoever draws, so the speed-up over
the teacher is compared with two things: the ratio of network passes, and what the parts allow, the same ratio with the
student's own time a pass and each pipeline's own text encoder and decoder.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from stepdistill import assets, files
from stepdistill.attention.choice import try_on_heads
from stepdistill.attention.kernels import AUTO, BACKENDS, attend
from stepdistill.attention.modules import find_attention
from stepdistill.attention.processor import AttentionProcessor, subtract_negative
from stepdistill.errors import UserError, reading
from stepdistill.eval.show.run_files import read_config
from stepdistill.eval.show.tables import Cells, text_table
from stepdistill.eval.stock_pipeline import StockPipeline
from stepdistill.families.random_sizes import PIPELINE_SIZES, random_pipeline
from stepdistill.pipelines import accelerate
from stepdistill.stock.folders import hub_folder

from .latency import PARTS, Clock, Latency, device_name, measure_latency

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
        place = (self.student.device, self.student.denoiser.dtype, [self.student.denoiser], False)
        if ALL in self.attention:
            return [name for name in BACKENDS if not name.endswith("_hub") and try_on_heads(name, *place) is None]
        for name in self.attention:
            if name not in BACKENDS:
                raise UserError(f"--attention {name}: use all, or one of {', '.join(sorted(BACKENDS))}")
            if (reason := try_on_heads(name, *place)) is not None:
                raise UserError(f"--attention {name}: it does not run on this {place[0].type} ({reason})")
        return list(self.attention)

    def _measure(self, name, stock: StockPipeline, steps: int, guidance, setup: str, arguments) -> Row:
        device = stock.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        faster = contextlib.nullcontext() if arguments is None else accelerate(stock.first, **arguments)
        with faster:
            warmup = 3 if arguments is not None and arguments.get("compile") else 1
            latency = measure_latency(stock, steps, self.batch_size, guidance, self.repeats, warmup)
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
        return Row(name, steps, setup, latency, peak)


def speed_up(teacher: Row, student: Row) -> dict[str, float]:
    """The whole call's speed-up, the ratio of network passes, and what the parts allow.

    ``allowed`` is ``(text + decoder + passes pass)_teacher / (text + decoder + passes pass)_student`` with the
    student's own time a pass for both: what would be reached if nothing but the parts took time.
    """
    one_pass = student.milliseconds("denoiser") / student.latency.passes

    def parts(row: Row) -> float:
        return row.milliseconds("text_encoder") + row.milliseconds("decoder") + row.latency.passes * one_pass

    return {
        "speed_up": teacher.latency.seconds / student.latency.seconds,
        "passes": teacher.latency.passes / student.latency.passes,
        "denoiser": teacher.milliseconds("denoiser") / student.milliseconds("denoiser"),
        "allowed": parts(teacher) / parts(student),
    }


def describe(case: Inference, rows: list[Row]) -> str:
    """The rows in milliseconds, and the speed-up in words."""
    network = case.student.denoiser
    parameters = sum(p.numel() for p in network.parameters()) / 1e6
    head = (
        f"{type(network).__name__} of {parameters:.2f}M, {str(network.dtype).removeprefix('torch.')}, batch "
        f"{case.batch_size}, {device_name(case.student.device)}, {torch.get_num_threads()} threads; ms a call"
    )
    teacher, *students = rows
    lines = [head, text_table(_list_cells(rows)), *(_describe_speed_up(teacher, row) for row in students[:2])]
    cost = negative_cost(case)
    if cost is not None:
        lines.append(
            f"a negative prompt: the pass's cross-attentions take {cost['plain']:.2f} ms without, {cost['fused']:.2f} "
            f"with both branches in one call, {cost['two']:.2f} in two ({cost['fused'] / cost['two']:.2f} of it)"
        )
    return "\n".join(lines)


def _list_cells(rows: list[Row]) -> Cells:
    """A header, and the parts of each row's call."""
    names = [name.replace("_", " ") for name in PARTS]
    cells = [["", "steps", "passes", *names, "call", "rest %", "images/s", "peak GiB"]]
    for row in rows:
        milliseconds = [f"{row.milliseconds(part):.2f}" for part in PARTS]
        latency = row.latency
        cells.append(
            [
                f"{row.name}, {row.setup}",
                str(row.steps),
                f"{latency.passes:g}",
                *milliseconds,
                f"{1000 * latency.seconds:.2f}",
                f"{latency.shares['rest']:.1%}",
                f"{latency.images_per_second:.2f}",
                "-" if row.peak is None else f"{row.peak:.2f}",
            ]
        )
    if all(row.peak is None for row in rows):
        return [row[:-1] for row in cells]
    return cells


def _describe_speed_up(teacher: Row, student: Row) -> str:
    ratios = speed_up(teacher, student)
    return (
        f"{student.setup}: {ratios['speed_up']:.1f} x the teacher's speed; {ratios['passes']:g} x fewer passes "
        f"({ratios['speed_up'] / ratios['passes']:.2f} of it; the denoiser alone "
        f"{ratios['denoiser'] / ratios['passes']:.2f}); the parts allow {ratios['allowed']:.1f} "
        f"({ratios['speed_up'] / ratios['allowed']:.2f} of it)"
    )


def negative_cost(case: Inference) -> dict[str, float] | None:
    """Milliseconds of one pass's cross-attentions: plain, and with a negative prompt in one call of both branches and
    in two; None for a pipeline without cross-attention.  Medians of interleaved runs on the tensors of a pass."""
    stock = case.student
    if stock.condition_kind != "prompt" or not _find_cross_attention(stock):
        return None
    calls = _record_cross_attention(case)
    processor, clock = AttentionProcessor(), Clock(stock.device)

    def attend_twice(attn: nn.Module, hidden: Tensor, text: Tensor) -> Tensor:
        query, *rows = (
            projection(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projection, x in [(attn.to_q, hidden), *[(p, text) for p in (attn.to_k, attn.to_v) * 2]]
        )
        branches = (attend(query, *rows[i : i + 2], None, None) for i in (0, 2))
        return attn.to_out[0](subtract_negative(*branches, 0.5).transpose(1, 2).flatten(2))

    ways = {
        "plain": lambda attn, hidden, text: processor(attn, hidden, text),
        "fused": lambda attn, hidden, text: processor(
            attn, hidden, text, negative_hidden_states=text, negative_scale=0.5
        ),
        "two": attend_twice,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for _ in range(4 * case.repeats + 1):
            for name, way in ways.items():
                start = clock.now()
                for call in calls:
                    way(*call)
                times[name].append(clock.now() - start)
    return {name: 1000 * statistics.median(seconds[1:]) for name, seconds in times.items()}


def _record_cross_attention(case: Inference) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Module, hidden states and text of every cross-attention in one step of the student."""
    stock, calls = case.student, []

    def record(module: nn.Module, arguments: tuple, options: dict) -> None:
        calls.append((module, arguments[0], options["encoder_hidden_states"]))

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in _find_cross_attention(stock)]
    noise = torch.randn(case.batch_size, *stock.noise_shape, generator=torch.Generator().manual_seed(0))
    try:
        stock.generate(["a picture"] * case.batch_size, noise, 1, None, case.student_guidance)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _find_cross_attention(stock: StockPipeline) -> list[nn.Module]:
    return [m for m in find_attention(stock.denoiser) if getattr(m, "is_cross_attention", False)]


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
    if (student is None) == (random_size is None):
        raise UserError("name a student's folder, or a --random-size")
    if student is None:
        return make_random_inference(random_size, device, dtype, **settings)
    return load_inference(student, teacher, device, dtype, **settings)


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
