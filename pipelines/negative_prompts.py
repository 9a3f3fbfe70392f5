"""Negative prompts for one- and few-step students, ours or others': NASA (2412.02687).

    negative = NegativePrompts(pipe)
    image = pipe("a cat", num_inference_steps=1, guidance_scale=0, **negative("blurry", scale=0.2)).images[0]

A one-step student has no guidance to put a negative prompt into; here it acts inside the cross-attention.  The paper's
scales: 0.1 on SD1.5, 0.2 on SD2.1, up to 1 for students trained with negative prompts (``swiftbrush.negatives``).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline

from stepdistill.attention import modules as attention
from stepdistill.errors import UserError
from stepdistill.families import calls_of


class NegativePrompts:
    """Makes a pipeline's UNet take negative prompts through ``cross_attention_kwargs``; calls without them give what
    they gave, to the bit.

    Works with every pipeline around a UNet2DConditionModel (Stable Diffusion 1.x, 2.x, XL, latent consistency models).
    Nothing is saved with the pipeline.  Also a context manager: on leaving, the stock processors are back.

    Raises:
        UserError: a pipeline without text, without such a network, or with attention processors of its own.
    """

    def __init__(self, pipe: DiffusionPipeline):
        calls = calls_of(pipe)
        if "cross_attention_kwargs" not in calls.arguments_known or not hasattr(pipe, "encode_prompt"):
            raise UserError(f"{type(pipe).__name__}: negative prompts need a UNet with cross-attention to a text")
        self.pipe, self.network, self.user = pipe, calls.network, f"negative {id(self)}"
        refused = attention.install(self.network, self.user)
        if refused:
            self.remove()
            module, reason = next(iter(refused.items()))
            raise UserError(
                f"{type(pipe).__name__}: {calls.component}.{module} {reason}; reset all with "
                f"{calls.component}.set_attn_processor(AttnProcessor2_0())"
            )

    @torch.no_grad()
    def __call__(
        self, prompt: str | list[str], scale: float | torch.Tensor = 0.2, images_per_prompt: int = 1
    ) -> dict[str, Any]:
        """The arguments of the pipeline's call that steer away from ``prompt``.

        Args:
            prompt: one for all pictures, or one a prompt of the call.
            scale: a of ``Z+ - a Z-``, from 0 (the plain picture, to the bit); a tensor has one a picture.
            images_per_prompt: the call's ``num_images_per_prompt``, where ``prompt`` is a list.

        With guidance on, as few-step models may have it, one prompt for all steers both halves; a list is refused.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        encoded = self.pipe.encode_prompt(
            prompt=prompts,
            device=self.network.device,
            num_images_per_prompt=1 if isinstance(prompt, str) else images_per_prompt,
            do_classifier_free_guidance=False,
        )
        return {"cross_attention_kwargs": {"negative_hidden_states": encoded[0], "negative_scale": scale}}

    def remove(self) -> None:
        """Put the network's own processors back."""
        attention.release(self.network, self.user)

    def __enter__(self) -> NegativePrompts:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
