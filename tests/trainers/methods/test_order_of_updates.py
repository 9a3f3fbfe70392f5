"""Score methods: whether student or fake score is updated first, on which samples, at which levels, at what cost."""

import pytest
import torch
from toys import toy_family, toy_trainer

from stepdistill.analytic import GaussianMixture
from stepdistill.errors import UserError

ORDERS = ("student", "fake_score")


def watched(first="student", k=1, method="dmd2", **changes):
    """A trainer, and what happens in it: ("made", batch, samples, graph), ("student" or "fake_score", samples),
    ("update", role)."""
    trainer = toy_trainer(method=method, **{method: {"first": first, "fake_score_updates": k}}, **changes)
    events = []
    make, student, fake_score = (
        getattr(trainer.method, name) for name in ("make_sample", "sample_gradient", "fake_score_losses")
    )
    update = trainer.step

    def making(batch):
        x0 = make(batch)
        events.append(("made", batch, x0.detach().clone(), x0.requires_grad))
        return x0

    def comparing(x0, batch):
        events.append(("student", x0.detach().clone()))
        return student(x0, batch)

    def denoising(x0, batch):
        assert not x0.requires_grad
        events.append(("fake_score", x0.clone()))
        return fake_score(x0, batch)

    def updating(role):
        events.append(("update", role))
        return update(role)

    trainer.method.make_sample, trainer.method.sample_gradient = making, comparing
    trainer.method.fake_score_losses, trainer.step = denoising, updating
    return trainer, events


def run(trainer, iterations):
    for _ in range(iterations):
        trainer.iteration()


def updates(events):
    return [event[1] for event in events if event[0] == "update"]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_student_is_updated_before_or_after_its_fake_score_updates(k):
    for first, expected in (
        ("student", ["student"] + ["fake_score"] * k),
        ("fake_score", ["fake_score"] * k + ["student"]),
    ):
        trainer, events = watched(first, k)
        run(trainer, 2 * k)
        assert updates(events) == 2 * expected
        assert trainer.counters["student"] == 2
        assert trainer.counters["fake_score"] == 2 * k


def test_student_first_shares_the_samples_that_were_made_before_its_update():
    trainer, events = watched("student")
    run(trainer, 1)
    assert [event[0] for event in events] == ["made", "student", "update", "fake_score", "update"]
    (_, _, created, graph), (_, compared), (_, trained_on) = events[0], events[1], events[3]
    assert graph
    assert torch.equal(created, compared)
    assert torch.equal(created, trained_on)


def test_fake_score_first_trains_on_samples_of_its_own_and_the_student_makes_new_ones():
    trainer, events = watched("fake_score", 2)
    student = trainer.roles.student.network
    before = {key: value.clone() for key, value in student.state_dict().items()}
    run(trainer, 2)
    kinds = [event[0] for event in events]
    assert kinds == ["made", "fake_score", "update"] * 2 + ["made", "student", "update"]
    created = [event for event in events if event[0] == "made"]
    assert [graph for *_, graph in created] == [False, False, True]
    noises = [batch.noise for _, batch, *_ in created]
    assert not torch.equal(noises[0], noises[1])
    assert not torch.equal(noises[1], noises[2])
    trained_on = [event[1] for event in events if event[0] == "fake_score"]
    assert torch.equal(trained_on[0], created[0][2])
    assert torch.equal(trained_on[1], created[1][2])
    assert torch.equal(events[-2][1], created[2][2])
    # every sample is of the student as it was before its update, the fake score's too
    trained = student.state_dict()
    assert any(not torch.equal(before[key], trained[key]) for key in before)
    student.load_state_dict(before)
    for _, batch, samples, _ in created:
        x_t, t = trainer.sampler.start(batch.noise), trainer.sampler.time(0, batch.noise)
        torch.testing.assert_close(trainer.roles.student(x_t, t, batch.condition).x0, samples)


def test_fake_score_first_compares_the_student_with_the_fake_score_just_updated():
    """Under a teacher that the fake score starts from, the first student update has no gradient in DMD2's order."""
    norms = {}
    for first in ORDERS:
        family = toy_family()
        family.teacher_denoiser = lambda: None
        trainer = toy_trainer(family, dmd2={"first": first, "fake_score_updates": 1})
        run(trainer, 1)
        norms[first] = float(trainer.parts.journal.values["sample_grad/distribution_matching"][0])
    assert norms["student"] == 0
    assert norms["fake_score"] > 0


@pytest.mark.parametrize("first", ORDERS)
def test_a_gathered_update_takes_the_mean_over_its_batches(first):
    trainer, events = watched(first, train={"gradient_accumulation": 3, "batch_size": 4})
    run(trainer, 1)
    assert sorted(updates(events)) == ["fake_score", "student"]
    assert len([event for event in events if event[0] == "fake_score"]) == 3
    assert len([event for event in events if event[0] == "student"]) == 3
    assert len([event for event in events if event[0] == "made"]) == (3 if first == "student" else 6)


@pytest.mark.parametrize(
    ("method", "changes", "expected"),
    [
        ("dmd2", {}, 3 * 4 + 1 + 4),
        ("dmd2", {"sampler": {"steps": 3}}, 3 * 4 + 1 + 4 + 4 * 1),
        ("sim", {}, 3 * 4 + 1 + 6),
    ],
)
def test_the_plans_passes_are_those_that_fake_score_first_makes(method, changes, expected):
    family = toy_family(GaussianMixture([[-1.0], [1.0]], 0.05, labels=[0, 1]))
    family.teacher_denoiser = lambda: None  # the network is the teacher, so its passes count
    trainer = toy_trainer(
        family, method=method, **{method: {"first": "fake_score", "fake_score_updates": 3}}, **changes
    )
    trainer.noise.shared_randint = lambda low, high: (low + high) // 2  # the mean of a rollout's lengths
    run(trainer, 3)
    assert trainer.counters["student"] == 1
    assert trainer.passes == 8 * expected
    assert trainer.method.passes(trainer.config).per_update == expected


def test_the_fake_scores_levels_are_uniform_in_its_own_range():
    trainer = toy_trainer(dmd2={"fake_score_min_level": 20, "fake_score_max_level": 979})
    t, eps = trainer.method.fake_score_draw(torch.zeros(200_000, 1, 1, 1))
    assert (t.min(), t.max()) == (20, 979)
    assert t.double().mean().item() == pytest.approx(499.5, abs=3)
    assert eps.std().item() == pytest.approx(1, abs=0.02)
    t, _ = toy_trainer().method.fake_score_draw(torch.zeros(200_000, 1, 1, 1))
    assert (t.min(), t.max()) == (0, 999)


def test_an_empty_range_is_refused():
    with pytest.raises(UserError, match="fake_score_min_level = 30 is above fake_score_max_level = 20"):
        toy_trainer(dmd2={"fake_score_min_level": 30, "fake_score_max_level": 20})
