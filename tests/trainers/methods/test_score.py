"""The score methods against networks that say one value for each label: every gradient is a number that can be worked
out by hand, whichever noise is drawn, and a role in another's place gives another number."""

import json
from itertools import pairwise

import pytest
import torch
from torch import nn
from toys import linear_betas, toy_trainer

from stepdistill.denoiser import Prediction
from stepdistill.families.analytic import AnalyticFamily
from stepdistill.run import RunFolder
from stepdistill.trainers.methods.base import Batch, Phase

F64 = torch.float64
LEVEL = 300
TEACHER = torch.tensor([[0.25, -1.0], [1.5, 0.5], [-0.5, 0.0]], dtype=F64)
"""What the teacher says under the labels 0 and 1 and the null label, in two dimensions; all values are exact."""
FAKE_SCORE = torch.tensor([[0.75, 0.5], [-1.0, 2.0], [1.0, -0.25]], dtype=F64)
LABELS = torch.tensor([0, 1, 1, 0])
SAMPLES = torch.tensor([[-0.5, 0.25], [2.0, 1.0], [-1.0, -2.0], [0.5, 0.75]], dtype=F64)


class Teacher:
    """Says ``TEACHER`` at the sample's label, at every x_t and t."""

    schedule = linear_betas()

    def __call__(self, x_t, t, condition):
        return Prediction(self.schedule, x_t, t, TEACHER[condition["label"]].reshape(x_t.shape).to(x_t), "x0")


class Says(nn.Module):
    """A network that says ``values`` (3, 2) at the sample's label, in whatever kind of prediction it is taken for."""

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(FAKE_SCORE.clone())

    def forward(self, x, time, label):
        return self.values[label].reshape(x.shape)


def trainer_of(method, kind="x0", run=None, **changes):
    """Student and fake score say ``FAKE_SCORE``; the score methods compare at one level."""
    family = AnalyticFamily(Teacher(), Says(), kind, (2, 1, 1), num_labels=2)
    return toy_trainer(family, run=run, method=method, **changes)


def batch() -> Batch:
    return Batch({"label": LABELS}, torch.randn(4, 2, 1, 1), LABELS.tolist())


def sample_gradient(trainer) -> torch.Tensor:
    """The gradient (4, 2) of the student's losses in ``SAMPLES``, times their number of elements."""
    method = getattr(trainer.method, "base", trainer.method)  # of DisBack
    return 8 * method.sample_gradient(SAMPLES.reshape(4, 2, 1, 1).clone(), batch())[..., 0, 0]


def guided(values: torch.Tensor, scale: float) -> torch.Tensor:
    """``null + scale (conditional - null)`` of each sample, (4, 2)."""
    return values[2] + scale * (values[LABELS] - values[2])


def normalised(fake_score: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """DMD's gradient (2311.18828, eq. 8)."""
    return (fake_score - teacher) / (SAMPLES - teacher).abs().mean(1, keepdim=True)


def at_level(**settings) -> dict:
    return {"min_level": LEVEL, "max_level": LEVEL, **settings}


def coefficients(level=LEVEL) -> tuple[float, float]:
    alpha, sigma = Teacher.schedule.alpha_sigma(torch.tensor([level]))
    return alpha.item(), sigma.item()


# -- the student's gradient ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("method", ["dmd2", "enhance"])
def test_dmd2_and_enhancement_lead_from_the_fake_score_to_the_guided_teacher(method, scale):
    trainer = trainer_of(method, dmd2={"guidance_scale": scale})
    expected = normalised(FAKE_SCORE[LABELS], guided(TEACHER, scale))
    torch.testing.assert_close(sample_gradient(trainer), expected)
    assert (expected - normalised(guided(TEACHER, scale), FAKE_SCORE[LABELS])).abs().min() > 0.1  # if swapped


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(
    ("own", "factor"),
    [
        ({"objective": "sim", "distance": "squared_l2"}, 2.0),
        ({"objective": "full", "distance": "squared_l2"}, 2.0),
        ({"objective": "sid", "sid_alpha": 1.2}, 1.0),
    ],
)
def test_sim_leads_from_the_fake_score_to_the_guided_teacher(own, factor, scale):
    """-d'(y)^T (m_fake - x0) with y = m_fake - m_teacher: nothing but the residual depends on the sample here."""
    trainer = trainer_of("sim", sim={"guidance_scale": scale, **own})
    expected = factor * (FAKE_SCORE[LABELS] - guided(TEACHER, scale))
    torch.testing.assert_close(sample_gradient(trainer), expected)


def test_sim_in_the_space_of_scores_counts_the_levels_factor_twice():
    alpha, sigma = coefficients()
    trainer = trainer_of("sim", sim=at_level(distance="squared_l2", space="score"))
    expected = 2 * (alpha / sigma**2) ** 2 * (FAKE_SCORE - TEACHER)[LABELS]
    torch.testing.assert_close(sample_gradient(trainer), expected)


def test_sims_pseudo_huber_distance_and_sids_weight():
    difference, c = (FAKE_SCORE - TEACHER)[LABELS], 0.5
    huber = difference / (difference.square().sum(1, keepdim=True) + c**2).sqrt()
    torch.testing.assert_close(sample_gradient(trainer_of("sim", sim={"c": c})), huber)
    weight = 1 / (SAMPLES - TEACHER[LABELS]).abs().mean(1, keepdim=True)
    torch.testing.assert_close(sample_gradient(trainer_of("sim", sim={"c": c, "weight": "sid"})), weight * huber)


@pytest.mark.parametrize(("fake_score_guidance", "shared"), [("shared", True), ("none", False)])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_swiftbrush_takes_the_difference_of_eps(scale, fake_score_guidance, shared):
    """sigma^2 (eps_teacher - eps_fake) = sigma alpha (m_fake - m_teacher); of v it would be sigma times the
    difference, of x0 ``sigma^2 (m_teacher - m_fake)``."""
    alpha, sigma = coefficients()
    settings = at_level(guidance_scale=scale, fake_score_guidance=fake_score_guidance)
    trainer = trainer_of("swiftbrush", swiftbrush=settings, roles={"weights": "full"})
    expected = alpha * sigma * (guided(FAKE_SCORE, scale if shared else 1.0) - guided(TEACHER, scale))
    torch.testing.assert_close(sample_gradient(trainer), expected)


@pytest.mark.parametrize("kind", ["v", "eps"])
def test_swiftbrush_reads_eps_off_networks_of_any_kind(kind):
    """A fake score that says the same v (or eps) everywhere: eps = sigma x_t + alpha v."""
    alpha, sigma = coefficients()
    trainer = trainer_of("swiftbrush", kind, swiftbrush=at_level(guidance_scale=1.0), roles={"weights": "full"})
    state = trainer.noise.get_state()
    result = sample_gradient(trainer)
    trainer.noise.set_state(state)
    trainer.method.draw_time(LEVEL, LEVEL, 4)
    x_t = alpha * SAMPLES + sigma * trainer.noise.randn(4, 2, 1, 1, dtype=F64)[..., 0, 0]
    fake_score = sigma * x_t + alpha * FAKE_SCORE[LABELS] if kind == "v" else FAKE_SCORE[LABELS]
    teacher = (x_t - alpha * TEACHER[LABELS]) / sigma
    torch.testing.assert_close(result, sigma**2 * (teacher - fake_score))


def test_swiftbrush_leads_away_from_negatives_in_place_of_the_teachers_null_condition():
    """NASA-T: the teacher alone; the fake score is guided from its null condition as ever."""
    alpha, sigma = coefficients()
    trainer = trainer_of("swiftbrush", swiftbrush=at_level(guidance_scale=3.0), roles={"weights": "full"})
    negative = torch.tensor([1, 0, 0, 1])
    x0, condition = SAMPLES.reshape(4, 2, 1, 1), {"label": LABELS}
    result = trainer.method.variational_score(x0, condition, {"label": negative})[..., 0, 0]
    teacher = TEACHER[negative] + 3.0 * (TEACHER[LABELS] - TEACHER[negative])
    torch.testing.assert_close(result, alpha * sigma * (guided(FAKE_SCORE, 3.0) - teacher))


@pytest.mark.parametrize("weight", [0.25, 4.0])
def test_every_loss_of_the_student_counts_by_its_weight(weight):
    """Enhancement's squared error to where it began, beside the matching gradient; and a reward, the first value."""
    rewards = [{"reward": "judges:FirstValue", "hinge": 100.0, "weight": 3.0}]
    trainer = trainer_of("enhance", enhance={"mse_weight": weight, "rewards": rewards})
    expected = normalised(FAKE_SCORE[LABELS], TEACHER[LABELS]) + weight * 2 * (SAMPLES - FAKE_SCORE[LABELS])
    expected -= 3.0 * torch.tensor([2.0, 0.0])  # of the mean over four samples of -x, times their eight elements
    torch.testing.assert_close(sample_gradient(trainer), expected)


@pytest.mark.parametrize("method", ["dmd2", "swiftbrush", "sim"])
def test_a_deterministic_students_rollout_begins_with_the_batchs_noise(method):
    """It draws none of its own."""
    settings = {"sampler": {"steps": 4, "transition": "ode"}, "roles": {"weights": "full"}}
    trainer, exits = trainer_of(method, **settings), set()
    times = [torch.full((4,), time) for time in (999, 749, 499, 249)]
    for _ in range(20):
        created = batch()
        x_t, t = trainer.method.student_input(created)
        x = created.noise
        for now, following in pairwise(times):
            if now[0] <= t[0]:
                break
            x = Teacher.schedule.step(FAKE_SCORE[LABELS].float().reshape(4, 2, 1, 1), x, now, following)
        torch.testing.assert_close(x_t, x)
        exits.add(int(t[0]))
    assert exits == {999, 749, 499, 249}


# -- DisBack's walk --------------------------------------------------------------------------------------------

WALKED = {
    "dmd2": ({}, normalised),
    "sim": ({"distance": "squared_l2"}, lambda fake_score, teacher: 2 * (fake_score - teacher)),
    "swiftbrush": (
        at_level(guidance_scale=1.0, null_probability=0.0),
        lambda fake_score, teacher: coefficients()[0] * coefficients()[1] * (fake_score - teacher),
    ),
}


@pytest.mark.parametrize("base", WALKED)
def test_disback_leads_from_the_fake_score_to_each_target_in_turn(base):
    """T_1 = s'_2, T_2 = s'_1 of three nodes, then the teacher; the fake score starts as s'_3."""
    settings, expected = WALKED[base]
    trainer = trainer_of(
        "disback",
        disback={"base": base, "nodes": 3, "updates": 6, "hold": 1, "probe": 4, "spacing": "updates"},
        roles={"weights": "full"},
        optimizer={"fake_score": {"lr": 0.1}},
        **{base: settings},
    )
    with torch.no_grad():
        trainer.roles.student.network.values.add_(1.0)  # what the recorded weights go to
    trainer.begin()
    nodes = [trainer.method.store.read(node)["values"].double() for node in trainer.method.path]
    assert all((later - sooner)[:2].abs().min() > 0.01 for sooner, later in pairwise(nodes))
    for index, target in enumerate([nodes[1], nodes[0], TEACHER], 1):
        trainer.method.walk.move_to(index, trainer.method.path)
        torch.testing.assert_close(sample_gradient(trainer), expected(nodes[2][LABELS], target[LABELS]))


@pytest.mark.parametrize("train_steps", ["first", "all"])
def test_enhancement_may_lead_to_the_stage_before_in_place_of_the_teacher(train_steps):
    trainer = trainer_of("enhance", enhance={"teacher": "previous_stage", "train_steps": train_steps})
    with torch.no_grad():
        trainer.roles.fake_score.network.values.add_(0.5)
    torch.testing.assert_close(sample_gradient(trainer), normalised(FAKE_SCORE[LABELS] + 0.5, FAKE_SCORE[LABELS]))


# -- the fake score's loss -------------------------------------------------------------------------------------


def fake_score_gradient(trainer) -> torch.Tensor:
    """Of the fake score's values, (3, 2); the student gets none."""
    x0 = SAMPLES.reshape(4, 2, 1, 1).clone()
    trainer.method.total("fake_score", trainer.method.fake_score_losses(x0, batch())).backward()
    assert trainer.roles.student.network.values.grad is None
    return trainer.roles.fake_score.network.values.grad.double()


def error_gradient(labels: torch.Tensor) -> torch.Tensor:
    """Of the mean over samples and elements of ``(value - x0)^2``, (3, 2)."""
    error = FAKE_SCORE[labels] - SAMPLES
    return torch.zeros(3, 2, dtype=F64).index_add(0, labels, 2 * error / error.numel())


@pytest.mark.parametrize("method", ["dmd2", "sim", "enhance", "swiftbrush"])
def test_the_fake_score_learns_the_samples_each_under_its_own_label(method):
    """At level 0 alone; the eps error is alpha / sigma times that of x0, and SwiftBrush's weight alpha^2 more."""
    section = "dmd2" if method == "enhance" else method
    settings = {"fake_score_max_level": 0, "null_probability": 0.0, "guidance_scale": 3.0}
    trainer = trainer_of(method, **{section: settings}, roles={"weights": "full"})
    alpha, sigma = coefficients(0)
    factor = alpha**4 / sigma**2 if method == "swiftbrush" else 1.0
    expected = factor * error_gradient(LABELS)
    torch.testing.assert_close(fake_score_gradient(trainer), expected, rtol=1e-4, atol=1e-5)


def test_the_fake_score_learns_the_null_label_where_the_coin_says_so():
    settings = {"fake_score_max_level": 0, "null_probability": 0.5}
    trainer = trainer_of("dmd2", dmd2=settings)
    labels, result = {"null": torch.full((4,), 2), "own": LABELS}, set()
    for _ in range(20):
        trainer.roles.fake_score.network.zero_grad()
        gradient = fake_score_gradient(trainer)
        (name,) = [n for n, which in labels.items() if torch.allclose(gradient, error_gradient(which), atol=1e-5)]
        result.add(name)
    assert result == {"null", "own"}


# -- the loop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_gathered_micro_batches_count_as_one_batch(accumulation, tmp_path):
    """Eight samples in one, two or four parts: the norms of both gradients by hand.

    Four samples of each label; the fake score learns the samples that were made before the student's update.
    """
    train = {"batch_size": 8 // accumulation, "gradient_accumulation": accumulation, "updates": 1, "log_every": 1}
    run = RunFolder(tmp_path / "run")
    trainer = trainer_of("dmd2", run=run, dmd2={"fake_score_updates": 1}, train={**train, "sample_every": 1000})
    run.create(trainer.config, 0)
    student = torch.tensor([[-0.5, 0.25], [2.0, 1.0]], dtype=F64)
    with torch.no_grad():
        trainer.roles.student.network.values[:2].copy_(student)
    trainer.repeat(Phase("dmd2", "student", 1, trainer.method.updates), lambda bar, _: trainer.recorder.write_row(bar))
    (row,) = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    teacher, fake_score = TEACHER[:2], FAKE_SCORE[:2]
    gradient = (fake_score - teacher) / (student - teacher).abs().mean(1, keepdim=True)
    assert row["grad_norm/student"] == pytest.approx((gradient / 4).norm().item(), rel=1e-5)
    assert row["grad_norm/fake_score"] == pytest.approx(((fake_score - student) / 2).norm().item(), rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_enhancement_holds_the_other_steps_in_the_students_update(accumulation, tmp_path):
    """The squared error to where the stage began, by its weight, beside the matching gradient."""
    run = RunFolder(tmp_path / "run")
    trainer = trainer_of(
        "enhance",
        run=run,
        enhance={"hold_weight": 0.3},
        dmd2={"fake_score_updates": 1},
        sampler={"steps": 4},
        train={"batch_size": 8 // accumulation, "gradient_accumulation": accumulation},
    )
    run.create(trainer.config, 0)
    student = torch.tensor([[-0.5, 0.25], [2.0, 1.0]], dtype=F64)
    with torch.no_grad():
        trainer.roles.student.network.values[:2].copy_(student)
    trainer.repeat(
        Phase("enhance", "student", 1, trainer.method.updates), lambda bar, _: trainer.recorder.write_row(bar)
    )
    (row,) = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    teacher, start = TEACHER[:2], FAKE_SCORE[:2]
    gradient = (start - teacher) / (student - teacher).abs().mean(1, keepdim=True) / 4 + 0.3 * (student - start) / 2
    assert row["grad_norm/student"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert row["loss/hold"] == pytest.approx((student - start).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_gathered_micro_batches_of_a_recording_count_as_one_batch(accumulation, tmp_path):
    """DisBack's degradation, its one update by the norm of the gradient."""
    run = RunFolder(tmp_path / "run")
    trainer = trainer_of(
        "disback",
        run=run,
        disback={"nodes": 1, "updates": 1, "probe": 16},
        train={"batch_size": 8 // accumulation, "gradient_accumulation": accumulation, "log_every": 1},
    )
    run.create(trainer.config, 0)
    student = torch.tensor([[-0.5, 0.25], [2.0, 1.0]], dtype=F64)
    with torch.no_grad():
        trainer.roles.student.network.values[:2].copy_(student)
    trainer.begin()
    (row,) = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert row["grad_norm/fake_score"] == pytest.approx(((FAKE_SCORE[:2] - student) / 2).norm().item(), rel=1e-5)
    error = (FAKE_SCORE[:2] - student).square().mean().item()
    assert row["loss/degradation"] == pytest.approx(error, rel=1e-5)
    assert trainer.method.memory["start_loss"] == pytest.approx(error, rel=1e-5)  # of 16 samples, eight at a time
