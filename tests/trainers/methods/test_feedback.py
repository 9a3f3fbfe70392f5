"""Human feedback, one-step enhancement and regression: their losses by hand, where their gradients go, fixed points."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from judges import Brightness
from toys import send_backward, toy_family, toy_trainer, zero_snr

from stepdistill.analytic import GaussianMixture
from stepdistill.config import merge
from stepdistill.data.order import Order
from stepdistill.data.teacher_pairs import PairRecipe, PairSet
from stepdistill.errors import UserError
from stepdistill.objectives.distribution_matching import distribution_matching_gradient
from stepdistill.sampler import ddim_times
from stepdistill.trainers.methods.base import Batch
from stepdistill.trainers.plans.build import build_trainer
from stepdistill.trainers.plans.job import make_job


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.save_pixels(tmp_path_factory.mktemp("feedback") / "teacher", "v", labels=3, null=True)


def trainer_of(teacher, tmp_path, method, **changes):
    raw = {
        "method": method,
        "output": str(tmp_path / "run"),
        "teacher": {"path": str(teacher), "steps": 3},
        "roles": {"weights": "shared", "lora": {"rank": 2}},
        "optimizer": {"student": {"lr": 1e-2, "weight_decay": 0.0}, "fake_score": {"lr": 1e-3}},
        "train": {"updates": 3, "batch_size": 4, "trackers": []},
        "evaluation": {"enabled": False},
    }
    if method == "feedback":
        settings = {"roles": {"student_from": str(teacher)}, "feedback": {"rewards": [{"reward": "judges:Brightness"}]}}
        raw = merge(raw, settings)
    return build_trainer(make_job(merge(raw, changes)), None)


def gradients(trainer, batch):
    losses = trainer.method.student_losses(batch)
    total = sum(weight * loss for weight, loss in losses.values())
    result = torch.autograd.grad(total, list(trainer.trained["student"].values()), allow_unused=True)
    return losses, [g for g in result if g is not None]


# -- feedback ----------------------------------------------------------------------------------------------


def test_the_loss_is_the_hinge_of_the_reward_of_the_decoded_sample(teacher, tmp_path):
    rewards = [{"reward": "judges:Brightness", "hinge": 0.4, "weight": 3.0}]
    trainer = trainer_of(
        teacher, tmp_path, "feedback", feedback={"rewards": rewards}, roles={"student_from": str(teacher)}
    )
    batch = trainer.method.next_batch()
    losses, _ = gradients(trainer, batch)
    x0 = trainer.roles.student(batch.noise, trainer.sampler.time(0, batch.noise), batch.condition).x0
    expected = (0.4 - x0.flatten(1).mean(1)).clamp(min=0).mean()
    ((weight, loss),) = losses.values()
    assert weight == 3.0
    torch.testing.assert_close(loss, expected)


def test_a_reward_is_told_what_each_sample_is_of(teacher, tmp_path):
    trainer = trainer_of(teacher, tmp_path, "feedback", feedback={"rewards": [{"reward": "judges:TimesLabel"}]})
    for _ in range(3):
        batch = trainer.method.next_batch()
        ((_, loss),) = trainer.method.student_losses(batch).values()
        x0 = trainer.roles.student(batch.noise, trainer.sampler.time(0, batch.noise), batch.condition).x0
        factor = batch.condition["label"] + 1
        torch.testing.assert_close(loss, -(factor * x0.flatten(1).mean(1)).mean())


def test_rollouts_take_the_numbers_of_steps_that_are_set(teacher, tmp_path):
    """Two in place of the sampler's four; the graded one is the second, from the first's sample."""
    trainer = trainer_of(teacher, tmp_path, "feedback", sampler={"steps": 4}, feedback={"rollout_steps": [2]})
    batch, state = trainer.method.next_batch(), trainer.noise.get_state()
    result = trainer.method.graded(batch)
    trainer.noise.set_state(state)
    times = [torch.full((4,), time) for time in (999, 499)]
    x0 = trainer.roles.student(batch.noise, times[0], batch.condition).x0
    x = trainer.family.schedule.add_noise(x0, trainer.noise.randn(*x0.shape), times[1])
    torch.testing.assert_close(result, trainer.roles.student(x, times[1], batch.condition).x0)


def test_a_reward_that_is_reached_gives_no_gradient_and_one_that_is_not_is_raised(teacher, tmp_path):
    settings = {"rewards": [{"reward": "judges:Brightness", "hinge": -1e4}]}
    reached = trainer_of(teacher, tmp_path, "feedback", feedback=settings)
    _, result = gradients(reached, reached.method.next_batch())
    assert all(g.abs().max() == 0 for g in result)
    trainer = trainer_of(
        teacher, tmp_path, "feedback", feedback={"rewards": [{"reward": "judges:Brightness", "hinge": 1e4}]}
    )
    batch = trainer.method.next_batch()
    with torch.no_grad():
        before = Brightness()(trainer.method.graded(batch), []).mean()
    trainer.fit()
    with torch.no_grad():
        after = Brightness()(trainer.method.graded(batch), []).mean()
    assert after > before + 1e-3


def test_the_rollout_has_no_gradient_but_the_last_step(teacher, tmp_path):
    """Every pass but the last is made without a graph, and the graded one is one of the ``last`` steps."""
    trainer = trainer_of(teacher, tmp_path, "feedback", sampler={"steps": 4}, feedback={"last": 2})
    calls, settings = [], trainer.roles.student._forward

    def keep(x, time, condition):
        calls.append((float(time[0]), torch.is_grad_enabled()))
        return settings(x, time, condition)

    trainer.roles.student._denoiser.forward = keep
    exits = set()
    for _ in range(12):
        calls.clear()
        trainer.method.graded(trainer.method.next_batch())
        assert [grad for _, grad in calls] == [False] * (len(calls) - 1) + [True]
        exits.add(calls[-1][0])
        assert [time for time, _ in calls] == [999.0, 749.0, 499.0, 249.0][: len(calls)]
    assert exits == {499.0, 249.0}


def test_numbers_of_steps_are_drawn_from_the_samplers(teacher, tmp_path):
    trainer = trainer_of(teacher, tmp_path, "feedback", sampler={"steps": 4, "also_steps": [1, 2]})
    assert sorted(trainer.method.counts(trainer.config)) == [1, 2, 4]
    before, seen = trainer.roles.meter.forward, set()
    for _ in range(20):
        trainer.method.graded(trainer.method.next_batch())
        seen.add((trainer.roles.meter.forward - before) // 4)
        before = trainer.roles.meter.forward
    assert seen == {1, 2, 4}


def test_only_the_new_lora_is_trained(teacher, tmp_path):
    trainer = trainer_of(teacher, tmp_path, "feedback")
    base = {k: v.clone() for k, v in trainer.roles.student.network.state_dict().items() if "lora_" not in k}
    trainer.fit()
    state = trainer.roles.student.network.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in base.items())
    assert any(p.abs().max() > 0 for k, p in trainer.roles.student.parameters().items() if "lora_B" in k)
    assert set(trainer.trained) == {"student"}


def test_merge_ratio_zero_is_the_student_below(teacher, tmp_path):
    trainer = trainer_of(teacher, tmp_path, "feedback", feedback={"merge_ratio": 0.0})
    trainer.fit()
    batch = trainer.method.next_batch()
    t = trainer.sampler.time(0, batch.noise)
    with torch.no_grad():
        trained = trainer.roles.student(batch.noise, t, batch.condition).output
        with trainer.exported():
            merged = trainer.roles.student(batch.noise, t, batch.condition).output
            exported = trainer.roles.student.plain_state_dict()
        below = trainer.roles.teacher(batch.noise, t, batch.condition).output
    assert (trained - below).abs().max() > 1e-3
    torch.testing.assert_close(merged, below, rtol=0, atol=1e-6)
    for key, value in trainer.family.read_weights(str(teacher)).items():
        torch.testing.assert_close(exported[key], value, rtol=0, atol=1e-6)


def perceptual_trainer(teacher, tmp_path, model="judges:Difference", **settings):
    """Six pictures, two of each label; no rewards, four steps."""
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(6) % 3)
    return trainer_of(
        teacher,
        tmp_path,
        "feedback",
        feedback={"rewards": [], "perceptual": {"model": model, "weight": 2.0, **settings}},
        data={"images": {"npz": str(tmp_path / "images.npz")}},
        sampler={"steps": 4},
    )


def test_the_perceptual_part_starts_from_a_noised_real_picture(teacher, tmp_path):
    trainer = perceptual_trainer(teacher, tmp_path)
    batch = trainer.method.next_batch()
    state, counters = trainer.noise.get_state(), dict(trainer.counters)
    losses, result = gradients(trainer, batch)
    trainer.noise.set_state(state)
    trainer.counters.update(counters)
    batch = trainer.method.next_real_batch()
    assert torch.equal(batch.real, trainer.parts.real.samples(trainer.parts.real.order.indices(0, 4)))
    t = torch.full((4,), 249)
    x_t = trainer.family.schedule.add_noise(batch.real, batch.noise, t)
    x0 = trainer.roles.student(x_t, t, batch.condition).x0
    torch.testing.assert_close(losses["perceptual"][1], (x0 - batch.real).square().mean())
    assert losses["perceptual"][0] == 2.0
    assert max(g.abs().max() for g in result) > 0


def test_a_real_picture_noised_further_goes_on_by_the_students_own_steps(teacher, tmp_path):
    """To one of its last three times, each move with noise of its own; a graph to the last step alone."""
    trainer, firsts = perceptual_trainer(teacher, tmp_path, noised_steps=3), set()
    batch, times = trainer.method.next_real_batch(), [torch.full((4,), time) for time in (999, 749, 499, 249)]
    schedule, student = trainer.family.schedule, trainer.roles.student
    for _ in range(12):
        state = trainer.noise.get_state()
        result = trainer.method.regraded(batch)
        trainer.noise.set_state(state)
        first = trainer.noise.shared_randint(1, 3)
        x = schedule.add_noise(batch.real, batch.noise, times[first])
        for index in range(first, 3):
            x0 = student(x, times[index], batch.condition).x0.detach()
            x = schedule.add_noise(x0, trainer.noise.randn(*x.shape), times[index + 1])
        expected = student(x, times[3], batch.condition).x0
        torch.testing.assert_close(result, expected)
        grads = [torch.autograd.grad(y.sum(), list(trainer.trained["student"].values())) for y in (result, expected)]
        for settings, target in zip(*grads, strict=True):
            torch.testing.assert_close(settings, target)
        firsts.add(first)
    assert firsts == {1, 2, 3}


def test_the_perceptual_model_is_told_which_pictures_they_are(teacher, tmp_path):
    trainer = perceptual_trainer(teacher, tmp_path, "judges:Index")
    for start in (0, 4):
        _, loss = trainer.method.student_losses(trainer.method.next_batch())["perceptual"]
        assert loss.item() == pytest.approx(sum(trainer.parts.real.order.indices(start, 4)) / 4)


BAD_FEEDBACK = {
    "nothing to learn from": ({"feedback": {"rewards": []}}, "set feedback.rewards, or feedback.perceptual"),
    "full weights": ({"roles": {"weights": "full"}}, "set roles.weights=shared"),
    "no student": ({"roles": {"student_from": None}}, "needs a student to start from"),
    "steps that do not divide": ({"feedback": {"rollout_steps": [3]}, "sampler": {"steps": 4}}, "not a divisor"),
    "no such reward": ({"feedback": {"rewards": [{"reward": "judges:Nothing"}]}}, "judges:Nothing"),
    "perceptual without images": ({"feedback": {"perceptual": {"model": "judges:Difference"}}}, "needs real images"),
}


@pytest.mark.parametrize("name", BAD_FEEDBACK)
def test_bad_feedback_is_one_line(name, teacher, tmp_path):
    changes, says = BAD_FEEDBACK[name]
    with pytest.raises(UserError) as caught:
        trainer_of(teacher, tmp_path, "feedback", **changes)
    assert says in str(caught.value)


def test_a_reward_of_the_wrong_shape_is_named(teacher, tmp_path):
    trainer = trainer_of(teacher, tmp_path, "feedback", feedback={"rewards": [{"reward": "judges:scalar"}]})
    with pytest.raises(UserError, match="judges:scalar"):
        trainer.iteration()


# -- enhancement -------------------------------------------------------------------------------------------


def enhance(path, tmp_path, steps=4, **settings):
    return trainer_of(
        path, tmp_path, "enhance", sampler={"steps": steps}, dmd2={"fake_score_updates": 1}, enhance=settings
    )


def shake(role, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in role.parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def test_the_first_step_alone_is_trained_whatever_the_number_of_steps(teacher, tmp_path):
    trainer = enhance(teacher, tmp_path)
    for _ in range(5):
        batch = trainer.method.next_batch()
        x_t, t = trainer.method.student_input(batch)
        assert torch.equal(x_t, batch.noise)
        assert t.tolist() == [999] * 4


def test_all_steps_are_trained_by_their_own_rollouts(teacher, tmp_path):
    """Any number of steps and any of its steps; each input's noise level is its time's."""
    trainer = trainer_of(
        teacher,
        tmp_path,
        "enhance",
        sampler={"steps": 4, "also_steps": [1, 2]},
        dmd2={"fake_score_updates": 1},
        enhance={"train_steps": "all"},
    )
    times = [int(trainer.method.student_input(trainer.method.next_batch())[1][0]) for _ in range(60)]
    assert set(times) == {999, 749, 499, 249}
    assert times.count(999) > times.count(749) > 0  # three of the seven steps are the first of theirs
    with pytest.raises(UserError, match=r"enhance\.mse_weight"):
        trainer_of(teacher, tmp_path, "enhance", enhance={"train_steps": "all", "mse_weight": 1.0})


def test_enhancement_without_its_terms_is_dmd2_of_one_step_bit_for_bit(teacher, tmp_path):
    plain = trainer_of(teacher, tmp_path, "dmd2", dmd2={"fake_score_updates": 2})
    ours = trainer_of(teacher, tmp_path, "enhance", dmd2={"fake_score_updates": 2})
    for trainer in (plain, ours):
        trainer.fit()
    for key, value in plain.roles.student.state_dict().items():
        assert torch.equal(value, ours.roles.student.state_dict()[key]), key


@pytest.mark.parametrize("reference", [1, 2])
def test_the_mse_term_by_hand(teacher, tmp_path, reference):
    trainer = enhance(teacher, tmp_path, mse_weight=0.7, reference_steps=reference)
    start = trainer.method.start
    shake(trainer.roles.student)
    batch = trainer.method.next_batch()
    x0 = trainer.method.make_sample(batch)
    state = trainer.noise.get_state()
    losses = trainer.method.student_losses(x0, batch)
    t = torch.full((4,), 999)
    aim = start(batch.noise, t, batch.condition).x0
    if reference == 2:
        seen, settings = [], trainer.noise.randn_like
        trainer.noise.set_state(state)
        trainer.noise.randn_like = lambda like: seen.append(settings(like)) or seen[-1]
        trainer.method.student_losses(x0, batch)
        x_t = trainer.family.schedule.add_noise(aim, seen[-1], torch.full((4,), 499))
        aim = start(x_t, torch.full((4,), 499), batch.condition).x0
    weight, loss = losses["mse"]
    assert weight == 0.7
    torch.testing.assert_close(loss, (x0 - aim).square().mean(), rtol=1e-5, atol=1e-7)
    assert loss > 1e-6


def test_the_other_steps_are_held_to_where_the_stage_began(teacher, tmp_path):
    trainer = enhance(teacher, tmp_path, hold_weight=2.0)
    batch = trainer.method.next_batch()
    x0 = trainer.method.make_sample(batch).detach()
    send_backward(trainer.method.more_student_terms([(batch, x0)]))
    settings = trainer.trained["student"].values()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in settings)  # it has not moved yet
    shake(trainer.roles.student)
    before = {k: v.clone() for k, v in trainer.method.start.state_dict().items()}
    send_backward(trainer.method.more_student_terms([(batch, x0)]))
    assert max(p.grad.abs().max() for p in settings if p.grad is not None) > 1e-6
    trainer.fit()
    assert all(torch.equal(before[k], v) for k, v in trainer.method.start.state_dict().items())


def test_the_real_score_may_be_the_stage_before(teacher, tmp_path):
    trainer = enhance(teacher, tmp_path, teacher="previous_stage")
    shake(trainer.roles.student)
    with torch.no_grad():  # a stage before that is not the teacher
        for parameter in trainer.method.start.switch.parameters("stage_start").values():
            parameter.add_(0.1)
    x0 = torch.randn(4, *trainer.family.sample_shape)
    batch = trainer.method.next_batch()
    state = trainer.noise.get_state()
    result = trainer.method.distribution_matching(x0, batch.condition)
    trainer.noise.set_state(state)
    t = trainer.method.draw_time(20, 980, 4)
    x_t = trainer.family.schedule.add_noise(x0, trainer.noise.randn_like(x0), t)
    with torch.no_grad():
        prediction = [role(x_t, t, batch.condition).x0 for role in (trainer.method.start, trainer.roles.fake_score)]
        base = trainer.family.denoiser()(x_t, t, batch.condition).x0
    torch.testing.assert_close(result, distribution_matching_gradient(x0, *prediction))
    assert (prediction[0] - base).abs().max() > 1e-2


def test_pure_noise_under_the_label_800():
    """The dedicated one-step student: unit noise, not noise scaled for that time."""
    trainer = toy_trainer(method="enhance", sampler={"start": 800}, dmd2={"fake_score_updates": 1})
    batch = Batch({}, torch.randn(3, 2, 1, 1), [])
    x_t, t = trainer.method.student_input(batch)
    assert torch.equal(x_t, batch.noise)
    assert t.tolist() == [800] * 3


# -- regression --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_regression_reaches_the_teachers_deterministic_map(tmp_path):
    """A Gaussian's DDIM map is a constant gain: the student, whose time is fixed, fits it."""
    family = toy_family(GaussianMixture([[0.5]], 0.09), zero_snr(), kind="x0")
    trainer = toy_trainer(
        family,
        method="regression",
        output=str(tmp_path / "run"),
        teacher={"steps": 10},
        regression={"count": 512, "shard": 256},
        optimizer={"student": {"lr": 3e-3, "betas": [0.9, 0.99]}},
        train={"updates": 400, "batch_size": 64},
    )
    trainer.fit()
    schedule, times = family.schedule, ddim_times(family.schedule, 10)
    noise = torch.linspace(-2, 2, 9).reshape(-1, 1, 1, 1)
    x = noise
    for index, time in enumerate(times):
        t = torch.full((9,), int(time))
        x0 = family.teacher(x, t, {}).x0
        if index < 9:
            x = schedule.step(x0, x, t, torch.full((9,), int(times[index + 1])))
    with torch.no_grad():
        prediction = trainer.roles.student(noise, torch.full((9,), 999), {}).x0
    torch.testing.assert_close(prediction, x0, rtol=0, atol=0.03)
    assert len(list((tmp_path / "run" / "pairs").iterdir())) == 2


def test_a_batch_is_pairs_in_a_seeded_order_and_the_loss_their_squared_error(teacher, tmp_path):
    settings = {"count": 10, "shard": 4, "guidance_scale": 2.0, "seed": 9}
    trainer = trainer_of(teacher, tmp_path, "regression", regression=settings)
    batches = [trainer.method.next_batch() for _ in range(2)]
    assert trainer.method.recipe(trainer.config).seed == 9
    pairs = PairSet(tmp_path / "run" / "pairs", trainer.family, [0, 1, 2], PairRecipe(10, 4, 3, 2.0, 9))
    order = Order(10, trainer.config.seed + 4).indices(0, 8)
    for batch, index in zip(batches, (order[:4], order[4:]), strict=True):
        assert batch.indices == tuple(index)
        assert torch.equal(batch.noise, pairs.noise[index])
        assert torch.equal(batch.real, pairs.x0[index])
        assert batch.condition["label"].tolist() == batch.items == [pairs.items[i] for i in index]
    batch = batches[1]
    weight, loss = trainer.method.student_losses(batch)["regression"]
    x0 = trainer.roles.student(batch.noise, torch.full((4,), 999), batch.condition).x0
    torch.testing.assert_close(loss, (x0 - batch.real).square().mean())
    assert weight == 1.0


def test_lpips_without_its_weights_says_where_they_belong(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"), raising=False)
    import torchvision.models._api as api

    def refuse(*_arguments, **_keywords):
        raise OSError("no network")

    monkeypatch.setattr(api, "load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match=r"VGG's weights cannot be loaded \(no network\)"):
        trainer_of(teacher, tmp_path, "regression", regression={"distance": "lpips"})


def test_lpips_is_of_enlarged_pictures(teacher, tmp_path, monkeypatch):
    """The network's own forward with random VGG features: its input is 3-channel and at least ``lpips_size``."""
    from torchmetrics.functional.image.lpips import _LPIPS

    from stepdistill.trainers.plans import build

    torch.manual_seed(0)
    network = _LPIPS(pretrained=True, net="vgg", pnet_rand=True).eval().requires_grad_(False)
    monkeypatch.setattr(build, "load_lpips", lambda: network)
    trainer = trainer_of(
        teacher, tmp_path, "regression", regression={"distance": "lpips", "count": 4, "lpips_size": 32}
    )
    batch = trainer.method.next_batch()
    losses, result = gradients(trainer, batch)
    x0 = trainer.roles.student(batch.noise, torch.full((4,), 999), batch.condition).x0
    enlarge = lambda x: torch.nn.functional.interpolate(x.expand(-1, 3, -1, -1), size=(32, 32), mode="bilinear")  # noqa: E731
    torch.testing.assert_close(losses["regression"][1], network(enlarge(x0), enlarge(batch.real)).mean())
    assert max(g.abs().max() for g in result) > 0
    assert trainer.method._lpips(batch.real, batch.real) == 0


def test_two_rewards_of_one_name_both_count(teacher, tmp_path):
    settings = [{"reward": "judges:Brightness", "hinge": 5.0}, {"reward": "judges:Brightness", "hinge": 50.0}]
    trainer = trainer_of(teacher, tmp_path, "feedback", feedback={"rewards": settings})
    losses, _ = gradients(trainer, trainer.method.next_batch())
    first, second = (loss for _, loss in losses.values())
    torch.testing.assert_close(second - first, torch.tensor(45.0))
