"""Drawing a target's pictures and looking at them, batch by batch, so that it can be stopped and shared.

What is kept of a batch is one file, written whole; a batch whose file is there is not drawn again.  A batch is a
function of (seed, batch) alone, so the numbers depend neither on stops nor on how many processes share the batches.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from stepdistill import files
from stepdistill.errors import UserError, reading
from stepdistill.eval.extractors.base import read_tensors
from stepdistill.eval.speed.latency import counted_passes
from stepdistill.finiteness import first_not_finite

if TYPE_CHECKING:
    from stepdistill.eval.stock_pipeline import StockPipeline

    from .evaluate import Target, _Tools

KIND = "stepdistill.EvaluationBatch"


@dataclass(frozen=True)
class Looked:
    """What is kept of pictures, a row each.

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
    def load(cls, path: Path) -> Looked:
        """From a file that :meth:`save` wrote.

        Raises:
            UserError: it is not there.
        """
        remedy = "every process must see the folder of the output"
        tensors, metadata = read_tensors(path, KIND, "file of a drawn batch", remedy)
        rewards = {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith("reward/")}
        with reading(path, "delete it, and its pictures are drawn again", "not a whole file of a drawn batch"):
            seconds, passes = float(metadata["seconds"]), int(metadata["passes"])
            return cls(tensors["features"], tensors.get("scores"), rewards, seconds, passes)

    @classmethod
    def joined(cls, parts: Sequence[Looked]) -> Looked:
        """All rows in the parts' order, seconds and passes added."""
        first = parts[0]
        return cls(
            torch.cat([part.features for part in parts]),
            None if first.scores is None else torch.cat([part.scores for part in parts]),
            {name: torch.cat([part.rewards[name] for part in parts]) for name in first.rewards},
            sum(part.seconds for part in parts),
            sum(part.passes for part in parts),
        )


def batches(samples: int, batch_size: int) -> list[range]:
    """The samples of each batch."""
    return [range(start, min(start + batch_size, samples)) for start in range(0, samples, batch_size)]


def draw(target: Target, stock: StockPipeline, steps: int, guidance: float | None, seed: int, tools: _Tools) -> None:
    """Draw this process's share of the batches of ``seed`` that are not there yet, each into its file.

    Raises:
        UserError: pixels, features or scores that are not numbers, or pictures that do not fit the extractor, reference
            or settings.
    """
    from .evaluate import drawn_batch, plural

    settings, processes = tools.settings, tools.processes
    whole = batches(settings.samples, settings.batch_size)
    own = list(enumerate(whole))[processes.rank :: processes.world]
    left = [(batch, of) for batch, of in own if not _is_there(tools, target, seed, batch, of)]
    total, done = (sum(len(of) for _, of in some) for some in (own, [pair for pair in own if pair not in left]))
    title = f"{target.name}, {plural(steps)}" + (f", seed {seed}" if settings.seeds > 1 else "")
    title += f", 1 of {processes.world} processes" if processes.world > 1 else ""
    bar = tqdm(total=total, initial=done, desc=title, unit="img", disable=not processes.main)
    with counted_passes(stock) as passed, bar:
        for batch, indices in left:
            before, started = passed[0], time.perf_counter()
            pixels, conditions = drawn_batch(stock, steps, guidance, settings, batch, indices, seed, tools.prompts)
            seconds = time.perf_counter() - started
            looked = look(target, pixels, conditions, seconds, passed[0] - before, tools)
            if tools.keep_samples is not None:
                _save_pictures(tools.treatment.to_bytes(pixels), indices, _picture_folder(tools, target, seed))
            looked.save(_file(tools, seed, batch))
            bar.update(len(pixels))


def drawn(tools: _Tools, seed: int) -> Looked:
    """What was kept of all batches of ``seed``, in their order, whoever drew them."""
    count = len(batches(tools.settings.samples, tools.settings.batch_size))
    return Looked.joined([Looked.load(_file(tools, seed, batch)) for batch in range(count)])


@torch.no_grad()
def look(target: Target, pixels: Tensor, conditions: list | None, seconds: float, passes: int, tools: _Tools) -> Looked:
    """Features, scores and rewards of pixels (B, C, H, W) in [0, 1].

    Raises:
        UserError: as :func:`draw`.
    """
    wanted = tools.settings.drawn_side
    if wanted is not None and tuple(pixels.shape[-2:]) != (wanted, wanted):
        raise UserError(
            f"{target.name} ({target.path}): draws {pixels.shape[-1]}x{pixels.shape[-2]} pictures, and this protocol "
            f"is of {wanted}x{wanted}; measure a pipeline of that size, or set drawn_side"
        )
    pictures = tools.treatment.to_bytes(pixels)
    measured = tools.treatment(pictures)
    tools.reference.check(tools.extractor, tuple(measured.shape[1:]))
    features = tools.extractor(measured.to(tools.device))
    scores = None
    if tools.scorer is not None:
        scored = measured if tools.clip_treatment == tools.treatment else tools.clip_treatment(pictures)
        scores = tools.scorer(scored, conditions)
    given = 2 * pixels.to(tools.device) - 1
    rewards = {reward.name: reward(given, conditions or []).float().cpu() for reward in tools.rewards}
    judged = {"the CLIP score": scores} | {f"reward {name}": values for name, values in rewards.items()}
    if odd := first_not_finite((name, values) for name, values in judged.items() if values is not None):
        raise UserError(f"{odd}: gave numbers that are not finite for pictures of {target.name}; leave it out")
    return Looked(features, scores, rewards, seconds, passes)


# -- files ---------------------------------------------------------------------------------------------------


def _file(tools: _Tools, seed: int, batch: int) -> Path:
    return tools.work / f"seed-{seed}" / f"{batch:06d}.safetensors"


def _picture_folder(tools: _Tools, target: Target, seed: int) -> Path:
    """``FOLDER/NAME-STEPS``, or ``FOLDER/NAME-STEPS/seed-SEED`` of several seeds; what is odd in a name is ``_``."""
    steps = "" if target.steps is None else f"-{target.steps}"
    folder = Path(tools.keep_samples) / (re.sub(r"[^\w.-]+", "_", target.name) + steps)
    return folder / f"seed-{seed}" if tools.settings.seeds > 1 else folder


def _picture(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def _save_pictures(pictures: Tensor, indices: range, folder: Path) -> None:
    arrays = pictures.permute(0, 2, 3, 1).cpu().numpy()
    for index, array in zip(indices, arrays, strict=True):
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        with files.replacing(_picture(folder, index)) as temporary:
            image.save(temporary, format="PNG")


def _is_there(tools: _Tools, target: Target, seed: int, batch: int, indices: range) -> bool:
    """Whether a batch was drawn before a stop; its pictures are written before its file, so the last one will do."""
    if not _file(tools, seed, batch).is_file():
        return False
    return tools.keep_samples is None or _picture(_picture_folder(tools, target, seed), indices[-1]).is_file()


def pictures_kept(tools: _Tools, target: Target, seeds: list[int]) -> bool:
    """Whether nothing is to be kept, or all pictures of a target lie there."""
    if tools.keep_samples is None:
        return True
    folders = [_picture_folder(tools, target, seed) for seed in seeds]
    return all(_picture(folder, index).is_file() for folder in folders for index in range(tools.settings.samples))
