"""A user's reward, named as ``module:attribute``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.plugins import call_factory, import_attribute

from .files import freeze
from .settings import RewardSettings


def import_reward(settings: RewardSettings, device: str | torch.device) -> Callable[[Tensor, list], Tensor]:
    """The reward as a function of pixels and items: the attribute itself, or what it gives without arguments.

    An nn.Module is moved and frozen; a function or object that holds one inside has to do that itself.

    Raises:
        UserError: it cannot be imported, or is no such function.
    """
    reward: Any = import_attribute(settings.reward, "reward")
    if inspect.isclass(reward) or (inspect.isroutine(reward) and _takes_nothing(reward)):
        if not _takes_nothing(reward):
            raise UserError(f"reward {settings.reward!r}: a class that needs arguments; name a function that makes one")
        reward = call_factory(reward, settings.reward, "reward")
    if not callable(reward) or inspect.isclass(reward):
        raise UserError(
            f"reward {settings.reward!r}: not an nn.Module or another callable of pixels and items, nor a class or "
            "function without arguments that gives one"
        )
    return freeze(reward, device) if isinstance(reward, nn.Module) else reward


def _takes_nothing(function: Callable) -> bool:
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):  # needs arguments, or is a builtin that does not say
        return False
    return True
