"""Two processes with half the batch each are one process with all of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from ranks import two_ranks

UPDATES = 2
ROWS = {
    "unet2d-full-gan": {"teacher": "pixels", "roles": {"weights": "full"}, "gan": True},
    "unet2d-shared-4-steps": {
        "teacher": "pixels",
        "roles": {"weights": "shared", "lora": {"rank": 2}},
        "sampler": {"steps": 4},
        "guidance": 2.0,
        "accumulation": 2,
    },
    "sim-mixed": {
        "method": "sim",
        "teacher": "pixels",
        "roles": {"weights": "mixed", "lora": {"rank": 2}},
        "settings": {"sim": {"objective": "full", "weight": "sid", "c": 0.1}},
    },
    "swiftbrush-random-guidance": {
        "method": "swiftbrush",
        "teacher": "pixels",
        "roles": {"weights": "mixed", "lora": {"rank": 2}},
        "settings": {"swiftbrush": {"guidance_range": [0.5, 4.0], "guidance_draw": "sample", "null_probability": 0.5}},
    },
    "disback": {
        "method": "disback",
        "teacher": "pixels",
        "roles": {"weights": "full"},
        "settings": {"disback": {"nodes": 2, "updates": 3, "hold": 1, "probe": 5}, "dmd2": {"fake_score_updates": 1}},
        "recorded": 3,
    },
    "boot": {
        "method": "boot",
        "teacher": "pixels",
        "roles": {"weights": "full"},
        "settings": {"boot": {"guidance_scale": 2.0, "solver": "heun", "weight_floor": 1.0}},
        "gradients": UPDATES,
    },
    "tscd-shared-adversarial": {
        "method": "tscd",
        "teacher": "pixels",
        "roles": {"weights": "shared", "lora": {"rank": 2}},
        "settings": {
            "tscd": {"end": "random", "guidance_range": [1.0, 3.0], "adversarial": {"weight": 0.1}},
            "data": {"images": {"npz": "{root}/images.npz"}},
        },
        "accumulation": 2,
        "gradients": 2 * UPDATES,
    },
    "enhance-all-steps": {
        "method": "enhance",
        "teacher": "pixels",
        "roles": {"weights": "shared", "lora": {"rank": 2}},
        "sampler": {"steps": 4, "also_steps": [1, 2]},
        "settings": {
            "enhance": {"train_steps": "all", "hold_weight": 0.5, "teacher": "previous_stage"},
            "dmd2": {"fake_score_updates": 1},
        },
    },
    "pso-online": {
        "method": "pso",
        "teacher": "pixels",
        "roles": {"weights": "shared", "lora": {"rank": 2}},
        "sampler": {"steps": 3, "transition": "ode"},
        "settings": {
            "pso": {
                "rewards": [{"reward": "stepdistill.judges.rewards:Brightness"}],
                "rollout_transition": "renoise",
                "clamp": None,
                "beta": 5.0,
            }
        },
        "gradients": UPDATES,
    },
    "pso-targets": {
        "method": "pso",
        "teacher": "pixels",
        "roles": {"weights": "full"},
        "sampler": {"steps": 2, "transition": "ode"},
        "settings": {
            "pso": {"mode": "targets", "likelihood": "transition", "rollout_transition": "renoise", "beta": 5.0},
            "data": {"images": {"npz": "{root}/images.npz"}},
        },
        "gradients": UPDATES,
    },
    "tsm-mixed-sizes": {
        "method": "tsm",
        "teacher": "pixels",
        "roles": {"weights": "full", "network": {"block_out_channels": [4, 8]}},
        "settings": {"tsm": {"guidance_scale": 2.0}, "data": {"images": {"npz": "{root}/images.npz"}}},
        "gradients": UPDATES,
    },
    "regression": {
        "method": "regression",
        "teacher": "pixels",
        "roles": {"weights": "full"},
        "settings": {"regression": {"pairs": "{root}/pairs", "count": 8, "shard": 2, "pair_batch": 2}},
        "gradients": UPDATES,
    },
}
"""What is run; a method or family joins by adding a row."""


def raw_config(row: dict, root: Path, batch: int) -> dict:
    section = {"fake_score_updates": 1, "guidance_scale": row.get("guidance", 1.0)}
    sections = row.get("settings") or {"dmd2": section}
    raw = {
        "method": row.get("method", "dmd2"),
        "output": str(root / "unused"),
        "seed": 5,
        "teacher": {"path": str(root / row["teacher"])},
        "roles": row["roles"],
        "sampler": row.get("sampler", {}),
        # a large eps: AdamW would else turn the rounding of gradients that are zero (a key's bias) into whole steps
        # so large an eps that a gradient that is nothing but rounding moves nothing
        "optimizer": {role: {"lr": 1e-3, "eps": 1e-2} for role in ("student", "fake_score", "discriminator")},
        "train": {
            "updates": UPDATES,
            "batch_size": batch,
            "gradient_accumulation": row.get("accumulation", 1),
            "ema_decay": 0.9,
            "trackers": [],
        },
        "evaluation": {"enabled": False},
        **sections,
    }
    if row.get("gan"):
        section["gan"] = {"student_weight": 0.01}
        raw["data"] = {"images": {"npz": str(root / "images.npz")}}
    return json.loads(json.dumps(raw).replace("{root}", str(root)))


def train(row: dict, root: Path, batch: int) -> tuple[dict, dict]:
    """Averaged gradients of every update by name, and all state after ``UPDATES`` student updates."""
    from accelerate import Accelerator

    from stepdistill.trainers.plans.build import build_trainer
    from stepdistill.trainers.plans.job import make_job

    trainer = build_trainer(make_job(raw_config(row, root, batch)), None, Accelerator(cpu=True))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # apart from the teacher, where the first gradient would be zero
        for role in trainer.roles.trained():
            for parameter in role.parameters().values():
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    gradients = {}
    for role, optimizer in trainer.optimizers.items():

        def keep(optimizer, _arguments, _keywords, role=role):
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            count = trainer.counters[role]
            gradients[f"{role}/{count}"] = torch.cat([p.grad.flatten().clone() for p in parameters])

        optimizer.register_step_pre_hook(keep)
    trainer.fit()
    tensors, meta = trainer.state()
    flat = {f"{group}/{key}": value.clone() for group, values in tensors.items() for key, value in values.items()}
    return gradients, {"tensors": flat, "counters": dict(meta["counters"]), "world": trainer.world}


def child(root: Path) -> None:
    """One of the two processes: every row, the state of each rank written beside."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    for name, row in ROWS.items():
        gradients, state = train(row, root, batch=2)
        torch.save({"gradients": gradients, **state}, root / f"{name}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By row: what the two ranks got, and what one process with the whole batch gets."""
    root = tmp_path_factory.mktemp("processes")
    tiny.save_pixels(root / "pixels", "v", labels=3, null=True)
    pixels = np.random.default_rng(0).integers(0, 255, (7, 8, 8), dtype=np.uint8)
    np.savez(root / "images.npz", images=pixels, labels=np.arange(7) % 3)
    with two_ranks(__file__, root, timeout=240):
        single = {name: train(row, root, batch=4) for name, row in ROWS.items()}
    ranks = {name: [torch.load(root / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)] for name in ROWS}
    return ranks, single


@pytest.mark.parametrize("name", ROWS)
def test_gradients_are_the_single_process_ones(results, name):
    ranks, single = results[0][name], results[1][name]
    assert [r["world"] for r in ranks] == [2, 2]
    assert single[1]["world"] == 1
    gradients = single[0]
    assert len(gradients) == ROWS[name].get("gradients", 2 * UPDATES) + ROWS[name].get("recorded", 0)
    for rank in ranks:
        assert rank["gradients"].keys() == gradients.keys()
        for key, expected in gradients.items():
            largest = expected.abs().max().item()
            assert largest > 1e-4, key
            rounding = 1e-6 + 2e-5 * largest  # float32 sums in another order; how much of it depends on the processor
            torch.testing.assert_close(rank["gradients"][key], expected, rtol=0, atol=rounding, msg=key)


@pytest.mark.parametrize("name", ROWS)
def test_ranks_agree_bit_for_bit(results, name):
    first, second = results[0][name]
    assert first["counters"] == second["counters"]
    for key, value in first["tensors"].items():
        if not key.startswith("logged/"):  # of each process's own samples; the main one's are written
            assert torch.equal(value, second["tensors"][key]), key


@pytest.mark.parametrize("name", ROWS)
def test_draws_and_data_positions_are_the_single_process_ones(results, name):
    rank, (_, single) = results[0][name][0], results[1][name]
    assert rank["counters"] == single["counters"]
    key = "noise/generator"
    assert torch.equal(rank["tensors"][key], single["tensors"][key])


@pytest.mark.parametrize("name", ROWS)
def test_weights_are_the_single_process_ones(results, name):
    rank, (_, single) = results[0][name][0], results[1][name]
    for key, expected in single["tensors"].items():
        if key.split("/")[0] in ("consistency_target", "student", "fake_score", "discriminator", "ema"):
            torch.testing.assert_close(rank["tensors"][key], expected, rtol=0, atol=1e-6, msg=key)


if __name__ == "__main__":
    child(Path(sys.argv[1]))
