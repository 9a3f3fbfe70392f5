"""SwiftBrush through its real trainer: fixed points under both guidances, random guidance, CLIP, routing, arrival."""

from dataclasses import replace

import pytest
import torch
from toys import MLP, ByLabel, assert_reaches_the_mixture, linear_betas, toy_config, toy_family, toy_trainer, zero_snr

from stepdistill.analytic import GaussianMixture
from stepdistill.errors import UserError
from stepdistill.families.analytic import AnalyticFamily
from stepdistill.judges.clip import ClipScorer
from stepdistill.trainers.plans.build import check_fit
from stepdistill.trainers.plans.job import make_job

F64 = torch.float64
VARIANCE = 0.3


def guided_trainer(fake_means, **swiftbrush):
    """Teacher N(0.7, S) for label 0 and N(0.2, S) for null; fake score exact for means ``fake_means`` of the same."""
    schedule = linear_betas()
    torch.manual_seed(0)
    family = AnalyticFamily(ByLabel([0.7, 0.2], VARIANCE, schedule), MLP(1, 8, 1), "eps", (1, 1, 1), num_labels=1)
    trainer = toy_trainer(family, method="swiftbrush", swiftbrush=swiftbrush)
    trainer.roles.fake_score = ByLabel(fake_means, VARIANCE, schedule)
    trainer.roles.student.schedule = schedule
    noise = torch.randn(64, 1, 1, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    return trainer, fake_means[0] + VARIANCE**0.5 * noise, {"label": torch.zeros(64, dtype=torch.long)}


def gradient(fake_means, seed=7, **swiftbrush):
    trainer, x0, condition = guided_trainer(fake_means, **swiftbrush)
    trainer.noise.generator.manual_seed(seed)
    return trainer.method.variational_score(x0, condition)


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.5, 7.5])
def test_shared_guidance_rests_at_the_unguided_teacher(scale):
    assert gradient([0.7, 0.2], guidance_scale=scale).abs().max() < 1e-12
    moved = 0.2 + scale * 0.5
    if scale != 1:  # the guided mean, with a fake score that knows it in both branches, is no fixed point
        assert gradient([moved, 0.2], guidance_scale=scale).abs().mean() > 1e-3


@pytest.mark.parametrize(("scale", "fixed_point"), [(1.0, 0.7), (3.0, 1.7), (4.5, 2.45)])
def test_teacher_only_guidance_rests_at_the_guided_mean(scale, fixed_point):
    settings = {"guidance_scale": scale, "fake_score_guidance": "none"}
    assert gradient([fixed_point, 99.0], **settings).abs().max() < 1e-12  # and never asks the fake score's null
    if scale != 1:
        assert gradient([0.7, 0.2], **settings).abs().mean() > 1e-3


def test_shared_direction_is_linear_in_the_scale_over_both_branches():
    """(1 - kappa)(u_T - u_L) + kappa (c_T - c_L)."""
    at = {kappa: gradient([0.9, 0.3], guidance_scale=kappa) for kappa in (0.0, 1.0, 3.0)}
    torch.testing.assert_close(at[3.0], -2 * at[0.0] + 3 * at[1.0])


@pytest.mark.parametrize("draw", ["batch", "sample"])
def test_random_guidance_is_in_expectation_the_mean_scale(draw):
    """PG-SB: the mean over kappa of its gradient is that of the mean kappa, 2.25 for U(0.5, 4)."""
    settings = {"guidance_range": [0.5, 4.0], "guidance_draw": draw}
    at = []
    for place in (0.0, 1.0):  # linear in kappa, so the mean of the ends is the mean of all
        trainer, x0, condition = guided_trainer([0.9, 0.3], **settings)
        trainer.noise.generator.manual_seed(7)
        trainer.noise.shared_uniform = lambda place=place: place
        trainer.noise.uniform = lambda count, place=place: torch.full((count,), place, dtype=F64)
        at.append(trainer.method.variational_score(x0, condition))
    torch.testing.assert_close((at[0] + at[1]) / 2, gradient([0.9, 0.3], guidance_scale=2.25))


def test_random_guidance_is_the_same_draw_for_both_networks():
    for seed in range(3):
        assert gradient([0.7, 0.2], seed, guidance_range=[0.5, 4.0], guidance_draw="sample").abs().max() < 1e-12


def test_random_guidance_law():
    trainer, *_ = guided_trainer([0.7, 0.2], guidance_range=[0.5, 4.0], guidance_draw="sample")
    scales = trainer.method.teacher_scale(100_000)
    assert (scales.min().item(), scales.max().item()) == pytest.approx((0.5, 4.0), abs=1e-3)
    assert scales.mean().item() == pytest.approx(2.25, abs=0.01)
    trainer, *_ = guided_trainer([0.7, 0.2], guidance_range=[0.5, 4.0])
    draws = [trainer.method.teacher_scale(8) for _ in range(200)]
    assert all(isinstance(scale, float) and 0.5 <= scale <= 4 for scale in draws)
    assert len(set(draws)) == 200


# -- a learned run's start -------------------------------------------------------------------------------------


def learned(**changes):
    """Teacher, student and fake score are networks; the fake score a LoRA on the teacher."""
    mixture = GaussianMixture([[-1.0], [1.0]], 0.05, labels=[0, 1])
    family = toy_family(mixture, linear_betas(), "eps", hidden=16)
    family.teacher_denoiser = lambda: None
    return toy_trainer(family, method="swiftbrush", **changes)


def test_the_fake_score_is_a_lora_on_the_teacher_by_default():
    trainer = learned()
    assert trainer.config.roles.weights == "mixed"
    assert (trainer.config.roles.lora.rank, trainer.config.roles.lora.alpha) == (64, 128)
    assert trainer.roles.fake_score.network is trainer.roles.teacher.network
    assert trainer.roles.student.network is not trainer.roles.teacher.network
    job = make_job(toy_config(method="swiftbrush", roles={"weights": "full", "lora": {"rank": 8, "alpha": 8}}))
    assert (job.config.roles.weights, job.config.roles.lora.rank) == ("full", 8)  # the file's own wins


def test_zero_adapters_give_zero_under_shared_guidance_and_not_under_the_other():
    for guidance, zero in (("shared", True), ("none", False)):
        trainer = learned(swiftbrush={"fake_score_guidance": guidance})
        batch = trainer.method.next_batch()
        x0 = trainer.method.make_sample(batch).detach()
        assert bool((trainer.method.variational_score(x0, batch.condition) == 0).all()) is zero


def test_routing():
    trainer = learned()
    batch = trainer.method.next_batch()
    with torch.no_grad():
        for parameter in trainer.roles.fake_score.parameters().values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    x0 = trainer.method.make_sample(batch)
    assert x0.dtype == torch.float32
    x0.backward(trainer.method.sample_gradient(x0.detach(), batch))
    assert any(p.grad.abs().sum() > 0 for p in trainer.trained["student"].values() if p.grad is not None)
    assert all(p.grad is None for p in trainer.trained["fake_score"].values())
    assert all(p.grad is None for p in trainer.family.network.parameters())
    for parameter in trainer.trained["student"].values():
        parameter.grad = None
    ((_, loss),) = trainer.method.fake_score_losses(x0.detach(), batch).values()
    loss.backward()
    assert all(p.grad is None for p in trainer.trained["student"].values())
    assert all(p.grad is not None for p in trainer.trained["fake_score"].values())
    base = [p for k, p in trainer.family.network.named_parameters() if "lora_" not in k]
    assert all(p.grad is None for p in base)


def test_fake_scores_loss_is_the_alpha_weighted_eps_error():
    """mean |alpha_t (eps_fake - eps)|^2 of version 1's code; unweighted where asked."""
    for weighted in (True, False):
        trainer = learned(swiftbrush={"alpha_weight": weighted, "null_probability": 0.0})
        batch = trainer.method.next_batch()
        x0 = trainer.method.make_sample(batch).detach()
        state = trainer.noise.get_state()
        loss = trainer.method.denoising(x0, batch.condition)
        trainer.noise.set_state(state)
        t, eps = trainer.method.fake_score_draw(x0)
        alpha = trainer.family.schedule.alpha_sigma(t)[0].float().reshape(-1, 1, 1, 1) if weighted else 1.0
        prediction = trainer.roles.fake_score(trainer.family.schedule.add_noise(x0, eps, t), t, batch.condition)
        torch.testing.assert_close(loss, (alpha * (prediction.eps - eps)).square().mean())


def test_null_prompt_is_one_coin_for_the_whole_batch():
    trainer = learned(swiftbrush={"null_probability": 0.25})
    batch = trainer.method.next_batch()
    x0 = trainer.method.make_sample(batch).detach()
    seen = []
    trainer.method.denoising_at = lambda x0, condition, t, eps: seen.append(condition["label"]) or x0.sum()
    for _ in range(400):
        trainer.method.denoising(x0, batch.condition)
    null = [bool((label == 2).all()) for label in seen]
    assert all(n or torch.equal(label, batch.condition["label"]) for n, label in zip(null, seen, strict=True))
    assert 70 < sum(null) < 130


def test_level_laws():
    trainer = learned()
    ranges = []
    draw = trainer.method.draw_time
    trainer.method.draw_time = lambda low, high, count: ranges.append((low, high)) or draw(low, high, count)
    trainer.iteration()
    assert ranges == [(20, 980), (0, 999)]


# -- CLIP ------------------------------------------------------------------------------------------------------


class Brightness(torch.nn.Module):
    """A CLIP-like module: a picture is (its mean, 1), the prompt 'light' (1, 1), 'dark' (-1, 1)."""

    def encode_image(self, images):
        mean = images.mean((1, 2, 3))
        return torch.stack([mean, torch.ones_like(mean)], 1)

    def encode_text(self, tokens):
        return tokens


def scorer():
    words = {"light": [1.0, 1.0], "dark": [-1.0, 1.0]}
    return ClipScorer(
        Brightness(),
        lambda picture: None,
        lambda prompts: torch.tensor([words[p] for p in prompts]),
        "brightness",
        size=(4, 4),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


@pytest.fixture
def clip_trainer():
    def make(**clip):
        return toy_trainer(
            method="swiftbrush",
            swiftbrush={"guidance_scale": 1.0, "null_probability": 0.0, "clip": {"model": "some:thing", **clip}},
            data={"prompts": "unused"},
            clip=scorer(),
            train={"updates": 10},
        )

    return make


def test_clip_loss_reaches_the_sample_and_is_clamped_per_sample(clip_trainer):
    trainer = clip_trainer(tau=0.35)
    batch = replace(trainer.method.next_batch(), items=["light"] * 4 + ["dark"] * 4)
    x0 = torch.full((8, 1, 6, 6), 0.9, requires_grad=True)  # bright pictures: the first half fits its prompt
    trainer.method.variational_score = lambda x0, condition, negative: torch.zeros_like(x0)
    weight, loss = trainer.method.student_losses(x0, batch)["clip"]
    (got,) = torch.autograd.grad(loss, x0)
    assert weight == 0.1
    assert (got[:4] == 0).all()
    assert (got[4:] > 0).all()  # darker is down the gradient
    cosine = (-0.9 + 1) / ((0.81 + 1) ** 0.5 * 2**0.5)
    assert loss.item() == pytest.approx((0.35 - cosine) / 2, rel=1e-4)


@pytest.mark.parametrize(("decay", "expected"), [("linear", [0.1, 0.05, 0.01]), ("none", [0.1, 0.1, 0.1])])
def test_clip_weight_decays_over_the_run(clip_trainer, decay, expected):
    trainer = clip_trainer(decay=decay)
    result = []
    for done in (0, 5, 9):
        trainer.counters["student"] = done
        result.append(trainer.method.clip_weight())
    assert result == pytest.approx(expected)


def test_clip_needs_prompts():
    raw = {"swiftbrush": {"clip": {"model": "some:thing"}}, "method": "swiftbrush"}
    with pytest.raises(UserError, match=r"swiftbrush\.clip needs prompts"):
        make_job(toy_config(**raw))
    job = make_job(toy_config(**raw, data={"prompts": "unused"}))
    with pytest.raises(UserError, match="takes no prompts"):
        job.method.check(job.config, toy_family(GaussianMixture([[0.0]], 1.0, labels=[0])))


@pytest.mark.parametrize(
    ("swiftbrush", "says"),
    [
        ({"guidance_range": [4.0, 0.5]}, "low then high"),
        ({"guidance_range": [-1.0, 0.5]}, "low then high"),
        ({"guidance_scale": -0.5}, "guidance_scale"),
        ({"clip": {"model": "ViT-B-32"}}, "pretrained is missing"),
        ({"fake_score_guidance": "both"}, "fake_score_guidance"),
    ],
)
def test_settings_that_do_not_go_together(swiftbrush, says):
    with pytest.raises(UserError, match=says):
        make_job(toy_config(method="swiftbrush", swiftbrush=swiftbrush))


def test_a_teacher_without_null_is_refused():
    job = make_job(toy_config(method="swiftbrush"))
    with pytest.raises(UserError, match="no labels"):
        check_fit(job, toy_family(schedule=zero_snr()))


# -- end to end ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_reaches_a_mixture_through_the_real_loop():
    """The fake score a LoRA on a learned teacher copy, as the method has it."""
    assert_reaches_the_mixture(
        method="swiftbrush",
        swiftbrush={
            "guidance_scale": 1.0,
            "null_probability": 0.0,
            "fake_score_updates": 2,
            "fake_score_target": "native",
            "alpha_weight": False,
        },
        roles={"lora": {"rank": 32, "alpha": 32}},
        optimizer={"fake_score": {"lr": 3e-3}},
    )
