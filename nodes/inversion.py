"""Inversion nodes: a picture becomes a path of latents."""

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io

from ..samplers import models
from ..samplers.guider import LeditsGuider
from ..samplers.inversion import check_latent, check_sigmas
from ..samplers.inverters import EditFriendlyInverter
from . import sockets

CATEGORY = "LEDITS/inversion"


def noise_levels(model, scheduler, steps, sigmas=None):
    """The SIGMAS of an inversion node: those connected, or the scheduler's.

    Raises:
        ValueError: levels that no path can run on.
    """
    if sigmas is None:
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
    check_sigmas(sigmas)
    return sigmas.float().cpu()


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
                io.Model.Input("model", tooltip="The model that will also make the edit."),
                io.Conditioning.Input(
                    "positive", tooltip="Source prompt: what the picture shows. An empty prompt works too."
                ),
                io.Conditioning.Input("negative", tooltip="Usually the empty prompt."),
                io.Latent.Input("latent", tooltip="The picture, from VAE Encode. Batches are inverted together."),
                io.Float.Input("cfg", default=3.5, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="Guidance towards the source prompt while inverting. The same value with the "
                               "same prompt in the sampler gives the picture back."),
                io.Int.Input("steps", default=50, min=1, max=1000,
                             tooltip="Steps of the whole path; the edit runs on the same ones."),
                io.Combo.Input("scheduler", options=comfy.samplers.SCHEDULER_NAMES, default="ddim_uniform",
                               tooltip="Spacing of the noise levels. ddim_uniform is the papers'."),
                io.Float.Input("eta", default=1.0, min=0.0, max=1.0, step=0.01,
                               tooltip="Share of noise in each step: 1 is DDPM (the paper's), 0 is DDIM."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                             tooltip="Noise of the path. Every seed reproduces the picture; edits vary a little."),
                io.Sigmas.Input("sigmas", optional=True,
                                tooltip="Noise levels of your own, descending. Replaces steps and scheduler."),
                io.Int.Input("steps_at_once", default=0, min=0, max=1000, optional=True, advanced=True,
                             tooltip="How many steps to evaluate in one batch; they do not depend on each other. "
                             "0 chooses by free memory; 1 where ControlNet, ranges, hooks or patches need it."),
            ],
            outputs=[
                sockets.Inversion.Output(display_name="inversion", tooltip="The path, for a LEDITS sampler."),
                io.Latent.Output(display_name="x_T", tooltip="The noisiest latent, where an unskipped edit begins."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, negative, latent, cfg, steps, scheduler, eta, seed, sigmas=None, steps_at_once=0):
        models.family(model)
        sigmas = noise_levels(model, scheduler, steps, sigmas)
        samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
        check_latent(samples)
        settings = {"cfg": cfg, "seed": seed, "eta": eta, "scheduler": scheduler}
        inverter = EditFriendlyInverter(seed, torch.full((len(sigmas) - 1,), float(eta)), steps_at_once, settings)
        guider = LeditsGuider(model, positive, negative, cfg)
        x_T = guider.sample(
            torch.zeros_like(samples), samples, inverter, sigmas, seed=seed,
            callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        )  # fmt: skip
        out = {"samples": x_T.to(comfy.model_management.intermediate_device())}
        return io.NodeOutput(inverter.inversion, out, ui=report(guider, len(sigmas) - 1))


def report(guider, steps):
    """What a run cost, for the history of the queue."""
    return {"ledits": [{"steps": steps, "unet_rows": guider.rows}]}


NODES = [EditFriendlyInversion]
