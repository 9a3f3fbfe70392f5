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
from stepdistill.eval.show.html import read_config
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
        backends = self._backends()
        setups: list[tuple[str, dict[str, Any] | None]] = [("stock", None), ("accelerated", {"attention": AUTO})]
        setups += [(name, {"attention": name, "fuse_qkv": False}) for name in backends]
        if self.compile:
            setups += [(f"{name}, compiled", {**own, "compile": True}) for name, own in setups if own is not None]
        rows = []
        with tqdm(total=1 + len(setups), desc="inference", unit="row") as bar:
            rows.append(self._row("teacher", self.teacher, self.teacher_steps, self.guidance_scale, "stock", None))
            bar.update()
            for setup, arguments in setups:
                rows.append(self._row("student", self.student, self.steps, self.student_guidance, setup, arguments))
                bar.update()
        return rows

    def _backends(self) -> list[str]:
        place = (self.student.device, self.student.denoiser.dtype, [self.student.denoiser], False)
        if ALL in self.attention:
            return [name for name in BACKENDS if not name.endswith("_hub") and try_on_heads(name, *place) is None]
        for name in self.attention:
            if name not in BACKENDS:
                raise UserError(f"--attention {name}: use all, or one of {', '.join(sorted(BACKENDS))}")
            if (reason := try_on_heads(name, *place)) is not None:
                raise UserError(f"--attention {name}: it does not run on this {place[0].type} ({reason})")
        return list(self.attention)

    def _row(self, name, stock: StockPipeline, steps: int, guidance, setup: str, arguments) -> Row:
        device = stock.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        made = contextlib.nullcontext() if arguments is None else accelerate(stock.first, **arguments)
        with made:
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


def table(case: Inference, rows: list[Row]) -> str:
    """The rows in milliseconds, and the speed-up in words."""
    network = case.student.denoiser
    parameters = sum(p.numel() for p in network.parameters()) / 1e6
    wide = max(len(f"{row.name}, {row.setup}") for row in rows) + 2
    names = [name.replace("_", " ") for name in (*PARTS, "call")]
    columns = [f"{'steps':>5s} {'passes':>6s}", *(f"{name:>12s}" for name in names), f"{'rest':>6s} {'images/s':>9s}"]
    lines = [
        f"{type(network).__name__} of {parameters:.2f}M, {str(network.dtype).removeprefix('torch.')}, batch "
        f"{case.batch_size}, {device_name(case.student.device)}, {torch.get_num_threads()} threads; ms a call",
        f"{'':{wide}s} {' '.join(columns)}" + ("" if rows[0].peak is None else f" {'peak GiB':>9s}"),
    ]
    for row in rows:
        parts = [row.milliseconds(part) for part in PARTS] + [1000 * row.latency.seconds]
        peak = "" if row.peak is None else f" {row.peak:9.2f}"
        lines.append(
            f"{f'{row.name}, {row.setup}':{wide}s} {row.steps:5d} {row.latency.passes:6g} "
            + " ".join(f"{value:12.2f}" for value in parts)
            + f" {row.latency.shares['rest']:6.1%} {row.latency.images_per_second:9.2f}{peak}"
        )
    teacher, students = rows[0], rows[1:]
    for row in students[:2]:
        own = speed_up(teacher, row)
        lines.append(
            f"{row.setup}: {own['speed_up']:.1f} x the teacher's speed; {own['passes']:g} x fewer passes "
            f"({own['speed_up'] / own['passes']:.2f} of it; the denoiser alone {own['denoiser'] / own['passes']:.2f}); "
            f"the parts allow {own['allowed']:.1f} ({own['speed_up'] / own['allowed']:.2f} of it)"
        )
    cost = negative_cost(case)
    if cost is not None:
        lines.append(
            f"a negative prompt: the pass's cross-attentions take {cost['plain']:.2f} ms without, {cost['fused']:.2f} "
            f"with both branches in one call, {cost['two']:.2f} in two ({cost['fused'] / cost['two']:.2f} of it)"
        )
    return "\n".join(lines)


def negative_cost(case: Inference) -> dict[str, float] | None:
    """Milliseconds of one pass's cross-attentions: plain, and with a negative prompt in one call of both branches and
    in two; None for a pipeline without cross-attention.  Medians of interleaved runs on the pass's own tensors."""
    stock = case.student
    if stock.condition_kind != "prompt" or not _cross(stock):
        return None
    asked: list[tuple[nn.Module, tuple, dict]] = []
    hooks = [
        module.register_forward_pre_hook(lambda m, a, k: asked.append((m, a, k)), with_kwargs=True)
        for module in _cross(stock)
    ]
    noise = torch.randn(case.batch_size, *stock.noise_shape, generator=torch.Generator().manual_seed(0))
    try:
        stock.generate(["a picture"] * case.batch_size, noise, 1, None, case.student_guidance)
    finally:
        for hook in hooks:
            hook.remove()
    calls = [(module, args[0], kwargs["encoder_hidden_states"]) for module, args, kwargs in asked]
    processor, clock = AttentionProcessor(), Clock(stock.device)

    def two(attn: nn.Module, hidden: Tensor, text: Tensor) -> Tensor:
        query, *rows = (
            projection(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projection, x in [(attn.to_q, hidden), *[(p, text) for p in (attn.to_k, attn.to_v) * 2]]
        )
        branches = (attend(query, *rows[i : i + 2], None, None) for i in (0, 2))
        return attn.to_out[0](subtract_negative(*branches, 0.5).transpose(1, 2).flatten(2))

    ways = {
        "plain": lambda m, h, t: processor(m, h, t),
        "fused": lambda m, h, t: processor(m, h, t, negative_hidden_states=t, negative_scale=0.5),
        "two": two,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for _ in range(4 * case.repeats + 1):
            for name, way in ways.items():
                start = clock.now()
                for call in calls:
                    way(*call)
                times[name].append(clock.now() - start)
    return {name: 1000 * statistics.median(own[1:]) for name, own in times.items()}


def _cross(stock: StockPipeline) -> list[nn.Module]:
    return [m for m in find_attention(stock.denoiser) if getattr(m, "is_cross_attention", False)]


def case_of(
    student: str | None,
    teacher: str | None,
    random_size: str | None,
    device: str,
    dtype: torch.dtype,
    **settings: Any,
) -> Inference:
    """What is to be measured: a student's folder and its teacher's, or a pipeline of random weights.

    Raises:
        UserError: both or neither are named, or as :func:`of_folders` and :func:`of_random`.
    """
    if (student is None) == (random_size is None):
        raise UserError("name a student's folder, or a --random-size")
    if student is None:
        return of_random(random_size, device, dtype, **settings)
    return of_folders(student, teacher, device, dtype, **settings)


def of_folders(student: str, teacher: str | None, device: str, dtype: torch.dtype, **settings: Any) -> Inference:
    """A student's folder and its teacher's: by default the one that its run's config names, or its provenance.

    Raises:
        UserError: no such folder, or a student that does not say its teacher.
    """
    own = StockPipeline.load(assets.resolve(student), device, dtype)
    facts = {"teacher": teacher} if teacher else own.provenance | _teacher_of_run(Path(student).parent)
    if facts.get("teacher") is None:
        raise UserError(f"{student}: does not say what it was distilled from; name its teacher by --teacher")
    steps = settings.pop("steps", None) or own.default_steps or 1
    folder = hub_folder(assets.resolve(facts["teacher"]), facts.get("teacher_revision"))
    if teacher is None and not Path(folder).is_dir():
        raise UserError(
            f"{student}: was distilled from {facts['teacher']}, which is no folder here nor in the hub's cache; name "
            "it by --teacher"
        )
    other = StockPipeline.load(folder, device, dtype, variant=facts.get("teacher_variant"))
    return Inference(own, other, steps, student_guidance=own.default_guidance, **settings)


def _teacher_of_run(run: Path) -> dict[str, Any]:
    """Where the teacher of a run is, as its provenance has it but with the whole path; {} where it is no run."""
    section = read_config(run).get("teacher")
    if not isinstance(section, dict) or not isinstance(section.get("path"), str):
        return {}
    return {"teacher": section["path"], **{f"teacher_{key}": section.get(key) for key in ("revision", "variant")}}


def of_random(size: str, device: str, dtype: torch.dtype, **settings: Any) -> Inference:
    """A pipeline with random weights as teacher, and as its one-step student.

    Raises:
        UserError: an unknown size.
    """
    if size not in PIPELINE_SIZES:
        raise UserError(f"--random-size {size}: sizes are {', '.join(PIPELINE_SIZES)}")
    stock = StockPipeline(random_pipeline(size, dtype).to(device), size)
    steps = settings.pop("steps", None) or 1
    return Inference(stock, stock, steps, student_guidance=0.0, **settings)


def check_ours(path: Path | None) -> None:
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


def write(path: Path, rows: list[Row]) -> None:
    """One JSON list.

    Raises:
        UserError: it cannot be written.
    """
    files.write_json(path, [row.as_dict() for row in rows])
