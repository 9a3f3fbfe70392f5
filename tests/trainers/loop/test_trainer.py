"""The loop: what is not finite is counted and skipped, limits stop and save, optimizers do what the config says."""

import json
import math

import pytest
import torch
from diffusers.optimization import get_constant_schedule_with_warmup
from toys import toy_family, toy_trainer

from stepdistill import checkpoint
from stepdistill.analytic import GaussianMixture
from stepdistill.data.images import ImageSet
from stepdistill.data.order import Order
from stepdistill.data.streams import ConditionSource, RealSource
from stepdistill.run import RunFolder
from stepdistill.settings import OptimizerSettings
from stepdistill.trainers.loop.optimizers import learning_rate
from stepdistill.trainers.loop.stopping import Interrupted
from stepdistill.trainers.methods.base import RunStopped


def in_folder(tmp_path, **changes):
    run = RunFolder(tmp_path / "run")
    trainer = toy_trainer(run=run, **changes)
    run.create(trainer.config, 0)
    trainer.recorder.save_samples = lambda: None  # toys are no pictures
    return trainer, run


def poison(trainer, role, times):
    """Make the next ``times`` gradients of ``role`` NaN."""
    left = {"count": times}
    update = trainer.step

    def poisoned(which):
        if which == role and left["count"] > 0:
            left["count"] -= 1
            next(iter(trainer.trained[role].values())).grad.view(-1)[0] = math.nan
        return update(which)

    trainer.step = poisoned


@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_a_non_finite_gradient_is_counted_and_its_step_skipped(role, tmp_path):
    trainer, run = in_folder(tmp_path, train={"updates": 4, "log_every": 1})
    poison(trainer, role, 1)
    before = {k: p.detach().clone() for k, p in trainer.trained[role].items()}
    other = "fake_score" if role == "student" else "student"
    trainer.iteration()
    assert trainer.skipped == {role: 1, other: 0}
    assert trainer.counters[role] == 0
    assert trainer.counters[other] == 1
    for key, parameter in trainer.trained[role].items():
        assert torch.equal(parameter, before[key])
        assert parameter.grad is None
    trainer.fit()
    assert trainer.counters["student"] == 4
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert rows[-1][f"skipped/{role}"] == 1
    assert all(p.isfinite().all() for p in trainer.trained[role].values())


@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_too_many_in_a_row_stop_the_run_naming_step_and_role(role, tmp_path):
    trainer, run = in_folder(
        tmp_path,
        train={"updates": 9, "checkpoint_every": 1, "non_finite_limit": 3},
        dmd2={"fake_score_updates": 1},
    )
    trainer.config.train.__dict__["updates"] = 2
    trainer.fit()
    trainer.config.train.__dict__["updates"] = 9
    poison(trainer, role, 5)
    with pytest.raises(RunStopped, match=rf"stopped at iteration 4: 3 non-finite gradients of the {role} in a row"):
        trainer.fit()
    tensors, _ = checkpoint.load(checkpoint.latest(run.checkpoints))
    assert all(torch.isfinite(v).all() for v in tensors[role].values())


def test_a_finite_step_between_resets_the_count():
    trainer = toy_trainer(train={"updates": 9, "non_finite_limit": 2}, dmd2={"fake_score_updates": 1})
    for _ in range(3):
        poison(trainer, "student", 1)
        trainer.iteration()
        trainer.iteration()
    assert trainer.skipped["student"] == 3


def test_wall_time_saves_and_stops_and_resuming_is_the_uninterrupted_run(tmp_path):
    trainer, run = in_folder(tmp_path, train={"updates": 6, "max_minutes": 1e-9})
    with pytest.raises(Interrupted, match="max_minutes") as stop:
        trainer.fit()
    assert stop.value.exit_code == 0
    assert trainer.counters["student"] == 1
    again = toy_trainer(train={"updates": 6})
    again.restore(*checkpoint.load(checkpoint.latest(run.checkpoints)), "here")
    again.fit()
    whole = toy_trainer(train={"updates": 6})
    whole.fit()
    for key, parameter in whole.trained["student"].items():
        assert torch.equal(parameter, again.trained["student"][key]), key


def test_clipping_and_warm_up_are_per_role():
    trainer = toy_trainer(
        optimizer={"student": {"clip": 1e-3, "warmup": 4, "lr": 1e-2}, "fake_score": {"clip": 1e3}},
        dmd2={"fake_score_updates": 1},
    )
    norms, rates = {"student": [], "fake_score": []}, []

    def watch(role):
        optimizer = trainer.optimizers[role]
        step = optimizer.step

        def watched():
            gradients = [p.grad for p in trainer.trained[role].values() if p.grad is not None]
            norms[role].append(torch.nn.utils.get_total_norm(gradients).item())
            if role == "student":
                rates.append(optimizer.param_groups[0]["lr"])
            return step()

        optimizer.step = watched

    watch("student")
    watch("fake_score")
    for _ in range(6):
        trainer.iteration()
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    assert max(norms["student"]) <= 1.001e-3
    assert max(norms["fake_score"]) > 1e-3


def test_learning_rate_warms_up_then_decays_in_the_roles_own_updates():
    settings = OptimizerSettings(lr=1.0, warmup=4, decay=10)
    rates = [learning_rate(settings, done) for done in range(12)]
    assert rates == pytest.approx([0.25, 0.45, 0.6, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.01, 0.01])
    assert learning_rate(OptimizerSettings(lr=0.5), 1000) == 0.5


def test_warm_up_is_one_update_ahead_of_diffusers_scheduler():
    settings = OptimizerSettings(lr=1.0, warmup=4)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_constant_schedule_with_warmup(optimizer, 4)
    rates = []
    for _ in range(7):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert rates[0] == 0
    assert rates[1:] == pytest.approx([learning_rate(settings, done) for done in range(6)])


def test_every_row_says_how_far_and_at_what_cost(tmp_path):
    trainer, run = in_folder(tmp_path, train={"updates": 4, "log_every": 2, "batch_size": 8})
    trainer.fit()
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["updates/student"] for row in rows] == [2, 4]
    # an iteration: sample 8, fake score 8 + 16 backward; a student's turn: 16 backward, fake score 8 (the teacher is a
    # closed form and no network)
    assert rows[1]["passes"] - rows[0]["passes"] == 2 * (5 * 32 + 16 + 8)
    for name in ("loss/student", "loss/fake_score", "grad_norm/student", "sample_grad/distribution_matching"):
        assert math.isfinite(rows[1][name])


def test_the_average_follows_its_formula():
    trainer = toy_trainer(train={"ema_decay": 0.5, "updates": 3}, dmd2={"fake_score_updates": 1})
    name = next(iter(trainer.trained["student"]))
    shadow = trainer.ema.shadow[name].clone()
    for n in (1, 2, 3):
        trainer.iteration()
        decay = min(0.5, (1 + n) / (10 + n))
        shadow = decay * shadow + (1 - decay) * trainer.trained["student"][name].detach()
        torch.testing.assert_close(trainer.ema.shadow[name], shadow)
    raw = trainer.trained["student"][name].detach().clone()
    with trainer.exported():
        torch.testing.assert_close(trainer.trained["student"][name].detach(), shadow)
    assert torch.equal(trainer.trained["student"][name].detach(), raw)


def spoil(trainer, role, name="weight"):
    """Make a parameter of ``role`` infinite."""
    with torch.no_grad():
        next(iter(trainer.trained[role].values())).view(-1)[0] = math.inf


@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_a_network_that_breaks_while_it_trains_is_named_with_its_rate(role):
    trainer = toy_trainer(train={"updates": 9, "non_finite_limit": 1}, dmd2={"fake_score_updates": 1})
    trainer.iteration()
    spoil(trainer, role)
    trainer.roles.watch.clear()
    with pytest.raises(
        RunStopped, match=rf"the {role}'s prediction is not finite at timesteps? .*lower optimizer.{role}.lr"
    ):
        trainer.iteration()


def test_a_network_that_was_broken_before_its_first_update_is_not_told_to_lower_its_rate():
    trainer = toy_trainer(train={"updates": 9, "non_finite_limit": 1}, dmd2={"fake_score_updates": 1})
    spoil(trainer, "student")
    with pytest.raises(RunStopped, match="before its first update; the weights or the scheduler of unused are broken"):
        trainer.iteration()


def test_skipped_updates_that_are_most_of_all_end_the_run_without_ten_in_a_row():
    trainer = toy_trainer(train={"updates": 9999, "non_finite_limit": 3}, dmd2={"fake_score_updates": 1})
    update, turn = trainer.step, iter(range(9999))

    def two_of_three(role):
        if role == "student" and next(turn) % 3 < 2:
            next(iter(trainer.trained[role].values())).grad.view(-1)[0] = math.nan
        return update(role)

    trainer.step = two_of_three
    with pytest.raises(RunStopped, match="30 of 44 gradients of the student were non-finite; every prediction is fini"):
        trainer.fit()


def test_a_student_that_no_update_has_touched_is_not_exported():
    trainer = toy_trainer(train={"updates": 9, "max_passes": 1}, dmd2={"fake_score_updates": 1})
    poison(trainer, "student", 1)
    trainer.iteration()
    trainer.fit()  # the passes are spent
    with pytest.raises(RunStopped, match=r"no student update was taken.*1 of 1 updates of the student were skipped"):
        trainer.check_trained()
    trainer.iteration()
    trainer.check_trained()


def test_a_row_is_the_mean_of_what_is_finite_and_holds_no_nan(tmp_path):
    trainer, run = in_folder(tmp_path, train={"updates": 2, "log_every": 2})
    for value in (1.0, math.nan, torch.tensor(4.0), torch.tensor(math.inf)):
        trainer.method.log("loss/some", value)
    trainer.method.log("loss/none", math.nan)
    trainer.fit()
    (line,) = run.metrics.read_text().splitlines()
    assert "NaN" not in line
    assert "Infinity" not in line
    assert json.loads(line)["loss/some"] == 2.5
    assert json.loads(line)["loss/none"] is None


def test_passes_of_all_processes_are_counted_whatever_their_number_was_before():
    trainer = toy_trainer()
    for world, forward in ((2, 48), (1, 32), (2, 64)):
        again = toy_trainer()
        if trainer.passes:
            again.restore(*trainer.state(), "here")
        again.world = world
        again.roles.meter.forward += forward
        trainer = again
    assert trainer.passes == 2 * 48 + 32 + 2 * 64


# -- optimizers ------------------------------------------------------------------------------------------------


def test_every_roles_optimizer_is_made_of_its_own_settings():
    changes = {
        "student": {"lr": 1e-3, "betas": [0.1, 0.98], "eps": 1e-7, "weight_decay": 0.02},
        "fake_score": {"lr": 2e-3, "betas": [0.2, 0.97], "eps": 1e-6, "weight_decay": 0.03},
    }
    trainer = toy_trainer(optimizer=changes)
    for role, settings in changes.items():
        (group,) = trainer.optimizers[role].param_groups
        assert {key: group[key] for key in settings} == {**settings, "betas": tuple(settings["betas"])}
        assert {id(p) for p in group["params"]} == {id(p) for p in trainer.trained[role].values()}


def test_an_update_uses_its_gradients_up():
    """AdamW's first step of SGD's sign: lr for every element that had a gradient; then there is none left."""
    trainer = toy_trainer(optimizer={"student": {"lr": 0.5, "clip": 1e9, "eps": 1e-20}})
    before = {k: p.detach().clone() for k, p in trainer.trained["student"].items()}
    for parameter in trainer.trained["student"].values():
        parameter.grad = torch.full_like(parameter, -3.0)
    assert trainer.step("student")
    for key, parameter in trainer.trained["student"].items():
        torch.testing.assert_close(parameter.detach(), before[key] + 0.5)
        assert parameter.grad is None
    assert trainer.counters["student"] == 1


def test_warm_up_and_decay_count_the_roles_own_updates_and_not_iterations():
    settings = {"student": {"lr": 1.0, "warmup": 4}, "fake_score": {"lr": 1.0, "warmup": 4, "decay": 100}}
    trainer = toy_trainer(optimizer=settings, dmd2={"fake_score_updates": 3})
    rates = {"student": [], "fake_score": []}
    for _ in range(6):
        for role in ("fake_score", "fake_score", "fake_score", "student"):
            for parameter in trainer.trained[role].values():
                parameter.grad = torch.zeros_like(parameter)
            trainer.step(role)
            rates[role].append(trainer.optimizers[role].param_groups[0]["lr"])
        trainer.counters["iteration"] += 3
    assert rates["student"] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    assert rates["fake_score"][:6] == pytest.approx([0.25, 0.5 * 0.99, 0.75 * 0.98, 0.97, 0.96, 0.95])


def test_a_stopped_run_has_its_averages_moments_and_draws_back():
    settings = {"train": {"updates": 6, "ema_decay": 0.9}, "dmd2": {"fake_score_updates": 2}}
    whole, first, second = (toy_trainer(**settings) for _ in range(3))
    for _ in range(5):
        whole.iteration()
        if whole.counters["iteration"] <= 3:
            first.iteration()
    second.restore(*first.state(), "here")
    for _ in range(2):
        second.iteration()
    assert second.counters == whole.counters
    assert second.ema.updates == whole.ema.updates == 3
    (a, _), (b, _) = whole.state(), second.state()
    assert a.keys() == b.keys()
    for group in a.keys() - {"logged"}:
        assert all(torch.equal(a[group][key], b[group][key]) for key in a[group]), group


# -- where batches come from -----------------------------------------------------------------------------------


class Prompts:
    """A family whose encoding of a prompt is its length; it counts what it encodes."""

    condition_kind, device = "prompt", torch.device("cpu")

    def __init__(self):
        self.encoded = 0

    def encode_conditions(self, items):
        self.encoded += len(items)
        return {"text": torch.tensor([[float(len(item))] for item in items])}

    def encode_images(self, pixels):
        return 2 * pixels


PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]


@pytest.mark.parametrize("most_encoded", [5, 4])
def test_conditions_come_in_their_seeded_order_each_with_its_own_prompt(most_encoded):
    """Encoded once up to a number of prompts, and above it whenever they are drawn."""
    family = Prompts()
    conditions = ConditionSource(family, PROMPTS, 3, most_encoded=most_encoded)
    order = Order(5, 3).indices(0, 12)
    for position in (0, 4, 8):
        condition, items = conditions.batch(position, 4)
        assert items == [PROMPTS[i] for i in order[position : position + 4]]
        assert condition["text"][:, 0].tolist() == [len(item) for item in items]
    assert family.encoded == (5 if most_encoded == 5 else 12)
    assert ConditionSource(family, PROMPTS, 3, ["more", *PROMPTS]).all_items == ["more", *PROMPTS]


def test_micro_batches_go_on_in_the_conditions_order():
    family = toy_family(GaussianMixture([[0.0], [1.0], [2.0]], 0.1, labels=[0, 1, 2]))
    trainer = toy_trainer(family, train={"batch_size": 4})
    batches = [trainer.method.next_batch() for _ in range(3)]
    assert [item for batch in batches for item in batch.items] == Order(3, 0).indices(0, 12)
    assert all(batch.condition["label"].tolist() == batch.items for batch in batches)
    assert trainer.counters["conditions"] == 12


@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize("subset", [None, [4, 1, 3]])
def test_real_samples_come_with_their_own_captions_from_a_subset_or_all(subset, latents):
    pixels = 2 * torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0)) - 1
    array = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    images = ImageSet("toy", lambda index: array[index], 5, PROMPTS, "")
    source = RealSource(Prompts(), images, 3 * pixels if latents else None, 7, subset)
    places = list(range(5)) if subset is None else subset
    order = [places[i] for i in Order(len(places), 7).indices(2, 6)]
    batch = source.batch(2, 6)
    torch.testing.assert_close(batch.samples, (3 if latents else 2) * pixels[order], rtol=1e-4, atol=1e-2)
    assert batch.condition["text"][:, 0].tolist() == [len(PROMPTS[i]) for i in order]
    assert batch.items == [PROMPTS[i] for i in order]
    assert list(batch.indices) == order
