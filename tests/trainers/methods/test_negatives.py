"""Negative prompts in training (NASA-T, 2412.02687 version 3) and ``train.attention``, through real trainers."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import tiny
import torch
import yaml
from console import stepdistill
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from stepdistill.attention import kernels
from stepdistill.attention.modules import find_attention
from stepdistill.attention.processor import AttentionProcessor
from stepdistill.config import merge
from stepdistill.errors import UserError
from stepdistill.objectives.variational import variational_score_gradient
from stepdistill.pipelines import NegativePrompts, export_student
from stepdistill.run import RunFolder
from stepdistill.trainers.plans import prepare
from stepdistill.trainers.plans.build import build_trainer, load_teacher, provenance, resume
from stepdistill.trainers.plans.job import make_job
from stepdistill.trainers.plans.single import Run

AWAY = ["blurry", "a frame", "low quality, bad", "", "text"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("negatives")
    tiny.save_stable_diffusion(root / "sd")
    tiny.save_pixels(root / "pixels", "v", labels=3, null=True)
    pipe = DiffusionPipeline.from_pretrained(root / "sd", safety_checker=None)
    with torch.no_grad():  # so that a text is seen in the picture
        for name, settings in pipe.unet.named_modules():
            if name.endswith("attn2"):
                settings.to_v.weight.mul_(20)
    pipe.save_pretrained(root / "sd")
    (root / "prompts.txt").write_text("a cat\na dog\na red bus\n")
    (root / "away.txt").write_text("\n".join(AWAY[:3] + AWAY[4:]) + "\n")
    return root


def raw(root, output, weights="mixed", method="swiftbrush", negatives=True, **changes):
    settings = {"null_probability": 0.5, "guidance_scale": 3.0}
    if negatives:
        settings["negatives"] = {"prompts": str(root / "away.txt")}
    return merge(
        {
            "method": method,
            "output": str(output),
            "seed": 3,
            "teacher": {"path": str(root / "sd")},
            "data": {"prompts": str(root / "prompts.txt")},
            "roles": {"weights": weights, "lora": {"rank": 2, "targets": ["to_q", "to_v"]}},
            "optimizer": {"student": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
            "train": {"updates": 4, "batch_size": 2, "log_every": 1, "sample_count": 2, "trackers": []},
            "evaluation": {"enabled": False},
            "swiftbrush": settings,
        },
        changes,
    )


TEACHERS: dict = {}


def trainer_of(root, **changes):
    """On a copy of a teacher that is read once; nothing is written."""
    job = make_job(raw(root, "unused", **changes))
    path = job.config.teacher.path
    if path not in TEACHERS:
        TEACHERS[path] = load_teacher(job.config)
    return build_trainer(job, None, family=copy.deepcopy(TEACHERS[path]))


def shaken(trainer, size: float = 0.05):
    """Roles that differ: adapters start at zero, where the gradient is too."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for role in trainer.roles.trained():
            for parameter in role.parameters().values():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return trainer


def spy(role, calls: list) -> None:
    """Every condition that ``role`` is asked with from now on."""
    settings = role._denoiser.forward

    def forward(x, time, condition):
        calls.append((x.detach(), time, condition))
        return settings(x, time, condition)

    role._denoiser.forward = forward


# -- what each role is told ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["full", "mixed", "shared"])
def test_each_role_is_told_its_own(weights, root):
    """Student: text, negative text and a.  Teacher: negative in place of null.  Fake score: text or null alone."""
    trainer = shaken(trainer_of(root, weights=weights))
    calls = {name: [] for name in ("student", "teacher", "fake_score")}
    for name, settings in calls.items():
        spy(getattr(trainer.roles, name), settings)
    batches, next_batch = [], trainer.method.next_batch
    trainer.method.next_batch = lambda: batches.append(next_batch()) or batches[-1]
    for _ in range(6):
        trainer.iteration()
    null = trainer.family.null_condition(2)["text"]
    assert len(batches) == len(calls["student"]) == len(calls["teacher"]) == 6
    for batch, (_, _, told), (_, _, seen_calls) in zip(batches, calls["student"], calls["teacher"], strict=True):
        assert told.keys() == {"text", "negative_text", "negative_scale"}
        assert torch.equal(told["text"], batch.condition["text"])
        assert torch.equal(told["negative_text"], batch.negative["text"])
        assert seen_calls.keys() == {"text"}
        assert torch.equal(seen_calls["text"], torch.cat([batch.negative["text"], batch.condition["text"]]))
    assert len(calls["fake_score"]) == 12  # compared, and trained
    for i, (_, _, seen_calls) in enumerate(calls["fake_score"]):
        batch = batches[i // 2]
        assert seen_calls.keys() == {"text"}
        compared = torch.cat([null, batch.condition["text"]])
        trained = [batch.condition["text"], null]
        assert any(torch.equal(seen_calls["text"], settings) for settings in (trained if i % 2 else [compared]))
    texts = [row for batch in batches for row in batch.negative["text"]]
    known = trainer.family.encode_conditions([AWAY[i] for i in (0, 1, 2, 4)])["text"]
    drawn = {next(i for i in range(4) if torch.equal(known[i], row)) for row in texts}
    assert drawn == {0, 1, 2, 3}  # every one of the file is drawn, each sample its own
    assert any(not torch.equal(*batch.negative["text"]) for batch in batches)


@pytest.mark.parametrize(("weights", "own"), [("full", True), ("mixed", True), ("shared", False)])
def test_only_the_students_network_is_changed(weights, own, root):
    roles = trainer_of(root, weights=weights).roles
    kinds = {
        name: {type(m.processor) for m in find_attention(getattr(roles, name).network)}
        for name in vars(roles)
        if name in ("student", "teacher", "fake_score")
    }
    assert kinds["student"] == {AttentionProcessor}
    assert kinds["teacher"] == ({AttnProcessor2_0} if own else {AttentionProcessor})
    plain = trainer_of(root, weights=weights, negatives=False).roles
    assert {type(m.processor) for m in find_attention(plain.student.network)} == {AttnProcessor2_0}


def test_the_students_sample_is_nasa_and_scale_zero_its_plain_one(root):
    trainer = shaken(trainer_of(root, swiftbrush={"negatives": {"scale": [0.0, 0.0]}}))
    batch = trainer.method.next_batch()
    assert torch.equal(batch.steering["negative_scale"], torch.zeros(2))
    steered = trainer.method.make_sample(batch).detach()
    batch = replace(batch, steering={})
    plain = trainer.method.make_sample(batch).detach()
    size = plain.abs().max()
    assert ((steered - plain).abs().max() / size) < 1e-6
    trainer = shaken(trainer_of(root, swiftbrush={"negatives": {"scale": [1.0, 1.0]}}))
    batch = trainer.method.next_batch()
    assert torch.equal(batch.steering["negative_scale"], torch.ones(2))
    assert ((trainer.method.make_sample(batch).detach() - plain).abs().max() / size) > 1e-3


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.2, 0.6)])
def test_a_is_uniform_and_each_samples_own(low, high, root):
    changes = {} if (low, high) == (0.0, 1.0) else {"swiftbrush": {"negatives": {"scale": [low, high]}}}
    trainer = trainer_of(root, train={"batch_size": 4000}, **changes)
    batch = trainer.method.next_batch()
    scale = batch.steering["negative_scale"]
    assert scale.shape == (4000,)
    assert scale.dtype == torch.float32
    place = ((scale - low) / (high - low)).double().sort().values
    assert (place[0].item(), place[-1].item()) == pytest.approx((0, 1), abs=5e-3)
    even = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    assert (place - even).abs().max() < 1.63 / 4000**0.5  # Kolmogorov-Smirnov at 1 %
    assert len(scale.unique()) > 3900
    again = trainer.method.next_batch().steering["negative_scale"]
    assert not torch.equal(again, scale)
    texts = batch.negative["text"].flatten(1)
    counts = texts.unique(dim=0, return_counts=True)[1]
    assert len(counts) == 4
    assert counts.min() > 850  # a negative each, uniform too
    assert abs(torch.corrcoef(torch.stack([scale.double(), texts[:, -1].double()]))[0, 1]) < 0.06


def test_plain_batches_draw_nothing_more(root):
    """Without the section the run is what it was, draw by draw."""
    trainer = trainer_of(root, negatives=False)
    batch = trainer.method.next_batch()
    assert batch.negative is None
    assert batch.steering == {}
    assert batch.student_condition == batch.condition
    other = trainer_of(root)
    assert torch.equal(other.method.next_batch().noise, batch.noise)
    assert not torch.equal(other.noise.get_state(), trainer.noise.get_state())


@pytest.mark.parametrize("guidance", ["shared", "none"])
def test_gradient_by_hand(guidance, root):
    """sigma^2 (eps_T - eps_L), eps_T = T(y-) + kappa (T(y) - T(y-)), eps_L guided by null or not at all."""
    settings = {"guidance_range": [0.5, 4.0], "guidance_draw": "sample", "fake_score_guidance": guidance}
    trainer = shaken(trainer_of(root, swiftbrush=settings))
    batch = trainer.method.next_batch()
    x0 = trainer.method.make_sample(batch).detach()
    state = trainer.noise.get_state()
    ((_, loss),) = trainer.method.student_losses(leaf := x0.clone().requires_grad_(), batch).values()
    (got,) = torch.autograd.grad(loss, leaf)
    trainer.noise.set_state(state)
    with torch.no_grad():
        t = trainer.method.draw_time(20, 980, 2)
        eps = trainer.noise.randn_like(x0)
        kappa = (0.5 + 3.5 * trainer.noise.uniform(2)).reshape(-1, 1, 1, 1)
        schedule = trainer.family.schedule
        alpha, sigma = (c.reshape(-1, 1, 1, 1).float() for c in schedule.alpha_sigma(t))
        x_t = alpha * x0 + sigma * eps
        null = trainer.family.null_condition(2)
        teacher, fake = trainer.roles.teacher, trainer.roles.fake_score
        away, to = (teacher(x_t, t, c).eps for c in (batch.negative, batch.condition))
        eps_teacher = away + kappa * (to - away)
        eps_fake = fake(x_t, t, batch.condition).eps
        if guidance == "shared":
            without = fake(x_t, t, null).eps
            eps_fake = without + kappa * (eps_fake - without)
        expected = sigma**2 * (eps_teacher - eps_fake)
        from_null = teacher(x_t, t, null).eps
        other = sigma**2 * (from_null + kappa * (to - from_null) - eps_fake)
    trainer.noise.set_state(state)
    score = trainer.method.variational_score(x0, batch.condition, batch.negative)
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-5)
    assert (other - expected).abs().max() > 1e-2  # the null prompt in its place is another gradient
    torch.testing.assert_close(got / got.norm(), expected / expected.norm(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        score, variational_score_gradient(eps_teacher, eps_fake, schedule.alpha_sigma(t)[1]), rtol=1e-4, atol=1e-5
    )


def test_gradients_of_the_student_come_through_both_branches(root):
    """The student's gradient is a scalar function's of its sample, to which the negative branch belongs."""
    gradients = []
    for steered in (True, False):
        trainer = shaken(trainer_of(root, weights="full", swiftbrush={"negatives": {"scale": [1.0, 1.0]}}))
        batch = trainer.method.next_batch()
        if not steered:
            batch = replace(batch, steering={})
        trainer.method.make_sample(batch).backward(torch.ones_like(batch.noise))
        network = trainer.roles.student.network
        gradients.append(network.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight.grad)
    assert all(g.abs().sum() > 0 for g in gradients)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-2 * gradients[1].abs().max()


def test_gradient_checkpointing_changes_no_gradient(root):
    recorded = []
    for checkpointing in (False, True):
        trainer = shaken(trainer_of(root, weights="shared", train={"gradient_checkpointing": checkpointing}))
        taken = {}
        trainer.step = lambda role, taken=taken, trainer=trainer: taken.update(
            {f"{role}/{k}": p.grad.clone() for k, p in trainer.trained[role].items() if p.grad is not None}
        )
        trainer.iteration()
        recorded.append(taken)
    assert recorded[0].keys() == recorded[1].keys()
    for key, value in recorded[0].items():
        torch.testing.assert_close(recorded[1][key], value, rtol=1e-4, atol=1e-7, msg=key)


def test_bf16_samples_are_close_to_float32s(root):
    samples = []
    for precision in ("float32", "bf16"):
        trainer = shaken(trainer_of(root, train={"precision": precision}))
        samples.append(trainer.method.make_sample(trainer.method.next_batch()).detach())
    assert samples[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*(s.flatten() for s in samples), 0) > 0.99


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_teacher_in_half_precision_is_steered_too(root, dtype):
    for weights in ("full", "shared"):
        job = make_job(raw(root, "unused", weights, train={"precision": "bf16"}, teacher={"dtype": dtype}))
        trainer = shaken(build_trainer(job, None))
        batch = trainer.method.next_batch()
        steered = trainer.method.make_sample(batch).detach()
        assert steered.isfinite().all()
        batch = replace(batch, steering={})
        assert (steered - trainer.method.make_sample(batch).detach()).abs().max() > 1e-3


# -- whole runs ------------------------------------------------------------------------------------------------


def started(root, output, **changes):
    job, run = make_job(raw(root, output, **changes)), RunFolder(output)
    run.create(job.config, job.config.seed)
    return job, build_trainer(job, run), run


def tensors_of(trainer) -> dict[str, torch.Tensor]:
    return {f"{group}/{k}": v.clone() for group, settings in trainer.state()[0].items() for k, v in settings.items()}


@pytest.mark.parametrize("weights", ["shared", "mixed"])
def test_one_and_one_update_are_two_and_the_export_is_stock(weights, root, tmp_path):
    ema = {"train": {"ema_decay": 0.9, "updates": 2}}
    job, whole, _ = started(root, tmp_path / "whole", weights=weights, **ema)
    start = tensors_of(whole)
    whole.fit()
    _, first, _ = started(root, tmp_path / "halves", weights=weights, **merge(ema, {"train": {"updates": 1}}))
    first.fit()
    again = make_job(raw(root, tmp_path / "halves", weights=weights, **ema))
    run = RunFolder(tmp_path / "halves")
    assert run.check(again.config, resume=True)
    second = build_trainer(again, run)
    assert resume(second, run)
    assert second.counters["student"] == 1
    second.fit()
    a, b = tensors_of(whole), tensors_of(second)
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert any(not torch.equal(start[k], a[k]) for k in start if k.startswith("student/"))
    family, role, sampler = whole.family, whole.roles.student, whole.sampler
    folder = export_student(family, role, sampler, tmp_path / "student", provenance(job, whole))
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert {type(m.processor) for m in find_attention(pipe.unet)} == {AttnProcessor2_0}
    facts = pipe.scheduler.config["_stepdistill"]
    assert facts["settings"]["swiftbrush"]["negatives"] == {
        "prompts": "away.txt",
        "column": None,
        "scale": [0.0, 1.0],
    }
    assert facts["attention"] == "native"

    # the exported student, steered by NegativePrompts, is the student that was trained
    batch = whole.method.next_batch()
    negative = NegativePrompts(pipe)
    items = whole.parts.negatives.family.encode_conditions(["blurry"])["text"]
    steering = family.steering({"text": items.expand(2, -1, -1)}, torch.tensor([0.4, 0.9]))
    with torch.no_grad():
        expected = sampler.sample(role, batch.noise, batch.condition | steering, torch.randn_like)
    call = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "latent", "latents": batch.noise}
    got = pipe(batch.items, **call, **negative("blurry", torch.tensor([0.4, 0.9]))).images
    size = expected.abs().max()
    assert ((got - expected).abs().max() / size) < 1e-5
    plain = pipe(batch.items, **call).images
    assert ((plain - expected).abs().max() / size) > 1e-4


def test_four_steps_are_steered_at_each(root):
    trainer = shaken(trainer_of(root, sampler={"steps": 4}))
    calls = []
    spy(trainer.roles.student, calls)
    trainer.noise.shared_randint = lambda low, high: high  # the last step of the rollout
    trainer.method.make_sample(trainer.method.next_batch())
    assert len(calls) == 4
    for _, _, condition in calls:
        assert condition.keys() == {"text", "negative_text", "negative_scale"}


def test_disback_around_it(root, tmp_path):
    """Degradation and backtracking on steered samples; every target is led away from the negative prompt."""
    settings = {"disback": {"base": "swiftbrush", "nodes": 2, "updates": 2, "hold": 1, "probe": 4}}
    job, trainer, _ = started(root, tmp_path, method="disback", train={"updates": 3}, **settings)
    told = []
    spy(trainer.roles.student, told)
    trainer.fit()
    assert trainer.counters == {"iteration": 5, "conditions": 10, "real": 0, "student": 3, "fake_score": 5} | {
        "recorded": 2
    }
    trained = [condition for _, _, condition in told if "negative_text" in condition]
    assert len(trained) == 5
    folder = export_student(
        trainer.family, trainer.roles.student, trainer.sampler, tmp_path / "out", provenance(job, trainer)
    )
    unet = DiffusionPipeline.from_pretrained(folder).unet
    assert {type(m.processor) for m in find_attention(unet)} == {AttnProcessor2_0}


# -- refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"guidance_scale": 1.0}, "negatives act on the teacher through its guidance"),
        ({"negatives": {"scale": [0.8, 0.2]}}, "low then high, from 0"),
        ({"negatives": {"scale": [-0.1, 0.2]}}, "low then high, from 0"),
        ({"negatives": {"away": 1}}, "negatives.away"),
    ],
)
def test_settings_that_do_not_go_together(own, says, root):
    with pytest.raises(UserError, match=says) as caught:
        make_job(raw(root, "unused", swiftbrush=own))
    assert "\n" not in str(caught.value)


def test_without_guidance_a_range_will_do(root):
    changes = {"guidance_scale": 1.0, "guidance_range": [0.5, 4.0]}
    settings = make_job(raw(root, "unused", swiftbrush=changes)).settings
    assert settings.negatives is not None
    assert (settings.guidance_scale, settings.guidance_range) == (1.0, (0.5, 4.0))
    with pytest.raises(UserError, match="through its guidance"):
        make_job(raw(root, "unused", swiftbrush={**changes, "guidance_range": None}))


def test_teachers_of_labels_and_pixels_are_refused(root):
    with pytest.raises(UserError, match=r"swiftbrush\.negatives: teachers of family unet2d take none") as caught:
        trainer_of(root, teacher={"path": str(root / "pixels")}, data={"prompts": None})
    assert "\n" not in str(caught.value)
    family = load_teacher(make_job(raw(root, "unused", teacher={"path": str(root / "pixels")})).config)
    with pytest.raises(UserError, match="take no negative prompts"):
        family.steering({}, torch.ones(1))


def test_a_file_that_is_not_there_is_one_line(root):
    with pytest.raises(UserError, match=r"nothing\.txt: no such file; set swiftbrush\.negatives\.prompts"):
        trainer_of(root, swiftbrush={"negatives": {"prompts": str(root / "nothing.txt")}})


def test_a_teacher_with_processors_of_its_own_is_refused(root):
    """They would be called without the negative prompt, silently."""
    job = make_job(raw(root, "unused"))
    family = load_teacher(job.config)
    family.network.set_attn_processor(AttnProcessor())
    with pytest.raises(UserError, match=r"swiftbrush\.negatives: the teacher's .* has a AttnProcessor already"):
        build_trainer(job, None, family=family)


# -- train.attention -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", [False, True])
def test_a_named_kernel_trains_as_native_does(negatives, root, monkeypatch):
    """Two updates within rounding; Adam's eps is large so that a gradient of rounding is no step."""
    name, calls, students = AttentionBackendName("_native_math"), [], []
    settings = _AttentionBackendRegistry._backends[name]
    monkeypatch.setitem(
        _AttentionBackendRegistry._backends, name, lambda **arguments: calls.append(1) or settings(**arguments)
    )
    gentle = {"student": {"lr": 1e-2, "eps": 1e-2}, "fake_score": {"lr": 1e-2, "eps": 1e-2}}
    for backend in ("native", "_native_math"):
        changes = {"train": {"updates": 2, "attention": backend}, "optimizer": gentle}
        trainer = shaken(trainer_of(root, negatives=negatives, **changes))
        start = {k: p.detach().clone() for k, p in trainer.roles.student.parameters().items()}
        trainer.use_attention()
        calls.clear()
        trainer.fit()
        passes = trainer.counters["iteration"] * 4  # student, teacher, fake score twice
        assert len(calls) == (8 * passes if backend == "_native_math" else 0)
        students.append({k: p.detach() for k, p in trainer.roles.student.parameters().items()})
    plain, named = students
    moved = max((plain[k] - start[k]).abs().max().item() for k in plain)
    apart = max((plain[k] - named[k]).abs().max().item() for k in plain)
    assert moved > 1e-4
    assert apart < 1e-2 * moved
    assert _AttentionBackendRegistry._active_backend == AttentionBackendName.NATIVE


def test_the_kernel_is_written_down_and_may_change_on_the_way(root, tmp_path, capsys):
    def run(go_on: bool, **train):
        job = make_job(raw(root, tmp_path / "a", negatives=False, train=train))
        Run.of(job).train(go_on)
        return job, DiffusionPipeline.from_pretrained(tmp_path / "a" / "student")

    job, pipe = run(False, updates=1, attention="_native_math")
    assert "attention _native_math\n" in capsys.readouterr().out
    assert pipe.scheduler.config["_stepdistill"]["attention"] == "_native_math"
    assert pipe.unet.config["_stepdistill"]["attention"] == "_native_math"
    assert {type(m.processor) for m in find_attention(pipe.unet)} == {AttnProcessor2_0}
    trainer = build_trainer(job, RunFolder(tmp_path / "a"))
    assert trainer.attention is None
    assert resume(trainer, RunFolder(tmp_path / "a"))
    assert trainer.attention == "_native_math"  # so an export from the checkpoint alone says it too
    _, pipe = run(True, updates=2, attention="auto")
    assert "attention native, the fastest here\n" in capsys.readouterr().out
    assert pipe.scheduler.config["_stepdistill"]["attention"] == "native"
    assert pipe.scheduler.config["_stepdistill"]["student_updates"] == 2


def test_every_network_of_a_trainer_gets_the_kernel(root):
    for weights, count in (("full", 3), ("mixed", 2), ("shared", 1)):
        trainer = trainer_of(root, weights=weights, negatives=False, train={"attention": "_native_math"})
        assert provenance(make_job(raw(root, "unused")), trainer)["attention"] == "native"  # not chosen yet
        trainer.use_attention()
        assert trainer.attention == "_native_math"
        networks = trainer.roles.networks()
        assert len(networks) == count
        for network in networks:
            assert {m.processor._attention_backend.value for m in find_attention(network)} == {"_native_math"}


def test_auto_on_a_cpu_is_native_and_processors_stay_stock(root):
    trainer = trainer_of(root, negatives=False, train={"attention": "auto"})
    trainer.use_attention()
    assert trainer.attention == "native"
    for network in trainer.roles.networks():
        assert {type(m.processor) for m in find_attention(network)} == {AttnProcessor2_0}


def test_a_kernel_that_stops_at_some_head_is_refused_before_the_first_update(root, monkeypatch):
    """The tiny UNet's heads are of 4: what runs on 64 is not asked there alone."""
    settings = kernels.try_backend

    def why_not(backend, device, dtype=torch.float32, head_dim=64, gradients=False, masked=False):
        return "heads below 8" if head_dim < 8 else settings(backend, device, dtype, head_dim, gradients, masked)

    monkeypatch.setattr(kernels, "try_backend", why_not)
    trainer = trainer_of(root, train={"attention": "_native_math"})
    with pytest.raises(UserError, match=r"train\.attention = _native_math: .*\(heads below 8\); use auto"):
        trainer.use_attention()


def test_a_kernel_without_backward_is_refused_by_the_trainer_too(root):
    """compare and benchmark have no other check."""
    trainer = trainer_of(root, train={"attention": "flex"})
    with pytest.raises(UserError, match=r"train\.attention = flex: it does not run on this cpu \(.*backward"):
        trainer.use_attention()
    for network in trainer.roles.networks():
        assert not any(getattr(m.processor, "_attention_backend", None) for m in find_attention(network))


def test_an_unknown_kernel_is_refused_with_the_config(root, tmp_path):
    with pytest.raises(UserError, match=r"train\.attention.*flush is unknown; use auto or one of _flash_3") as caught:
        make_job(raw(root, tmp_path / "out", train={"attention": "flush"}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        ("flush", "flush is unknown; use auto or one of"),
        ("flash", "train.attention = flash: it does not run on this cpu (Flash Attention backend"),
        ("flex", "train.attention = flex: it does not run on this cpu (FlexAttention does not support backward"),
    ],
)
def test_the_command_line_says_it_in_one_line_before_the_teacher_is_read(backend, says, root, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "load_teacher", lambda config: pytest.fail("the teacher was loaded"))
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(raw(root, tmp_path / "out", train={"attention": backend})))
    result = stepdistill("distill", file)
    assert result.code == 2
    assert says in result.error
    assert not (tmp_path / "out").exists()
