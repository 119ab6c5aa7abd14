"""Edit-friendly DDPM inversion, the inversion of LEDITS."""

import torch
from comfy_api.latest import io

from ..samplers import models
from ..samplers.guider import LeditsGuider
from ..samplers.inverters import EditFriendlyInverter
from ..samplers.methods.edit_friendly import NOISES
from . import feedback
from .choices import known
from .inversion_inputs import (
    CATEGORY,
    guidance_input,
    level_inputs,
    noise_levels,
    output,
    outputs,
    picture,
    run,
    seed_input,
    sigmas_input,
    source_inputs,
)


class EditFriendlyInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_EditFriendlyInversion",
            display_name="Edit-Friendly DDPM Inversion",
            category=CATEGORY,
            description="Turns a picture into a path of latents and noise maps that reproduces it exactly and bends "
            "well to edits (arXiv 2304.06140). The inversion of LEDITS.",
            search_aliases=["ledits inversion", "ddpm inversion", "invert image", "unsampler"],
            inputs=[
                *source_inputs(),
                guidance_input("cfg", 3.5, "Guidance towards the source prompt while inverting. The same value with "
                               "the same prompt in the sampler gives the picture back."),
                *level_inputs(),
                io.Float.Input("eta", default=1.0, min=0.0, max=1.0, step=0.01,
                               tooltip="Share of noise in each step: 1 is DDPM (the paper's), 0 is DDIM."),
                seed_input(),
                sigmas_input(),
                io.Int.Input("steps_at_once", default=0, min=0, max=1000, optional=True, advanced=True,
                             tooltip="How many steps to evaluate in one batch; they do not depend on each other. "
                             "0 chooses by free memory; 1 where ControlNet, ranges, hooks or patches need it."),
                io.Float.Input("eta_end", default=-1.0, min=-1.0, max=1.0, step=0.01, optional=True, advanced=True,
                               tooltip="eta of the last step, where it is to differ: eta then changes evenly from the "
                               "first step to the last. Below 0: the same eta at every step."),
                io.Combo.Input("noise", options=list(NOISES), optional=True, advanced=True,
                               tooltip="independent: new noise at every level, the edit-friendly one. Brownian: each "
                               "level adds to the one below, as noise is added in training (CycleDiffusion, sync-SDE)."),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, cfg, steps, scheduler, eta, seed, sigmas=None, steps_at_once=0,
                eta_end=-1.0, noise=NOISES[0]):
        known(cls, scheduler=scheduler, noise=noise)
        models.family(model)
        sigmas = noise_levels(model, scheduler, steps, sigmas)
        samples = picture(model, latent)
        settings = {"cfg": cfg, "seed": seed, "eta": eta, "scheduler": scheduler}
        if eta_end >= 0:
            settings["eta_end"] = eta_end
        if noise != NOISES[0]:
            settings["noise"] = noise
        etas = torch.linspace(float(eta), float(eta_end if eta_end >= 0 else eta), len(sigmas) - 1)
        inverter = EditFriendlyInverter(
            seed=seed, etas=etas, steps_at_once=steps_at_once, noise=noise, settings=settings
        )
        guider = LeditsGuider(model, positive, negative, cfg)
        x_T = run(guider, inverter, samples, sigmas, latent=latent, seed=seed)
        note = feedback.notes(feedback.guidance_note(model, positive), inverter.note)
        return output(inverter.inversion, x_T, guider.rows, latent, note=note)


NODES = [EditFriendlyInversion]
