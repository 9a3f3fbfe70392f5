"""Drawing a target's pictures and taking their features, batch by batch, so that it can be stopped and shared.

The features of a batch are one file, written whole; a batch whose file exists is not drawn again.  A batch is a
function of (seed, batch) alone, so the numbers depend neither on stops nor on how many processes share the batches.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from stepdistill import files
from stepdistill.errors import UserError, reading
from stepdistill.eval.speed.latency import count_passes
from stepdistill.eval.stock_pipeline import StockPipeline
from stepdistill.eval.tensor_files import read_tensors
from stepdistill.finiteness import first_not_finite

from .draws import draw_batch, select_conditions, split_into_batches
from .targets import Target, count_steps
from .tools import Tools

KIND = "stepdistill.EvaluationBatch"


@dataclass(frozen=True)
class BatchFeatures:
    """What the judges say of pictures, a row each.

    Attributes:
        features: (N, F).
        scores: CLIP scores (N,), or None.
        rewards: (N,) by name.
        seconds, passes: of drawing alone; pictures through the networks.
    """

    features: Tensor
    scores: Tensor | None
    rewards: dict[str, Tensor]
    seconds: float
    passes: int

    def save(self, path: Path) -> None:
        """One safetensors file, whole or not at all."""
        tensors = {"features": self.features} | ({} if self.scores is None else {"scores": self.scores})
        tensors |= {f"reward/{name}": value for name, value in self.rewards.items()}
        files.write_tensors(path, tensors, {"kind": KIND, "seconds": repr(self.seconds), "passes": str(self.passes)})

    @classmethod
    def load(cls, path: Path) -> BatchFeatures:
        """From a file that :meth:`save` wrote.

        Raises:
            UserError: there is no such file, or it is damaged.
        """
        remedy = "every process must see the folder of the output"
        tensors, metadata = read_tensors(path, KIND, "file of a drawn batch", remedy)
        rewards = {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith("reward/")}
        with reading(path, "delete it, and its pictures are drawn again", "not a whole file of a drawn batch"):
            seconds, passes = float(metadata["seconds"]), int(metadata["passes"])
            return cls(tensors["features"], tensors.get("scores"), rewards, seconds, passes)

    @classmethod
    def join(cls, parts: Sequence[BatchFeatures]) -> BatchFeatures:
        """All rows in the parts' order, seconds and passes added."""
        scores = [part.scores for part in parts if part.scores is not None]
        return cls(
            torch.cat([part.features for part in parts]),
            torch.cat(scores) if scores else None,
            {name: torch.cat([part.rewards[name] for part in parts]) for name in parts[0].rewards},
            sum(part.seconds for part in parts),
            sum(part.passes for part in parts),
        )


def draw_share(
    target: Target, stock: StockPipeline, steps: int, guidance: float | None, seed: int, tools: Tools
) -> None:
    """Draw this process's share of the batches of ``seed`` that do not exist yet, each into its file.

    Raises:
        UserError: pixels, features or scores that are not numbers, or pictures that do not fit the extractor, reference
            or protocol.
    """
    protocol, processes = tools.protocol, tools.processes
    batches = list(enumerate(split_into_batches(protocol.samples, protocol.batch_size)))
    share = batches[processes.rank :: processes.world]
    missing = [(batch, indices) for batch, indices in share if not _is_drawn(tools, target, seed, batch, indices)]
    total = sum(len(indices) for _, indices in share)
    title = f"{target.name}, {count_steps(steps)}"
    if protocol.seeds > 1:
        title += f", seed {seed}"
    if processes.world > 1:
        title += f", 1 of {processes.world} processes"
    finished = total - sum(len(indices) for _, indices in missing)
    bar = tqdm(total=total, initial=finished, desc=title, unit="img", disable=not processes.main)
    with count_passes(stock) as passed, bar:
        for batch, indices in missing:
            before, started = passed[0], time.perf_counter()
            conditions = select_conditions(stock, indices, tools.prompts, protocol.labels)
            pixels = draw_batch(stock, steps, guidance, conditions, len(indices), seed, batch)
            seconds = time.perf_counter() - started
            features = extract_features(target, pixels, conditions, seconds, passed[0] - before, tools)
            if (folder := _picture_folder(tools, target, seed)) is not None:
                _save_pictures(tools.preprocessing.to_bytes(pixels), indices, folder)
            features.save(_batch_file(tools, seed, batch))
            bar.update(len(pixels))


def load_features(tools: Tools, seed: int) -> BatchFeatures:
    """The features of all batches of ``seed``, in their order, whoever drew them."""
    count = len(split_into_batches(tools.protocol.samples, tools.protocol.batch_size))
    return BatchFeatures.join([BatchFeatures.load(_batch_file(tools, seed, batch)) for batch in range(count)])


@torch.no_grad()
def extract_features(
    target: Target, pixels: Tensor, conditions: list | None, seconds: float, passes: int, tools: Tools
) -> BatchFeatures:
    """Features, scores and rewards of pixels (B, C, H, W) in [0, 1].

    Raises:
        UserError: as :func:`draw_share`.
    """
    side = tools.protocol.drawn_side
    if side is not None and tuple(pixels.shape[-2:]) != (side, side):
        raise UserError(
            f"{target.name} ({target.path}): draws {pixels.shape[-1]}x{pixels.shape[-2]} pictures, and this protocol "
            f"is of {side}x{side}; measure a pipeline of that size, or set drawn_side"
        )
    pictures = tools.preprocessing.to_bytes(pixels)
    processed = tools.preprocessing(pictures)
    channels, height, width = processed.shape[1:]
    tools.reference.check(tools.extractor, (channels, height, width))
    features = tools.extractor(processed.to(tools.device))
    scores = None
    if tools.scorer is not None:
        same = tools.clip_preprocessing == tools.preprocessing
        scores = tools.scorer(processed if same else tools.clip_preprocessing(pictures), conditions or [])
    signed = 2 * pixels.to(tools.device) - 1
    rewards = {reward.name: reward(signed, conditions or []).float().cpu() for reward in tools.rewards}
    judged = {"the CLIP score": scores} | {f"reward {name}": values for name, values in rewards.items()}
    if odd := first_not_finite((name, values) for name, values in judged.items() if values is not None):
        raise UserError(f"{odd}: gave numbers that are not finite for pictures of {target.name}; leave it out")
    return BatchFeatures(features, scores, rewards, seconds, passes)


# -- files ---------------------------------------------------------------------------------------------------


def _batch_file(tools: Tools, seed: int, batch: int) -> Path:
    return tools.work / f"seed-{seed}" / f"{batch:06d}.safetensors"


def _picture_folder(tools: Tools, target: Target, seed: int) -> Path | None:
    """``FOLDER/NAME-STEPS``, or ``FOLDER/NAME-STEPS/seed-SEED`` of several seeds; what is odd in a name is ``_``.

    None where no pictures are wanted.
    """
    if tools.keep_samples is None:
        return None
    steps = "" if target.steps is None else f"-{target.steps}"
    folder = tools.keep_samples / (re.sub(r"[^\w.-]+", "_", target.name) + steps)
    return folder / f"seed-{seed}" if tools.protocol.seeds > 1 else folder


def _picture_file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def _save_pictures(pictures: Tensor, indices: range, folder: Path) -> None:
    arrays = pictures.permute(0, 2, 3, 1).cpu().numpy()
    for index, array in zip(indices, arrays, strict=True):
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        with files.replacing(_picture_file(folder, index)) as temporary:
            image.save(temporary, format="PNG")


def _is_drawn(tools: Tools, target: Target, seed: int, batch: int, indices: range) -> bool:
    """Whether a batch was drawn before a stop; its pictures are written before its file, so the last one will do."""
    if not _batch_file(tools, seed, batch).is_file():
        return False
    folder = _picture_folder(tools, target, seed)
    return folder is None or _picture_file(folder, indices[-1]).is_file()


def has_pictures(tools: Tools, target: Target) -> bool:
    """Whether all pictures of a target are in their folder, or the user wants none."""
    folders = [_picture_folder(tools, target, seed) for seed in tools.protocol.list_seeds()]
    indices = range(tools.protocol.samples)
    return all(_picture_file(folder, index).is_file() for folder in folders if folder is not None for index in indices)
