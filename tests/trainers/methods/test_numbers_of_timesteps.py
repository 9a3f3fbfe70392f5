"""Teachers of 10, 100, 250 and 4000 timesteps: levels are fractions of the schedule; what is trained is exported."""

from __future__ import annotations

import console
import numpy as np
import pytest
import tiny
import torch
from diffusers import ConsistencyModelPipeline, DDIMScheduler, DiffusionPipeline
from toys import linear_betas, toy_family, toy_trainer

from stepdistill.errors import UserError
from stepdistill.pipelines import export_student
from stepdistill.sampler import ddim_times
from stepdistill.schedule import EDMSchedule, FlowSchedule
from stepdistill.trainers.plans.build import build_trainer
from stepdistill.trainers.plans.job import make_job

DRAWN = {10: (0, 9), 100: (2, 98), 250: (5, 245), 1000: (20, 980), 4000: (80, 3923)}
"""The levels of thousandths 20..980 by the number of levels."""
METHODS = {
    "dmd2": {"dmd2": {"gan": {"student_weight": 0.01}}},
    "sim": {},
    "swiftbrush": {},
    "tsm": {},
    "boot": {},
    "tscd": {"tscd": {"grid": 10}},
    "disback": {"disback": {"nodes": 2, "updates": 2, "hold": 1, "probe": 4}},
}


@pytest.mark.parametrize("count", DRAWN)
def test_a_range_is_the_same_part_of_every_schedule(count):
    for schedule in (linear_betas(count), FlowSchedule(num_train_timesteps=count), EDMSchedule(num_levels=count)):
        assert schedule.level_range(20, 980) == DRAWN[count]
        assert schedule.level_range(0, 999) == (0, count - 1)
        low, high = schedule.level_range(979, 979)
        assert low <= 0.979 * count < high + 1


def test_a_thousand_levels_are_the_thousandths_themselves():
    schedule = linear_betas(1000)
    for k in range(1000):
        assert schedule.level_range(k, k) == (k, k)
        assert schedule.level_of(k) == k
        assert schedule.level_distance(k) == max(1, k)


def test_thousandths_share_out_all_levels_of_a_long_schedule():
    schedule = linear_betas(4000)
    drawn = [
        level for k in range(1000) for level in range(schedule.level_range(k, k)[0], schedule.level_range(k, k)[1] + 1)
    ]
    assert drawn == list(range(4000))


@pytest.mark.parametrize("count", DRAWN)
def test_times_are_drawn_over_the_whole_range(count):
    trainer = toy_trainer(toy_family(schedule=linear_betas(count)))
    t = trainer.method.draw_time(20, 980, 200_000)
    assert t.unique().tolist() == list(range(DRAWN[count][0], DRAWN[count][1] + 1))
    t = trainer.method.fake_score_draw(torch.zeros(200_000, 2, 1, 1))[0]
    assert t.unique().tolist() == list(range(count))


def test_a_level_of_a_long_schedule_has_the_noise_of_the_same_fraction():
    """Cosine schedules are one curve whatever their number of timesteps is."""
    ratios = []
    for count in (1000, 4000):
        scheduler = DDIMScheduler(num_train_timesteps=count, beta_schedule="squaredcos_cap_v2")
        alpha = scheduler.alphas_cumprod[linear_betas(count).level_of(900)]
        ratios.append(((1 - alpha) / alpha).sqrt().item())
    assert ratios[0] == pytest.approx(ratios[1], rel=0.02)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    file = tmp_path_factory.mktemp("timesteps") / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 255, (12, 8, 8), dtype=np.uint8)
    np.savez(file, images=pixels, labels=np.arange(12) % 3)
    return file


def teacher_of(folder, timesteps):
    scheduler = DDIMScheduler(
        num_train_timesteps=timesteps, prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"
    )
    ConsistencyModelPipeline(tiny.unet(labels=3, null=True), scheduler).save_pretrained(folder)
    return folder


def config_of(method, teacher, images, output, **changes):
    return {
        "method": method,
        "output": str(output),
        "teacher": {"path": str(teacher), "steps": 5},
        "data": {"images": {"npz": str(images)}},
        "train": {"updates": 2, "batch_size": 2, "log_every": 1, "sample_count": 2, "trackers": []},
        "evaluation": {"enabled": False},
        **METHODS[method],
        **changes,
    }


@pytest.mark.parametrize("timesteps", [10, 100, 250, 4000])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_its_student_samples_alike_in_stock(method, timesteps, images, tmp_path):
    teacher = teacher_of(tmp_path / "teacher", timesteps)
    job = make_job(config_of(method, teacher, images, tmp_path / "run"))
    trainer = build_trainer(job, None)
    trainer.fit()
    assert trainer.counters["student"] == 2
    assert not any(trainer.skipped.values())
    sampler, student = trainer.sampler, trainer.roles.student
    if method != "boot":
        assert sampler.times == (timesteps - 1,)
    folder = export_student(trainer.family, student, sampler, tmp_path / "student", {})
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = sampler.sample(student, noise, trainer.family.encode_conditions([2, 0]), torch.randn_like)
    pipe, latest = DiffusionPipeline.from_pretrained(folder), []
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    pipe(2, [2, 0], generator=generator, callback=lambda i, t, x: latest.append(x))
    torch.testing.assert_close(latest[-1], ours, rtol=1e-5, atol=1e-5)


def test_more_teacher_steps_than_timesteps_are_refused_before_training(images, tmp_path):
    """Before, pairs went round to the last timestep, and the evaluation failed after the training."""
    teacher = teacher_of(tmp_path / "teacher", 10)
    raw = config_of("sim", teacher, images, tmp_path / "run", evaluation={"enabled": True})
    (tmp_path / "config.yaml").write_text(str(raw).replace("True", "true").replace("False", "false"))
    for change, says in (
        ("teacher.steps=25", "teacher.steps = 25"),
        ("evaluation.teacher_steps=[11]", "teacher_steps = 11"),
    ):
        refused = console.stepdistill("distill", tmp_path / "config.yaml", change, "--dry-run")
        assert refused.code == 2
        assert f"{says}: more than the 10 timesteps of the teacher; set 10 or fewer" in refused.error
    assert console.stepdistill("distill", tmp_path / "config.yaml", "--dry-run").code == 0
    with pytest.raises(UserError, match=r"teacher\.steps = 11: more than the 10 levels"):
        ddim_times(linear_betas(10), 11)


def test_a_grid_that_does_not_divide_the_timesteps_is_named(images, tmp_path):
    teacher = teacher_of(tmp_path / "teacher", 100)
    job = make_job(config_of("tscd", teacher, images, tmp_path / "run", tscd={"grid": 40}))
    with pytest.raises(UserError, match=r"tscd\.grid = 40 does not divide 100 timesteps; use a divisor"):
        build_trainer(job, None)
