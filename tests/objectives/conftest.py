import pytest
import torch
from toys import Gaussians, linear_betas, sigma_points


@pytest.fixture(params=[20, 249, 749, 980])
def gaussians(request):
    """Three dimensions at one time of Stable Diffusion's schedule, means over sigma points: exact for quadratics."""
    generator = torch.Generator().manual_seed(request.param)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    root = draw(3, 3)
    S = root @ root.T + 0.1 * torch.eye(3)
    return Gaussians(linear_betas(), request.param, draw(3), S, draw(3), draw(3, 3), sigma_points(6))
