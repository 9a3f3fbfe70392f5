"""Stock pipelines called with noise by hand."""

from __future__ import annotations

import inspect

from diffusers import (
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDPMPipeline,
    DiffusionPipeline,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    PNDMPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

TEXT_TO_IMAGE: dict[type, type] = {
    StableDiffusionImg2ImgPipeline: StableDiffusionPipeline,
    StableDiffusionInpaintPipeline: StableDiffusionPipeline,
    LatentConsistencyModelImg2ImgPipeline: LatentConsistencyModelPipeline,
}
"""Pipelines of pictures to the one that draws from prompts alone with the very same parts."""


def callable_with_noise(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline, made to take its noise by hand where its class does not let one.

    DDPM's, DDIM's and PNDM's pipelines have no ``latents``; with the same network and scheduler the consistency
    pipeline runs the same loop and has.  That one's input check in turn demands three channels and squares whatever its
    network has, which nothing after the check does, so latents are kept from the check; and it calls any scheduler in
    one way (:func:`_as_the_loop_calls`).  A pipeline that changes pictures becomes the one that draws them.
    """
    if isinstance(pipeline, DDPMPipeline | DDIMPipeline | PNDMPipeline):
        pipeline = ConsistencyModelPipeline(unet=pipeline.unet, scheduler=pipeline.scheduler)
    if isinstance(pipeline, ConsistencyModelPipeline):
        stock_check = pipeline.check_inputs

        def check_inputs(steps, timesteps, latents, batch_size, img_size, callback_steps):
            stock_check(steps, timesteps, None, batch_size, img_size, callback_steps)

        pipeline.check_inputs = check_inputs
        _as_the_loop_calls(pipeline.scheduler)
    target = TEXT_TO_IMAGE.get(type(pipeline))
    if target is not None and pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels:
        pipeline = target(**pipeline.components, requires_safety_checker=False)
    return pipeline


def _as_the_loop_calls(scheduler) -> None:
    """Let the consistency pipeline's loop call a scheduler: some take no generator (PNDM, Heun, UniPC), those of flow
    models start from unit noise that they do not scale, and do not say so."""
    if not hasattr(scheduler, "init_noise_sigma"):
        scheduler.init_noise_sigma = 1.0
        scheduler.scale_model_input = lambda sample, timestep=None: sample
    step = scheduler.step
    if "generator" not in inspect.signature(step).parameters:
        scheduler.step = lambda *arguments, generator=None, **named: step(*arguments, **named)
