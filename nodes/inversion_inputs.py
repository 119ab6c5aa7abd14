"""Shared by inversion nodes: inputs, outputs, and the run of a SAMPLER that inverts."""

from dataclasses import replace

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider
from comfy_api.latest import io

from ..samplers import models
from ..samplers.methods.noise_regularisation import NoiseRegularisation
from ..samplers.methods.record import Inversion, check_latent, check_sigmas
from ..samplers.model_inputs import shaped_mask
from ..samplers.phased import PhasedSampler
from . import feedback, sockets

CATEGORY = "LEDITS/inversion"


def noise_levels(model: ModelPatcher, scheduler, steps, sigmas=None):
    """The SIGMAS of an inversion node: those connected, or the scheduler's.

    Raises:
        ValueError: levels that no path can run on.
    """
    family = models.family(model)
    if sigmas is not None:
        check_sigmas(sigmas, family)
        return sigmas.float().cpu()
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
    try:
        check_sigmas(sigmas, family)
    except ValueError:
        raise ValueError(
            f"The scheduler {scheduler} cannot make {steps} steps for this model: the noise levels that it gives are not "
            f"finite, or do not fall from step to step. Choose {'more' if steps < 3 else 'fewer'} steps or another scheduler."
        ) from None
    return sigmas.float().cpu()


def source_inputs(model="The model that will also make the edit.",
                  positive="Source prompt: what the picture shows. An empty prompt works too."):
    """Inputs of the picture and its prompts; tooltips of the first two."""
    return [
        io.Model.Input("model", tooltip=model),
        io.Conditioning.Input("positive", tooltip=positive),
        io.Conditioning.Input("negative", tooltip="Usually the empty prompt."),
        latent_input(),
    ]


def latent_input():
    return io.Latent.Input("latent", tooltip="The picture, from VAE Encode. Batches are inverted together.")


def guidance_input(name, default, tooltip):
    return io.Float.Input(name, default=default, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=tooltip)


def level_inputs():
    """The noise levels of a path."""
    return [
        io.Int.Input("steps", default=50, min=1, max=1000,
                     tooltip="Steps of the whole path; the edit runs on the same ones. Published: 50 for Stable "
                     "Diffusion and SD3, 28 for Flux.1-dev."),
        scheduler_input(),
    ]


def scheduler_input():
    return io.Combo.Input("scheduler", options=comfy.samplers.SCHEDULER_NAMES, default="simple",
                          tooltip="Spacing of the noise levels. simple gives the steps asked for on every model; "
                          "ddim_uniform is diffusers' spacing, but ComfyUI's gives 31 steps for 30.")


def seed_input():
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                        tooltip="Noise of the path. Every seed reproduces the picture; edits vary a little.")


def sigmas_input():
    return io.Sigmas.Input("sigmas", optional=True,
                           tooltip="Noise levels of your own, descending. Replaces steps and scheduler.")


def outputs(inversion="The path, for a LEDITS sampler."):
    """Outputs of an inversion node; the tooltip of the first."""
    return [
        sockets.Inversion.Output(display_name="inversion", tooltip=inversion),
        io.Latent.Output(display_name="x_T", tooltip="The noisiest latent, where an unskipped edit begins."),
        noise_output(),
    ]


def noise_output():
    return io.Noise.Output(display_name="noise", tooltip="The path's noise, for a stock sampler that is to begin at x_T: "
                           "connect x_T as its latent. (On flow models a latent alone cannot: their samplers take nothing "
                           "of it at the highest noise level.)")


class PathNoise:
    """NOISE with which a stock sampler begins at the first latent of an inversion.

    Flow models begin at `(1 - s) * latent + s * noise`, so that the noise is solved for the latent that is connected;
    variance-exploding ones at `latent + sigma * noise`, where x_T is the latent itself and the noise is 0.
    """

    seed = 0  # some conditionings compute with it

    def __init__(self, inversion: Inversion):
        self.inversion = inversion

    def generate_noise(self, latent):
        """As of core's NOISE: of a LATENT, a tensor of its shape.

        Raises:
            ValueError: the LATENT has another shape, or is not x_T where it must be.
        """
        path, samples = self.inversion, latent["samples"].float().cpu()
        start, level = path.latents[0], float(path.sigmas[0])
        given = path.latent_format.process_in(samples) if samples.any() else samples
        if given.shape != start.shape:
            raise ValueError(
                f"The LATENT has shape {list(given.shape)}, the inversion {list(start.shape)}: connect its x_T as latent."
            )
        if not path.kind.bounded:
            if not torch.allclose(given, start, rtol=1e-3, atol=1e-3 * float(start.std())):
                raise ValueError("Connect the inversion's x_T as the latent of a sampler that takes the inversion's noise.")
            return torch.zeros_like(samples)
        return path.kind.noise(start, given, level) / path.settings.get("noise_scale", 1.0)


def output(inversion: Inversion, x_T: torch.Tensor, rows: int, latent: dict, **more):
    """What an inversion node returns; a mask of the LATENT goes on with the path, and with x_T.

    Args:
        x_T: as in a LATENT.
        rows, more: as in `feedback.costs`.
        latent: the LATENT that was inverted.
    """
    ui, start = feedback.costs(rows, inversion.steps, **more), {"samples": x_T}
    mask = latent.get("noise_mask")
    if mask is not None:
        start["noise_mask"] = mask
        inversion = replace(inversion, mask=_mask_of(latent))
    return io.NodeOutput(inversion, start, PathNoise(inversion), ui=ui)


def _mask_of(latent: dict) -> torch.Tensor | None:
    """The mask of a LATENT as MASK [M, h, w], one for each frame [B, 1, T, h, w], or None."""
    mask = latent.get("noise_mask")
    if mask is None:
        return None
    mask = mask.detach().float().cpu()
    return mask if mask.ndim == 5 else mask.reshape(-1, *mask.shape[-2:])


def picture(model: ModelPatcher, latent):
    """The picture of a LATENT, [B, C, H, W].

    Raises:
        ValueError: it cannot be inverted.
    """
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    check_latent(samples, model.model.latent_format)
    return samples


def run(guider: CFGGuider, inverter: PhasedSampler, samples, sigmas, *, latent: dict, seed=0, draws=1):
    """Run a SAMPLER of `samplers.inverters`; `x_T` on the device of all LATENTs.

    Args:
        samples: the pictures that are inverted, each `draws` times.
        latent: the LATENT they are from, whose mask is an input of some models.
    """
    mask = _mask_of(latent)
    if mask is not None:
        mask = shaped_mask(mask, len(samples) // draws, draws, samples.ndim == 5)
    x_T = feedback.sample(guider, inverter, samples, sigmas, mask=mask, seed=seed)
    return x_T.to(comfy.model_management.intermediate_device())


def latent_size(inversion: Inversion) -> str:
    """The shape of one picture's latent in words."""
    return " x ".join(str(n) for n in inversion.latents.shape[2:])


def regularisation_input():
    """The choice of an inversion node, see `regularisation`."""
    defaults = NoiseRegularisation()
    published = [
        io.Float.Input("lambda_ac", default=defaults.lambda_ac, min=0.0, max=1000.0, step=1.0,
                       tooltip="Strength against noise that is correlated with itself."),
        io.Float.Input("lambda_kl", default=defaults.lambda_kl, min=0.0, max=1000.0, step=1.0,
                       tooltip="Strength against noise of another variance than 1."),
        io.Int.Input("reg_steps", default=defaults.steps, min=1, max=100,
                     tooltip="Times that each step is regularised."),
        io.Int.Input("ac_rolls", default=defaults.rolls, min=1, max=100,
                     tooltip="Random shifts that correlation is measured with, each time."),
        io.Int.Input("reg_seed", default=defaults.seed, min=0, max=0xFFFFFFFFFFFFFFFF, tooltip="Of the random shifts."),
    ]
    return io.DynamicCombo.Input(
        "noise_regularisation", optional=True,
        options=[io.DynamicCombo.Option("none", []), io.DynamicCombo.Option("pix2pix-zero", published)],
        tooltip="Keeps the path's noise like Gaussian noise, so that the picture edits better but comes back less "
        "exactly. pix2pix-zero (arXiv 2302.03027) inverts so, with refinements 0 and convention B.",
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
