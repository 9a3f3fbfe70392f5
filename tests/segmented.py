"""Grids, closed forms of a Gaussian's trajectory, and small trainers of trajectory-segmented consistency."""

from __future__ import annotations

import tiny
import torch
from toys import toy_family, toy_trainer

from stepdistill.data.images import ImageSet
from stepdistill.data.streams import RealSource
from stepdistill.families.unet2d import UNet2DFamily
from stepdistill.sampler import FewStepSampler, few_step_times
from stepdistill.trainers.methods.base import Batch
from stepdistill.trainers.methods.segments import SegmentGrid
from stepdistill.trainers.methods.tscd import TSCD

F64 = torch.float64


def grid_of(schedule, points=40, segments=1, transition="ode") -> SegmentGrid:
    """The grid of a student's trainer."""
    return SegmentGrid.of(FewStepSampler(schedule, few_step_times(schedule, points), transition), segments)


def tall(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64).reshape(-1, 1, 1, 1)


def scale(values: torch.Tensor) -> torch.Tensor:
    """(B,) so that it multiplies samples."""
    return values.reshape(-1, 1, 1, 1)


def spread(grid: SegmentGrid, c: float) -> torch.Tensor:
    """r_u, the standard deviation at each point of the grid."""
    return (grid.alpha**2 * c**2 + grid.sigma**2).sqrt()


def exact_gain(alpha_t, sigma_t, alpha_s, sigma_s, c):
    """D(t, s): the gain of x0 with which one DDIM (or Euler) move from t to s is the exact trajectory's."""
    r_t, r_s = ((a**2 * c**2 + s**2) ** 0.5 for a, s in ((alpha_t, sigma_t), (alpha_s, sigma_s)))
    return (r_s / r_t - sigma_s / sigma_t) / (alpha_s - alpha_t * sigma_s / sigma_t)


def multiplier(grid: SegmentGrid, c: float) -> torch.Tensor:
    """S(u -> u - 1) of the teacher's DDIM step, u = 1..N."""
    (alpha, below), (sigma, sigma_below) = ((x[1:], x[:-1]) for x in (grid.alpha, grid.sigma))
    gain = alpha * c**2 / (alpha**2 * c**2 + sigma**2)
    return below * gain + sigma_below / sigma * (1 - alpha * gain)


def real_source(family, latents=None):
    if latents is None:
        latents = torch.randn(64, *family.sample_shape, generator=torch.Generator().manual_seed(3))
    return RealSource(family, ImageSet("toy", None, len(latents), [0] * 64, ""), latents, 0)


def trainer_of(
    family=None, segments=1, points=40, real=None, sampler=None, train=None, student=None, **changes
) -> TSCD:
    """``changes``: keys of the method's section."""
    family = family or toy_family()
    return toy_trainer(
        family,
        real or real_source(family),
        method="tscd",
        tscd={"segments": segments, "grid": points, **changes},
        sampler={"steps": segments, "transition": "ode", **(sampler or {})},
        data={"images": {"folder": "unused"}},
        train=train or {},
        optimizer={"student": student or {}, "discriminator": {"lr": 1e-3}},
    )


def self_taught(**changes) -> TSCD:
    """The teacher is the network itself, so that it has features, and student = teacher at first."""
    family = toy_family()
    family.teacher_denoiser = lambda: None
    return trainer_of(family, **changes)


def unets(weights="full", student=None, **changes) -> TSCD:
    """Four segments under a class-conditional UNet teacher with a null label."""
    family = UNet2DFamily(tiny.unet(labels=3, null=True), tiny.scheduler("v"))
    return toy_trainer(
        family,
        real_source(family),
        method="tscd",
        tscd={"segments": 4, **changes},
        sampler={"steps": 4, "transition": "ode"},
        roles={"weights": weights, "lora": {"rank": 2}},
        data={"images": {"folder": "unused"}},
        optimizer={"student": student or {}},
    )


def shake(role, size=0.1, seed=1):
    """Move the weights of a role or module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in role.state_dict().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def point_at(trainer, u, end):
    """Eight samples' points and ends in place of drawn ones."""
    u, end = (torch.as_tensor(x).expand(8).clone() for x in (u, end))
    trainer.method.draw_points = lambda count: (u, end)
    return u, end


def gradients(trainer, loss):
    """By the student's parameters."""
    parameters = trainer.trained["student"]
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def state_of(trainer):
    tensors, meta = trainer.state()
    return {group: {k: v.clone() for k, v in values.items()} for group, values in tensors.items()}, meta


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def double(trainer):
    """Student and target in float64."""
    for role in (trainer.roles.student, trainer.method.target):
        role.network.double()


def batch_of(count=8, dim=2, condition=None, seed=2) -> Batch:
    real, noise = torch.randn(2, count, dim, 1, 1, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return Batch(condition or {}, noise, [], real)
