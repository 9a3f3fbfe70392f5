"""Noise schedules and conversions between x0, eps, v, flow and score.  The only place with these formulas.

Conventions, once for the whole library:

- ``x_t = alpha(t) x0 + sigma(t) eps``, ``eps ~ N(0, I)``; time runs from data (small t) to noise (large t).
- ``t`` is in the schedule's own unit: an integer timestep 0..T-1 for VP, the flow time in [0, 1] for flow,
  the noise level sigma for EDM.  Shape ``(B,)``.
- ``eps``: the noise.  ``x0``: the clean sample.  ``v = alpha eps - sigma x0`` (Salimans & Ho, 2202.00512).
  ``flow = eps - x0``: the velocity of the straight path, pointing to the noise (Liu et al., 2209.03003).
  ``edm``: the raw output F of a preconditioned network, ``x0 = c_skip x + c_out F`` (Karras et al., 2206.00364).
- ``score = -(x_t - alpha x0) / sigma^2``, the gradient of log q_t at x_t when x0 is the posterior mean.

Coefficients are made in float64 and applied in float32 or better; results come back in the caller's dtype.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from .errors import UserError

PredictionType = Literal["eps", "v", "x0", "flow", "edm"]
Transition = Literal["renoise", "ode", "tcd", "ancestral"]
Number = TypeVar("Number", float, Tensor)
"""How a few-step student moves from one of its times to the next; see :mod:`stepdistill.sampler`."""

ALPHA_MIN = 1e-4
"""What x0 is divided by where alpha is exactly 0 and eps says nothing of x0, so that a conversion stays finite.  Any
other alpha is divided by as it is, however small: stock schedulers do the same.  An eps teacher whose schedule reaches
0 is refused (:func:`from_scheduler`)."""
SIGMA_MIN = 1e-5
"""Smallest sigma that eps and the score are divided by: at sigma = 0 the noise is unknown."""

DIFFUSERS_PREDICTION_TYPES: dict[str, PredictionType] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}


EDM_STUDENT_RHO = 4.0
"""Spacing of an EDM student's steps, ``sigma_k = sigma_1 (1 - k/N)^rho``: 80, 25, 5, 0.3 for four."""


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """One value a sample, shape ``(B,)``, to ``(B, 1, ..., 1)`` with as many dims as ``like`` (B, ...); its dtype
    stays."""
    return values.to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def per_channel_shape(like: Tensor) -> tuple[int, ...]:
    """The shape ``(B, C, 1, ..., 1)`` of one value a channel of ``like`` (B, C, ...)."""
    return (*like.shape[:2], *[1] * (like.ndim - 2))


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """Shape ``(B,)`` to ``(B, 1, ..., 1)`` with the dims of ``like``, in its dtype, at least float32."""
    return per_sample(coefficient.to(like.device, torch.promote_types(like.dtype, torch.float32)), like)


def upward(low: tuple[Tensor, Tensor], high: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """``r`` and the noise's factor of :func:`noise_up`, (B,) each."""
    ratio = high[0] / low[0]
    return ratio, (high[1] ** 2 - (ratio * low[1]) ** 2).clamp(min=0).sqrt()


def ancestral(at: tuple[Tensor, Tensor], following: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What an Euler-ancestral move keeps of the predicted eps, ``down = sigma'^2 alpha / (alpha' sigma)``, and the
    fresh noise's factor, ``up = sqrt(sigma'^2 - down^2)``: DDIM with eta = 1 (2010.02502, eq. 16).

    at, following: alpha and sigma (B,) at both times; (B,) each.  In VE units ``up^2 = s'^2 (s^2 - s'^2) / s^2``.
    """
    down = following[1] ** 2 * at[0] / (following[0] * at[1])
    return down, (following[1] ** 2 - down**2).clamp(min=0).sqrt()


def noise_up(x_s: Tensor, low: tuple[Tensor, Tensor], high: tuple[Tensor, Tensor], noise: Tensor) -> Tensor:
    """x_t given x_s in the forward process, for a noisier t: ``x_t = r x_s + sqrt(sigma_t^2 - r^2 sigma_s^2) noise``
    with ``r = alpha_t / alpha_s`` (2006.11239, eq. 2 from s in place of 0).

    x_s and unit normal noise: (B, ...); low, high: alpha and sigma (B,) at s and at t.
    """
    ratio, spread = upward(low, high)
    return (expand(ratio, x_s) * x_s + expand(spread, x_s) * noise).to(x_s.dtype)


class Schedule(abc.ABC):
    """alpha and sigma as functions of t, and how a network is fed at t.

    ``num_levels`` discrete noise levels (ascending in noise) stand for "a random time": methods draw an integer
    level and :meth:`level` turns it into t.  Configs count levels in thousandths of the schedule, whatever its number
    of levels is, so that a range such as 20..980 means the same on every schedule: thousandth k holds the levels whose
    part of the schedule lies in ``[k / 1000, (k + 1) / 1000)``; with 1000 levels it is level k.
    """

    num_levels: int
    time_dtype: ClassVar[torch.dtype] = torch.float64
    """The dtype of t."""
    transitions: ClassVar[tuple[Transition, ...]] = ("renoise", "ode")
    """How a student on this schedule can move between its steps."""
    stock_transitions: ClassVar[tuple[Transition, ...]]
    """Those of them that a stock scheduler can be configured to make between several steps."""
    has_timestep_0: ClassVar[bool] = False
    """Whether the lowest level is an integer timestep 0 that still has noise, where a sampler can end."""
    lowest_student_level: ClassVar[int] = 0
    """The lowest level that a stock scheduler can be told as the one timestep of a student."""

    def level_of(self, thousandth: int) -> int:
        """The level where thousandth 0..999 begins; with fewer than 1000 levels, the one that it falls in."""
        return thousandth * self.num_levels // 1000

    def level_range(self, low: int, high: int) -> tuple[int, int]:
        """The first and the last level, both included, of thousandths ``low .. high``, both included, 0..999."""
        return self.level_of(low), -(-(high + 1) * self.num_levels // 1000) - 1

    def level_distance(self, thousandths: int) -> int:
        """How many levels make a distance of so many thousandths, at least 1."""
        return max(1, round(thousandths * self.num_levels / 1000))

    @abc.abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at ``t`` (B,), each (B,) in float64."""

    @abc.abstractmethod
    def level(self, index: Tensor) -> Tensor:
        """The time t of noise level ``index`` in 0..num_levels-1 (ascending noise), same shape."""

    @abc.abstractmethod
    def at_noise_ratio(self, ratio: Tensor) -> Tensor:
        """The time t where ``sigma/alpha`` is ``ratio`` (EDM's sigma), same shape; the nearest timestep on VP."""

    @abc.abstractmethod
    def student_times(self, steps: int, start: float | None, key: str) -> tuple[float, ...]:
        """The N times of a student, descending, as its exported scheduler will give them.

        Args:
            start: the first time (the noise's conditioning timestep); None: the schedule's last.
            key: the config's name of ``steps``, for errors.

        Raises:
            UserError: more steps than levels, a start outside the schedule.
        """

    def x0_weight(self, t: Tensor) -> Tensor | None:
        """What the squared error of x0 is multiplied by in a denoising loss at t (B,), (B,); None for 1."""
        return None

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """What the network sees in place of x_t: c_in x_t for EDM, x_t itself otherwise."""
        return x_t

    def network_time(self, t: Tensor) -> Tensor:
        """The time label that the network was trained with, (B,)."""
        return t

    def start_scale(self, t: float) -> float:
        """What unit noise is multiplied by to be the sampler's first input at ``t``: 1, but sigma for EDM."""
        return 1.0

    def _coefficients(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(t)
        return expand(alpha, x_t), expand(sigma, x_t)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``alpha x0 + sigma eps``; x0 and eps (B, ...), t (B,)."""
        alpha, sigma = self._coefficients(x0, t)
        return (alpha * x0 + sigma * eps).to(x0.dtype)

    def to_x0(self, output: Tensor, kind: PredictionType, x_t: Tensor, t: Tensor) -> Tensor:
        """The x0 that a prediction of ``kind`` means at ``x_t``.

        eps: ``(x - sigma eps) / alpha``, with ``ALPHA_MIN`` in place of an alpha of 0; v: ``(alpha x - sigma v) /
        (alpha^2 + sigma^2)``; flow: ``(x - sigma u) / (alpha + sigma)``.  Any schedule, so any pair may be converted.
        """
        alpha, sigma = self._coefficients(x_t, t)
        match kind:
            case "x0":
                x0 = output
            case "eps":
                x0 = (x_t - sigma * output) / torch.where(alpha > 0, alpha, ALPHA_MIN)
            case "v":
                x0 = (alpha * x_t - sigma * output) / (alpha**2 + sigma**2)
            case "flow":
                x0 = (x_t - sigma * output) / (alpha + sigma)
            case "edm":
                c_skip, c_out = self.preconditioning(t)
                x0 = expand(c_skip, x_t) * x_t + expand(c_out, x_t) * output
            case _:
                raise ValueError(f"unknown prediction type {kind!r}")
        return x0.to(x_t.dtype)

    def from_x0(self, x0: Tensor, kind: PredictionType, x_t: Tensor, t: Tensor) -> Tensor:
        """The prediction of ``kind`` that means ``x0`` at ``x_t``: the inverse of :meth:`to_x0`.

        Divides by sigma (at least ``SIGMA_MIN``), but for x0 itself.
        """
        alpha, sigma = self._coefficients(x_t, t)
        if kind == "x0":
            return x0
        if kind == "edm":
            c_skip, c_out = self.preconditioning(t)
            return ((x0 - expand(c_skip, x_t) * x_t) / expand(c_out, x_t)).to(x_t.dtype)
        eps = (x_t - alpha * x0) / sigma.clamp(min=SIGMA_MIN)
        match kind:
            case "eps":
                output = eps
            case "v":
                output = alpha * eps - sigma * x0
            case "flow":
                output = eps - x0
            case _:
                raise ValueError(f"unknown prediction type {kind!r}")
        return output.to(x_t.dtype)

    def target(self, x0: Tensor, eps: Tensor, kind: PredictionType, x_t: Tensor, t: Tensor) -> Tensor:
        """What a network of ``kind`` should say when x_t was made of ``x0`` and ``eps``.  No division."""
        alpha, sigma = self._coefficients(x0, t)
        match kind:
            case "x0":
                return x0
            case "eps":
                return eps
            case "v":
                return (alpha * eps - sigma * x0).to(x0.dtype)
            case "flow":
                return eps - x0
        return self.from_x0(x0, kind, x_t, t)

    def score(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """``-(x_t - alpha x0) / sigma^2``."""
        alpha, sigma = self._coefficients(x_t, t)
        return (-(x_t - alpha * x0) / sigma.clamp(min=SIGMA_MIN) ** 2).to(x_t.dtype)

    def step(self, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The deterministic (DDIM, flow Euler) move from t to s along the prediction x0 (2010.02502, eq. 12).

        ``x_s = alpha_s x0 + sigma_s eps`` with ``eps = (x_t - alpha_t x0) / sigma_t``.
        """
        eps = self.from_x0(x0, "eps", x_t, t)
        return self.add_noise(x0, eps, s)

    def trapezoid_step(self, x_t: Tensor, t: Tensor, s: Tensor, at_t: Tensor, at_s: Tensor, x_s: Tensor) -> Tensor:
        """The second-order move from t to s of ``dx = x0 d(alpha) + eps d(sigma)``, the probability flow in its own
        coefficients, by the trapezoidal rule: :meth:`step` uses its left end alone.

        On flow schedules this is Heun's method on the velocity, on EDM's the paper's sampler (2206.00364, alg. 1).
        at_t, at_s: the x0 predictions at x_t and at the first-order x_s, (B, ...).
        """
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self._coefficients(x_t, t), self._coefficients(x_t, s)
        eps = self.from_x0(at_t, "eps", x_t, t) + self.from_x0(at_s, "eps", x_s, s)
        return (x_t + (alpha_s - alpha_t) * (at_t + at_s) / 2 + (sigma_s - sigma_t) * eps / 2).to(x_t.dtype)

    def to_signal(self, x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """BOOT's signal ``y_t = (x_t - sigma_t eps) / alpha_t`` with the path's own starting noise (2306.05544), at t
        below pure noise, where alpha would be 0."""
        alpha, sigma = self._coefficients(x_t, t)
        return ((x_t - sigma * eps) / alpha).to(x_t.dtype)

    def signal_weight(self, t: Tensor, s: Tensor) -> Tensor:
        """``w(t, s) = 1 - alpha_t sigma_s / (sigma_t alpha_s)`` (B,) in float64: how far the signal moves towards the
        teacher's x0 in one DDIM step from t to s; in [0, 1] for s below t."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.alpha_sigma(t), self.alpha_sigma(s)
        return 1 - alpha_t * sigma_s / (sigma_t * alpha_s)

    def preconditioning(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out of an EDM network, (B,) each; only EDM schedules have them."""
        raise ValueError("prediction type 'edm' needs an EDM schedule")


class VPSchedule(Schedule):
    """Variance preserving: ``alpha^2 = alphas_cumprod[t]``, ``sigma^2 = 1 - alpha^2``; t integer in 0..T-1.

    ``alphas_cumprod``: shape (T,), decreasing, in [0, 1]; a last entry of 0 (zero terminal SNR) is allowed.
    """

    time_dtype = torch.long
    transitions = stock_transitions = ("renoise", "ode", "tcd", "ancestral")
    has_timestep_0 = True
    lowest_student_level = 1

    def __init__(self, alphas_cumprod: Tensor):
        self.alphas_cumprod = alphas_cumprod.detach().to("cpu", torch.float64)
        self.num_levels = len(self.alphas_cumprod)
        self._alpha = self.alphas_cumprod.sqrt()
        self._sigma = (1 - self.alphas_cumprod).sqrt()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if self._alpha.device != t.device:
            self._alpha, self._sigma = self._alpha.to(t.device), self._sigma.to(t.device)
        return self._alpha[t.long()], self._sigma[t.long()]

    def level(self, index: Tensor) -> Tensor:
        return index

    def student_times(self, steps: int, start: float | None, key: str) -> tuple[float, ...]:
        """``k (N, ..., 1) - 1`` with ``k = (start + 1) // N``; N = 4, start 999: 999, 749, 499, 249."""
        last = self.num_levels - 1
        first = last if start is None else start
        if first != int(first) or not 0 < first <= last:
            raise UserError(f"sampler.start = {first}: a whole timestep from 1 to {last} is needed")
        stride = (int(first) + 1) // steps
        if stride < 1:
            raise UserError(f"{key} = {steps}: more than the {int(first) + 1} timesteps up to {first:g}")
        if (int(first) + 1) % steps and stride * steps - 1 < 0.9 * first:
            raise UserError(f"{key} = {steps} does not divide {int(first) + 1} timesteps; use a divisor")
        return tuple(float(stride * k - 1) for k in range(steps, 0, -1))

    def at_noise_ratio(self, ratio: Tensor) -> Tensor:
        """Nearest in ln(sigma/alpha); an alpha of 0 is infinitely far from any other."""
        logs = (self._sigma / self._alpha).log().to(ratio.device)
        log_ratio = ratio.double().log()
        above = torch.searchsorted(logs, log_ratio).clamp(1, self.num_levels - 1)
        return torch.where(log_ratio - logs[above - 1] < logs[above] - log_ratio, above - 1, above)


class FlowSchedule(Schedule):
    """Straight paths: ``alpha = 1 - t``, ``sigma = t``, t in [0, 1]; the network's label is ``1000 t``.

    ``shift`` s moves the levels to noise: ``t = s u / (1 + (s - 1) u)`` (Esser et al., 2403.03206, eq. 23).
    ``integer_labels``: the network is told floor(1000 t), as stock schedulers with integer timesteps tell it.
    """

    stock_transitions = ("ode",)

    def __init__(self, shift: float = 1.0, num_train_timesteps: int = 1000, integer_labels: bool = False):
        self.shift = shift
        self.num_levels = num_train_timesteps
        self.integer_labels = integer_labels

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        return 1 - t, t

    def level(self, index: Tensor) -> Tensor:
        return self.shifted((index.double() + 1) / self.num_levels)

    def at_noise_ratio(self, ratio: Tensor) -> Tensor:
        return ratio.double() / (1 + ratio.double())

    def student_times(self, steps: int, start: float | None, key: str) -> tuple[float, ...]:
        """``0.999 (N, ..., 1) / N``, shifted, of 1000 levels; always from pure noise."""
        if start is not None:
            raise UserError("sampler.start: a flow student always starts at pure noise; remove the key")
        top = 1 - 1 / self.num_levels
        return tuple(self.shifted(top * k / steps) for k in range(steps, 0, -1))

    def shifted(self, u: Number) -> Number:
        """The flow time that the unshifted time ``u`` in [0, 1] becomes."""
        return self.shift * u / (1 + (self.shift - 1) * u)

    def network_time(self, t: Tensor) -> Tensor:
        label = t.double() * self.num_levels
        return (torch.floor(label + 1e-6) if self.integer_labels else label).float()


class EDMSchedule(Schedule):
    """Variance exploding with EDM's preconditioning: ``alpha = 1``, ``sigma = t`` (2206.00364, table 1).

    ``c_skip = sd^2 / (sigma^2 + sd^2)``, ``c_out = sigma sd / sqrt(sigma^2 + sd^2)``, ``c_in = 1 / sqrt(sigma^2 +
    sd^2)``, ``c_noise = time_scale * ln(sigma) / 4``.  Levels are Karras' grid, ascending (rho 7).
    ``out_sign`` is -1 for schedulers that call the raw output a v-prediction.
    """

    stock_transitions = ("renoise",)

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        rho: float = 7.0,
        time_scale: float = 1.0,
        out_sign: int = 1,
        num_levels: int = 1000,
    ):
        self.sigma_min, self.sigma_max, self.sigma_data, self.rho = sigma_min, sigma_max, sigma_data, rho
        self.time_scale, self.out_sign, self.num_levels = time_scale, out_sign, num_levels

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        return torch.ones_like(t), t

    def level(self, index: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + index.double() / (self.num_levels - 1) * (high - low)) ** self.rho

    def at_noise_ratio(self, ratio: Tensor) -> Tensor:
        return ratio.double()

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        return (x_t / expand((t.double() ** 2 + self.sigma_data**2).sqrt(), x_t)).to(x_t.dtype)

    def network_time(self, t: Tensor) -> Tensor:
        return (self.time_scale * t.double().log() / 4).float()

    def start_scale(self, t: float) -> float:
        return float(t)

    def student_times(self, steps: int, start: float | None, key: str) -> tuple[float, ...]:
        """``start (1 - k/N)^4``, from sigma_max by default."""
        first = self.sigma_max if start is None else start
        if not 0 < first <= self.sigma_max:
            raise UserError(f"sampler.start = {first}: a sigma in (0, {self.sigma_max}] is needed")
        return tuple(first * (1 - k / steps) ** EDM_STUDENT_RHO for k in range(steps))

    def x0_weight(self, t: Tensor) -> Tensor:
        """``sigma^-2 + sigma_data^-2`` (2206.00364, table 1, up to a constant)."""
        return t.double() ** -2 + self.sigma_data**-2

    def preconditioning(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma, sd = t.double(), self.sigma_data
        c_skip = sd**2 / (sigma**2 + sd**2)
        c_out = self.out_sign * sigma * sd / (sigma**2 + sd**2).sqrt()
        return c_skip, c_out


@dataclass(frozen=True)
class Clipping:
    """What a stock scheduler does to the x0 that it reads off a prediction, before it moves on.

    Attributes:
        limit: without ``ratio`` x0 is clamped to [-limit, limit].
        ratio: with it x0 is clamped to its own quantile ``ratio`` of absolute values, between 1 and ``limit``, and
            divided by that: dynamic thresholding (Saharia et al., 2205.11487, section 2.3).
    """

    limit: float = 1.0
    ratio: float | None = None

    def __call__(self, x0: Tensor) -> Tensor:
        """x0 (B, ...) as the scheduler takes it, same shape and dtype."""
        if self.ratio is None:
            return x0.clamp(-self.limit, self.limit)
        dtype = torch.promote_types(x0.dtype, torch.float32)
        bound = torch.quantile(x0.to(dtype).abs().flatten(1), self.ratio, dim=1).clamp(min=1, max=self.limit)
        bound = expand(bound, x0)
        return (x0.clamp(-bound, bound) / bound).to(x0.dtype)


def clipping_of(scheduler: Any) -> Clipping | None:
    """How a diffusers scheduler bounds x0: ``thresholding``, else ``clip_sample``, else (of consistency models)
    ``clip_denoised``; None where it does not.

    It is part of sampling alone: the x0 of teacher, fake score and student in training losses is never bounded, as in
    the papers, and exported students' schedulers do not bound theirs.
    """
    config = scheduler.config
    if config.get("thresholding"):
        return Clipping(config.sample_max_value, config.dynamic_thresholding_ratio)
    if config.get("clip_sample"):
        return Clipping(config.get("clip_sample_range", 1.0))
    return Clipping() if config.get("clip_denoised") else None


def from_scheduler(scheduler: Any) -> tuple[Schedule, PredictionType]:
    """The schedule and prediction type that a diffusers scheduler's config describes.

    Any scheduler with ``alphas_cumprod`` (DDPM, DDIM, PNDM, Euler, DPM-Solver, LCM, ...) is VP, with the
    scheduler's own float32 table, so that stock sampling and ours use the same numbers; FlowMatch* and
    schedulers set to ``use_flow_sigmas`` are flow; schedulers with ``sigma_data`` are EDM.

    Raises:
        UserError: a scheduler of another kind, a prediction type that is not one of ours, or an eps network on betas
            that are rescaled to end in pure noise, where no x0 can be read off eps.
    """
    config, name = scheduler.config, type(scheduler).__name__
    stated = config.get("prediction_type", "epsilon")
    if name.startswith("FlowM") or config.get("use_flow_sigmas"):
        if config.get("use_dynamic_shifting"):
            raise UserError(
                f"scheduler {name}: use_dynamic_shifting makes its times depend on the size of the picture, which is "
                "not supported; set it to false and shift to the value for the teacher's size in "
                "scheduler_config.json"
            )
        shift = config.get("shift", config.get("flow_shift", 1.0)) or 1.0
        return FlowSchedule(shift, config.get("num_train_timesteps", 1000)), "flow"
    if config.get("sigma_data") is not None:
        edm = EDMSchedule(
            # the consistency scheduler's sigma_min = 0 is its way to end at x0 exactly, not a training level
            sigma_min=config.sigma_min or 0.002,
            sigma_max=config.sigma_max,
            sigma_data=config.sigma_data,
            rho=config.get("rho", 7.0),
            time_scale=1000.0 if name.startswith("CMStochastic") else 1.0,
            out_sign=-1 if stated == "v_prediction" else 1,
        )
        return edm, "edm"
    if hasattr(scheduler, "alphas_cumprod"):
        if stated not in DIFFUSERS_PREDICTION_TYPES:
            raise UserError(
                f"scheduler {name}: prediction_type {stated!r} is not supported; use one of "
                f"{', '.join(DIFFUSERS_PREDICTION_TYPES)}"
            )
        kind = DIFFUSERS_PREDICTION_TYPES[stated]
        if kind == "eps" and (config.get("rescale_betas_zero_snr") or scheduler.alphas_cumprod[-1] == 0):
            raise UserError(
                f"scheduler {name}: its last timestep is pure noise (rescale_betas_zero_snr), where a network that "
                "predicts epsilon says nothing of the picture; if it was trained on such a schedule, its "
                "prediction_type is v_prediction or sample: say so in scheduler_config.json, else set "
                "rescale_betas_zero_snr to false"
            )
        return VPSchedule(scheduler.alphas_cumprod), kind
    raise UserError(f"scheduler {name} is neither VP, flow nor EDM; save the teacher with one that is")
