"""DisBack: the recorded path and the walk on the sheet's scalar toy, bit-identity without nodes, nodes on disk."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from toys import assert_reaches_the_mixture, real_source, sigma_points, toy_config, toy_family, toy_trainer

from stepdistill import files
from stepdistill.analytic import GaussianMixture
from stepdistill.errors import UserError
from stepdistill.families.analytic import AnalyticFamily
from stepdistill.objectives.score_divergence import score_terms
from stepdistill.roles.recorded import Node, NodeStore
from stepdistill.run import RunFolder
from stepdistill.schedule import EDMSchedule
from stepdistill.trainers.loop.stopping import Interrupted
from stepdistill.trainers.methods import disback
from stepdistill.trainers.methods.disback import DisBack, DisBackSettings, candidate_updates, choose, target_index
from stepdistill.trainers.plans.build import check_fit, resume
from stepdistill.trainers.plans.job import make_job

F64 = torch.float64


# -- the scalar toy ----------------------------------------------------------------------------------------------


class Affine(nn.Module):
    """The denoiser of N(mu, V): what an x0 network of two numbers can say on an EDM schedule."""

    def __init__(self):
        super().__init__()
        self.mu, self.V = nn.Parameter(torch.zeros((), dtype=F64)), nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, x, time, label=None):
        sigma = torch.exp(4 * time.double()).reshape(-1, 1, 1, 1)  # the network's time label is ln(sigma) / 4
        x = x * (sigma**2 + 0.25).sqrt()  # and its input is scaled
        return (self.V * x + sigma**2 * self.mu) / (self.V + sigma**2)


class ExactSchedule(EDMSchedule):
    def network_time(self, t):
        return t.double().log() / 4

    def network_input(self, x_t, t):
        return x_t / (t.double() ** 2 + 0.25).sqrt().reshape(-1, 1, 1, 1)


SIGMAS = torch.logspace(torch.log10(torch.tensor(0.05)), torch.log10(torch.tensor(20.0)), 60, dtype=F64)
RECORDED = {
    5: (0.169, 1.028, 6.672),
    20: (0.592, 1.075, 4.268),
    50: (1.163, 1.087, 2.054),
    100: (1.651, 1.021, 1.037),
    200: (1.942, 0.830, 0.754),
    1000: (2.0, 0.04, 0.362),
}
"""mu, V and the loss at the sheet's nodes; at update 0 they are 0, 1 and 7.835."""


def scalar_toy(monkeypatch, nodes=6, hold=300):
    """Teacher N(0, 1), untouched student N(2, 0.2^2); every batch is all sigmas times points that make means exact."""
    schedule = ExactSchedule()
    family = AnalyticFamily(GaussianMixture([[0.0]], 1.0).denoiser(schedule), Affine(), "x0", (1, 1, 1))
    monkeypatch.setattr(disback, "candidate_updates", lambda settings: sorted(RECORDED))
    trainer = toy_trainer(
        family,
        method="disback",
        disback={"nodes": nodes, "updates": 1000, "hold": hold, "probe": 1},
        optimizer={"fake_score": {"lr": 0.005, "clip": 1e9}},
        train={"updates": 10 * hold, "log_every": 1000},
    )
    points = sigma_points(2)
    z, n = (points[:, i].repeat(len(SIGMAS)).reshape(-1, 1, 1, 1) for i in (0, 1))
    t = SIGMAS.repeat_interleave(len(points))
    trainer.method.base.make_sample = lambda batch: 2 + 0.2 * z
    trainer.method.base.fake_score_draw = lambda x0: (t, n)
    parameters = list(trainer.trained["fake_score"].values())
    trainer.optimizers.adamw["fake_score"] = torch.optim.SGD(parameters, lr=0.005)
    return trainer


def test_recorded_path_is_the_sheets(monkeypatch):
    trainer = scalar_toy(monkeypatch)
    teacher = {k: v.clone() for k, v in trainer.family.network.state_dict().items()}
    student = {k: v.clone() for k, v in trainer.roles.student.state_dict().items()}
    trainer.begin()
    assert trainer.method.memory["start_loss"] == pytest.approx(7.835, abs=2e-3)
    assert [node.update for node in trainer.method.path] == sorted(RECORDED)
    for node in trainer.method.path:
        result = trainer.method.store.read(node)
        mu, V, loss = RECORDED[node.update]
        assert (result["mu"].item(), result["V"].item()) == pytest.approx((mu, V), abs=1e-3)
        assert node.loss == pytest.approx(loss, abs=2e-3)
    losses = [trainer.method.memory["start_loss"], *(node.loss for node in trainer.method.path)]
    assert losses == sorted(losses, reverse=True)
    # the fake score starts from the last node; teacher and student are as they were
    last = trainer.method.store.read(trainer.method.path[-1])
    assert all(torch.equal(last[k], v) for k, v in trainer.roles.fake_score.state_dict().items())
    assert all(torch.equal(teacher[k], v) for k, v in trainer.family.network.state_dict().items())
    assert all(torch.equal(student[k], v) for k, v in trainer.roles.student.state_dict().items())


def walk(trainer, steps=300, lr=0.05):
    """A linear student (a, b) with an exact fake score down the KL gradient, w = sigma^2, against each target."""
    a, b = torch.tensor(2.0, dtype=F64), torch.tensor(0.2, dtype=F64)
    points = sigma_points(2)
    z, n = (points[:, i].repeat(len(SIGMAS)).reshape(-1, 1, 1, 1) for i in (0, 1))
    t = SIGMAS.repeat_interleave(len(points))
    means, indices = [], []
    for step in range(steps * trainer.method.settings.nodes):
        if trainer.method.walk.move_to(target_index(step, trainer.method.settings.nodes, steps), trainer.method.path):
            indices.append(trainer.method.walk.index)
            means.append(a.item())
        x_t = 2.0 * 0 + a + b * z + t.reshape(-1, 1, 1, 1) * n
        fake = GaussianMixture([[a.item()]], b.item() ** 2).denoiser(trainer.family.schedule)
        with torch.no_grad():
            y, _ = score_terms(
                (trainer.method.walk.teacher.denoiser or trainer.roles.teacher)(x_t, t, {}),
                fake(x_t, t, {}),
                x_t,
                "score",
            )
        direction = t.reshape(-1, 1, 1, 1) ** 2 * y
        a, b = a - lr * direction.mean(), b - lr * (direction * z).mean()
    return means, indices, a.item(), abs(b.item())


def test_walk_visits_the_nodes_in_reverse_and_ends_at_the_teacher(monkeypatch):
    trainer = scalar_toy(monkeypatch)
    trainer.begin()
    means, indices, a, b = walk(trainer)
    assert indices == [1, 2, 3, 4, 5, 6]
    assert means[0] == 2.0
    assert means[1:] == pytest.approx([1.942, 1.651, 1.164, 0.592, 0.169], abs=2e-3)
    assert (a, b) == pytest.approx((0.0, 1.0), abs=5e-3)
    assert trainer.method.walk.teacher.denoiser is None


def test_nodes_walked_in_the_recorded_order_would_not_pass(monkeypatch):
    trainer = scalar_toy(monkeypatch, hold=50)
    trainer.begin()
    path = trainer.method.memory["path"]
    trainer.method.memory["path"] = path[-2::-1] + path[-1:]
    means, *_ = walk(trainer, 50)
    assert means[1:] != pytest.approx([1.942, 1.651, 1.164, 0.592, 0.169], abs=0.1)


# -- schedules of nodes ------------------------------------------------------------------------------------------


def test_targets_are_held_and_never_pass_the_teacher():
    walked = [target_index(update, 3, 10) for update in range(60)]
    assert walked == [1] * 10 + [2] * 10 + [3] * 40
    assert {target_index(update, 0, 10) for update in range(60)} == {0}
    assert {target_index(update, 1, 10) for update in range(60)} == {1}


@pytest.mark.parametrize(("nodes", "updates"), [(1, 1), (5, 5), (5, 100), (10, 1000)])
@pytest.mark.parametrize("spacing", ["updates", "loss"])
def test_candidates_end_with_the_last_update_and_suffice(nodes, updates, spacing):
    result = candidate_updates(DisBackSettings(nodes=nodes, updates=updates, spacing=spacing))
    assert result == sorted(set(result))
    assert result[-1] == updates
    assert result[0] >= 1
    assert len(result) == nodes if spacing == "updates" else len(result) >= nodes
    if spacing == "updates" and updates % nodes == 0:
        assert result == [updates // nodes * k for k in range(1, nodes + 1)]


def test_loss_spaced_nodes_are_at_equal_steps_of_loss():
    losses = [8.0, 6.9, 6.1, 5.0, 4.2, 3.0, 2.1, 1.5, 1.2, 1.0]
    candidates = [Node(update, loss, "") for update, loss in enumerate(losses, 1)]
    assert [node.loss for node in choose(candidates, 9.0, 4)] == [6.9, 5.0, 3.0, 1.0]
    assert choose(candidates, 9.0, 1) == candidates[-1:]
    assert choose(candidates, 9.0, len(candidates)) == candidates


def test_a_path_is_chosen_from_the_loss_of_the_teacher_itself():
    """The probe's loss before the first update, and not from 0 or from the first candidate's."""
    trainer = short(spacing="loss", recorded=12)
    trainer.begin()
    again = short(spacing="loss", recorded=12)
    again.method.begin_recording()
    assert trainer.method.memory["start_loss"] == again.method.probe_loss()
    assert len([Node(**node) for node in trainer.method.memory["candidates"]]) > 4
    assert trainer.method.path == choose(
        [Node(**node) for node in trainer.method.memory["candidates"]], trainer.method.memory["start_loss"], 3
    )
    assert trainer.method.path != choose([Node(**node) for node in trainer.method.memory["candidates"]], 0.0, 3)


def test_chosen_nodes_keep_their_order_when_the_loss_does_not_fall():
    candidates = [Node(update, loss, "") for update, loss in enumerate([1.0, 3.0, 1.0, 3.0, 2.0], 1)]
    for count in range(1, 6):
        updates = [node.update for node in choose(candidates, 3.0, count)]
        assert updates == sorted(set(updates))
        assert len(updates) == count
        assert updates[-1] == 5


# -- the same trainer, with and without a path -------------------------------------------------------------------


def state_of(trainer):
    tensors, _ = trainer.state()
    return {f"{group}/{k}": v.clone() for group, settings in tensors.items() for k, v in settings.items()}


@pytest.mark.parametrize("base", ["dmd2", "sim", "swiftbrush"])
def test_no_nodes_is_the_base_method_bit_for_bit(base):
    mixture = GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], 0.05, labels=[0, 1])
    result = []
    for changes in ({"method": base}, {"method": "disback", "disback": {"base": base, "nodes": 0}}):
        settings = {base: {"fake_score_updates": 2}, "train": {"updates": 5, "ema_decay": 0.9}}
        trainer = toy_trainer(toy_family(mixture), **changes, **settings)
        trainer.fit()
        result.append(state_of(trainer))
    assert result[0].keys() == result[1].keys()
    assert all(torch.equal(result[0][k], result[1][k]) for k in result[0])


def short(run=None, base="dmd2", updates=12, recorded=6, **disback):
    """Three nodes recorded in six updates, each held for two student updates."""
    settings = {"base": base, "nodes": 3, "updates": recorded, "hold": 2, "probe": 4, "spacing": "updates", **disback}
    mixture = GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], 0.05, labels=[0, 1])
    return toy_trainer(
        toy_family(mixture),
        run=run,
        method="disback",
        disback=settings,
        train={"updates": updates, "checkpoint_every": 3, "log_every": 1},
        **{base: {"fake_score_updates": 2}},
    )


def test_the_base_asks_the_targets_in_turn_and_then_the_teacher():
    trainer = short()
    calls = []
    compare = trainer.method.base.predict_both

    def note(x0, condition):
        calls.append(trainer.method.walk.index if trainer.method.walk.teacher.denoiser else "teacher")
        if trainer.method.walk.index and calls[-1] != "teacher":
            node = trainer.method.store.read(
                trainer.method.path[trainer.method.settings.nodes - trainer.method.walk.index - 1]
            )
            now = trainer.method.walk.teacher.denoiser.portable_state_dict()
            assert now.keys() == node.keys()
            assert all(torch.equal(node[k], now[k]) for k in node)
            assert not any(p.requires_grad for p in trainer.method.walk.teacher.denoiser.network.parameters())
        return compare(x0, condition)

    trainer.method.base.predict_both = note
    trainer.fit()
    assert calls == [1, 1, 2, 2] + ["teacher"] * 8
    assert trainer.method.walk.node_teacher is None  # freed
    assert trainer.counters["recorded"] == 6
    assert trainer.counters["student"] == 12
    assert trainer.counters["fake_score"] == 6 + trainer.counters["iteration"] - 6


def test_target_equal_to_the_fake_score_gives_no_gradient():
    """T_0 would: which is why the walk starts at T_1."""
    trainer = short()
    trainer.begin()
    target = trainer.roles.frozen_like(trainer.roles.fake_score, "target")
    target.load_portable_state_dict(trainer.method.store.read(trainer.method.path[-1]))
    trainer.method.walk.teacher.denoiser = target
    batch = trainer.method.next_batch()
    x0 = trainer.method.base.make_sample(batch).detach()
    assert (trainer.method.base.distribution_matching(x0, batch.condition) == 0).all()
    trainer.method.walk.move_to(1, trainer.method.path)
    assert (trainer.method.base.distribution_matching(x0, batch.condition) != 0).any()


def test_recording_trains_the_fake_score_alone():
    trainer = short()
    updated = []
    update = trainer.step
    trainer.step = lambda role: updated.append(role) or update(role)
    trainer.begin()
    assert updated == ["fake_score"] * 6
    assert [name for name, _ in trainer.method.updates()] == ["student", "fake_score"]  # the base starts as it does


def test_the_probe_takes_nothing_from_the_runs_own_samples_and_noise():
    """Of a student that starts from real samples: those that follow are what they are without a probe."""
    family = toy_family(GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], 0.05, labels=[0, 1]))
    result = []
    for probe in (1, 20):
        trainer = toy_trainer(
            family,
            real_source(family, labels=[0] * 32),
            method="disback",
            disback={"nodes": 1, "updates": 1, "probe": probe},
            dmd2={"multistep_input": "real"},
            sampler={"steps": 4},
            data={"images": {"folder": "unused"}},
        )
        trainer.begin()
        assert trainer.counters["real"] == trainer.counters["conditions"] == 8
        result.append(trainer.noise.get_state())
    assert torch.equal(*result)


@pytest.mark.parametrize("recorded", [5, 6, 7])
def test_the_walk_begins_with_the_students_turn_however_many_updates_were_recorded(recorded):
    """Two fake-score updates for each of the student's, counted from the recording's end."""
    trainer, after = short(updates=5, recorded=recorded), []
    trainer.watchers.append(lambda trainer: after.append(trainer.counters["iteration"]))
    trainer.fit()
    assert after == [recorded + 1 + 2 * k for k in range(5)]


def test_guidance_and_null_probability_are_the_nodes_own():
    trainer = short(guidance_scales=[1.0, 2.0], null_probability=0.5)
    probabilities, denoising = [], trainer.method.base.denoising
    trainer.method.base.denoising = lambda x0, condition, probability=None: (
        probabilities.append(probability) or denoising(x0, condition, probability)
    )
    trainer.begin()
    assert probabilities == [0.5] * 6
    trainer.iteration()
    assert probabilities[-1] is None  # the base's own, 0
    scales = []
    for target in (1, 2, 3):
        trainer.method.walk.move_to(target, trainer.method.path)
        scales.append(trainer.method.base.teacher_scale(4))
    assert scales == [1.0, 2.0, trainer.method.base.settings.guidance_scale]


# -- on disk -----------------------------------------------------------------------------------------------------


def started(path, **changes):
    run = RunFolder(path)
    trainer = short(run, **changes)
    if not (path / "config.yaml").exists():
        run.create(trainer.config, 0)
    return trainer, run


def test_nodes_on_disk_say_what_they_are(tmp_path):
    trainer, run = started(tmp_path / "run", spacing="loss")
    trainer.fit()
    path = json.loads((run.nodes / "path.json").read_text())
    assert [node["file"] for node in path["nodes"]] == sorted(p.name for p in run.nodes.glob("*.safetensors"))
    assert len(path["nodes"]) == 3
    assert path["nodes"][-1]["update"] == 6
    assert path["weights"] == "network"
    assert path["teacher_loss"] > path["nodes"][-1]["loss"]
    assert not list(run.nodes.glob("*.tmp"))


@pytest.mark.parametrize("where", ["before any is deleted", "among them", "before the path is written"])
def test_a_kill_while_nodes_are_chosen_loses_and_leaves_none(tmp_path, monkeypatch, where):
    whole, run = started(tmp_path / "whole", spacing="loss")
    whole.fit()
    first, _ = started(tmp_path / "halves", spacing="loss")
    left = {"before any is deleted": 0, "among them": 1, "before the path is written": 99}[where]
    unlink, write = Path.unlink, files.write_json

    def dies(path, missing_ok=False):
        nonlocal left
        left -= path.name.startswith("node-")
        if left < 0:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    def dies_too(path, content):
        if path.name == "path.json":
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "unlink", lambda path, **arguments: (dies if path.name[:5] == "node-" else unlink)(path, **arguments)
        )
        patch.setattr(files, "write_json", dies_too)
        with pytest.raises(KeyboardInterrupt):
            first.fit()
    second, halves = started(tmp_path / "halves", spacing="loss")
    assert resume(second, halves)
    second.fit()
    assert halves.nodes.joinpath("path.json").read_bytes() == run.nodes.joinpath("path.json").read_bytes()
    assert sorted(p.name for p in halves.nodes.iterdir()) == sorted(p.name for p in run.nodes.iterdir())


@pytest.mark.parametrize("stop_at", [("recorded", 3), ("student", 1), ("student", 3), ("student", 7)])
def test_a_run_stopped_anywhere_goes_on_bit_for_bit(tmp_path, stop_at):
    whole, _ = started(tmp_path / "whole")
    whole.fit()
    first, _ = started(tmp_path / "halves")
    counter, at = stop_at
    maybe_stop = first._maybe_stop

    def stop():
        if first.counters[counter] == at and (counter == "recorded" or first.method.path):
            first.stopping.reason = ("stopped", 1)
        maybe_stop()

    first._maybe_stop = stop
    with pytest.raises(Interrupted):
        first.fit()
    second, run = started(tmp_path / "halves")
    assert resume(second, run)
    assert (second.method.path is None) == (counter == "recorded")
    second.fit()
    assert whole.counters == second.counters
    assert whole.method.path == second.method.path
    a, b = state_of(whole), state_of(second)
    assert all(torch.equal(a[k], b[k]) for k in a)
    first_rows, second_rows = ((tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("whole", "halves"))
    targets = [[json.loads(row).get("target") for row in rows] for rows in (first_rows, second_rows)]
    assert targets[0] == targets[1]


@pytest.mark.parametrize("harm", ["missing", "damaged", "another"])
def test_a_node_that_is_not_what_was_written_is_refused(tmp_path, harm):
    trainer, run = started(tmp_path / "run")
    trainer.begin()
    file = run.nodes / "node-00000004.safetensors"
    if harm == "missing":
        file.unlink()
    elif harm == "damaged":
        file.write_bytes(file.read_bytes()[:-5])
    else:
        file.write_bytes((run.nodes / "node-00000002.safetensors").read_bytes())
    with pytest.raises(
        UserError, match=rf"node-00000004.*this node is {'missing' if harm == 'missing' else 'damaged'}"
    ):
        trainer.iteration()


def test_weights_of_another_shape_are_refused(tmp_path):
    trainer = short()
    trainer.begin()
    role = trainer.roles.frozen_like(trainer.roles.fake_score, "target")
    good = trainer.method.store.read(trainer.method.path[0])
    renamed = {f"fake_unet.{k}": v for k, v in good.items()}  # what a non-strict load would pass over
    with pytest.raises(UserError, match="do not fit this network"):
        role.load_portable_state_dict(renamed)
    with pytest.raises(UserError, match="do not fit this network"):
        role.load_portable_state_dict(dict(list(good.items())[1:]))


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_node_is_what_the_tensors_were_when_it_was_written(on_disk, tmp_path):
    """Tensors that go on changing, and two names of one tensor."""
    store, weight = NodeStore(tmp_path if on_disk else None), torch.tensor([1.0, 2.0])
    nodes = []
    for update in (3, 5):
        nodes.append(store.write(update, 0.5, {"weight": weight, "tied": weight}))
        weight.add_(10)
    for node, first in zip(nodes, (1.0, 11.0), strict=True):
        read = store.read(node)
        assert read["weight"].tolist() == read["tied"].tolist() == [first, first + 1]


def test_a_full_disk_is_one_line(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match=r"node-00000001\.safetensors: cannot be written"):
        NodeStore(blocked / "nodes").write(1, 0.0, {"a": torch.zeros(1)})


# -- config ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"disback": {"base": "boot"}}, r"disback\.base = 'boot'"),
        ({"disback": {"nodes": 3, "hold": 2}}, "reach the teacher after 4"),
        ({"disback": {"nodes": 9, "updates": 5}}, "nodes = 9: more than the updates"),
        ({"disback": {"nodes": 3, "hold": 1, "guidance_scales": [1.0]}}, "1 numbers for 2 targets"),
        ({"disback": {"nodes": 2, "hold": 1, "guidance_scales": [-1.0]}}, "below 0"),
        ({"disback": {"base": "sim", "nodes": 1}, "sim": {"space": "score"}}, r"set sim\.c"),
        ({"disback": {"hold": 1}, "dmd2": {"gan": {"student_weight": 0.1}}, "train": {"updates": 9}}, r"dmd2\.gan"),
        ({"disback": "sim"}, "disback"),
    ],
)
def test_bad_configs(changes, says):
    with pytest.raises(UserError, match=says):
        make_job(toy_config(method="disback", **changes))


def test_a_teacher_without_null_is_refused_where_a_node_is_guided():
    raw = toy_config(method="disback", disback={"nodes": 2, "updates": 2, "hold": 1, "guidance_scales": [2.0]})
    with pytest.raises(UserError, match="cannot be guided"):
        check_fit(make_job(raw), toy_family())


def test_sections_of_the_base_and_of_others():
    raw = toy_config(method="disback", disback={"nodes": 0}, dmd2={"fake_score_updates": 3}, sim={"c": 0.1})
    job = make_job(raw)
    assert job.unused == ("sim",)
    assert job.config.dmd2.fake_score_updates == 3
    assert job.method is DisBack
    assert job.config.disback.nodes == 0


# -- end to end --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("base", ["dmd2", "sim"])
def test_reaches_a_mixture_through_the_real_loop(base):
    settings = {"dmd2": {}, "sim": {"c": 0.1}}[base]
    assert_reaches_the_mixture(
        method="disback", disback={"base": base, "nodes": 3, "updates": 60, "hold": 30}, **{base: settings}
    )
