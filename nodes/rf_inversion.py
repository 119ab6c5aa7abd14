"""RF-Inversion (arXiv 2410.10792): its inversion, and its edit as a patch of a MODEL."""

from comfy_api.latest import io

from ..samplers import models
from ..samplers.guider import LeditsGuider
from ..samplers.methods.rf_inversion import HoldPicture
from ..samplers.ode_inverters import RFInverter
from . import sockets
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


class RFInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_RFInversion",
            display_name="RF-Inversion",
            category=CATEGORY,
            description="Follows a flow model from the picture to noise while drawing the path to ordinary noise "
            "(arXiv 2410.10792). Edit with Hold to Picture; known for changes of style.",
            search_aliases=["rf inversion", "unsampler", "rectified flow inversion", "invert image"],
            inputs=[
                *source_inputs(positive="What the picture shows. The paper uses the empty prompt."),
                guidance_input("cfg", 1.0, "Guidance while inverting. The paper uses none: 1; with Flux.1-dev also "
                               "FluxGuidance 0."),
                *level_inputs(), seed_input(),
                io.Float.Input("gamma", default=0.5, min=0.0, max=1.0, step=0.05, round=0.01,
                               tooltip="How strongly the path is drawn to the noise: 0 follows the model alone, 1 goes "
                               "straight. More edits better and keeps less."),
                sigmas_input(),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, cfg, steps, scheduler, seed, gamma, sigmas=None):
        known(cls, scheduler=scheduler)
        if not models.family(model).bounded:
            raise ValueError(
                f"RF-Inversion is for flow models (Flux, SD3, Qwen-Image, ...); {type(model.model).__name__} is not one. "
                "Use DDIM or Direct Inversion, or Edit-Friendly DDPM Inversion."
            )
        sigmas, samples = noise_levels(model, scheduler, steps, sigmas), picture(model, latent)
        settings = {"cfg": cfg, "seed": seed, "gamma": gamma, "scheduler": scheduler}
        inverter, guider = RFInverter(seed, gamma, settings), LeditsGuider(model, positive, negative, cfg)
        x_T = run(guider, inverter, samples, sigmas, latent=latent, seed=seed)
        return output(inverter.inversion, x_T, guider.rows, latent)


class HoldToPicture(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_HoldPicture",
            display_name="Hold to Picture",
            category="LEDITS/guidance",
            description="Draws predictions to the picture during a window of steps: the edit of RF-Inversion "
            "(arXiv 2410.10792). Without a mask, on every model, at any guidance, with every inversion.",
            search_aliases=["rf inversion", "reconstruction guidance", "eta"],
            inputs=[
                io.Model.Input("model", tooltip="The model that makes the edit."),
                sockets.Inversion.Input("inversion", tooltip="The inversion that is edited."),
                io.Float.Input("strength", default=1.0, min=0.0, max=1.0, step=0.05, round=0.01,
                               tooltip="How strongly to hold (the paper's eta). 1 follows the picture alone."),
                io.Float.Input("start", default=0.0, min=0.0, max=1.0, step=0.01, round=0.001,
                               tooltip="Share of the steps at which to begin."),
                io.Float.Input("stop", default=0.25, min=0.0, max=1.0, step=0.01, round=0.001,
                               tooltip="Share of the steps at which to end. More keeps more of the picture."),
                io.Float.Input("decay", default=0.0, min=0.0, max=10.0, step=0.1, optional=True, advanced=True,
                               tooltip="Weakens the hold from step to step: strength times (1 - share of the steps) to "
                               "this power. 0 keeps it as it is."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model that holds to the picture.")],
        )

    @classmethod
    def execute(cls, model, inversion, strength, start, stop, decay=0.0):
        models.check(model, inversion)
        patched = model.clone()
        patched.set_model_sampler_post_cfg_function(HoldPicture(inversion, strength, start, stop, decay))
        return io.NodeOutput(patched)


NODES = [RFInversion, HoldToPicture]
