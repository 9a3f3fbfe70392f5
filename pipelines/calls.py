"""Stock pipelines called with noise by hand."""

from __future__ import annotations

from diffusers import ConsistencyModelPipeline, DDIMPipeline, DDPMPipeline, DiffusionPipeline


def callable_with_noise(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline, made to take its noise by hand where its class does not let one.

    DDPM's and DDIM's pipelines have no ``latents``; with the same network and scheduler the consistency pipeline
    runs the same loop and has.  That one's input check in turn demands three channels whatever its network has,
    which nothing after the check does, so latents are kept from the check.
    """
    if isinstance(pipeline, DDPMPipeline | DDIMPipeline):
        pipeline = ConsistencyModelPipeline(unet=pipeline.unet, scheduler=pipeline.scheduler)
    if isinstance(pipeline, ConsistencyModelPipeline):
        stock_check = pipeline.check_inputs

        def check_inputs(steps, timesteps, latents, batch_size, img_size, callback_steps):
            stock_check(steps, timesteps, None, batch_size, img_size, callback_steps)

        pipeline.check_inputs = check_inputs
    return pipeline
