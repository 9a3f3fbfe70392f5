"""DMD2 through its real trainer: fixed points, gradient routing, the order and laws of its draws."""

import pytest
import torch
from toys import MLP, ByLabel, assert_reaches_the_mixture, linear_betas, real_source, toy_family, toy_trainer

from stepdistill.analytic import GaussianMixture
from stepdistill.families.analytic import AnalyticFamily


def guided_trainer(student_mean: float, scale: float):
    """Teacher N(0.7, S) for label 0 and N(0.2, S) for null; fake score exact for a student N(student_mean, S)."""
    schedule = linear_betas()
    torch.manual_seed(0)
    family = AnalyticFamily(ByLabel([0.7, 0.2], 0.3, schedule), MLP(1, 8, 1), "v", (1, 1, 1), num_labels=1)
    trainer = toy_trainer(family, dmd2={"guidance_scale": scale})
    trainer.roles.fake_score = ByLabel([student_mean, 99.0], 0.3, schedule)
    trainer.roles.student.schedule = schedule
    x0 = student_mean + 0.3**0.5 * torch.randn(
        64, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    return trainer, x0, {"label": torch.zeros(64, dtype=torch.long)}


@pytest.mark.parametrize(("scale", "fixed_point"), [(3.0, 1.7), (1.0, 0.7), (1.75, 1.075)])
def test_guided_fixed_point(scale, fixed_point):
    """The student rests at mu_null + s (mu_cond - mu_null); the other convention's 2.2 at s = 3 does not rest."""
    trainer, x0, condition = guided_trainer(fixed_point, scale)
    assert trainer.method.distribution_matching(x0, condition).abs().max() < 1e-12
    other = 0.7 + scale * 0.5
    trainer, x0, condition = guided_trainer(other, scale)
    assert trainer.method.distribution_matching(x0, condition).abs().mean() > 0.1


def labelled_trainer(method="dmd2", **changes):
    """Two labels on Stable Diffusion's schedule; all real pictures have label 1, and the batches' labels alternate."""
    mixture = GaussianMixture([[-1.0, 0.5], [1.0, -0.5]], 0.05, labels=[0, 1])
    family = toy_family(mixture, linear_betas())
    real = real_source(family, labels=[1] * 32)
    return toy_trainer(family, real, method=method, data={"images": {"folder": "unused"}}, **changes)


def gan_trainer(**changes):
    family = toy_family()
    raw = {"gan": {"student_weight": 0.1}, **changes.pop("dmd2", {})}
    return toy_trainer(family, real_source(family), dmd2=raw, data={"images": {"folder": "unused"}}, **changes)


def test_student_turn_gives_gradients_to_the_student_alone():
    trainer = gan_trainer()
    batch = trainer.method.next_batch()
    x0 = trainer.method.make_sample(batch)
    gradient = trainer.method.sample_gradient(x0.detach(), batch)
    assert gradient.abs().sum() > 0
    x0.backward(gradient)
    assert all(p.grad is not None for p in trainer.trained["student"].values())
    assert all(p.grad is None for p in trainer.trained["fake_score"].values())


def test_generator_term_reaches_the_sample():
    trainer = gan_trainer()
    batch = trainer.method.next_batch()
    x0 = trainer.method.make_sample(batch).detach().requires_grad_()
    _, loss = trainer.method.student_losses(x0, batch)["generator"]
    (gradient,) = torch.autograd.grad(loss, x0)
    assert gradient.abs().sum() > 0


def test_fake_score_turn_gives_gradients_to_fake_score_and_head_alone():
    trainer = gan_trainer()
    batch = trainer.method.next_batch()
    with torch.no_grad():
        x0 = trainer.method.make_sample(batch)
    losses = trainer.method.fake_score_losses(x0, batch)
    sum(w * loss for w, loss in losses.values()).backward()
    assert all(p.grad is None for p in trainer.trained["student"].values())
    assert all(p.grad is not None for p in trainer.trained["fake_score"].values())


def test_the_head_learns_in_the_fake_scores_turn_and_not_in_the_students():
    """By their optimizer's steps: after the student's update alone it is what it was."""
    trainer = gan_trainer()
    head = trainer.method.networks["discriminator"]

    def weights():
        return {k: p.detach().clone() for k, p in head.named_parameters()}

    before = weights()
    samples = []
    trainer.take(("student", trainer.method.student_terms(samples)))
    assert all(torch.equal(before[k], v) for k, v in weights().items())
    trainer.take(("fake_score", trainer.method.fake_score_terms(samples)))
    assert all(not torch.equal(before[k], v) for k, v in weights().items())


def test_discriminator_loss_trains_the_encoder_and_not_the_decoder():
    trainer = gan_trainer()
    batch = trainer.method.next_batch()
    with torch.no_grad():
        x0 = trainer.method.make_sample(batch)
    trainer.method.fake_score_losses(x0, batch)["discriminator"][1].backward()
    fake = dict(trainer.roles.fake_score.network.named_parameters())
    assert fake["into.weight"].grad is not None
    assert fake["out.weight"].grad is None
    assert all(p.grad is not None for p in trainer.method.networks["discriminator"].parameters())


def labelled_gan_trainer(method, **gan):
    """Its head tells samples and labels apart."""
    settings = {"gan": {"student_weight": 0.1, "discriminator_weight": 0.3, **gan}}
    trainer = labelled_trainer(method, dmd2=settings)
    with torch.no_grad():
        for parameter in trainer.method.networks["discriminator"].parameters():
            parameter.mul_(3.0)
    return trainer


def logits_by_hand(trainer, x0, label, max_level=999):
    """The head on the fake score's features at a level and noise of their own, (B, 1)."""
    t = trainer.noise.randint(0, max_level, len(x0))
    x_t = trainer.family.schedule.add_noise(x0, trainer.noise.randn_like(x0), t)
    return trainer.method.networks["discriminator"](trainer.roles.fake_score.features(x_t, t, {"label": label}))


def cost(logits):
    """softplus written out."""
    return torch.log1p(logits.exp()).mean()


@pytest.mark.parametrize("max_level", [999, 400])
@pytest.mark.parametrize("method", ["dmd2", "enhance"])
def test_discriminators_loss_by_hand(method, max_level):
    """softplus(D(fake)) + softplus(-D(real)), the real pictures under labels of their own."""
    trainer = labelled_gan_trainer(method, max_level=max_level)
    batch, x0 = trainer.method.next_batch(), torch.randn(8, 2, 1, 1)
    state = trainer.noise.get_state()
    weight, loss = trainer.method.fake_score_losses(x0, batch)["discriminator"]
    assert weight == 0.3
    assert trainer.counters["real"] == 8

    def by_hand(real_label, fake_label):
        trainer.noise.set_state(state)
        trainer.method.fake_score_draw(x0)  # of the denoising loss
        real = trainer.parts.real.latents[trainer.parts.real.order.indices(0, 8)]
        return [logits_by_hand(trainer, x, label, max_level) for x, label in ((real, real_label), (x0, fake_label))]

    ones, labels = torch.ones(8, dtype=torch.long), batch.condition["label"]
    real, fake = by_hand(ones, labels)
    torch.testing.assert_close(loss, cost(fake) + cost(-real))
    for wrong in (cost(real) + cost(-fake), cost(fake) + cost(-by_hand(labels, ones)[0])):  # swapped; fakes' labels
        assert (wrong - loss).abs() > 0.02


@pytest.mark.parametrize("method", ["dmd2", "enhance"])
def test_generators_loss_by_hand(method):
    """softplus(-D(fake)) after the draws of the matching gradient, under the student's labels."""
    trainer = labelled_gan_trainer(method)
    batch, x0 = trainer.method.next_batch(), torch.randn(8, 2, 1, 1)
    state = trainer.noise.get_state()
    weight, loss = trainer.method.student_losses(x0, batch)["generator"]
    assert weight == 0.1
    trainer.noise.set_state(state)
    trainer.method.distribution_matching(x0, batch.condition)
    fake = logits_by_hand(trainer, x0, batch.condition["label"])
    torch.testing.assert_close(loss, cost(-fake))
    assert (cost(fake) - loss).abs() > 0.02


def test_a_discriminator_of_clean_samples_sees_them_at_the_lowest_level():
    trainer = labelled_gan_trainer("dmd2", noised=False)
    x0, labels = torch.randn(8, 2, 1, 1), torch.arange(8) % 2
    features = trainer.roles.fake_score.features(x0, torch.zeros(8, dtype=torch.long), {"label": labels})
    torch.testing.assert_close(
        trainer.method.logits(x0, {"label": labels}), trainer.method.networks["discriminator"](features)
    )


@pytest.mark.parametrize("ratio", [1, 3, 5])
def test_two_time_scales_student_first_and_counts_exact(ratio):
    trainer = toy_trainer(dmd2={"fake_score_updates": ratio}, train={"updates": 4})
    order = []
    update = trainer.step
    trainer.step = lambda role: (order.append(role), update(role))[1]
    for _ in range(3 * ratio):
        trainer.iteration()
    assert order == (["student"] + ["fake_score"] * ratio) * 3


def test_fake_score_trains_on_the_samples_made_before_the_students_update():
    trainer = toy_trainer()
    seen = {}
    losses, make = trainer.method.fake_score_losses, trainer.method.make_sample

    def make_and_keep(batch):
        x0 = make(batch)
        seen["made"] = x0.detach().clone()
        return x0

    def losses_and_keep(x0, batch):
        seen["trained_on"], seen["graph"] = x0.clone(), x0.requires_grad
        return losses(x0, batch)

    trainer.method.make_sample, trainer.method.fake_score_losses = make_and_keep, losses_and_keep
    trainer.iteration()
    assert torch.equal(seen["made"], seen["trained_on"])
    assert not seen["graph"]


def test_level_laws():
    """Levels 20..980 where student and teacher meet, 0..999 for fake score and discriminator; ends included."""
    trainer = gan_trainer(train={"batch_size": 4000})
    ranges = []
    draw = trainer.method.draw_time
    trainer.method.draw_time = lambda low, high, count: ranges.append((low, high)) or draw(low, high, count)
    trainer.iteration()
    # student: matching, generator; fake score: denoising, real logits, fake logits
    assert ranges == [(20, 980), (0, 999), (0, 999), (0, 999), (0, 999)]
    times = draw(20, 980, 200_000)
    assert (times.min(), times.max()) == (20, 980)
    assert times.double().mean().item() == pytest.approx(500, abs=3)


def test_fake_score_equal_to_a_learned_teacher_gives_a_loss_of_zero():
    trainer = toy_trainer()
    family = trainer.family
    trainer.roles.teacher = trainer.roles.fake_score
    batch = trainer.method.next_batch()
    x0 = trainer.method.make_sample(batch).detach()
    assert trainer.method.distribution_matching(x0, batch.condition).abs().max() == 0
    assert family.has_null is False


def test_teacher_never_changes():
    trainer = toy_trainer(train={"updates": 3})
    before = {k: v.clone() for k, v in trainer.family.network.state_dict().items()}
    trainer.fit()
    after = trainer.family.network.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert trainer.counters["student"] == 3


# -- several steps -------------------------------------------------------------------------------------------


def steps_trainer(steps=4, **dmd2):
    return toy_trainer(sampler={"steps": steps}, dmd2=dmd2)


def test_exit_step_is_shared_uniform_and_the_first_input_is_the_batch_noise_itself():
    trainer = steps_trainer()
    counts = dict.fromkeys(trainer.sampler.times, 0)
    for _ in range(400):
        batch = trainer.method.next_batch()
        x_t, t = trainer.method.student_input(batch)
        assert (t == t[0]).all()
        counts[float(t[0])] += 1
        if t[0] == 999:
            assert torch.equal(x_t, batch.noise)
    assert all(60 < count < 140 for count in counts.values())


def test_rollout_starts_from_new_noise_and_ends_with_the_batchs():
    """x_in = alpha x0_hat + sigma n0 at the exit step, x0_hat being the student's on noise other than n0."""
    trainer = steps_trainer(steps=2)
    trainer.noise.shared_randint = lambda low, high: 1
    seen = []
    student = trainer.roles.student

    class Spy:
        schedule = student.schedule

        def __call__(self, x_t, t, condition):
            prediction = student(x_t, t, condition)
            seen.append((x_t, prediction.x0, torch.is_grad_enabled()))
            return prediction

    trainer.roles.student = Spy()
    batch = trainer.method.next_batch()
    x_t, t = trainer.method.student_input(batch)
    (first_input, x0_hat, grad), *rest = seen
    assert not rest
    assert not grad
    assert not torch.equal(first_input, batch.noise)
    torch.testing.assert_close(x_t, student.schedule.add_noise(x0_hat, batch.noise, t), rtol=0, atol=0)
    assert (t == 499).all()


def at_exit(trainer, exit_index):
    """A batch whose training input is that of step ``exit_index``, and the state of the noise before it is made."""
    while True:
        batch, state = trainer.method.next_batch(), trainer.noise.get_state()
        if trainer.noise.shared_randint(0, trainer.sampler.steps - 1) == exit_index:
            trainer.noise.set_state(state)
            return batch, state


@pytest.mark.parametrize("exit_index", [1, 2, 3])
def test_backward_simulation_by_hand(exit_index):
    """A first noise of its own, another for every move, and the batch's for the last."""
    trainer = labelled_trainer(sampler={"steps": 4})
    batch, state = at_exit(trainer, exit_index)
    result, t = trainer.method.student_input(batch)
    trainer.noise.set_state(state)
    trainer.noise.shared_randint(0, 3)
    times = [torch.full((8,), time) for time in (999, 749, 499, 249)]
    x = trainer.noise.randn(8, 2, 1, 1)
    noises = [trainer.noise.randn(8, 2, 1, 1) for _ in range(exit_index - 1)] + [batch.noise]
    with torch.no_grad():
        for now, following, noise in zip(times, times[1:], noises, strict=False):
            x0 = trainer.roles.student(x, now, batch.condition).x0
            x = trainer.family.schedule.add_noise(x0, noise, following)
    torch.testing.assert_close(result, x)
    assert torch.equal(t, times[exit_index])


def test_gradient_passes_through_one_step_only():
    trainer = steps_trainer(steps=4)
    trainer.noise.shared_randint = lambda low, high: 3
    before = trainer.roles.meter.forward, trainer.roles.meter.backward
    x0 = trainer.method.make_sample(trainer.method.next_batch())
    assert x0.requires_grad
    forward, backward = trainer.roles.meter.forward - before[0], trainer.roles.meter.backward - before[1]
    assert (forward, backward) == (4 * 8, 2 * 8)


def test_real_inputs_are_noised_samples_each_at_a_time_of_its_own():
    family = toy_family()
    trainer = toy_trainer(
        family,
        real_source(family),
        sampler={"steps": 4},
        dmd2={"multistep_input": "real"},
        data={"images": {"folder": "unused"}},
        train={"batch_size": 64},
    )
    batch = trainer.method.next_batch()
    x_t, t = trainer.method.student_input(batch)
    assert set(t.tolist()) == {999, 749, 499, 249}
    first = t == 999
    assert torch.equal(x_t[first], batch.noise[first])
    real = trainer.parts.real.latents[trainer.parts.real.order.indices(0, 64)]
    expected = family.schedule.add_noise(real, batch.noise, t)
    torch.testing.assert_close(x_t[~first], expected[~first])


def test_real_inputs_come_with_the_real_samples_labels_and_the_first_is_pure_noise():
    """On a schedule whose last level is not pure noise; what is made of them is told their labels."""
    real = {"multistep_input": "real", "null_probability": 0.0}
    trainer = labelled_trainer(sampler={"steps": 4}, dmd2=real, train={"batch_size": 32})
    conditions = trainer.method.next_conditions()
    assert set(conditions.condition["label"].tolist()) == {0, 1}
    batch = trainer.method.prepare(conditions)
    assert batch.condition["label"].tolist() == [1] * 32
    state = trainer.noise.get_state()
    x0 = trainer.method.make_sample(batch)
    trainer.noise.set_state(state)
    t = torch.tensor([999, 749, 499, 249])[trainer.noise.randint(0, 3, 32)]
    pictures = trainer.parts.real.latents[trainer.parts.real.order.indices(0, 32)]
    x_t = trainer.family.schedule.add_noise(pictures, batch.noise, t)
    first = t == 999
    assert 0 < first.sum() < 32
    assert (x_t[first] - batch.noise[first]).abs().amax(1).min() > 1e-4
    x_t[first] = batch.noise[first]
    expected = trainer.roles.student(x_t, t, {"label": torch.ones(32, dtype=torch.long)}).x0
    torch.testing.assert_close(x0, expected)


def test_one_step_input_is_the_noise_at_the_chosen_time():
    trainer = toy_trainer(toy_family(schedule=linear_betas(), kind="eps"), sampler={"start": 399})
    batch = trainer.method.next_batch()
    x_t, t = trainer.method.student_input(batch)
    assert torch.equal(x_t, batch.noise)
    assert (t == 399).all()
    # x0 = (z - sigma eps) / alpha: 1.532 z - 1.161 eps at 399
    output = torch.ones_like(x_t)
    x0 = trainer.family.schedule.to_x0(output, "eps", x_t, t)
    torch.testing.assert_close(x0, 1.532 * x_t - 1.1606, rtol=1e-3, atol=1e-3)


# -- end to end ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_reaches_a_mixture_through_the_real_loop():
    assert_reaches_the_mixture()
