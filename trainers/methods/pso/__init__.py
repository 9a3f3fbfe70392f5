"""Pairwise sample optimisation of a model that is already distilled (PSO, 2410.03190).

The teacher of the config is the few-step model to tune; it stays frozen as the reference, and the student starts as a
LoRA on it (``roles.weights: shared``) or a copy.  Three kinds of pairs:

- ``online``: two rollouts of the student for each condition, the better by ``rewards`` is the winner.  The log ratios
  are those of the sampler's own Gaussian moves, so the last move and a deterministic sampler have none, and a one-step
  rollout has nothing to learn from.  A model deployed in one step is tuned through a longer ``rollout_steps``, as the
  authors tune SDXL-Turbo.
- ``pairs``: preference data.  Both sides' ratios are denoising errors at the student's own times with shared noise:
  Diffusion-DPO (2311.12908) restricted to those times, for any number of steps.
- ``targets``: ``data.images`` (a style, a concept) against the student's own samples of the same conditions.  The
  samples' side is a denoising error too, or with ``likelihood: transition`` the moves that made them (eq. 39 as
  restated by FestDPO; the target's side then counts 1 and not 1/2, as printed there).

``loss: diffusion`` is the plain denoising loss on the targets, the fine-tune that PSO is compared with.

Departures from the released code: re-noising is drawn for each sample, not once for a batch; densities are float32
whatever the networks compute in; the moves' times are the rollout's own pairs; ties are left out of the mean; the loss
at all moves of a pair is one update.  The paper itself could not be read here: its offline beta and settings are not
known, nor whether its runs sum over steps inside the sigmoid (``over_steps: sum``) as its equations or not (``step``)
as its code.  Rewards over-optimise (over-exposed, smoothed pictures are reported): watch ``probe/distance``.
"""

from __future__ import annotations

from stepdistill.settings import RunSettings

from .base import PSOMethod
from .online import Online
from .pairs import Pairs
from .settings import PSOSettings
from .targets import Targets

__all__ = ["PSO", "PSOSettings"]

MODES: dict[str, type[PSOMethod]] = {"online": Online, "pairs": Pairs, "targets": Targets}


class PSO(PSOMethod):
    """One class a mode answers for the settings."""

    @classmethod
    def of(cls, config: RunSettings) -> type[PSOMethod]:
        return MODES[config.pso.mode]

    def student_losses(self, batch):
        raise TypeError("PSO.of(config) is the class that trains")
