"""Pairwise sample optimisation: the reference, the moves, every mode's loss by hand, and what it does to toys."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from diffusers import ConsistencyModelPipeline, LCMScheduler
from PIL import Image
from toys import fit_to_teacher, students_samples, toy_family, toy_trainer, zero_snr

from stepdistill.analytic import GaussianMixture
from stepdistill.config import merge
from stepdistill.data.images import ImageSet
from stepdistill.data.streams import RealSource
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.judges.rewards import Sharpness
from stepdistill.objectives.preference import gaussian_log_prob
from stepdistill.sampler import FewStepSampler
from stepdistill.trainers.methods.base import planned_passes
from stepdistill.trainers.methods.pso.pairs import PairBatch
from stepdistill.trainers.plans.build import build_trainer
from stepdistill.trainers.plans.job import make_job

TIMES = [999, 759, 499, 259]  # of the LCM scheduler itself, fifty steps its grid


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A few-step model of three labels whose scheduler re-noises."""
    scheduler = LCMScheduler(
        prediction_type="v_prediction",
        beta_schedule="squaredcos_cap_v2",
        rescale_betas_zero_snr=True,
        clip_sample=False,
    )
    folder = tmp_path_factory.mktemp("pso") / "teacher"
    ConsistencyModelPipeline(tiny.unet(labels=3, null=True), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve pictures, four of each label."""
    file = tmp_path_factory.mktemp("images") / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 255, (12, 8, 8), dtype=np.uint8)
    pixels[:, 0, 0] = [9, 200, 30, 100, 50, 60, 90, 80, 240, 10, 250, 20]
    np.savez(file, images=pixels, labels=np.arange(12) // 4)
    return file


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Six pairs, two of each label: a winner is 100 grey values above its loser."""
    root = tmp_path_factory.mktemp("pairs")
    pixels = np.random.default_rng(1).integers(0, 140, (6, 8, 8), dtype=np.uint8)
    for index, picture in enumerate(pixels):
        for side, more in (("winner", 100), ("loser", 0)):
            (root / side / str(index % 3)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture + np.uint8(more)).save(root / side / str(index % 3) / f"{index}.png")
    return root


def config_of(teacher, tmp_path, **changes):
    raw = {
        "method": "pso",
        "output": str(tmp_path / "run"),
        "teacher": {"path": str(teacher), "steps": 3},
        "sampler": {"steps": 4},
        "pso": {"probe": 3},
        "roles": {"lora": {"rank": 2}},
        "optimizer": {"student": {"lr": 1e-2, "weight_decay": 0.0}},
        "train": {"updates": 3, "batch_size": 4, "trackers": []},
        "evaluation": {"enabled": False},
    }
    if "mode" not in changes.get("pso", {}):
        raw["pso"]["rewards"] = [{"reward": "judges:FirstValue"}]
    return merge(raw, changes)


def trainer_of(teacher, tmp_path, **changes):
    return build_trainer(make_job(config_of(teacher, tmp_path, **changes)), None)


def targets_trainer(teacher, tmp_path, images, sampler=None, **settings):
    return trainer_of(
        teacher,
        tmp_path,
        pso={"mode": "targets", "beta": 40.0, **settings},
        data={"images": {"npz": str(images)}},
        sampler=sampler or {},
    )


def shaken(trainer, size=0.05):
    """The same trainer, its student moved away from the reference."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.roles.student.parameters().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return trainer


def gradients(trainer, batch):
    losses = trainer.method.student_losses(batch)
    total = sum(weight * loss for weight, loss in losses.values())
    result = torch.autograd.grad(total, list(trainer.trained["student"].values()), allow_unused=True)
    return total, [g for g in result if g is not None]


def drawn(trainer, monkeypatch):
    """What the trainer draws from now on: normal noise and integers."""
    normal, whole, randn_like, randint = [], [], trainer.noise.randn_like, trainer.noise.randint
    monkeypatch.setattr(trainer.noise, "randn_like", lambda like: normal.append(randn_like(like)) or normal[-1])
    monkeypatch.setattr(trainer.noise, "randint", lambda *arguments: whole.append(randint(*arguments)) or whole[-1])
    return normal, whole


def coefficients(trainer, t):
    """alpha and sigma of times t (B,), each (B, 1, 1, 1)."""
    abar = trainer.family.schedule.alphas_cumprod[t].float()
    return abar.sqrt()[:, None, None, None], (1 - abar).sqrt()[:, None, None, None]


def outputs(denoiser, label=1):
    """What a denoiser says at fixed inputs, at every time of a four-step student."""
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        prediction = [denoiser(x, torch.full((3,), t), {"label": torch.full((3,), label)}).output for t in TIMES]
    return torch.stack(prediction)


# -- the reference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["shared", "full"])
@pytest.mark.parametrize("over_steps", ["step", "sum"])
def test_at_first_the_student_is_the_reference_and_has_something_to_learn(teacher, tmp_path, weights, over_steps):
    trainer = trainer_of(teacher, tmp_path, roles={"weights": weights}, pso={"over_steps": over_steps})
    student, reference = outputs(trainer.roles.student), outputs(trainer.roles.teacher)
    rounding = 0 if weights == "shared" else 1e-6  # a copy lies elsewhere in memory, and some processors' sums see that
    torch.testing.assert_close(student, reference, rtol=0, atol=rounding)
    loss, result = gradients(trainer, trainer.method.next_batch())
    assert loss.item() == pytest.approx(math.log(2), abs=rounding or 1e-7)
    assert max(g.abs().max() for g in result) > 1e-4
    assert not torch.equal(outputs(trainer.roles.teacher), outputs(trainer.roles.teacher, label=2))


@pytest.mark.parametrize("weights", ["shared", "full"])
def test_the_reference_stays_the_base_bit_for_bit(teacher, tmp_path, weights):
    trainer = trainer_of(teacher, tmp_path, roles={"weights": weights})
    trainer.fit()
    base = outputs(load_family(str(teacher)).denoiser())
    assert torch.equal(outputs(trainer.roles.teacher), base)
    assert (outputs(trainer.roles.student) - base).abs().max() > 1e-3


@pytest.mark.parametrize("weights", ["shared", "full"])
def test_reference_and_stored_states_get_no_gradient(teacher, tmp_path, weights):
    trainer = shaken(trainer_of(teacher, tmp_path, roles={"weights": weights}))
    recorded, settings = [], trainer.method.roll_out
    trainer.method.roll_out = lambda *arguments: recorded.append(settings(*arguments)) or recorded[-1]
    loss = trainer.method.total("student", trainer.method.student_losses(trainer.method.next_batch()))
    loss.backward()
    ((moves, x0),) = recorded
    assert not any(part.requires_grad for part in (*(p for m in moves for p in (m.x_t, m.following)), x0))
    trained = {id(p) for p in trainer.trained["student"].values()}
    networks = (trainer.family.network, trainer.roles.student.network)
    others = [p for network in networks for p in network.parameters() if id(p) not in trained]
    assert len(others) > 20
    assert all(p.grad is None for p in others)
    assert max(p.grad.abs().max() for p in trainer.trained["student"].values() if p.grad is not None) > 0


# -- the moves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transition", ["renoise", "tcd", "ancestral"])
def test_a_moves_density_at_the_rollouts_weights_is_that_of_its_noise(teacher, tmp_path, monkeypatch, transition):
    trainer = shaken(trainer_of(teacher, tmp_path, pso={"rollout_transition": transition}))
    assert trainer.sampler.transition == "renoise"
    batch = trainer.method.next_batch()
    normal, _ = drawn(trainer, monkeypatch)
    moves, _ = trainer.method.roll_out(trainer.roles.student, batch.noise, batch.condition, trainer.noise.randn_like)
    assert len(normal) == 3
    for move, noise in zip(moves, normal, strict=True):
        t = torch.full((4,), TIMES[move.index])
        with torch.no_grad():
            x0 = trainer.roles.student(move.x_t, t, batch.condition).x0
        mean, std = trainer.method.rollout.transition_kernel(x0, move.x_t, move.index)
        spread = std.float()[:, None, None, None]
        stored = (-0.5 * noise**2 - spread.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)
        result = gaussian_log_prob(move.following, mean, std)
        torch.testing.assert_close(result, stored, rtol=1e-5, atol=1e-5)


def test_the_last_move_has_no_density_and_is_left_out(teacher, tmp_path, monkeypatch):
    trainer = shaken(trainer_of(teacher, tmp_path))
    batch = trainer.method.next_batch()
    normal, _ = drawn(trainer, monkeypatch)
    moves, x0 = trainer.method.roll_out(trainer.roles.student, batch.noise, batch.condition, trainer.noise.randn_like)
    assert [move.index for move in moves] == [0, 1, 2]
    assert trainer.method.move_ratios(moves, batch.condition).shape == (4, 3)
    assert torch.equal(moves[0].x_t, batch.noise)
    assert all(torch.equal(move.following, after.x_t) for move, after in pairwise(moves))
    replay = iter(list(normal))
    settings = trainer.sampler.sample(trainer.roles.student, batch.noise, batch.condition, lambda _: next(replay))
    torch.testing.assert_close(x0, settings, rtol=1e-5, atol=1e-5)
    winner, loser, _ = trainer.method.log_ratios(batch)
    assert winner.shape == loser.shape == (4, 3)


def test_a_moves_ratio_is_that_of_the_two_models_densities(teacher, tmp_path):
    trainer = shaken(trainer_of(teacher, tmp_path, pso={"reduction": "sum"}))
    batch = trainer.method.next_batch()
    moves, _ = trainer.method.roll_out(trainer.roles.student, batch.noise, batch.condition, trainer.noise.randn_like)
    result = trainer.method.move_ratios(moves, batch.condition)
    for index, move in enumerate(moves):
        alpha, sigma = coefficients(trainer, torch.full((4,), TIMES[index + 1]))
        prediction = [
            role(move.x_t, torch.full((4,), TIMES[index]), batch.condition).x0
            for role in (trainer.roles.student, trainer.roles.teacher)
        ]
        logs = [-((move.following - alpha * x0) ** 2 / (2 * sigma**2)).double().flatten(1).sum(1) for x0 in prediction]
        torch.testing.assert_close(result[:, index].double(), logs[0] - logs[1], rtol=1e-3, atol=1e-3)
    assert result.abs().median() > 0.1


def test_every_sample_of_both_rollouts_is_renoised_by_itself(teacher, tmp_path):
    trainer = trainer_of(teacher, tmp_path)
    recorded, settings = [], trainer.method.roll_out
    trainer.method.roll_out = lambda *arguments: recorded.append((arguments, settings(*arguments))) or recorded[-1][1]
    trainer.method.log_ratios(trainer.method.next_batch())
    (((role, _, condition, _), (moves, _)),) = recorded
    assert len(moves) == 3
    for move in moves:
        x0 = role(move.x_t, torch.full((8,), TIMES[move.index]), condition).x0
        alpha, sigma = coefficients(trainer, torch.full((8,), TIMES[move.index + 1]))
        noise = ((move.following - alpha * x0) / sigma).detach().flatten(1)
        assert torch.pdist(noise).min() > 5  # of two unit normals in 64 dimensions: 11.3


@pytest.mark.parametrize("shared", [False, True])
def test_both_rollouts_start_apart_or_together_and_end_apart(teacher, tmp_path, shared):
    trainer = trainer_of(teacher, tmp_path, pso={"shared_start": shared})
    recorded, settings = [], trainer.method.roll_out
    trainer.method.roll_out = lambda *arguments: recorded.append(settings(*arguments)) or recorded[-1]
    batch = trainer.method.next_batch()
    trainer.method.log_ratios(batch)
    ((moves, x0),) = recorded
    first, second = moves[0].x_t.chunk(2)
    assert torch.equal(first, batch.noise)
    assert torch.equal(first, second) is shared
    first, second = x0.chunk(2)
    assert (first - second).flatten(1).abs().amax(1).min() > 1e-2


# -- online ------------------------------------------------------------------------------------------------


def test_a_constant_judge_teaches_nothing(teacher, tmp_path):
    trainer = shaken(trainer_of(teacher, tmp_path, pso={"rewards": [{"reward": "judges:Constant"}]}))
    loss, result = gradients(trainer, trainer.method.next_batch())
    assert loss.item() == 0
    assert result
    assert max(g.abs().max() for g in result) == 0
    before = {k: v.clone() for k, v in trainer.roles.student.state_dict().items()}
    trainer.fit()
    assert trainer.counters["student"] == 3
    assert all(torch.equal(before[k], v) for k, v in trainer.roles.student.state_dict().items())


def test_adding_a_constant_to_all_rewards_changes_nothing(teacher, tmp_path):
    runs = {}
    for name in ("FirstValue", "ShiftedFirstValue"):
        runs[name] = trainer_of(teacher, tmp_path, pso={"rewards": [{"reward": f"judges:{name}"}]})
        runs[name].fit()
    plain, shifted = (trainer.roles.student.state_dict() for trainer in runs.values())
    assert all(torch.equal(value, shifted[key]) for key, value in plain.items())


def test_a_reward_and_its_negative_give_opposite_logits(teacher, tmp_path):
    trainer = shaken(trainer_of(teacher, tmp_path, pso={"clamp": None}))
    batch, state = trainer.method.next_batch(), trainer.noise.get_state()
    winner, loser, counts = trainer.method.log_ratios(batch)
    trainer.noise.set_state(state)
    settings = trainer.method.judge
    trainer.method.judge = lambda *arguments: -settings(*arguments)
    turned = trainer.method.log_ratios(batch)
    assert torch.equal(turned[0], loser)
    assert torch.equal(turned[1], winner)
    assert counts.all()
    assert (winner - loser).abs().min() > 1e-5


@pytest.mark.parametrize("spread", [0.03, 0.3])
def test_the_loss_is_that_of_the_released_code(teacher, tmp_path, monkeypatch, spread):
    """Random log densities through the block of 2410.03190's online script: ratios clamped to 0.9..1.1, +1 for the
    winner and -1 for the loser, beta 50, mean over pairs and steps."""
    trainer = trainer_of(teacher, tmp_path, train={"batch_size": 16})
    generator = torch.Generator().manual_seed(3)
    logp, ref = (-1.3 + spread * torch.randn(32, 3, generator=generator) for _ in range(2))
    scores = torch.randn(32, generator=generator)
    monkeypatch.setattr(trainer.method, "move_ratios", lambda moves, condition: logp - ref)
    monkeypatch.setattr(trainer.method, "judge", lambda pixels, items: scores)
    (weight, loss), *_ = trainer.method.student_losses(trainer.method.next_batch()).values()
    h = torch.where(scores[:16] > scores[16:], 1.0, -1.0)
    each = []
    for step in range(3):
        ratio_0, ratio_1 = (
            torch.clamp(torch.exp(logp[rows, step] - ref[rows, step]), 1 - 0.1, 1 + 0.1)
            for rows in (slice(16), slice(16, 32))
        )
        each.append(-torch.log(torch.sigmoid(50.0 * (torch.log(ratio_0) * h + torch.log(ratio_1) * -h))).mean())
    assert weight == 1.0
    assert loss.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-6, abs=1e-6)
    assert 0 < h.eq(1).sum() < 16


def test_two_rewards_judge_by_their_weighted_sum(teacher, tmp_path):
    settings = [{"reward": "judges:FirstValue", "weight": 2.0}, {"reward": "judges:Brightness", "weight": 0.5}]
    trainer = trainer_of(teacher, tmp_path, pso={"rewards": settings})
    pixels = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = 2 * pixels[:, 0, 0, 0] + 0.5 * pixels.mean(dim=(1, 2, 3))
    torch.testing.assert_close(trainer.method.judge(pixels, [0] * 5), expected)


def test_the_judge_is_told_the_pairs_conditions_and_sees_both_rollouts(teacher, tmp_path, monkeypatch):
    trainer, seen = trainer_of(teacher, tmp_path), []
    settings = trainer.method.judge
    monkeypatch.setattr(
        trainer.method, "judge", lambda pixels, items: seen.append((pixels, items)) or settings(pixels, items)
    )
    batch = trainer.method.next_batch()
    trainer.method.log_ratios(batch)
    ((pixels, items),) = seen
    assert items == [*batch.items, *batch.items]
    assert pixels.shape == (8, 1, 8, 8)


# -- denoising errors --------------------------------------------------------------------------------------


def errors_by_hand(trainer, x0, noise, t, condition, kind="v"):
    """Mean squared errors of student and reference, (B,) each."""
    alpha, sigma = coefficients(trainer, t)
    x_t = alpha * x0 + sigma * noise
    result = []
    for role in (trainer.roles.student, trainer.roles.teacher):
        prediction = role(x_t, t, condition)
        error = prediction.output - (alpha * noise - sigma * x0) if kind == "v" else prediction.x0 - x0
        result.append(error.square().mean(dim=(1, 2, 3)))
    return result


def test_targets_against_own_samples_by_hand(teacher, tmp_path, monkeypatch, images):
    trainer = shaken(targets_trainer(teacher, tmp_path, images))
    batch = trainer.method.next_batch()
    normal, whole = drawn(trainer, monkeypatch)
    loss, result = gradients(trainer, batch)
    *renoising, noise = normal
    (steps,) = whole
    assert len(renoising) == 3
    x = batch.noise
    for index, time in enumerate(TIMES):
        with torch.no_grad():
            x0 = trainer.roles.teacher(x, torch.full((4,), time), batch.condition).x0
        if index < 3:
            alpha, sigma = coefficients(trainer, torch.full((4,), TIMES[index + 1]))
            x = alpha * x0 + sigma * renoising[index]
    t = torch.tensor(TIMES)[steps]
    ratios = []
    for picture in (batch.real, x0):
        ours, theirs = errors_by_hand(trainer, picture, noise, t, batch.condition)
        ratios.append(-0.5 * (ours - theirs))
    logit = 40.0 * (ratios[0] - ratios[1])
    assert logit.abs().min() > 1e-3
    torch.testing.assert_close(loss, (1 + (-logit).exp()).log().mean(), rtol=1e-4, atol=1e-6)
    assert max(g.abs().max() for g in result) > 0


def test_every_step_of_the_student_is_drawn(teacher, tmp_path, images):
    trainer = targets_trainer(teacher, tmp_path, images)
    (steps,) = trainer.method.draw_steps(200)
    assert torch.bincount(steps).min() > 25
    assert trainer.method.times(torch.arange(4), torch.zeros(1, 1, 8, 8), trainer.sampler).tolist() == TIMES
    one = targets_trainer(teacher, tmp_path, images, sampler={"steps": 1})
    assert torch.cat(one.method.draw_steps(50)).unique().tolist() == [0]


def test_pairs_of_pictures_by_hand(teacher, tmp_path, monkeypatch, pairs):
    """Winner and loser of one label at every step, the same noise for both; one sigmoid of the sum."""
    trainer = shaken(
        trainer_of(
            teacher,
            tmp_path,
            pso={
                "mode": "pairs",
                "pairs": {"folder": str(pairs)},
                "over_steps": "sum",
                "error": "x0",
                "beta": 3.0,
            },
        )
    )
    batch = trainer.method.next_batch()
    assert isinstance(batch, PairBatch)
    torch.testing.assert_close(batch.real - batch.loser, torch.full((4, 1, 8, 8), 100 / 127.5))
    assert (
        batch.condition["label"].tolist()
        == batch.items
        == [trainer.parts.preferences.pairs.labels[i] for i in batch.indices]
    )
    normal, _ = drawn(trainer, monkeypatch)
    loss, result = gradients(trainer, batch)
    assert len(normal) == 4
    logit = torch.zeros(4)
    for noise, time in zip(normal, TIMES, strict=True):
        for sign, picture in ((1, batch.real), (-1, batch.loser)):
            t = torch.full((4,), time)
            ours, theirs = errors_by_hand(trainer, picture, noise, t, batch.condition, "x0")
            logit = logit - sign * 3.0 / 2 * (ours - theirs)
    assert logit.abs().min() > 1e-3
    torch.testing.assert_close(loss, (1 + (-logit).exp()).log().mean(), rtol=1e-4, atol=1e-6)
    assert max(g.abs().max() for g in result) > 0


def test_all_pairs_come_once_an_epoch_with_their_own_pictures(teacher, tmp_path, pairs):
    trainer = trainer_of(
        teacher,
        tmp_path,
        pso={"mode": "pairs", "pairs": {"folder": str(pairs)}},
        train={"batch_size": 3},
    )
    batches = [trainer.method.next_batch() for _ in range(2)]
    assert sorted(index for batch in batches for index in batch.indices) == list(range(6))
    whole = trainer.parts.preferences.pairs.sets[0].batch(list(range(6)))
    for batch in batches:
        assert torch.equal(batch.real, whole[list(batch.indices)])


def test_targets_against_moves_by_hand(teacher, tmp_path, monkeypatch, images):
    """The target's errors count 1 and the moves of own samples their densities, averaged over dimensions alike."""
    trainer = shaken(targets_trainer(teacher, tmp_path, images, likelihood="transition"))
    batch = trainer.method.next_batch()
    normal, _ = drawn(trainer, monkeypatch)
    loss, result = gradients(trainer, batch)
    assert len(normal) == 6
    x, logits = batch.noise, []
    for index in range(3):
        t = torch.full((4,), TIMES[index])
        alpha, sigma = coefficients(trainer, torch.full((4,), TIMES[index + 1]))
        prediction = [role(x, t, batch.condition).x0 for role in (trainer.roles.student, trainer.roles.teacher)]
        following = alpha * prediction[1].detach() + sigma * normal[index]
        logs = [-((following - alpha * x0) ** 2 / (2 * sigma**2)).mean(dim=(1, 2, 3)) for x0 in prediction]
        ours, theirs = errors_by_hand(trainer, batch.real, normal[3 + index], t, batch.condition)
        logits.append(40.0 * (-(ours - theirs) - (logs[0] - logs[1])))
        x = following
    logit = torch.stack(logits, 1)
    assert logit.abs().max() > 1e-2
    torch.testing.assert_close(loss, (1 + (-logit).exp()).log().mean(), rtol=1e-3, atol=1e-5)
    assert max(g.abs().max() for g in result) > 0


def test_a_smaller_error_on_targets_and_a_less_likely_sample_lower_the_loss(teacher, tmp_path, monkeypatch, images):
    trainer = targets_trainer(teacher, tmp_path, images, likelihood="transition")

    def loss(error, ratio):
        prediction = {"student": error, "teacher": 0.5}
        monkeypatch.setattr(
            trainer.method, "errors", lambda role, x0, *_: torch.full((len(x0),), prediction[role.name])
        )
        monkeypatch.setattr(trainer.method, "move_ratios", lambda moves, _: torch.full((4, len(moves)), ratio))
        ((_, result),) = trainer.method.student_losses(trainer.method.next_batch()).values()
        return result.item()

    assert loss(0.5, 0.0) == pytest.approx(math.log(2), rel=1e-6)
    assert loss(0.49, 0.0) == pytest.approx(math.log1p(math.exp(-40 * 0.01)), rel=1e-4)
    assert loss(0.5, -0.02) == pytest.approx(math.log1p(math.exp(-40 * 0.02)), rel=1e-4)
    assert loss(0.51, 0.02) == pytest.approx(math.log1p(math.exp(40 * 0.03)), rel=1e-4)


def test_own_samples_are_the_untuned_models_or_the_tuned_ones(teacher, tmp_path, images):
    result = {}
    for whose in ("untuned", "tuned"):
        trainer = shaken(targets_trainer(teacher, tmp_path, images, reference_samples=whose))
        batch = trainer.method.next_batch()
        state = trainer.noise.get_state()
        result[whose] = trainer.method.samples(batch)
        trainer.noise.set_state(state)
        role = trainer.roles.teacher if whose == "untuned" else trainer.roles.student
        settings = trainer.sampler.sample(role, batch.noise, batch.condition, trainer.noise.randn_like)
        assert torch.equal(result[whose], settings)
        assert not result[whose].requires_grad
    assert (result["tuned"] - result["untuned"]).abs().max() > 1e-2


@pytest.mark.parametrize("over_steps", ["step", "sum"])
def test_the_diffusion_loss_is_the_denoising_error_of_the_targets(teacher, tmp_path, monkeypatch, images, over_steps):
    trainer = shaken(targets_trainer(teacher, tmp_path, images, loss="diffusion", over_steps=over_steps))
    batch = trainer.method.next_batch()
    normal, whole = drawn(trainer, monkeypatch)
    losses = trainer.method.student_losses(batch)
    times = [torch.tensor(TIMES)[whole[0]]] if over_steps == "step" else [torch.full((4,), t) for t in TIMES]
    each = [
        errors_by_hand(trainer, batch.real, noise, t, batch.condition)[0]
        for noise, t in zip(normal, times, strict=True)
    ]
    ((name, (weight, loss)),) = losses.items()
    assert (name, weight) == ("diffusion", 1.0)
    torch.testing.assert_close(loss, torch.stack(each).mean(), rtol=1e-4, atol=1e-6)
    assert loss.requires_grad


# -- which targets -----------------------------------------------------------------------------------------


def test_the_best_targets_are_the_top_share_of_each_label(teacher, tmp_path, images):
    trainer = targets_trainer(teacher, tmp_path, images, best=0.5, rewards=[{"reward": "judges:FirstValue"}])
    assert trainer.parts.real.subset == [1, 3, 6, 7, 8, 10]
    seen = {i for _ in range(3) for i in trainer.method.next_batch().indices}
    assert seen == {1, 3, 6, 7, 8, 10}
    least = targets_trainer(teacher, tmp_path, images, best=0.1, rewards=[{"reward": "judges:FirstValue"}])
    assert least.parts.real.subset == [1, 6, 10]
    everything = targets_trainer(teacher, tmp_path, images)
    assert everything.parts.real.subset == list(range(12))


# -- what is refused ---------------------------------------------------------------------------------------

HAS_NO_DENSITY = "a deterministic sampler (transition = {}) has no density; set pso.rollout_transition=renoise"
BAD = {
    "one step": ({"sampler": {"steps": 1}}, "set pso.rollout_steps above 1"),
    "one step of a rollout": ({"pso": {"rollout_steps": 1}}, "set pso.rollout_steps above 1"),
    "ode": ({"sampler": {"transition": "ode"}}, HAS_NO_DENSITY.format("ode")),
    "ode of a rollout": ({"pso": {"rollout_transition": "ode"}}, HAS_NO_DENSITY.format("ode")),
    "tcd": ({"pso": {"rollout_transition": "tcd"}, "sampler": {"eta": 0.0}}, HAS_NO_DENSITY.format("tcd")),
    "no judge": ({"pso": {"rewards": []}}, "needs a judge: set pso.rewards"),
    "no images": ({"pso": {"mode": "targets"}}, "needs images: set data.images"),
    "another student": ({"roles": {"student_from": "elsewhere"}}, "roles.student_from"),
    "another sampler": ({"sampler": {"transition": "ancestral"}}, "LCMScheduler, moves by renoise"),
    "diffusion online": ({"pso": {"loss": "diffusion"}}, "loss = diffusion needs mode = targets"),
    "no pairs": ({"pso": {"mode": "pairs"}}, "pairs goes with mode = pairs"),
    "pairs online": ({"pso": {"pairs": {"folder": "somewhere"}}}, "pairs goes with mode = pairs"),
    "no such pairs": ({"pso": {"mode": "pairs", "pairs": {"folder": "nowhere"}}}, "no folder 'winner'"),
    "best online": ({"pso": {"best": 0.5}}, "best needs mode = targets and rewards"),
    "transition online": ({"pso": {"likelihood": "transition"}}, "likelihood = transition is for mode = targets"),
    "hinge": ({"pso": {"rewards": [{"reward": "judges:Brightness", "hinge": 1.0}]}}, "a hinge has no meaning"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_one_line(name, teacher, tmp_path):
    changes, says = BAD[name]
    with pytest.raises(UserError) as caught:
        trainer_of(teacher, tmp_path, **changes)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sampler": {"steps": 1}}, "pso.rollout_steps"),
        ({"pso": {"rollout_transition": "ode"}}, HAS_NO_DENSITY.format("ode")),
    ],
)
def test_the_transition_likelihood_needs_stochastic_moves_too(teacher, tmp_path, images, changes, says):
    settings = {"pso": {"mode": "targets", "likelihood": "transition"}, "data": {"images": {"npz": str(images)}}}
    with pytest.raises(UserError) as caught:
        trainer_of(teacher, tmp_path, **merge(settings, changes))
    assert says in str(caught.value)
    assert "pso.likelihood = transition" in str(caught.value)


def test_a_one_step_model_is_tuned_through_a_longer_rollout(teacher, tmp_path):
    trainer = trainer_of(teacher, tmp_path, sampler={"steps": 1}, pso={"rollout_steps": 4})
    assert list(trainer.sampler.times) == [999]
    assert list(trainer.method.rollout.times) == TIMES
    trainer.fit()
    assert trainer.counters["student"] == 3


# -- what is watched ---------------------------------------------------------------------------------------


def test_sharpness_by_hand():
    pixels = torch.tensor([[[[0.0, 1.0], [3.0, 7.0]]], [[[2.0, 2.0], [2.0, 2.0]]]])
    assert Sharpness()(pixels, []).tolist() == [((1 + 4) / 2 + (3 + 6) / 2) / 2, 0.0]


def test_the_probe_logs_reward_distance_and_sharpness_of_each_number_of_steps(teacher, tmp_path):
    trainer = trainer_of(teacher, tmp_path, sampler={"steps": 4, "also_steps": [1, 2]})
    trainer.begin()
    expected = {f"probe/{what}@{steps}" for what in ("reward", "distance", "sharpness") for steps in (1, 2, 4)}
    assert {name for name in trainer.parts.journal.values if name.startswith("probe")} == expected
    assert [trainer.parts.journal.values[f"probe/distance@{steps}"][0].item() for steps in (1, 2, 4)] == [0.0] * 3
    shaken(trainer).method.probe()
    for steps, times in ((1, [999]), (2, [999, 499]), (4, TIMES)):
        result = {
            what: trainer.parts.journal.values[f"probe/{what}@{steps}"][1].item()
            for what in ("reward", "distance", "sharpness")
        }
        condition, sampled = {"label": torch.tensor([0, 1, 2])}, []
        for role in (trainer.roles.student, trainer.roles.teacher):
            generator = torch.Generator().manual_seed(trainer.config.seed + 1)
            draw = lambda like, generator=generator: torch.randn(like.shape, generator=generator)  # noqa: E731
            sampler = FewStepSampler(trainer.family.schedule, tuple(times))
            with torch.no_grad():
                sampled.append(sampler.sample(role, draw(torch.zeros(3, 1, 8, 8)), condition, draw))
        assert result["reward"] == pytest.approx(sampled[0][:, 0, 0, 0].mean().item(), rel=1e-5)
        assert result["distance"] == pytest.approx((sampled[0] - sampled[1]).square().mean().sqrt().item(), rel=1e-5)
        assert result["sharpness"] == pytest.approx(Sharpness()(sampled[0], []).mean().item(), rel=1e-5)
        assert result["distance"] > 1e-2


def test_probing_changes_neither_the_run_nor_its_count_of_passes(teacher, tmp_path):
    runs, probes = [], []
    for every in (1, 1000):
        trainer = trainer_of(teacher, tmp_path, train={"sample_every": every})
        settings = trainer.method.probe
        trainer.method.probe = lambda settings=settings, every=every: probes.append(every) or settings()
        trainer.fit()
        runs.append(trainer)
    assert (probes.count(1), probes.count(1000)) == (4, 1)
    often, once = runs
    assert often.passes == once.passes > 0
    assert torch.equal(often.noise.get_state(), once.noise.get_state())
    states = [trainer.roles.student.state_dict() for trainer in runs]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


PASSES = {
    "online": {},
    "online_one_step": {"sampler": {"steps": 1}, "pso": {"rollout_steps": 3}},
    "online_sum": {"pso": {"over_steps": "sum"}, "sampler": {"steps": 2}},
    "online_full": {"roles": {"weights": "full"}},
    "pairs_step": {"pso": {"mode": "pairs"}},
    "pairs_sum": {"pso": {"mode": "pairs", "over_steps": "sum"}},
    "targets_step": {"pso": {"mode": "targets"}},
    "targets_sum": {"pso": {"mode": "targets", "over_steps": "sum"}},
    "targets_tuned": {"pso": {"mode": "targets", "reference_samples": "tuned"}, "sampler": {"steps": 1}},
    "targets_transition": {"pso": {"mode": "targets", "likelihood": "transition"}},
    "targets_transition_longer": {"pso": {"mode": "targets", "likelihood": "transition", "rollout_steps": 8}},
    "diffusion_step": {"pso": {"mode": "targets", "loss": "diffusion"}},
    "diffusion_sum": {"pso": {"mode": "targets", "loss": "diffusion", "over_steps": "sum"}},
    "diffusion_accumulated": {"pso": {"mode": "targets", "loss": "diffusion"}, "train": {"gradient_accumulation": 2}},
}


@pytest.mark.parametrize("name", PASSES)
def test_the_passes_made_are_those_planned(name, teacher, tmp_path, images, pairs):
    changes = PASSES[name]
    mode = changes.get("pso", {}).get("mode")
    if mode == "pairs":
        changes = merge(changes, {"pso": {"pairs": {"folder": str(pairs)}}})
    if mode == "targets":
        changes = merge(changes, {"data": {"images": {"npz": str(images)}}})
    trainer = trainer_of(teacher, tmp_path, **merge(changes, {"train": {"updates": 1}}))
    trainer.fit()
    assert trainer.passes == planned_passes(type(trainer.method), trainer.config) > 0


# -- what it does ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_reward_rises_and_the_samples_keep_their_spread():
    """A four-step model of a mixture, its own denoiser, and the x-coordinate for a judge."""
    mixture = GaussianMixture([[-0.6, 0.8], [0.6, 0.8], [0.0, -1.0]], 0.05)
    family = toy_family(mixture, zero_snr())
    fit_to_teacher(family, mixture, 800)
    family.teacher_denoiser = lambda: None
    trainer = toy_trainer(
        family,
        method="pso",
        sampler={"steps": 4},
        roles={"weights": "full"},
        pso={"rewards": [{"reward": "judges:FirstValue"}], "beta": 5.0, "clamp": None},
        train={"updates": 200, "batch_size": 64},
    )
    before, watched, settings = students_samples(trainer), {}, trainer.method.log

    def log(name, value):
        watched.setdefault(name, []).append(torch.as_tensor(value).item())
        settings(name, value)

    trainer.method.log = log
    trainer.fit()
    after = students_samples(trainer)
    assert after[:, 0].mean() > before[:, 0].mean() + 0.2
    assert (after.std(0) > 0.7 * before.std(0)).all()
    assert (after.mean(0) - before.mean(0))[1].abs() < 0.2
    reward, distance = (watched[f"probe/{name}@4"] for name in ("reward", "distance"))
    assert reward[-1] > reward[0] + 0.2
    assert distance[0] == 0
    assert distance[-1] > 0.2


def test_targets_move_a_one_step_model_that_a_diffusion_loss_blurs():
    """The model makes N(m, 0.4^2) of pure noise, the targets are N(m + (0.5, 0), 0.4^2): the denoising loss answers
    pure noise with the targets' mean, the preference moves the samples and keeps their spread."""
    family = toy_family(GaussianMixture([[0.2, -0.1]], 0.16), zero_snr(), kind="x0")
    network, generator = family.network.requires_grad_(True), torch.Generator().manual_seed(0)
    optimizer, centre = torch.optim.Adam(network.parameters(), 3e-3), torch.tensor([0.2, -0.1])[:, None, None]
    for _ in range(400):
        z = torch.randn(128, 2, 1, 1, generator=generator)
        optimizer.zero_grad()
        (network(z, torch.full((128,), 999)) - 0.4 * z - centre).square().mean().backward()
        optimizer.step()
    family.teacher_denoiser = lambda: None
    targets = torch.tensor([0.7, -0.1]) + 0.4 * torch.randn(1000, 2, generator=generator)
    after = {}
    for loss in ("margin", "diffusion"):
        settings = copy.deepcopy(family)
        settings.teacher_denoiser = lambda: None
        trainer = toy_trainer(
            settings,
            RealSource(settings, ImageSet("points", None, 1000, None, ""), targets[:, :, None, None], 0),
            method="pso",
            roles={"weights": "full"},
            pso={"mode": "targets", "loss": loss, "beta": 10.0},
            data={"images": {"npz": "unused"}},
            train={"updates": 200, "batch_size": 64},
        )
        before = students_samples(trainer)
        trainer.fit()
        after[loss] = students_samples(trainer)
    for result in after.values():
        assert result[:, 0].mean() - before[:, 0].mean() > 0.3
    assert (after["margin"].std(0) / before.std(0) - 1).abs().max() < 0.15
    assert (after["diffusion"].std(0) < 0.1 * before.std(0)).all()
