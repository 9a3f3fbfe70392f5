"""How well pictures fit their prompts by a CLIP-like model: a score (Hessel et al., 2104.08718), and a loss's cosine.

Plain cosines, not times 100, not clamped at 0.  Scores of different CLIP models live on different scales: the tag says
which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn

from stepdistill.config import Section, UserPath


class ClipSettings(Section):
    """Which CLIP scores, and from where its weights come."""

    model: UserPath = Field(
        "ViT-g-14",
        description="open_clip's model name, local-dir:FOLDER, hf-hub:NAME with hub=true, a .safetensors file of "
        "stepdistill's (stepdistill.judges.contrastive), or module:attribute: a ClipScorer or what gives one",
    )
    pretrained: UserPath | None = Field(
        None, description="a weight file; with hub=true one of open_clip's tags, such as laion2b_s12b_b42k"
    )
    hub: bool = Field(False, description="true allows open_clip to download the weights")
    prefix: str = Field("A photo depicts ", description="put before every prompt")

    @model_validator(mode="after")
    def _weights_named(self) -> ClipSettings:
        if self.model.startswith("hf-hub:") and not self.hub:
            raise ValueError(f"model = {self.model} downloads its weights; allow it with hub=true")
        if self.pretrained is None and ":" not in self.model and not self.model.endswith(".safetensors"):
            raise ValueError(
                f"pretrained is missing: name a weight file of {self.model}, or hub=true and a tag, or "
                "model=local-dir:FOLDER"
            )
        return self

    @property
    def tag(self) -> str:
        """What a score is labelled with."""
        weights = "" if self.pretrained is None else f" {Path(self.pretrained).name}"
        return f"{self.model}{weights}, prefix {self.prefix!r}"


class TextImageModel(Protocol):
    """What scoring needs of a model: embeddings of the same width for pictures and for texts."""

    def encode_image(self, images: Tensor) -> Tensor: ...

    def encode_text(self, tokens: Tensor) -> Tensor: ...


@torch.inference_mode()
def cosine_scores(model: TextImageModel, images: Tensor, tokens: Tensor) -> Tensor:
    """Cosine of each picture's embedding with its text's, (B,), float32 on the CPU.

    Args:
        images: (B, ...) as the model takes them; tokens: (B, ...) likewise, aligned.
    """
    pictures, texts = model.encode_image(images).float(), model.encode_text(tokens).float()
    return torch.nn.functional.cosine_similarity(pictures, texts, dim=-1).cpu()


@dataclass
class ClipScorer:
    """A model with its picture transform (PIL image to tensor) and tokenizer (list of str to tensor).

    ``size``, ``mean`` and ``std``: the side and the three channels' normalisation of the pictures that the model takes,
    which :meth:`cosine` needs; the transform does the same to single pictures.
    """

    model: TextImageModel
    transform: Callable[[Image.Image], Tensor] | None
    tokenizer: Callable[[list[str]], Tensor]
    tag: str
    prefix: str = ""
    device: str | torch.device = "cpu"
    size: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def _tokens(self, prompts: list[str]) -> Tensor:
        return self.tokenizer([self.prefix + prompt for prompt in prompts]).to(self.device)

    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,) of pictures (B, 1 or 3, H, W) uint8 against their prompts.

        Raises:
            ValueError: the scorer has no transform of single pictures.
        """
        transform = self.transform
        if transform is None:
            raise ValueError(f"{self.tag}: no transform of single pictures")
        arrays = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
        images = torch.stack([transform(Image.fromarray(array)) for array in arrays]).to(self.device)
        return cosine_scores(self.model, images, self._tokens(prompts))

    def embed(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, E), float32, of pictures (B, 1 or 3, H, W) in [-1, 1], differentiable; their length is not 1.

        Bicubic to the model's size with antialiasing, in place of the transform's resize and crop; values outside
        [-1, 1] are not cut, so they keep their gradient.
        """
        images = nn.functional.interpolate(
            pixels.expand(-1, 3, -1, -1), size=self.size, mode="bicubic", antialias=True, align_corners=False
        )
        mean, std = (torch.tensor(v, device=pixels.device).reshape(1, 3, 1, 1) for v in (self.mean, self.std))
        return self.model.encode_image(((images + 1) / 2 - mean) / std).float()

    def cosine(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """The same as a differentiable function of pixels (B, 1 or 3, H, W) in [-1, 1], (B,); as :meth:`embed` has it.

        The text side has no gradient.
        """
        pictures = self.embed(pixels)
        with torch.no_grad():
            texts = self.model.encode_text(self._tokens(prompts))
        return nn.functional.cosine_similarity(pictures, texts.float(), dim=-1)
