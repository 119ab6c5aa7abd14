"""SDEdit: image-to-image as a path."""

import comfy.model_management
import torch
from comfy_api.latest import io

from ..samplers import models
from ..samplers.methods import ddim
from ..samplers.methods.edit_friendly import draw_noise
from ..samplers.methods.record import Inversion
from .choices import known
from .inversion_inputs import (
    CATEGORY,
    latent_input,
    level_inputs,
    noise_levels,
    output,
    outputs,
    picture,
    seed_input,
    sigmas_input,
)


class SDEditPath(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_SDEditPath",
            display_name="SDEdit Path",
            category=CATEGORY,
            description="A picture with more and more of one noise, without any inversion (SDEdit, arXiv 2108.01073): "
            "image-to-image as a path like any other. Its strength is the sampler's skip.",
            search_aliases=["img2img", "sdedit", "image to image"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will make the edit."),
                latent_input(), *level_inputs(), seed_input(), sigmas_input(),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, model, latent, steps, scheduler, seed, sigmas=None):
        known(cls, scheduler=scheduler)
        family, sigmas = models.family(model), noise_levels(model, scheduler, steps, sigmas)
        y0 = model.model.process_latent_in(picture(model, latent).float().cpu())
        latents = ddim.one_noise_path(y0, sigmas, draw_noise(y0.shape, 1, seed)[0] * models.noise_scale(model), family=family)
        inversion = Inversion(
            sigmas=sigmas,
            latents=latents,
            etas=torch.zeros(len(sigmas) - 1),
            family=family.name,
            model=models.describe(model),
            method="SDEdit",
            settings={"seed": seed, "scheduler": scheduler},
            latent_format=model.model.latent_format,
        )
        x_T = model.model.process_latent_out(latents[0]).to(comfy.model_management.intermediate_device())
        return output(inversion, x_T, 0, latent)


NODES = [SDEditPath]
