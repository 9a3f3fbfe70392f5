"""The teacher's noise-sample pairs of a plan, made before its training, by one machine or by several."""

from __future__ import annotations

from stepdistill.data.teacher_pairs import make_pairs
from stepdistill.errors import UserError
from stepdistill.files import LOCK
from stepdistill.locks import Lock
from stepdistill.trainers.loop.ranks import locked

from .build import check_fit, load_teacher, make_accelerator
from .plan import Plan


def make_pairs_of(plan: Plan, share: tuple[int, int], where: str) -> None:
    """Make the pairs that the regressions of a plan train on; goes on where it stopped.

    Args:
        share: i and n: this machine makes the i-th of n parts, from 0.
        where: the config's name, for errors.

    Raises:
        UserError: no regression in it, or another process makes the same share.
    """
    jobs = [(job, needed) for job in plan.undivided_jobs if (needed := job.needs.teacher_pairs) is not None]
    if not jobs:
        raise UserError(f"{where}: no stage with method = regression; nothing needs pairs")
    accelerator = make_accelerator()
    for job, needed in jobs:
        family = load_teacher(job.config).to(accelerator.device)
        items = check_fit(job, family).all_items
        lock = Lock(needed.folder, file=needed.folder / f"{LOCK}-{share[0]}-of-{share[1]}")
        with locked(accelerator, lock):
            autocast_dtype = job.config.train.autocast_dtype
            make_pairs(family, items, needed.recipe, needed.folder, needed.batch, share, autocast_dtype)
        print(f"pairs {needed.folder}")


def share_of(text: str) -> tuple[int, int]:
    """``i/n`` as two numbers.

    Raises:
        UserError: not of that form, or i is not below n.
    """
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"--part {text}: give i/n with i below n, such as 0/4")
    return int(index), int(count)
