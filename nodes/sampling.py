"""The edit, as one KSampler-style node and as GUIDER + SAMPLER over the same code."""

import comfy.model_management
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io

from ..samplers import models
from ..samplers.guider import LeditsGuider
from ..samplers.ledits import SOLVERS, LeditsSampler
from . import sockets
from .inversion import report

CATEGORY = "LEDITS/sampling"


def _edit_inputs():
    """What guides an edit."""
    return [
        io.Model.Input("model", tooltip="The model that made the inversion. LoRA, ControlNet and patches may be added."),
        io.Conditioning.Input("positive", tooltip="Target prompt. For concepts alone: the source prompt, or empty."),
        io.Conditioning.Input("negative", tooltip="Usually the empty prompt."),
    ]


def _cfg():
    return io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, round=0.01,
                          tooltip="Guidance towards the target prompt: more changes more. LEDITS uses 7 to 15; for "
                          "concepts alone the inversion's own value keeps the picture.")  # fmt: skip


def _path_inputs():
    """Where an edit runs."""
    return [
        sockets.Inversion.Input("inversion", tooltip="The picture's path, from an inversion node."),
    ]


def _skip():
    return io.Int.Input("skip", default=18, min=0, max=999,
                        tooltip="Steps of the path to leave out at the noisy end. More stays closer to the picture, "
                        "0 changes most. The paper skips 36 % of the steps.")  # fmt: skip


def _solver():
    return io.Combo.Input("solver", options=list(SOLVERS), optional=True, advanced=True,
                          tooltip="ddpm is LEDITS. dpmpp_2m_sde is the second-order solver of LEDITS++, for fewer "
                          "steps.")  # fmt: skip


def _attention():
    """What of the source's attention an edit keeps."""
    return [
        sockets.Attention.Input("attention", optional=True,
                                tooltip="Attention control: Prompt-to-Prompt, MasaCtrl, Plug-and-Play, ..."),
        sockets.Store.Input("store", optional=True,
                            tooltip="The source's attention, from Capture Attention. Saves the source pass."),
    ]  # fmt: skip


def sigmas_after(inversion, skip):
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


class LeditsKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_KSampler",
            display_name="LEDITS KSampler",
            category=CATEGORY,
            description="Edits an inverted picture: target prompt, semantic concepts, or both, along the picture's own "
            "path and noise maps (LEDITS, arXiv 2307.00522).",
            search_aliases=["ledits", "ledits++", "edit image", "real image editing"],
            inputs=[
                *_edit_inputs(),
                *_path_inputs(),
                _cfg(),
                _skip(),
                sockets.Concepts.Input("concepts", optional=True, tooltip="Semantic concepts to add or remove."),
                io.Mask.Input("mask", optional=True,
                              tooltip="Where the picture may change. Outside it, it stays as it was."),
                _solver(),
                *_attention(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The edited picture, for VAE Decode.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, negative, inversion, cfg, skip, concepts=None, mask=None, solver=SOLVERS[0],
                attention=None, store=None):  # fmt: skip
        models.check(model, inversion)
        sigmas = sigmas_after(inversion, skip)
        guider = LeditsGuider(model, positive, negative, cfg, concepts or ())
        picture = inversion.latent_format.process_out(inversion.latents[-1])
        samples = guider.sample(
            torch.zeros_like(picture), picture, LeditsSampler(inversion, solver, attention, store), sigmas,
            denoise_mask=mask, seed=0,  # some conditionings compute with it; nothing is drawn
            callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        )  # fmt: skip
        out = {"samples": samples.to(comfy.model_management.intermediate_device())}
        return io.NodeOutput(out, ui=report(guider, len(sigmas) - 1))


class LeditsGuiderNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_Guider",
            display_name="LEDITS Guider",
            category=CATEGORY,
            description="Prompt guidance and semantic concepts as a GUIDER for SamplerCustomAdvanced. Works with every "
            "SAMPLER; with the LEDITS Sampler it edits an inverted picture.",
            search_aliases=["sega guider", "semantic guidance"],
            inputs=[
                *_edit_inputs(),
                _cfg(),
                sockets.Concepts.Input("concepts", optional=True, tooltip="Semantic concepts to add or remove."),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg, concepts=None):
        return io.NodeOutput(LeditsGuider(model, positive, negative, cfg, concepts or ()))


class LeditsSamplerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_Sampler",
            display_name="LEDITS Sampler",
            category=CATEGORY,
            description="The LEDITS update along an inverted picture's path, as SAMPLER and SIGMAS for "
            "SamplerCustomAdvanced. Connect the inversion's x_T as latent and Disable Noise as noise.",
            inputs=[*_path_inputs(), _skip(), _solver(), *_attention()],
            outputs=[
                io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustomAdvanced."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The path's noise levels from the first step that runs."),
            ],
        )

    @classmethod
    def execute(cls, inversion, skip, solver=SOLVERS[0], attention=None, store=None):
        return io.NodeOutput(LeditsSampler(inversion, solver, attention, store), sigmas_after(inversion, skip))


NODES = [LeditsKSampler, LeditsGuiderNode, LeditsSamplerNode]
