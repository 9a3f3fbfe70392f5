"""The matrix: a new method joins every contract by adding a row here."""

from typing import Any

import pytest
from teacher_table import GOLDEN, TEACHERS

from stepdistill.config import merge
from stepdistill.trainers.methods import registry

SMALL = "small"
"""Stands for the keys that make a smaller network of the teacher's family."""
METHODS = {
    "dmd2": {"dmd2": {"fake_score_updates": 2}},
    "dmd2_gan": {"dmd2": {"fake_score_updates": 2, "gan": {"student_weight": 0.01}}},
    "dmd2_guided_4_steps": {
        "dmd2": {"fake_score_updates": 2, "guidance_scale": 2.0},
        "sampler": {"steps": 4},
    },
    "sim": {},
    "sim_sid_guided": {"sim": {"objective": "sid", "weight": "sid", "guidance_scale": 2.0, "fake_score_updates": 2}},
    "sim_fake_score_first": {"sim": {"first": "fake_score", "fake_score_min_level": 20}},
    "swiftbrush": {"swiftbrush": {"null_probability": 0.5}},
    "swiftbrush_random_guidance_4_steps": {
        "swiftbrush": {"guidance_range": [0.5, 4.0], "fake_score_guidance": "none"},
        "sampler": {"steps": 4},
    },
    "diffinstruct": {},
    "disback": {"disback": {"nodes": 2, "updates": 3, "hold": 1, "probe": 4}, "dmd2": {"fake_score_updates": 2}},
    "disback_sim": {"disback": {"base": "sim", "nodes": 2, "updates": 3, "hold": 1, "spacing": "updates", "probe": 4}},
    "disback_swiftbrush": {
        "disback": {"base": "swiftbrush", "nodes": 2, "updates": 2, "hold": 1, "probe": 4, "guidance_scales": [1.5]}
    },
    "boot": {"boot": {"delta": 100}},
    "boot_heun_guided": {"boot": {"solver": "heun", "guidance_scale": 2.0, "progressive": 3}},
    "tscd": {
        "tscd": {"guidance_range": [1.0, 3.0], "end": "random", "huber_c": 1e-3, "offset_noise": 0.05},
        "sampler": {"steps": 8, "also_steps": [1, 2, 4]},
    },
    "tscd_segments_adversarial": {
        "tscd": {"segments": 4, "adversarial": {"weight": 0.1}, "teacher": "previous_stage"},
        "sampler": {"steps": 4, "transition": "ode"},
    },
    "tscd_phased": {
        "tscd": {
            "segments": 4,
            "target_decay": 0.0,
            "guidance_range": [1.0, 3.0],
            "guidance_draw": "sample",
            "adversarial": {"weight": 0.1, "loss": "hinge", "features": "all", "heads": 2, "conditional": False},
        },
        "sampler": {"steps": 4, "transition": "ode", "final": "timestep_0"},
    },
    "feedback": {
        "feedback": {
            "rewards": [{"reward": "judges:Brightness", "hinge": 2.0}],
            "perceptual": {"model": "judges:Difference"},
            "merge_ratio": 0.5,
        },
        "sampler": {"steps": 4, "also_steps": [2]},
        "roles": {"student_from": "{teacher}"},
    },
    "enhance": {
        "enhance": {
            "mse_weight": 0.5,
            "reference_steps": 2,
            "hold_weight": 0.5,
            "teacher": "previous_stage",
            "rewards": [{"reward": "judges:Brightness", "hinge": 2.0}],
        },
        "dmd2": {"fake_score_updates": 2},
        "sampler": {"steps": 4},
    },
    "dmd2_small": {"dmd2": {"fake_score_updates": 2}, "roles": {"network": SMALL}},
    "pso": {
        "pso": {
            "rewards": [{"reward": "judges:Brightness"}],
            "rollout_transition": "renoise",
            "clamp": None,
            "beta": 5.0,
        },
        "sampler": {"steps": 4, "also_steps": [1], "transition": "ode"},
    },
    "pso_targets_transition": {
        "pso": {
            "mode": "targets",
            "likelihood": "transition",
            "rollout_transition": "renoise",
            "over_steps": "sum",
            "reference_samples": "tuned",
            "beta": 5.0,
        },
        "sampler": {"steps": 2, "transition": "ode"},
    },
    "pso_pairs": {"pso": {"mode": "pairs", "pairs": {"folder": "{teacher}-pairs"}}},
    "tsm": {"tsm": {"guidance_scale": 2.0}, "sampler": {"steps": 5, "transition": "ode"}},
    "tsm_small": {"roles": {"network": SMALL}},
    "regression": {"regression": {"count": 6, "shard": 4, "guidance_scale": 2.0}, "teacher": {"steps": 3}},
}
"""Config sections by row; a row's method is the name up to the first underscore."""

SCORE_ROWS = [row for row in METHODS if registry.METHODS[row.split("_")[0]].has_fake_score]
DIRECT_ROWS = [row for row in METHODS if row not in SCORE_ROWS]


def weights_of(row: str) -> list[str]:
    """The ways to hold the roles that a row's method has."""
    if row == "feedback":
        return ["shared"]
    if "network" in METHODS[row].get("roles", {}):  # a student of another size
        return ["full", "mixed"] if row in SCORE_ROWS else ["full"]
    return ["full", "shared", "mixed"] if row in SCORE_ROWS else ["full", "shared"]


def settings_on(row: str, teacher: str) -> dict[str, Any]:
    """A row's config sections as the teacher takes them: a transition that its export cannot make becomes its usual
    one, and a smaller student has the keys of its own network."""
    settings, table = METHODS[row], TEACHERS[teacher]
    sampler = settings.get("sampler", {})
    if sampler.get("steps", 1) > 1 and sampler.get("transition", "renoise") not in table.transitions:
        settings = merge(settings, {"sampler": {"transition": table.transitions[0]}})
    if settings.get("roles", {}).get("network") == SMALL:
        settings = merge(settings, {"roles": {"network": table.small}})
    return settings


def _quick(row: str, weights: str, teacher: str) -> bool:
    """Each row runs in one way on the small teacher, each method's plain row in all ways there and in one on the
    Stable Diffusion and on one of the others."""
    ways = weights_of(row)
    first = weights == ("shared" if "shared" in ways else ways[0])
    plain = "_" not in row
    if teacher == "unet2d":
        return plain or first
    return plain and first and teacher in ("stable_diffusion", _other_teacher(row))


def _other_teacher(row: str) -> str:
    """One of the teachers that are not in the golden record, in turn, that a method's row is for."""
    others = [name for name in TEACHERS if name not in GOLDEN and row not in TEACHERS[name].refused]
    return others[list(METHODS).index(row) % len(others)]


CASES = [
    pytest.param(row, weights, teacher, marks=[] if _quick(row, weights, teacher) else [pytest.mark.slow])
    for row in METHODS
    for weights in weights_of(row)
    for teacher in TEACHERS
    if row not in TEACHERS[teacher].refused
]
"""Every row, each way to hold its roles, each teacher that it is for."""
