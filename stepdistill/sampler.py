"""The few-step generator: the same arithmetic in training, evaluation and export.

A student of N steps is called at N fixed times t_1 > ... > t_N.  It starts from noise used as it is (unit variance,
times sigma on EDM schedules), predicts x0, moves to the next time, and ends with the last x0:

- ``renoise``: ``x_{k+1} = alpha x0 + sigma eps`` with fresh eps (consistency sampling, 2303.01469 alg. 1; DMD2);
- ``ode``: the deterministic DDIM or Euler move along the student's own prediction;
- ``tcd``: strategic stochastic sampling (2402.19159), VP only: the deterministic move to a time s below the next one,
  then noise from s up to it, ``s = floor((1 - eta) t_(k+1))``.  eta = 0 is ``ode`` and 1 nearly ``renoise``, but for
  the last time, which is timestep 0 and not the clean sample, as in the stock scheduler;
- ``ancestral``: the deterministic move to less noise than the next time has, then fresh noise up to it (Euler
  ancestral, which is DDIM with eta = 1), VP only; it starts from ``sigma`` times unit noise, as SDXL-Turbo does.

``final`` is where an ``ode`` student's last step ends: at the clean sample x0, or, ``timestep_0`` (VP only), at the
lowest timestep along its own prediction, as stock DDIM does with ``set_alpha_to_one: false``.

A move that draws is a Gaussian of the next sample, :meth:`FewStepSampler.transition_kernel`.

Which times and transitions exist is decided by what a stock diffusers scheduler can be told by its config alone,
since the exported student must sample with nothing else (:func:`few_step_times`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .denoiser import Condition, Denoiser
from .errors import UserError
from .schedule import Clipping, Schedule, Transition, ancestral, expand, noise_up, upward

Final = Literal["clean", "timestep_0"]
Draw = Callable[[Tensor], Tensor]
"""Standard normal noise of the shape, dtype and device of its argument."""


def few_step_times(
    schedule: Schedule, steps: int, start: float | None = None, key: str = "sampler.steps"
) -> tuple[float, ...]:
    """The N times of a student, descending, as its exported scheduler will give them: ``schedule.student_times``."""
    return schedule.student_times(steps, start, key)


@dataclass(frozen=True)
class FewStepSampler:
    """N-step generation with any denoiser; ``times`` descending, in the schedule's unit."""

    schedule: Schedule
    times: tuple[float, ...]
    transition: Transition = "renoise"
    eta: float = 0.3
    final: Final = "clean"

    def __post_init__(self) -> None:
        if self.transition not in self.schedule.transitions:
            raise UserError(f"sampler.transition = {self.transition}: only VP teachers have it; use renoise or ode")
        if self.final == "timestep_0" and (self.transition != "ode" or not self.schedule.has_timestep_0):
            raise UserError(
                "sampler.final = timestep_0: only students of VP teachers with transition = ode end there; use clean"
            )

    def in_steps(self, steps: int) -> FewStepSampler:
        """The same sampler in fewer steps, a divisor of its number: every so many of its times."""
        return replace(self, times=self.times[:: self.steps // steps])

    @property
    def steps(self) -> int:
        return len(self.times)

    @property
    def ends_clean(self) -> bool:
        """Whether the last step gives x0; else it goes to timestep 0."""
        return self.transition != "tcd" and self.final == "clean"

    def time(self, index: int, like: Tensor) -> Tensor:
        """``times[index]`` for each sample of ``like``, shape (B,); integer on VP schedules."""
        return torch.full((len(like),), self.times[index], dtype=self.schedule.time_dtype, device=like.device)

    def start(self, noise: Tensor) -> Tensor:
        """Unit noise (B, ...) to the first input."""
        if self.transition == "ancestral":
            _, sigma = self.schedule.alpha_sigma(self.time(0, noise))
            return (expand(sigma, noise) * noise).to(noise.dtype)
        return noise * self.schedule.start_scale(self.times[0])

    def move(self, x0: Tensor, x_t: Tensor, index: int, draw: Draw) -> Tensor:
        """From ``times[index]`` to ``times[index + 1]`` given the prediction ``x0`` at ``x_t``."""
        following = self.time(index + 1, x0)
        if self.transition == "renoise":
            return self.schedule.add_noise(x0, draw(x0), following)
        if self.transition == "tcd" and self.eta > 0:
            return strategic_step(self.schedule, x0, x_t, self.time(index, x0), following, self.eta, draw)
        if self.transition == "ancestral":
            mean, std = self.transition_kernel(x0, x_t, index)
            return (mean + expand(std, x0) * draw(x0)).to(x0.dtype)
        return self.schedule.step(x0, x_t, self.time(index, x0), following)

    def transition_kernel(self, x0: Tensor, x_t: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and standard deviation (B,) of the move from ``times[index]`` to ``times[index + 1]``.

        ``N(alpha' x0 + down eps, up^2 I)`` with ``down^2 + up^2 = sigma'^2`` and eps what x0 says of x_t: down = 0 for
        ``renoise``; of :func:`schedule.upward` from its lower time for ``tcd`` and of :func:`schedule.ancestral` for
        ``ancestral``.  up = 0 for ``ode``.
        """
        t, following = self.time(index, x0), self.time(index + 1, x0)
        alpha_next, sigma_next = arrival = self.schedule.alpha_sigma(following)
        if self.transition == "renoise":
            return expand(alpha_next, x0) * x0, sigma_next
        eps = self.schedule.from_x0(x0, "eps", x_t, t)
        if self.transition == "tcd":
            low = self.schedule.alpha_sigma(lower_time(following, self.eta))
            ratio, up = upward(low, arrival)
            down = ratio * low[1]
        elif self.transition == "ancestral":
            down, up = ancestral(self.schedule.alpha_sigma(t), arrival)
        else:
            up, down = torch.zeros_like(sigma_next), sigma_next
        return expand(alpha_next, x0) * x0 + expand(down, x0) * eps, up

    def rollout(
        self, student: Denoiser, noise: Tensor, condition: Condition, exit_index: int, draw: Draw
    ) -> tuple[Tensor, Tensor]:
        """The student's own input at step ``exit_index``, and its time: backward simulation (2405.14867, 4.5).

        noise (B, ...) unit normal.  Returns x_t (B, ...) and t (B,).  Runs ``exit_index`` network passes; call it
        under ``no_grad``.
        """
        x_t = self.start(noise)
        for index in range(exit_index):
            x0 = student(x_t, self.time(index, x_t), condition).x0
            x_t = self.move(x0, x_t, index, draw)
        return x_t, self.time(exit_index, x_t)

    def sample(self, student: Denoiser, noise: Tensor, condition: Condition, draw: Draw) -> Tensor:
        """x0 (B, ...) after all N steps, from unit noise (B, ...); timestep 0's sample if not :attr:`ends_clean`."""
        x_t, t = self.rollout(student, noise, condition, self.steps - 1, draw)
        x0 = student(x_t, t, condition).x0
        return x0 if self.ends_clean else self.schedule.step(x0, x_t, t, torch.zeros_like(t))


def strategic_step(
    schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor, following: Tensor, eta: float, draw: Draw
) -> Tensor:
    """TCD's step (2402.19159, alg. 4) from t to ``following`` (B,) along the prediction x0 (B, ...).

    ``x_s = alpha_s x0 + sigma_s eps`` at ``s = floor((1 - eta) following)``, then from s up with fresh noise z:
    ``(alpha/alpha_s) x_s + sqrt(1 - (alpha/alpha_s)^2) z``.
    """
    s = lower_time(following, eta)
    return renoised(schedule, schedule.step(x0, x_t, t, s), s, following, draw(x0))


def lower_time(following: Tensor, eta: float) -> Tensor:
    """TCD's s of the next time (B,), (B,)."""
    return torch.floor((1 - eta) * following).to(following.dtype)  # in float32, as the stock scheduler has it


def renoised(schedule: Schedule, x_s: Tensor, s: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_s (B, ...) at time s (B,) taken up to the noisier time t (B,) by fresh noise: ``schedule.noise_up``."""
    return noise_up(x_s, schedule.alpha_sigma(s), schedule.alpha_sigma(t), noise)


@dataclass(frozen=True)
class SignalSampler(FewStepSampler):
    """BOOT's student: one call on pure noise under the label of the lowest time (2306.05544)."""

    def rollout(
        self, student: Denoiser, noise: Tensor, condition: Condition, exit_index: int, draw: Draw
    ) -> tuple[Tensor, Tensor]:
        raise ValueError("a signal student has one step; there is nothing to roll out")

    def sample(self, student: Any, noise: Tensor, condition: Condition, draw: Draw) -> Tensor:
        """``student``: a role, which has BOOT's signal."""
        return student.signal(noise, self.time(0, noise), condition)


def ddim_times(schedule: Schedule, steps: int) -> tuple[float, ...]:
    """Trailing times of a teacher's sampler in ``steps`` steps, descending: its usual DDIM or Euler grid.

    Raises:
        UserError: more steps than levels.
    """
    if steps > schedule.num_levels:
        raise UserError(
            f"teacher.steps = {steps}: more than the {schedule.num_levels} levels of the teacher's schedule"
        )
    levels = [round(schedule.num_levels * (1 - k / steps)) - 1 for k in range(steps)]
    return tuple(float(t) for t in schedule.level(torch.tensor(levels)))


def ode_sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    times: Sequence[float],
    noise: Tensor,
    clipping: Clipping | None = None,
) -> Tensor:
    """Deterministic DDIM/Euler sampling with ``denoise(x_t, t) -> x0`` along ``times``, ending at x0 (2010.02502).

    ``clipping`` bounds the x0 of every move but not the eps that goes with it, as stock schedulers do.
    """
    sampler = FewStepSampler(schedule, tuple(times), "ode")
    x_t = sampler.start(noise)
    for index in range(len(times)):
        t = sampler.time(index, x_t)
        x0 = denoise(x_t, t)
        bounded = x0 if clipping is None else clipping(x0)
        if index + 1 < len(times):
            x_t = schedule.add_noise(bounded, schedule.from_x0(x0, "eps", x_t, t), sampler.time(index + 1, x_t))
    return bounded
