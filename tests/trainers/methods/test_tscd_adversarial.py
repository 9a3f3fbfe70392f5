"""TSCD's adversarial part: when there is one, what the discriminator sees, both losses, whom each trains."""

import pytest
import scipy.stats
import torch
from segmented import assert_same, gradients, scale, self_taught, shake, trainer_of, unets
from toys import take_all, toy_family

from stepdistill.errors import UserError
from stepdistill.roles.discriminator import DiscriminatorHead, MapHeads
from stepdistill.sampler import few_step_times
from stepdistill.trainers.methods import tscd as module
from stepdistill.trainers.methods.base import Batch
from stepdistill.trainers.methods.tscd import TSCD


def test_without_weight_no_discriminator_is_made_or_called(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("called")

    monkeypatch.setattr(module, "DiscriminatorHead", refuse)
    monkeypatch.setattr(module, "generator_loss", refuse)
    trainer = self_taught(segments=4)
    trainer.roles.teacher.features = refuse
    trainer.fit()
    assert trainer.method.networks == {}
    assert trainer.optimizers.adamw.keys() == {"student"}
    assert trainer.method.student_losses(trainer.method.next_batch()).keys() == {"consistency"}
    with pytest.raises(AssertionError, match="called"):
        self_taught(segments=4, adversarial={"weight": 0.1})


@pytest.mark.parametrize(("conditional", "times"), [(True, 2), (False, 1)])
def test_the_discriminators_width(conditional, times):
    adversarial = {"weight": 0.1, "conditional": conditional}
    for trainer, features in ((self_taught(adversarial=adversarial), 64), (unets(adversarial=adversarial), 8)):
        head = trainer.method.networks["discriminator"]
        assert isinstance(head, DiscriminatorHead)
        assert head.layers[0].in_channels == times * features
        assert trainer.roles.meter.total == 0
        trainer.iteration()
        assert trainer.counters["discriminator"] == trainer.counters["student"] == 1


def test_making_the_discriminator_draws_from_the_seed_alone():
    created = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        family = toy_family()
        family.teacher_denoiser = lambda: None
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        created.append(trainer_of(family, adversarial={"weight": 0.1}).method.networks["discriminator"].state_dict())
        assert torch.equal(torch.get_rng_state(), state)
    assert_same(*created)


def test_a_teacher_in_closed_form_has_no_features_for_it():
    with pytest.raises(UserError, match=r"tscd\.adversarial\.weight > 0"):
        trainer_of(adversarial={"weight": 0.1})


def watched(trainer):
    """What the teacher's mid-block is asked: (x, t, whether a gradient is kept)."""
    calls, features = [], trainer.roles.teacher.features

    def noting(x_t, t, condition):
        calls.append((x_t.detach().clone(), t.clone(), x_t.requires_grad and torch.is_grad_enabled()))
        return features(x_t, t, condition)

    trainer.roles.teacher.features = noting
    return calls, features


def adversarial_trainer(conditional=True, **settings):
    trainer = self_taught(segments=4, adversarial={"weight": 0.3, "conditional": conditional}, **settings)
    shake(trainer.roles.student)
    shake(trainer.method.target, seed=2)
    shake(trainer.method.networks["discriminator"], 0.3)
    return trainer


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("end", ["start", "random"])
def test_candidates_and_both_losses_by_hand(end, conditional):
    trainer = adversarial_trainer(conditional, end=end)
    calls, features = watched(trainer)
    batch, state = trainer.method.next_batch(), trainer.noise.get_state()
    losses = trainer.method.student_losses(batch)
    assert losses.keys() == {"consistency", "generator"}
    assert losses["generator"][0] == 0.3

    trainer.noise.set_state(state)
    grid, times = trainer.method.grid, torch.tensor([0, *few_step_times(trainer.family.schedule, 40)[::-1]]).long()
    u, e = trainer.method.draw_points(8)
    x_u = trainer.family.schedule.add_noise(batch.real, batch.noise, times[u])
    prediction = trainer.roles.student(x_u, times[u], {})
    jump_, aim = grid.add_noise(prediction.x0, prediction.eps, e), trainer.method.target_jump(x_u, u, e, batch)
    high = (u + 9) // 10 * 10
    look = e + 1 + torch.floor(trainer.noise.uniform(8) * (high - e)).long()
    ratio = grid.alpha[look] / grid.alpha[e]
    fresh = (1 - grid.alpha[look] ** 2 - ratio**2 * (1 - grid.alpha[e] ** 2)).sqrt()  # VP: sigma^2 = 1 - alpha^2
    ratio, fresh = (scale(x).float() for x in (ratio, fresh))
    fake = ratio * jump_ + fresh * trainer.noise.randn(8, 2, 1, 1)
    real = ratio * aim + fresh * trainer.noise.randn(8, 2, 1, 1)

    beside = [(x_u, times[u], False)] if conditional else []
    for (x, t, grad), (x_, t_, grad_) in zip(
        calls, [*beside, (fake, times[look], True), (real, times[look], False)], strict=True
    ):
        torch.testing.assert_close(x, x_.detach(), rtol=1e-4, atol=1e-5)
        assert torch.equal(t, t_)
        assert grad == grad_
    head = trainer.method.networks["discriminator"]
    seen = [features(x, times[look], {}) for x in (fake, real)]
    if conditional:
        seen = [torch.cat([x, features(x_u, times[u], {})], 1) for x in seen]
    by_hand = torch.log1p(torch.exp(-head(seen[0]))).mean()
    torch.testing.assert_close(losses["generator"][1], by_hand, rtol=1e-4, atol=1e-5)
    result, expected = gradients(trainer, losses["generator"][1]), gradients(trainer, by_hand)
    for key in result:
        torch.testing.assert_close(result[key], expected[key], rtol=1e-3, atol=1e-6)
    assert max(x.abs().max() for x in result.values()) > 1e-6

    recorded = {}
    trainer.step = lambda role: recorded.update({k: p.grad.clone() for k, p in trainer.trained[role].items()})
    take_all(trainer, trainer.method.other_updates())
    (logged,) = trainer.parts.journal.values["loss/discriminator"]
    seen = [x.detach() for x in seen]
    expected = torch.log1p(torch.exp(head(seen[0]))).mean() + torch.log1p(torch.exp(-head(seen[1]))).mean()
    torch.testing.assert_close(logged, expected.detach(), rtol=1e-4, atol=1e-5)
    settings = dict(head.named_parameters())
    for (key, _), value in zip(settings.items(), torch.autograd.grad(expected, list(settings.values())), strict=True):
        torch.testing.assert_close(recorded[key], value, rtol=1e-3, atol=1e-5)
    assert trainer.method.candidates == []


@pytest.mark.parametrize("point", [11, 13, 20])
@pytest.mark.parametrize("end", ["start", "random"])
def test_both_candidates_are_taken_to_one_point_above_their_end_and_inside_the_segment(end, point):
    """Points 11..20 are a segment; from an end e to e + 1 .. 20, uniformly."""
    trainer = adversarial_trainer(False, end=end)
    calls, _ = watched(trainer)
    trainer.noise.randint = lambda low, high, count: torch.full((count,), point)
    draw, ends = trainer.method.draw_points, []

    def noting(count):
        u, where = draw(count)
        ends.append(where)
        return u, where

    trainer.method.draw_points = noting
    trainer.method.student_losses(Batch({}, torch.randn(20_000, 2, 1, 1), [], torch.zeros(20_000, 2, 1, 1)))
    (_, fake_time, _), (_, real_time, _) = calls
    assert torch.equal(fake_time, real_time)
    look, where = (fake_time + 1) // 25, ends[0]
    assert set(where.tolist()) == (set(range(10, point)) if end == "random" else {10})
    for low in where.unique().tolist():
        result = torch.bincount(look[where == low] - low - 1)
        assert len(result) == 20 - low
        assert len(result) == 1 or scipy.stats.chisquare(result).pvalue > 1e-3


def test_the_students_turn_trains_no_discriminator_and_its_own_turn_no_student():
    trainer = adversarial_trainer(mse_weight=0.0, target_decay=0.5)
    head, student = trainer.method.networks["discriminator"], trainer.trained["student"]
    losses = trainer.method.student_losses(trainer.method.next_batch())
    assert losses.keys() == {"generator"}
    trainer.method.total("student", losses).backward()
    assert sum(p.grad.abs().sum() for p in student.values()) > 0
    assert all(p.grad is None for p in head.parameters())
    assert all(p.grad is None for p in trainer.family.network.parameters())
    trainer.step("student")
    updates, reached = trainer.step, {}

    def noting(role):
        reached[role] = all(p.grad is not None for p in trainer.trained[role].values())
        reached["student_too"] = any(p.grad is not None for p in student.values())
        return updates(role)

    trainer.step = noting
    take_all(trainer, trainer.method.other_updates())
    assert reached == {"discriminator": True, "student_too": False}
    assert all(p.grad is None for p in trainer.family.network.parameters())


def test_the_discriminator_takes_the_mean_of_a_gathered_updates_batches():
    trainer = adversarial_trainer(train={"gradient_accumulation": 3})
    head, recorded, update = trainer.method.networks["discriminator"], {}, trainer.step

    def noting(role):
        if role == "discriminator":
            looked = list(trainer.method.candidates)
            recorded["found"] = [p.grad.clone() for p in head.parameters()]
            losses = [
                module.discriminator_loss(head(torch.cat([c.real, c.start], 1)), head(torch.cat([c.fake, c.start], 1)))
                for c in looked
            ]
            recorded["wanted"] = torch.autograd.grad(sum(losses) / 3, list(head.parameters()))
            recorded["batches"] = len(looked)
        return update(role)

    trainer.step = noting
    trainer.iteration()
    assert recorded["batches"] == 3
    for a, b in zip(recorded["found"], recorded["wanted"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert trainer.counters["discriminator"] == 1


@pytest.mark.parametrize(
    ("own", "passes"),
    [
        ({}, 5),
        ({"guidance_scale": 3.0}, 6),
        ({"guidance_range": [2.0, 5.0], "adversarial": {"weight": 0.1}}, 10),
        ({"adversarial": {"weight": 0.1, "conditional": False}}, 8),
    ],
)
def test_the_plans_passes_are_those_that_a_run_makes(own, passes):
    trainer = unets(**own)
    assert TSCD.passes(trainer.config).per_update == passes
    trainer.iteration()
    assert trainer.passes == passes * 8


# -- phased consistency's discriminator --------------------------------------------------------------------------


def phased(conditional=False, **settings):
    """Hinge, two heads on the output of each of a UNet's five blocks."""
    adversarial = {"weight": 0.3, "loss": "hinge", "features": "all", "heads": 2, "conditional": conditional}
    trainer = unets(adversarial=adversarial, **settings)
    shake(trainer.roles.student)
    shake(trainer.method.networks["discriminator"])
    return trainer


@pytest.mark.parametrize("conditional", [True, False])
def test_all_maps_by_hand(conditional):
    """Both losses are hinges of the heads on what the teacher's blocks put out, down, middle and up."""
    trainer = phased(conditional)
    discriminator, network = trainer.method.networks["discriminator"], trainer.family.network
    assert isinstance(discriminator, MapHeads)
    assert len(discriminator.maps) == 5
    blocks = [*network.down_blocks, network.mid_block, *network.up_blocks]
    seen, maps_of = [], trainer.roles.teacher.feature_maps

    def noting(x_t, t, condition):
        maps = maps_of(x_t, t, condition)
        outputs = []
        handles = [b.register_forward_hook(lambda _m, _i, out, o=outputs: o.append(out)) for b in blocks]
        trainer.family.forward(network, x_t, t, condition)
        for handle in handles:
            handle.remove()
        for one, output in zip(maps, outputs, strict=True):
            torch.testing.assert_close(one, output[0] if isinstance(output, tuple) else output)
        seen.append(maps)
        return maps

    trainer.roles.teacher.feature_maps = noting
    _, loss = trainer.method.student_losses(trainer.method.next_batch())["generator"]
    *beside, fake, real = seen
    assert len(beside) == conditional

    def logits(maps):
        if conditional:
            maps = [torch.cat(pair, 1) for pair in zip(maps, beside[0], strict=True)]
        return discriminator([one.detach() for one in maps])

    by_hand = torch.stack([(1 - one).clamp(min=0).mean() for one in logits(fake)]).mean()
    torch.testing.assert_close(loss, by_hand)
    assert max(gradient.abs().max() for gradient in gradients(trainer, loss).values()) > 1e-6

    expected = torch.stack(
        [
            (1 + f).clamp(min=0).mean() + (1 - r).clamp(min=0).mean()
            for f, r in zip(logits(fake), logits(real), strict=True)
        ]
    ).mean()
    reached = {}
    trainer.step = lambda role: reached.update({role: [p.grad.clone() for p in trainer.trained[role].values()]})
    take_all(trainer, trainer.method.other_updates())
    (logged,) = trainer.parts.journal.values["loss/discriminator"]
    torch.testing.assert_close(logged, expected.detach())
    by_parameter = torch.autograd.grad(expected, list(discriminator.parameters()))
    for gradient, value in zip(reached["discriminator"], by_parameter, strict=True):
        torch.testing.assert_close(gradient, value)
    assert all(p.grad is None for p in network.parameters())


def test_hinge_on_the_mid_block_alone_is_another_loss_on_the_same_logits():
    losses = {}
    for kind in ("softplus", "hinge"):
        trainer = self_taught(segments=4, adversarial={"weight": 0.3, "loss": kind})
        shake(trainer.method.networks["discriminator"], 0.3)
        assert isinstance(trainer.method.networks["discriminator"], DiscriminatorHead)
        batch = trainer.method.next_batch()
        logits = []
        trainer.method.networks["discriminator"].register_forward_hook(
            lambda _m, _i, out, logits=logits: logits.append(out)
        )
        losses[kind] = trainer.method.student_losses(batch)["generator"][1], logits[0]
    (soft, a), (hinge, b) = losses["softplus"], losses["hinge"]
    assert torch.equal(a, b)
    torch.testing.assert_close(soft, torch.nn.functional.softplus(-a).mean())
    torch.testing.assert_close(hinge, torch.relu(1 - a).mean())


def test_a_network_of_one_block_has_one_map():
    adversarial = {"weight": 0.1, "features": "all", "heads": 1, "conditional": False}
    trainer = self_taught(adversarial=adversarial)
    assert len(trainer.method.networks["discriminator"].maps) == 1
    trainer.iteration()
    assert trainer.counters["discriminator"] == 1


@pytest.mark.parametrize("draw", ["batch", "sample"])
def test_a_scale_for_all_or_one_a_sample(draw):
    trainer = unets(guidance_range=[2.0, 5.0], guidance_draw=draw)
    seen, ask = [], module.guided

    def noting(denoiser, x_t, t, condition, null, scale):
        seen.append(scale)
        return ask(denoiser, x_t, t, condition, null, scale)

    module.guided = noting
    try:
        trainer.iteration()
    finally:
        module.guided = ask
    scales = torch.as_tensor(seen[0])
    assert scales.shape == ((8,) if draw == "sample" else ())
    many = torch.cat([torch.as_tensor(trainer.method.draw_scale(1000)).reshape(-1) for _ in range(50)])
    assert (many >= 2).all()
    assert (many < 5).all()
    assert many.double().mean().item() == pytest.approx(3.5, abs=0.05 if draw == "sample" else 0.6)
    assert len(many.unique()) > 40
