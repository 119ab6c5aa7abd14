"""Inversion nodes: a picture becomes a path of latents."""

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy_api.latest import io

from ..samplers import models
from ..samplers.guider import LeditsGuider
from ..samplers.inverters import EditFriendlyInverter
from ..samplers.methods.record import check_latent, check_sigmas
from . import feedback, sockets
from .feedback import report

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


def source_inputs():
    """What an inversion begins with."""
    return [
        io.Model.Input("model", tooltip="The model that will also make the edit."),
        io.Conditioning.Input("positive", tooltip="Source prompt: what the picture shows. An empty prompt works too."),
        io.Conditioning.Input("negative", tooltip="Usually the empty prompt."),
        latent_input(),
    ]


def latent_input():
    return io.Latent.Input("latent", tooltip="The picture, from VAE Encode. Batches are inverted together.")


def level_inputs():
    """The noise levels of a path."""
    return [
        io.Int.Input("steps", default=50, min=1, max=1000,
                     tooltip="Steps of the whole path; the edit runs on the same ones."),
        io.Combo.Input("scheduler", options=comfy.samplers.SCHEDULER_NAMES, default="ddim_uniform",
                       tooltip="Spacing of the noise levels. ddim_uniform is the papers'."),
    ]


def seed_input():
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                        tooltip="Noise of the path. Every seed reproduces the picture; edits vary a little.")


def sigmas_input():
    return io.Sigmas.Input("sigmas", optional=True,
                           tooltip="Noise levels of your own, descending. Replaces steps and scheduler.")


def outputs():
    return [
        sockets.Inversion.Output(display_name="inversion", tooltip="The path, for a LEDITS sampler."),
        io.Latent.Output(display_name="x_T", tooltip="The noisiest latent, where an unskipped edit begins."),
    ]


def picture(model, latent):
    """The picture of a LATENT, [B, C, H, W].

    Raises:
        ValueError: it cannot be inverted.
    """
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    check_latent(samples, model.model.latent_format)
    return samples


def run(guider, inverter, samples, sigmas, seed=0):
    """Run a SAMPLER of `samplers.inverters`; `x_T` on the device of all LATENTs."""
    return feedback.sample(guider, inverter, samples, sigmas, seed=seed).to(comfy.model_management.intermediate_device())


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
                io.Float.Input("cfg", default=3.5, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="Guidance towards the source prompt while inverting. The same value with the "
                               "same prompt in the sampler gives the picture back."),
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
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, cfg, steps, scheduler, eta, seed, sigmas=None, steps_at_once=0,
                eta_end=-1.0):
        models.family(model)
        sigmas = noise_levels(model, scheduler, steps, sigmas)
        samples = picture(model, latent)
        settings = {"cfg": cfg, "seed": seed, "eta": eta, "scheduler": scheduler}
        if eta_end >= 0:
            settings["eta_end"] = eta_end
        etas = torch.linspace(float(eta), float(eta_end if eta_end >= 0 else eta), len(sigmas) - 1)
        inverter = EditFriendlyInverter(seed, etas, steps_at_once, settings)
        guider = LeditsGuider(model, positive, negative, cfg)
        x_T = run(guider, inverter, samples, sigmas, seed)
        return io.NodeOutput(inverter.inversion, {"samples": x_T}, ui=report(guider, len(sigmas) - 1))


NODES = [EditFriendlyInversion]
