"""How pictures are read and encoded, wherever a config names some."""

from __future__ import annotations

from pydantic import Field

from stepdistill.config import Section

from .latents import Posterior
from .pictures import Colour


class PictureSettings(Section):
    """What every section that names pictures can say of them."""

    resize: bool = Field(False, description="centre-crop and Lanczos-resize what has another size")
    background: Colour = Field("white", description="what lies under transparent pixels: a name, or '#rrggbb'")
    posterior: Posterior = Field(
        "mean",
        description="of the teacher's VAE: latents are its posterior's mean, or a sample drawn at every use, as in the "
        "released code of LCM, PCM and Diffusion-DPO (DMD2's are drawn once)",
    )
    max_unreadable: float = Field(
        0.001,
        ge=0,
        lt=1,
        description="the share of the pictures that may be unreadable, at least one of them; others are taken in their "
        "place; above it the run is saved and ends; 0: at the first",
    )
