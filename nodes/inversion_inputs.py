"""Shared by inversion nodes: inputs, outputs, and the run of a SAMPLER that inverts."""

import comfy.model_management
import comfy.sample
import comfy.samplers
from comfy_api.latest import io

from ..samplers.methods.noise_regularisation import NoiseRegularisation
from ..samplers.methods.record import check_latent, check_sigmas
from . import feedback, sockets

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
    """Inputs of the picture and its prompts."""
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


def regularisation_input():
    """The choice of an inversion node, see `regularisation`."""
    own = NoiseRegularisation()
    published = [
        io.Float.Input("lambda_ac", default=own.lambda_ac, min=0.0, max=1000.0, step=1.0,
                       tooltip="Strength against noise that is correlated with itself."),
        io.Float.Input("lambda_kl", default=own.lambda_kl, min=0.0, max=1000.0, step=1.0,
                       tooltip="Strength against noise of another variance than 1."),
        io.Int.Input("reg_steps", default=own.steps, min=1, max=100, tooltip="Times that each step is regularised."),
        io.Int.Input("ac_rolls", default=own.rolls, min=1, max=100,
                     tooltip="Random shifts that correlation is measured with, each time."),
        io.Int.Input("reg_seed", default=own.seed, min=0, max=0xFFFFFFFFFFFFFFFF, tooltip="Of the random shifts."),
    ]
    return io.DynamicCombo.Input(
        "noise_regularisation", optional=True,
        options=[io.DynamicCombo.Option("none", []), io.DynamicCombo.Option("pix2pix-zero", published)],
        tooltip="Keeps the path's noise like Gaussian noise, so that the picture edits better but comes back less exactly. "
        "pix2pix-zero (arXiv 2302.03027) inverts so, with refinements 0 and convention B.",
    )


def regularisation(chosen):
    """`NoiseRegularisation` or None, and the settings for the record, of the value of `regularisation_input`."""
    if not chosen or chosen["noise_regularisation"] == "none":
        return None, {}
    regularise = NoiseRegularisation(
        lambda_ac=chosen["lambda_ac"],
        lambda_kl=chosen["lambda_kl"],
        steps=chosen["reg_steps"],
        rolls=chosen["ac_rolls"],
        seed=chosen["reg_seed"],
    )
    return regularise, dict(chosen)
