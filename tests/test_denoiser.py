"""Denoisers: what a network is told, what its output means, and guidance, in numbers."""

import pytest
import torch
from toys import linear_betas

from stepdistill.denoiser import NetworkDenoiser, Prediction, cat_conditions, guided, select_rows
from stepdistill.schedule import EDMSchedule, FlowSchedule

F64 = torch.float64


class Noting:
    """A network's forward that keeps what it was told and says its input's double."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, time, condition):
        self.calls.append((x, time, condition))
        return 2 * x


def samples(count=3, dtype=F64):
    return torch.randn(count, 2, 2, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))


def test_a_vp_network_is_told_the_sample_and_the_timestep():
    forward, x_t, t = Noting(), samples(), torch.tensor([999, 3, 250])
    condition = {"label": torch.tensor([1, 0, 2])}
    result = NetworkDenoiser(forward, linear_betas(), "v")(x_t, t, condition)
    ((x, time, told),) = forward.calls
    assert torch.equal(x, x_t)
    assert torch.equal(time, t)
    assert told is condition
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in linear_betas().alpha_sigma(t))
    torch.testing.assert_close(result.x0, (alpha - 2 * sigma) * x_t)
    torch.testing.assert_close(result.eps, (sigma + 2 * alpha) * x_t)
    assert torch.equal(result.v, 2 * x_t)


def test_a_flow_network_is_told_a_thousand_times_the_flow_time():
    forward, x_t, t = Noting(), samples(), torch.tensor([1.0, 0.75, 0.0315], dtype=F64)
    result = NetworkDenoiser(forward, FlowSchedule(shift=3.0), "flow")(x_t, t, {})
    ((x, time, _),) = forward.calls
    assert torch.equal(x, x_t)
    torch.testing.assert_close(time, torch.tensor([1000.0, 750.0, 31.5]))
    torch.testing.assert_close(result.x0, (1 - 2 * t.reshape(-1, 1, 1, 1)) * x_t)
    whole = Noting()
    NetworkDenoiser(whole, FlowSchedule(integer_labels=True), "flow")(x_t, t, {})
    assert whole.calls[0][1].tolist() == [1000, 750, 31]


def test_an_edm_network_is_told_the_scaled_sample_and_a_quarter_of_the_logarithm():
    forward, x_t, sigma = Noting(), samples(), torch.tensor([80.0, 1.0, 0.05], dtype=F64)
    result = NetworkDenoiser(forward, EDMSchedule(sigma_data=0.7, time_scale=1000.0), "edm")(x_t, sigma, {})
    ((x, time, _),) = forward.calls
    s = sigma.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(x, x_t / (s**2 + 0.49).sqrt())
    torch.testing.assert_close(time.double(), 250 * sigma.log(), rtol=1e-6, atol=1e-6)
    expected = 0.49 / (s**2 + 0.49) * x_t + s * 0.7 / (s**2 + 0.49).sqrt() * 2 * x
    torch.testing.assert_close(result.x0, expected)
    torch.testing.assert_close(result.score, (result.x0 - x_t) / s**2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_output_comes_back_in_the_samples_precision_or_its_own(dtype):
    denoiser = NetworkDenoiser(lambda x, time, condition: x.to(dtype), linear_betas(), "eps")
    assert denoiser(samples(dtype=torch.float32), torch.tensor([5, 5, 5]), {}).output.dtype == torch.float32
    half = denoiser(samples().bfloat16(), torch.tensor([5, 5, 5]), {})
    assert half.output.dtype == dtype
    assert half.x0.dtype == torch.bfloat16


class ByLabel:
    """Says the label's number everywhere."""

    schedule = linear_betas()

    def __init__(self):
        self.batches = []

    def __call__(self, x_t, t, condition):
        self.batches.append(len(x_t))
        return Prediction(self.schedule, x_t, t, condition["label"].reshape(-1, 1, 1, 1).to(x_t).expand_as(x_t), "x0")


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0, torch.tensor([0.5, 1.0, 4.0]), torch.tensor([1.0, 1.0, 1.0])])
def test_guidance_leads_from_the_null_condition_by_the_scale_each_sample_by_its_own(scale):
    """null + w (conditional - null); w = 1 as a number runs no null branch."""
    denoiser, x_t = ByLabel(), samples()
    condition, null = {"label": torch.tensor([1, 2, 3])}, {"label": torch.tensor([10, 20, 30])}
    result = guided(denoiser, x_t, torch.tensor([9, 500, 900]), condition, null, scale)
    w = torch.as_tensor(scale, dtype=F64).expand(3)
    expected = null["label"] + w * (condition["label"] - null["label"])
    torch.testing.assert_close(result.x0, expected.reshape(-1, 1, 1, 1).expand_as(x_t))
    assert denoiser.batches == ([3] if isinstance(scale, float) and scale == 1 else [6])
    assert torch.equal(result.t, torch.tensor([9, 500, 900]))


def test_guidance_without_a_null_condition_is_refused():
    with pytest.raises(ValueError, match="null condition"):
        guided(ByLabel(), samples(), torch.tensor([1, 1, 1]), {"label": torch.tensor([1, 2, 3])}, None, 2.0)


def test_conditions_are_joined_in_their_order_and_taken_by_rows():
    first, second = (
        {"a": torch.tensor([1, 2]), "b": torch.tensor([[1.0], [2.0]])},
        {"a": torch.tensor([3]), "b": torch.ones(1, 1)},
    )
    both = cat_conditions(first, second)
    assert both["a"].tolist() == [1, 2, 3]
    assert both["b"].tolist() == [[1.0], [2.0], [1.0]]
    assert select_rows(both, torch.tensor([2, 0]))["a"].tolist() == [3, 1]
    assert select_rows(both, slice(1, None))["b"].tolist() == [[2.0], [1.0]]


def test_guidance_combines_outputs_as_the_network_says():
    """A pipeline that rescales the guided output to the norm of the conditional one, as some of transformers do."""

    def rescaled(null, cond, scale):
        output = null + scale * (cond - null)
        norms = [x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for x in (cond, output)]
        return output * norms[0] / norms[1]

    def forward(x, time, condition):
        return x * condition["label"].reshape(-1, 1, 1, 1)

    x_t, t = samples(), torch.tensor([10, 500, 900])
    null, condition = {"label": torch.tensor([1.0, 1.0, 1.0])}, {"label": torch.tensor([2.0, 3.0, -1.0])}
    results = [
        guided(NetworkDenoiser(forward, linear_betas(), "eps", *combine), x_t, t, condition, null, 4.0)
        for combine in ((), (rescaled,))
    ]
    torch.testing.assert_close(results[0].output, x_t * torch.tensor([5.0, 9.0, -7.0]).reshape(-1, 1, 1, 1))
    torch.testing.assert_close(results[1].output, x_t * torch.tensor([2.0, 3.0, -1.0]).reshape(-1, 1, 1, 1))
