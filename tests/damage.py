"""Damaged files, mutated configs and odd values, each given to the command that reads it, in a process of its own.

``python tests/damage.py --seed 0 --files 600 --configs 500`` builds a small world of teachers, data, judges and
finished runs, tries every case and prints the counts.  A case passes when its command ends with 0, 2 or 130, with no
traceback and at most one error line, before its time is up, and when changed weights or statistics that stepdistill
wrote are noticed.  Cases are functions of the seed; they run forked from one process that has loaded everything.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import numpy as np
import tiny
import torch
import yaml
from console import stepdistill
from PIL import Image
from safetensors.torch import save_file

from stepdistill.cli import main as cli
from stepdistill.config import merge, read_yaml
from stepdistill.data.arrays import read_npz
from stepdistill.eval.extractors.load import as_extractor
from stepdistill.eval.extractors.small import FeatureNetwork
from stepdistill.eval.measure.reference_statistics import make_reference
from stepdistill.files import write_tensors
from stepdistill.judges.contrastive import MatchingNetwork
from stepdistill.readers import read_tensors
from stepdistill.trainers.teachers import captioned

CPU_SECONDS, WALL_SECONDS = 20, 120
"""What a case may take: of its processor's time, and in all (a busy machine is no hang; waiting for nothing is)."""
MEMORY = 16 * 2**30
PASSES = (0, 2, 130)
CONFIGS = Path(__file__).parents[1] / "configs"

# -- the world ---------------------------------------------------------------------------------------------------

TRAIN = {"updates": 2, "batch_size": 2, "sample_count": 2, "checkpoint_every": 1, "log_every": 1, "trackers": []}
JUDGE = {"extractor": "judges/features.safetensors", "reference": "judges/reference.safetensors"}
LABEL = {"teacher": {"path": "teachers/label", "steps": 2}}
TEXT = {"teacher": {"path": "teachers/text", "steps": 2}, "data": {"prompts": "data/prompts.txt"}}
LOOP = {"steps": 2, "batch_size": 4, "warmup": 1, "save_every": 1}
RUNS: dict[str, dict[str, Any]] = {
    "full": {"method": "dmd2", "dmd2": {"fake_score_updates": 1}, **LABEL},
    "lora": {"method": "dmd2", "dmd2": {"fake_score_updates": 1}, "roles": {"weights": "shared"}, **TEXT},
    "several": {"method": "dmd2", "dmd2": {"fake_score_updates": 1}, "msd": {"students": 2}, **LABEL},
    "pairs": {"method": "regression", "regression": {"count": 4, "shard": 2}, **LABEL},
    "path": {"method": "disback", "disback": {"nodes": 2, "updates": 2, "hold": 1, "probe": 2}, **LABEL},
    "tsm": {
        "method": "tsm",
        **merge(TEXT, {"data": {"images": {"npz": "data/captioned/training.npz"}}}),
    },
    "pso": {
        "method": "pso",
        "sampler": {"steps": 2, "transition": "ode"},
        "pso": {
            "rewards": [{"reward": "clip", "clip": {"model": "judges/matching.safetensors"}}],
            "rollout_transition": "renoise",
            "probe": 2,
        },
        **TEXT,
    },
}
"""Runs of two updates; what they share is in :func:`run_config`."""
SMALL = ("full",)
"""The runs that a quick sample builds."""


def run_config(name: str) -> dict[str, Any]:
    shared = {"output": f"runs/{name}", "train": TRAIN, "roles": {"lora": {"rank": 2}}}
    evaluation = {"enabled": False, "samples": 4, "batch_size": 4, "latency": False}
    shared["evaluation"] = evaluation | ({} if "prompts" in RUNS[name].get("data", {}) else JUDGE)
    return merge(shared, RUNS[name])


TEACHERS = {
    "teacher": {
        "output": "trained/teacher",
        "data": {"npz": "data/images.npz", "num_labels": 3},
        "network": {"block_channels": [8, 8]},
        **LOOP,
    },
    "text_teacher": {
        "kind": "text_to_image",
        "output": "trained/text",
        "data": "data/captioned",
        "vae": {**LOOP, "block_channels": [8, 8]},
        "text": {"vocabulary": 530, "max_tokens": 12, "width": 8, "layers": 1, "heads": 2},
        "denoiser": {**LOOP, "block_channels": [16, 16], "attention": [False, True], "heads": 2},
        "samples": {"prompts": ["clock"], "steps": 2},
    },
    "features": {
        "output": "trained/features",
        "source": "noise",
        "train": {"npz": "data/images.npz"},
        "test": {"npz": "data/images.npz"},
        "num_labels": 3,
        "num_features": 4,
        "width": 8,
        "epochs": 1,
        "batch_size": 4,
        "packed_images": 3,
    },
    "matching": {
        "kind": "matching",
        "output": "trained/matching",
        "source": "noise",
        "data": "data/captioned",
        "num_features": 4,
        "width": 8,
        "steps": 2,
        "batch_size": 4,
    },
}
LENGTHS = {
    "teacher": ["steps=2"],
    "text_to_image": ["vae.steps=2", "denoiser.steps=2"],
    "features": ["epochs=1"],
    "matching": ["steps=2"],
}
"""What a mutated config of a teacher is given beside it, so that one that lost its length does not train for hours."""
COMPARE = {
    "output": "compared",
    "runs": {"A": "full.yaml", "B": {"config": "full.yaml", "overrides": ["optimizer.student.lr=0.002"]}},
    "overrides": ["train.updates=50"],
    "passes": 60,
    "points": 2,
    "samples": 4,
    "final_samples": 5,
}


def build(root: Path, whole: bool) -> None:
    """Make the world in ``root``; the working folder is there afterwards.

    Args:
        whole: all runs, trained teachers and a comparison, not the first run alone.
    """
    root.mkdir(parents=True, exist_ok=True)
    os.chdir(root)
    tiny.save_pixels(Path("teachers/label"), "v", labels=3, null=True, size=16)
    tiny.save_stable_diffusion(Path("teachers/text"))
    shutil.rmtree("teachers/text-tokenizer")
    _data()
    _judges()
    Path("configs").mkdir()
    for name in RUNS:
        _write_yaml(name, run_config(name))
    for name, config in TEACHERS.items():
        _write_yaml(name, config)
    _write_yaml("compare", COMPARE)
    shutil.copytree(CONFIGS, "shipped")
    for name in RUNS if whole else SMALL:
        _do("distill", f"configs/{name}.yaml")
    _do("evaluate", "runs/full")
    _do("report", "runs/full")
    shutil.copytree("runs/full", "runs/copy")
    if not whole:
        return
    for name in ("teacher", "text_teacher"):
        _do("teacher", "train", f"configs/{name}.yaml")
    for name in ("A", "B"):
        _do("compare", "configs/compare.yaml", "--only", name)
    _do("compare", "configs/compare.yaml", "--finished")


def _do(*arguments: str) -> None:
    result = stepdistill(*arguments)
    if result.code != 0:
        raise RuntimeError(f"{' '.join(arguments)}: {result.err}")


def _write_yaml(name: str, content: dict[str, Any]) -> None:
    Path(f"configs/{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def _data() -> None:
    draw = np.random.default_rng(0)
    Path("data/pictures").mkdir(parents=True)
    pixels = draw.integers(0, 255, (12, 16, 16), dtype=np.uint8)
    np.savez("data/images.npz", images=pixels, labels=np.arange(12) % 3)
    names = ["red heart", "blue heart", "grinning face", "cat face", "up arrow", "clock"]
    words = [captioned.Entry(f"{n}, {s} style", n, s, ["round"]) for n in names for s in ("noto", "flat")]
    words[0].split = "held-out-pair"
    pictures = draw.integers(0, 255, (12, 16, 16, 3), dtype=np.uint8)
    captioned.write_pictures(Path("data/captioned"), pictures, words, [])
    Path("data/prompts.txt").write_text("a cat\na dog\nthree birds\na tree\nno tree\nthe sea\n")
    Path("data/prompts.csv").write_text("text,style\na cat,flat\na dog,round\n")
    Path("data/prompts.jsonl").write_text('{"text": "a cat"}\n{"text": "a dog"}\n')
    for number, picture in enumerate(pictures[:3]):
        Image.fromarray(picture).save(f"data/pictures/{number}.png")
    for side in ("winner", "loser"):
        Path(f"data/preferences/{side}").mkdir(parents=True)
        Image.fromarray(pictures[4]).save(f"data/preferences/{side}/a.png")
        Path(f"data/preferences/{side}/a.txt").write_text("a cat")
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}) for number in range(3)]
    Path("data/pictures/metadata.jsonl").write_text("\n".join(lines) + "\n")


def _judges() -> None:
    torch.manual_seed(0)
    network = FeatureNetwork(1, 3, 4, 8, "judge")
    images = read_npz("data/images.npz", (1, 16, 16))
    network.save("judges/features.safetensors")
    make_reference(images, as_extractor(network.eval()), "noise").save("judges/reference.safetensors")
    np.savez("judges/moments.npz", mu=np.zeros(4), sigma=np.eye(4))
    matching = MatchingNetwork(16, 4, 8, 4)
    write_tensors("judges/matching.safetensors", matching.state_dict(), matching.metadata())


# -- what reads what ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A file and the commands that read it.

    ``ours``: stepdistill wrote it with a digest, so that a changed number must be noticed (or the file made anew).
    """

    path: str
    commands: tuple[str, ...]
    ours: bool = False


DRY = "distill configs/{}.yaml output=new --dry-run"
SAMPLE = "sample {} --count 1 --steps 2 --output out.png"
LABEL_COMMANDS = (
    DRY.format("full"),
    SAMPLE.format("teachers/label"),
    "evaluate teachers/label@2 --samples 4 --set batch_size=4 --extractor judges/features.safetensors "
    "--reference judges/reference.safetensors --output e.json",
    "merge teachers/label teachers/label --output merged",
)
TEXT_COMMANDS = (DRY.format("lora"), SAMPLE.format("teachers/text") + " --prompt cat")
STUDENT = (SAMPLE.format("runs/full"), "evaluate runs/full", "merge runs/full/student runs/full/student --output m")
RESUME = "distill configs/{0}.yaml train.updates=3 --resume"
CHECKPOINT = (RESUME.format("full"), "export runs/full --output exported")
JUDGED = (DRY.format("full") + " evaluation.enabled=true", "evaluate runs/full --samples 5")
MOMENTS = (
    "evaluate teachers/label@2 --samples 4 --set batch_size=4 --extractor judges/features.safetensors "
    "--reference judges/moments.npz --output e.json"
)
PICTURES = DRY.format("tsm") + " data.images.npz= data.images.folder=data/pictures"

TRAINING, TEXT_TRAINING = (f"teacher train configs/{name}.yaml" for name in ("teacher", "text_teacher"))

SMALL_TARGETS = [
    *(Target(f"teachers/label/{name}", LABEL_COMMANDS) for name in ("model_index.json", "unet/config.json")),
    Target("teachers/label/scheduler/scheduler_config.json", LABEL_COMMANDS),
    Target("teachers/label/unet/diffusion_pytorch_model.safetensors", LABEL_COMMANDS),
    *(Target(f"runs/full/student/{name}", STUDENT) for name in ("model_index.json", "unet/config.json")),
    Target("runs/full/student/scheduler/scheduler_config.json", STUDENT),
    Target("runs/full/student/unet/diffusion_pytorch_model.safetensors", STUDENT, ours=True),
    Target("runs/full/student/stepdistill.json", STUDENT),
    Target("runs/full/config.yaml", ("report runs/full", "evaluate runs/full", *CHECKPOINT)),
    Target("runs/full/metrics.jsonl", ("report runs/full", "report runs/full runs/copy", *CHECKPOINT)),
    Target("runs/full/environment.json", ("report runs/full", *CHECKPOINT)),
    Target("runs/full/evaluation.json", ("report runs/full", "evaluate runs/full")),
    Target("runs/full/grid.png", ("report runs/full", "evaluate runs/full")),
    Target("runs/full/checkpoints/step-00000002/state.json", CHECKPOINT),
    Target("runs/full/checkpoints/step-00000002/student.safetensors", CHECKPOINT, ours=True),
    Target("runs/full/checkpoints/step-00000002/fake_score.safetensors", CHECKPOINT, ours=True),
    Target("runs/full/checkpoints/step-00000002/optimizer-student.safetensors", CHECKPOINT, ours=True),
    Target("runs/full/checkpoints/step-00000002/noise.safetensors", CHECKPOINT, ours=True),
    Target("judges/features.safetensors", JUDGED, ours=True),
    Target("judges/reference.safetensors", JUDGED, ours=True),
    Target("judges/moments.npz", (MOMENTS,)),
    Target("configs/full.yaml", (DRY.format("full"),)),
]
TARGETS = [
    *SMALL_TARGETS,
    *(
        Target(f"teachers/text/{name}", TEXT_COMMANDS)
        for name in (
            "model_index.json",
            "unet/config.json",
            "vae/config.json",
            "text_encoder/config.json",
            "tokenizer/tokenizer.json",
            "tokenizer/tokenizer_config.json",
            "scheduler/scheduler_config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
        )
    ),
    Target(
        "runs/lora/student/lora/pytorch_lora_weights.safetensors",
        (DRY.format("lora") + " roles.lora_from=runs/lora/student",),
        ours=True,
    ),
    Target(
        "runs/full/student/unet/diffusion_pytorch_model.safetensors",
        (DRY.format("full") + " roles.student_from=runs/full/student",),
        ours=True,
    ),
    *(
        Target(f"runs/several/student/{name}", (SAMPLE.format("runs/several"), "evaluate runs/several"))
        for name in ("msd.json", "student-0/scheduler/scheduler_config.json", "student-1/unet/config.json")
    ),
    Target("runs/several/student/router.json", (SAMPLE.format("runs/several"),)),
    Target("runs/several/router.json", ("distill configs/several.yaml --resume",)),
    Target(
        "runs/several/student/student-1/unet/diffusion_pytorch_model.safetensors",
        ("evaluate runs/several",),
        ours=True,
    ),
    Target(
        "runs/several/student-0/student/unet/diffusion_pytorch_model.safetensors",
        ("distill configs/several.yaml --resume",),
    ),
    Target("runs/several/config.yaml", ("report runs/several", "distill configs/several.yaml --resume")),
    Target("runs/pairs/pairs/pairs-00000.safetensors", (RESUME.format("pairs"),), ours=True),
    Target("runs/path/nodes/path.json", (RESUME.format("path"), "report runs/path")),
    Target("runs/tsm/cache/*.safetensors", (RESUME.format("tsm"),)),
    Target("judges/matching.safetensors", (DRY.format("pso"),), ours=True),
    Target(
        "data/images.npz", ("teacher train configs/teacher.yaml output=t", "teacher features configs/features.yaml")
    ),
    Target("data/captioned/training.npz", (DRY.format("tsm"),)),
    *(
        Target(
            f"data/captioned/{name}",
            (f"{TEXT_TRAINING} output=t", "teacher features configs/matching.yaml"),
        )
        for name in ("images.npz", "captions.json")
    ),
    *(
        Target(f"data/prompts.{suffix}", (DRY.format("lora") + f" data.prompts=data/prompts.{suffix}",))
        for suffix in ("txt", "csv", "jsonl")
    ),
    Target("data/pictures/1.png", (PICTURES,)),
    Target("data/pictures/metadata.jsonl", (PICTURES,)),
    Target("trained/teacher.partial", ("teacher train configs/teacher.yaml steps=3",), ours=True),
    Target(
        "trained/text.work/denoiser.partial", ("teacher train configs/text_teacher.yaml denoiser.steps=3",), ours=True
    ),
    *(
        Target(f"trained/text.work/{name}", (f"{TEXT_TRAINING} denoiser.steps=3",))
        for name in (
            "latents.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
            "tokenizer/tokenizer.json",
        )
    ),
    *(
        Target(f"compared/{name}", ("compare configs/compare.yaml --finished",))
        for name in (
            "evaluation.json",
            "teacher.json",
            "compare.json",
            "A/cost.json",
            "A/distances.json",
            "A/config.yaml",
        )
    ),
    Target("configs/compare.yaml", ("compare configs/compare.yaml --finished",)),
    Target("configs/several.yaml", (DRY.format("several"),)),
    Target("configs/teacher.yaml", (f"{TRAINING} output=t",)),
]

# -- damage ------------------------------------------------------------------------------------------------------

EXTREMES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3.5,
    10**12,
    -(10**12),
    10**400,
    1e308,
    float("nan"),
    float("inf"),
]
EXTREMES += ["", "a", "0", "1e999", "../../x", "x" * 300, "\u0000", "\ud800", "é", [], [1], ["a"], {}, {"a": 1}, [[[]]]]


def _whole_file(draw: random.Random, path: Path) -> str:
    """Damage that any file can have; its name."""
    raw = path.read_bytes()
    kinds = "cut flip flips empty noise text json png huge folder pipe device dangling missing twice zeros"
    kind = draw.choice(kinds.split())
    if kind in ("flip", "flips") and raw:
        changed = bytearray(raw)
        for _ in range(1 if kind == "flip" else 40):
            changed[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
    elif kind == "huge":
        with path.open("r+b") as file:
            file.truncate(40 * 2**30)
    elif kind in ("folder", "pipe", "device", "dangling", "missing"):
        path.unlink()
        make = {
            "folder": path.mkdir,
            "pipe": lambda: os.mkfifo(path),
            "device": lambda: path.symlink_to("/dev/zero"),
            "dangling": lambda: path.symlink_to("gone"),
            "missing": lambda: None,
        }
        make[kind]()
    else:
        contents = {
            "cut": raw[: draw.randrange(max(1, len(raw)))],
            "empty": b"",
            "noise": draw.randbytes(draw.choice([1, 100, 10_000])),
            "text": b"to be or not to be\n" * 20,
            "json": json.dumps(draw.choice([x for x in EXTREMES if x != 10**400])).encode(),
            "png": b"\x89PNG\r\n\x1a\n" + draw.randbytes(200),
            "twice": raw + raw,
            "zeros": bytes(len(raw)),
        }
        path.write_bytes(contents.get(kind, raw[:-1]))
    return kind


def mutate(draw: random.Random, value: Any, times: int = 1) -> Any:
    """A nested value with so many of its entries swapped, deleted, doubled or replaced by something extreme."""
    for _ in range(times):
        value = _mutated_once(draw, value)
    return value


def _mutated_once(draw: random.Random, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return draw.choice(EXTREMES)
    if isinstance(value, list):
        place = draw.randrange(len(value))
        if draw.random() < 0.2:
            return [*value[:place], *value[place + 1 :]]
        return [*value[:place], _mutated_once(draw, value[place]), *value[place + 1 :]]
    key = draw.choice(list(value))
    rest = {k: v for k, v in value.items() if k != key}
    action = draw.random()
    if action < 0.15:
        return rest
    if action < 0.25:
        return {**rest, draw.choice(["x", "", "a.b", *map(str, value)]): value[key]}
    if action < 0.35:
        return {**value, key: value[draw.choice(list(value))]}
    return {**value, key: _mutated_once(draw, value[key])}


def _json_file(draw: random.Random, path: Path) -> str:
    """Another value somewhere in a JSON file."""
    path.write_text(json.dumps(mutate(draw, json.loads(path.read_text()), draw.randint(1, 3))))
    return "mutated"


def _lines_file(draw: random.Random, path: Path) -> str:
    """Lines that are none of a .jsonl file, or its rows changed."""
    lines = path.read_text().splitlines()
    place = draw.randrange(len(lines) + 1)
    odd = draw.choice(["3", "[]", "null", "{}", "{", '"a"', json.dumps(mutate(draw, json.loads(lines[0]), 2))])
    path.write_text("\n".join([*lines[:place], odd, *lines[place:]]) + "\n")
    return "odd line"


def _tensors_file(draw: random.Random, path: Path) -> str:
    """Other tensors or metadata in a safetensors file, the digest in it as it was."""
    tensors, metadata = read_tensors(path)
    name = draw.choice(sorted(tensors))
    value = tensors[name]
    kind = draw.choice(
        [
            "changed",
            "changed",
            "changed",
            "nan",
            "dropped",
            "renamed",
            "reshaped",
            "retyped",
            "more",
            "metadata",
            "unmarked",
            "header",
        ]
    )
    if kind == "changed":
        raw = value.contiguous().view(-1).view(torch.uint8).clone()
        raw[draw.randrange(max(1, len(raw)))] ^= 1 << draw.randrange(8)
        tensors[name] = raw.view(value.dtype).view(value.shape)
    elif kind == "nan" and value.is_floating_point():
        tensors[name] = torch.full_like(value, float("nan"))
    elif kind == "dropped":
        del tensors[name]
    elif kind == "renamed":
        tensors[f"{name}.x"] = tensors.pop(name)
    elif kind == "reshaped":
        tensors[name] = torch.zeros(draw.choice([(0,), (1,), (3, 3), (2, 2, 2, 2)]), dtype=value.dtype)
    elif kind == "retyped":
        tensors[name] = value.to(draw.choice([torch.int64, torch.float64, torch.bool, torch.float16]))
    elif kind == "more":
        tensors["more"] = torch.zeros(2)
    elif kind == "header":
        size = draw.choice([2**63, 2**40, 10**8, 0])
        path.write_bytes(size.to_bytes(8, "little") + path.read_bytes()[8:])
        return kind
    else:
        metadata = {} if kind == "unmarked" else {k: draw.choice(["", "x", "[]", "NaN", "-1"]) for k in metadata}
    save_file(tensors, path, metadata or None)
    return kind


def _npz_file(draw: random.Random, path: Path) -> str:
    """Other arrays in an .npz file."""
    with np.load(path) as file:
        arrays = dict(file)
    name = draw.choice(sorted(arrays))
    kind = draw.choice(["objects", "retyped", "reshaped", "dropped", "empty", "header", "nan"])
    if kind == "objects":
        arrays[name] = np.array([{}, 3], dtype=object)
    elif kind == "retyped":
        arrays[name] = arrays[name].astype(draw.choice(["U8", "f8", "i1", "c16", "?"]))
    elif kind == "reshaped":
        arrays[name] = arrays[name].reshape(-1)[: draw.randrange(1, 9)]
    elif kind == "dropped":
        del arrays[name]
    elif kind == "empty":
        arrays[name] = arrays[name][:0]
    elif kind == "nan":
        arrays[name] = np.full(arrays[name].shape, np.nan)
    np.savez(path, **arrays)
    if kind == "header":
        buffer = io.BytesIO()
        shape = draw.choice([(10**13,), (10**6, 10**7), (-1, 3), (2,)])
        np.lib.format.write_array_header_1_0(buffer, {"descr": "<f8", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{name}.npy", buffer.getvalue() + bytes(8))
    return kind


FORMATS: dict[str, Callable[[random.Random, Path], str]] = {
    ".json": _json_file,
    ".jsonl": _lines_file,
    ".safetensors": _tensors_file,
    ".partial": _tensors_file,
    ".npz": _npz_file,
}
UNNOTICED = {"changed", "nan", "dropped", "renamed", "reshaped", "retyped", "more"}
"""Damage to tensors that a command must not pass over where the file is ours."""


def damage(draw: random.Random, path: Path) -> str:
    """Damage one file; the kind of damage."""
    mutate_format = FORMATS.get(path.suffix)
    if mutate_format is not None and draw.random() < 0.6:
        return mutate_format(draw, path)
    return _whole_file(draw, path)


# -- cases -------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A command in a folder of its own, and what became of it.

    ``prepare`` changes a copy of the world and gives the words of the command; ``noticed``: it must not end with 0, but
    where a note says that the damaged file is made again.
    """

    kind: str
    name: str
    prepare: Callable[[], tuple[list[str], bool]]
    command: list[str] = field(default_factory=list)
    noticed: bool = False
    code: int | None = None
    text: str = ""
    seconds: float = 0.0

    @property
    def problem(self) -> str | None:
        """What is wrong with how it ended; None: nothing."""
        errors = [line for line in self.text.replace("\r", "\n").splitlines() if line.startswith("stepdistill: ")]
        if self.code is None:
            return "hang"
        if "Traceback (most recent call last)" in self.text:
            return "traceback"
        if self.code not in PASSES:
            return f"exit code {self.code}"
        if self.code == 2 and len(errors) != 1:
            return f"{len(errors)} error lines"
        if self.code == 0 and errors:
            return "an error line with exit code 0"
        renewed = "it is made again" in self.text
        return "silent" if self.code == 0 and self.noticed and not renewed else None


def file_cases(seed: int, count: int, targets: list[Target]) -> Iterator[Case]:
    """Damaged files: every target in turn, its commands and damage by chance."""
    for number, target in zip(range(count), itertools.cycle(targets), strict=False):

        def prepare(number=number, target=target) -> tuple[list[str], bool]:
            draw = random.Random(f"{seed} file {number}")
            (path,) = Path().glob(target.path)
            before = path.read_bytes()
            path.unlink()
            path.write_bytes(before)  # a file of its own: the world's are links
            kind = damage(draw, path)
            same = path.is_file() and path.stat().st_size == len(before) and path.read_bytes() == before
            Path("damage.txt").write_text(kind)
            return draw.choice(target.commands).split(" "), target.ours and kind in UNNOTICED and not same

        yield Case("files", f"files {number}: {target.path}", prepare)


def shipped() -> list[tuple[Path, str, dict[str, Any]]]:
    """Every shipped config with the command that takes it, on the world's teachers and data."""
    cases = []
    for path in sorted(CONFIGS.rglob("*.yaml")):
        raw = read_yaml(path)
        if "runs" in raw:
            cases.append((path, "compare {} --finished", raw))
        elif "teacher" not in raw:
            verb = "teacher features" if "features" in path.stem else "teacher train"
            lengths = " ".join(LENGTHS[raw.get("kind", "features" if "train" in raw else "teacher")])
            cases.append((path, f"{verb} {{}} {lengths}", _short(raw)))
        else:
            cases.append((path, "distill {} output=new --dry-run", _on_tiny(raw)))
    return cases


def _on_tiny(raw: dict[str, Any]) -> dict[str, Any]:
    """A run's config with the world's teacher, prompts, images and judge in place of its own."""
    data = raw.get("data") or {}
    text = "prompts" in data or "prompt_dataset" in data
    student = f"runs/{'lora' if text else 'full'}/student"
    few = raw.get("method") == "pso"  # it tunes a model of few steps
    teacher = {"path": student if few else f"teachers/{'text' if text else 'label'}", "steps": 2}
    local = {key: _local(value, student) for key, value in raw.items() if key not in ("data", "teacher")}
    local["teacher"] = {**{k: v for k, v in raw["teacher"].items() if k not in ("revision", "variant")}, **teacher}
    local["data"] = {key: value for key, value in data.items() if key not in ("prompts", "prompt_dataset", "shown")}
    if text:
        local["data"]["prompts"] = "data/prompts.txt"
    if "images" in data:
        local["data"]["images"] = {"npz": "data/captioned/training.npz" if text else "data/images.npz"}
    train = {"batch_size": 2, "gradient_accumulation": 1, "trackers": []}
    evaluation = {"extractor": None, "reference": None}
    return merge(local, {"train": train, "evaluation": evaluation})


def _local(value: Any, student: str, key: str = "") -> Any:
    """Rewards, CLIP models and students that are not here replaced by ones that are."""
    if isinstance(value, list):
        return [_local(entry, student) for entry in value]
    if not isinstance(value, dict):
        return {"student_from": student, "distance": "mse", "rank": 2}.get(key, value)
    if "reward" in value:
        parts = {k: v for k, v in value.items() if k in ("weight", "hinge")}
        return {**parts, "reward": "stepdistill.judges.rewards:Brightness"}
    if key == "clip":
        gone = ("pretrained", "hub", "decoder")
        return {**{k: v for k, v in value.items() if k not in gone}, "model": "judges/matching.safetensors"}
    if key == "negatives":
        return {**value, "prompts": "data/prompts.txt"}
    if key == "pairs":
        return {"folder": "data/preferences", "resize": True}
    return {k: _local(v, student, k) for k, v in value.items() if k != "decoder"}


def _short(raw: dict[str, Any]) -> dict[str, Any]:
    """The config of a teacher or judge, small, of one step, on the world's data."""
    if raw.get("kind") == "text_to_image":
        return merge(raw, {**TEACHERS["text_teacher"], "output": "t"})
    if raw.get("kind") == "matching":
        return merge(raw, {**TEACHERS["matching"], "output": "t"})
    if "train" in raw:
        return {**raw, **TEACHERS["features"], "resolution": 16, "channels": 1, "output": "t"}
    small = {**TEACHERS["teacher"], "network": {"block_channels": [8, 8]}}
    return {**raw, **small, "output": "t"}


def config_cases(seed: int, count: int) -> Iterator[Case]:
    """Mutated configs: every shipped one in turn."""
    for number, (path, command, raw) in zip(range(count), itertools.cycle(shipped()), strict=False):

        def prepare(number=number, path=path, command=command, raw=raw) -> tuple[list[str], bool]:
            draw = random.Random(f"{seed} config {number}")
            mutated = mutate(draw, raw, draw.choice([1, 1, 2, 4]))
            text = yaml.safe_dump(mutated, sort_keys=False, allow_unicode=True)
            file = Path("shipped") / path.relative_to(CONFIGS).with_name("mutated.yaml")
            file.write_bytes(text.encode("utf-8", "surrogatepass"))
            return command.format(file).split(" "), False

        yield Case("configs", f"configs {number}: {path.relative_to(CONFIGS)}", prepare)


def odd_cases(texts: list[str], overrides: list[list[str]]) -> Iterator[Case]:
    """Hand-made YAMLs (``{good}`` stands for a good run's keys) and overrides of a good config."""
    good = yaml.safe_dump({**run_config("full"), "output": "new"}, sort_keys=False)
    for text in texts:

        def prepare(text=text) -> tuple[list[str], bool]:
            content = text.replace("{good}", good)
            Path("configs/odd.yaml").write_bytes(content.encode("utf-8", "surrogateescape"))
            return ["distill", "configs/odd.yaml", "--dry-run"], False

        yield Case("odd", f"odd: {text[:60]!r}", prepare)
    for words in overrides:
        command = ["distill", "configs/full.yaml", "output=new", *words, "--dry-run"]
        yield Case("odd", f"odd: {' '.join(words)[:60]!r}", lambda command=command: (command, False))


# -- running them ------------------------------------------------------------------------------------------------


def _copy(source: str, target: str) -> str:
    """A hard link for what is only ever replaced, a copy of what is written in place."""
    if not source.endswith(".jsonl"):
        os.link(source, target)
        return target
    return shutil.copy2(source, target)


def _in_child(case: Case, world: Path, folder: Path) -> None:
    """The whole life of a case's process."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    shutil.copytree(world, folder, copy_function=_copy, symlinks=True)
    os.chdir(folder)
    code = 1
    with (folder / "printed.txt").open("w", encoding="utf-8", errors="backslashreplace") as printed:
        try:
            case.command, case.noticed = case.prepare()
            (folder / "case.json").write_text(json.dumps([case.command, case.noticed]))
            sys.argv = ["stepdistill", *case.command]
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except BaseException:
            traceback.print_exc(file=printed)
    os._exit(code)


def run(cases: list[Case], world: Path, workers: int = 2) -> list[Case]:
    """Run every case in a fork of this process, so many at a time; they hold what became of them afterwards."""
    waiting, running = list(reversed(cases)), {}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="cases-") as scratch:
        numbers = itertools.count()
        while waiting or running:
            while waiting and len(running) < workers:
                case, folder = waiting.pop(), Path(scratch) / str(next(numbers))
                pid = os.fork()
                if pid == 0:
                    _in_child(case, world, folder)
                running[pid] = (case, folder, time.monotonic())
            time.sleep(0.005)
            for pid, (case, folder, started) in list(running.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if not ended and time.monotonic() - started < WALL_SECONDS:
                    continue
                if not ended:
                    os.killpg(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                elif os.WIFEXITED(status):
                    case.code = os.WEXITSTATUS(status)
                _collect(case, folder, time.monotonic() - started)
                del running[pid]
    return cases


def _collect(case: Case, folder: Path, seconds: float) -> None:
    case.seconds = seconds
    with contextlib.suppress(OSError, ValueError):
        case.command, case.noticed = json.loads((folder / "case.json").read_text())
    with contextlib.suppress(OSError):
        case.text = (folder / "printed.txt").read_text(encoding="utf-8", errors="replace")
    with contextlib.suppress(OSError):
        case.name += f" ({(folder / 'damage.txt').read_text()})"
    shutil.rmtree(folder, ignore_errors=True)


def counts(cases: list[Case]) -> str:
    """A line for each kind of case: how many ended how."""
    lines = []
    for kind in dict.fromkeys(case.kind for case in cases):
        of_kind = [case for case in cases if case.kind == kind]
        codes = collections.Counter(case.code for case in of_kind)
        problems = collections.Counter(case.problem for case in of_kind if case.problem)
        ended = ", ".join(f"{codes[code]} with {code}" for code in PASSES if codes[code])
        listing = ", ".join(f"{count} {what}" for what, count in sorted(problems.items())) or "none"
        lines.append(f"{kind:8s} {len(of_kind):4d} cases: {ended}; problems: {listing}")
    return "\n".join(lines)


def failures(cases: list[Case]) -> str:
    """What is wrong, case by case."""
    return "\n\n".join(
        f"{case.problem}: {case.name}\n  stepdistill {' '.join(case.command)}\n{case.text[-1500:]}"
        for case in cases
        if case.problem
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", type=int, default=600)
    parser.add_argument("--configs", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--world", type=Path, help="a folder to build the world in, or one that holds it")
    arguments = parser.parse_args()
    from odd_configs import OVERRIDES, TEXTS

    world = arguments.world or Path(tempfile.mkdtemp(prefix="world-"))
    if not (world / "compared").exists():
        build(world.resolve(), whole=True)
    cases = [
        *file_cases(arguments.seed, arguments.files, TARGETS),
        *config_cases(arguments.seed, arguments.configs),
        *odd_cases(TEXTS, OVERRIDES),
    ]
    started = time.monotonic()
    run(cases, world.resolve(), arguments.workers)
    print(failures(cases))
    print(counts(cases))
    print(f"{time.monotonic() - started:.0f} seconds")
    if arguments.world is None:
        shutil.rmtree(world)
    sys.exit(any(case.problem for case in cases))


if __name__ == "__main__":
    main()
