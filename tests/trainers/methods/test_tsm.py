"""Teacher score matching: what the student is asked at, what it is compared with, and whom the loss trains."""

import pytest
import torch
from toys import linear_betas, real_source, toy_family, toy_trainer

from stepdistill.analytic import GaussianMixture

LABELS = [1, 0, 0, 1] * 8


def trainer_of(own_teacher=False, **tsm):
    """``own_teacher``: the student's network, as it begins, is the teacher."""
    mixture = GaussianMixture([[-1.0, 0.5], [1.0, -0.5]], 0.05, labels=[0, 1])
    family = toy_family(mixture, linear_betas())
    if own_teacher:
        family.teacher_denoiser = lambda: None
    return toy_trainer(
        family, real_source(family, labels=LABELS), method="tsm", tsm=tsm, data={"images": {"folder": "unused"}}
    )


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_loss_by_hand(scale):
    """The squared error of v at noised real samples, to the teacher's v under each sample's own label, guided."""
    trainer = trainer_of(guidance_scale=scale, min_level=300, max_level=400)
    batch = trainer.method.next_batch()
    index = trainer.parts.real.order.indices(0, 8)
    labels = torch.tensor([LABELS[i] for i in index])
    assert torch.equal(batch.real, trainer.parts.real.latents[index])
    assert torch.equal(batch.condition["label"], labels)
    assert set(labels.tolist()) == {0, 1}
    state = trainer.noise.get_state()
    ((weight, loss),) = trainer.method.student_losses(batch).values()
    trainer.noise.set_state(state)
    t = trainer.noise.randint(300, 400, 8)
    alpha, sigma = (c.float().reshape(-1, 1, 1, 1) for c in trainer.family.schedule.alpha_sigma(t))
    x_t = alpha * batch.real + sigma * batch.noise
    conditional, null = (
        trainer.family.teacher(x_t, t, {"label": settings}).x0 for settings in (labels, torch.full((8,), 2))
    )
    x0 = null + scale * (conditional - null)
    v = alpha * (x_t - alpha * x0) / sigma - sigma * x0
    says = trainer.roles.student.network(x_t, t.float(), labels)
    torch.testing.assert_close(loss, (says - v).square().mean())
    assert weight == 1.0
    loss.backward()
    assert all(p.grad is not None for p in trainer.trained["student"].values())


def test_a_student_that_is_the_teacher_has_nothing_to_learn():
    trainer = trainer_of(own_teacher=True)
    ((_, loss),) = trainer.method.student_losses(trainer.method.next_batch()).values()
    assert loss.item() == pytest.approx(0, abs=1e-10)
    loss.backward()
    assert all(p.grad is None for p in trainer.family.network.parameters())
