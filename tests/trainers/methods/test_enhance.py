"""Enhancement's own parts, its student and teacher saying one value for each time: which steps are trained, which are
held and to what."""

import pytest
import scipy.stats
import torch
from torch import nn
from toys import linear_betas, send_backward, toy_trainer

from stepdistill.analytic import GaussianMixture
from stepdistill.families.analytic import AnalyticFamily

TIMES = (999, 749, 499, 249)


class Table(nn.Module):
    """Says ``values[time]`` (1000,) at every sample."""

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.linspace(-1, 1, 1000))

    def forward(self, x, time, label=None):
        return self.values[time.long()].reshape(-1, 1, 1, 1).expand(x.shape)


def trainer_of(sampler=None, **enhance):
    family = AnalyticFamily(GaussianMixture([[3.0]], 0.1).denoiser(linear_betas()), Table(), "x0", (1, 1, 1))
    return toy_trainer(family, method="enhance", enhance=enhance, sampler=sampler or {"steps": 4})


def move_student(trainer, by=0.5):
    with torch.no_grad():
        trainer.roles.student.network.values.add_(by)


def test_all_but_the_first_step_are_held_to_what_the_student_was():
    """One step is drawn for each update; the gradient is that of the weighted squared error there and nowhere else."""
    trainer = trainer_of(hold_weight=0.3)
    move_student(trainer)
    values, held = trainer.roles.student.network.values, set()
    for _ in range(40):
        values.grad = None
        batch = trainer.method.next_batch()
        send_backward(trainer.method.more_student_terms([(batch, torch.randn(8, 1, 1, 1))]))
        (time,) = values.grad.nonzero()[:, 0].tolist()
        assert values.grad[time].item() == pytest.approx(0.3 * 2 * 0.5, rel=1e-5)
        held.add(time)
    assert held == set(TIMES[1:])


@pytest.mark.parametrize("also", [[], [1, 2]])
def test_every_step_of_every_number_of_steps_is_trained_alike(also):
    """Of one, two and four steps there are seven: 999 is the first of each, 499 one of two numbers of steps."""
    trainer = trainer_of({"steps": 4, "also_steps": also}, train_steps="all")
    counts = dict.fromkeys(TIMES, 0)
    for _ in range(700):
        _, t = trainer.method.student_input(trainer.method.next_batch())
        assert len(t.unique()) == 1
        counts[int(t[0])] += 1
    shares = [3, 1, 2, 1] if also else [1, 1, 1, 1]
    expected = [700 * share / sum(shares) for share in shares]
    assert scipy.stats.chisquare([counts[time] for time in TIMES], expected).pvalue > 1e-3


def test_a_rollout_in_two_steps_meets_its_second_input_at_its_own_time():
    """At 499 from 999 in one move, whatever the four-step sampler does between."""
    trainer = trainer_of({"steps": 2}, train_steps="all")
    seen = set()
    for _ in range(20):
        batch = trainer.method.next_batch()
        x_t, t = trainer.method.student_input(batch)
        if t[0] == 499:
            x0 = trainer.roles.student.network.values[999].detach().expand(8, 1, 1, 1)
            torch.testing.assert_close(x_t, linear_betas().add_noise(x0, batch.noise, t))
        else:
            assert torch.equal(x_t, batch.noise)
        seen.add(int(t[0]))
    assert seen == {999, 499}


@pytest.mark.parametrize(("reference_steps", "time"), [(1, 999), (2, 499), (4, 249)])
def test_the_squared_error_is_to_the_students_own_sample_as_it_was(reference_steps, time):
    trainer = trainer_of(mse_weight=0.7, reference_steps=reference_steps)
    start = trainer.roles.student.network.values.detach().clone()
    move_student(trainer)
    x0 = torch.full((8, 1, 1, 1), 0.25, requires_grad=True)
    weight, loss = trainer.method.student_losses(x0, trainer.method.next_batch())["mse"]
    assert weight == 0.7
    assert loss.item() == pytest.approx((0.25 - start[time].item()) ** 2, rel=1e-5)


def test_a_resumed_stage_holds_to_what_the_saved_one_held_to():
    first, second = trainer_of(hold_weight=1.0), trainer_of(hold_weight=1.0)
    with torch.no_grad():
        first.method.start.network.values.fill_(7.0)
    second.restore(*first.state(), "here")
    assert (second.method.start.network.values == 7.0).all()
