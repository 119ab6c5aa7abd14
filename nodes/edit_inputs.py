"""Shared by nodes that edit: inputs, the levels of an edit, and the run of its SAMPLER."""

import comfy.model_management
import torch
from comfy_api.latest import io

from ..samplers.guider import LeditsGuider
from ..samplers.ledits import SOLVERS
from ..samplers.methods.record import Inversion
from ..samplers.model_inputs import shaped_mask
from ..samplers.phased import PhasedSampler
from . import feedback, sockets


def edit_inputs():
    """Inputs that guide an edit."""
    return [
        io.Model.Input("model", tooltip="The model that made the inversion. LoRA, ControlNet and patches may be "
                       "added."),
        io.Conditioning.Input("positive", tooltip="Target prompt. For concepts alone: the source prompt, or empty."),
        io.Conditioning.Input("negative", tooltip="Usually the empty prompt."),
    ]


def cfg_input():
    return io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, round=0.01,
                          tooltip="Guidance towards the target prompt: more changes more. LEDITS uses 7 to 15; for "
                          "concepts alone the inversion's own value keeps the picture.")


def path_inputs():
    """Where an edit runs."""
    return [sockets.Inversion.Input("inversion", tooltip="The picture's path, from an inversion node.")]


def skip_input():
    return io.Int.Input("skip", default=18, min=0, max=999,
                        tooltip="Steps of the path to leave out at the noisy end. More stays closer to the picture, "
                        "0 changes most. LEDITS skips 36 % of the steps on Stable Diffusion; Flux.1-dev 4 of 28, as "
                        "its noise stays high for longer. The node shows the noise level that the edit begins at.")


def solver_input():
    return io.Combo.Input("solver", options=list(SOLVERS), optional=True, advanced=True,
                          tooltip="ddpm is LEDITS. dpmpp_2m_sde is the second-order solver of LEDITS++, for fewer "
                          "steps.")


def eta_input():
    return io.Float.Input("eta", default=-1.0, min=-1.0, max=1.0, step=0.01, optional=True, advanced=True,
                          tooltip="Share of noise in each step of the edit, without inverting again. 1 lets early "
                          "changes fade (LEDITS), 0 lets all of them last (FlowEdit). Below 0: as inverted.")


def chosen_eta(value: float) -> float | None:
    """The value of `eta_input` as `LeditsSampler` takes it."""
    return None if value < 0 else value


def finite(name: str, *masks):
    """Refuse MASKs (or None) that hold NaN or infinite numbers, which a comparison would take for places outside.

    Raises:
        ValueError: names the input.
    """
    if any(mask is not None and not torch.isfinite(mask).all() for mask in masks):
        raise ValueError(f"{name} holds NaN or infinite numbers: look at the node that makes it.")


def free_steps_input():
    return io.Int.Input("free_steps", default=0, min=0, max=999, optional=True, advanced=True,
                        tooltip="So many steps at the end follow the prompt alone, without the picture's noise maps "
                        "(FlowEdit's n_min). More changes details more.")


def attention_inputs():
    """Inputs of attention control."""
    return [
        sockets.Attention.Input("attention", optional=True,
                                tooltip="Attention control: Prompt-to-Prompt, MasaCtrl, Plug-and-Play, ..."),
        sockets.Store.Input("store", optional=True,
                            tooltip="The source's attention, from Capture Attention. Saves the source pass."),
    ]


def fine_inputs():
    """Further inputs of an edit in one node."""
    return [
        sockets.Concepts.Input("concepts", optional=True, tooltip="Semantic concepts to add or remove."),
        io.Mask.Input("mask", optional=True, tooltip="Where the picture may change. Outside it, it stays as it was."),
        solver_input(),
        *attention_inputs(),
    ]


def sigmas_after(inversion: Inversion, skip):
    """The SIGMAS of an edit that leaves out `skip` steps.

    Raises:
        ValueError: no step is left.
    """
    if skip >= inversion.steps:
        raise ValueError(
            f"skip is {skip}, but the inversion has {inversion.steps} steps: nothing is left to run. "
            f"Choose 0 to {inversion.steps - 1}."
        )
    return inversion.sigmas[skip:]


def edit(guider: LeditsGuider, sampler: PhasedSampler, sigmas, *, mask=None, runs: feedback.Runs | None = None):
    """Run a SAMPLER on the picture of its `inversion`; the samples of a LATENT.

    Args:
        mask: MASK; where there is none, that of the picture's LATENT, if it had one.
        runs: as in `feedback.sample`.
    """
    path = sampler.inversion
    picture = path.latent_format.process_out(path.latents[-1])
    mask = path.mask if mask is None else mask
    if mask is not None:
        mask = shaped_mask(mask, path.pictures, path.draws, picture.ndim == 5)
    samples = feedback.sample(guider, sampler, picture, sigmas, mask=mask, runs=runs)
    return samples.to(comfy.model_management.intermediate_device())
