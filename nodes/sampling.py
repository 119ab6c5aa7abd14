"""The edit, as one KSampler-style node and as GUIDER + SAMPLER over the same code."""

import comfy.model_management
from comfy_api.latest import io

from ..samplers import models
from ..samplers.guider import LeditsGuider
from ..samplers.ledits import SOLVERS, LeditsSampler
from . import feedback, sockets

CATEGORY = "LEDITS/sampling"


def edit_inputs():
    """Inputs that guide an edit."""
    return [
        io.Model.Input("model", tooltip="The model that made the inversion. LoRA, ControlNet and patches may be added."),
        io.Conditioning.Input("positive", tooltip="Target prompt. For concepts alone: the source prompt, or empty."),
        io.Conditioning.Input("negative", tooltip="Usually the empty prompt."),
    ]


def _cfg():
    return io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, round=0.01,
                          tooltip="Guidance towards the target prompt: more changes more. LEDITS uses 7 to 15; for "
                          "concepts alone the inversion's own value keeps the picture.")


def path_inputs():
    """Where an edit runs."""
    return [
        sockets.Inversion.Input("inversion", tooltip="The picture's path, from an inversion node."),
    ]


def _skip():
    return io.Int.Input("skip", default=18, min=0, max=999,
                        tooltip="Steps of the path to leave out at the noisy end. More stays closer to the picture, "
                        "0 changes most. The paper skips 36 % of the steps.")


def _solver():
    return io.Combo.Input("solver", options=list(SOLVERS), optional=True, advanced=True,
                          tooltip="ddpm is LEDITS. dpmpp_2m_sde is the second-order solver of LEDITS++, for fewer "
                          "steps.")


def _attention_inputs():
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
        _solver(),
        *_attention_inputs(),
    ]


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


def edit(guider, sampler, sigmas, mask=None, runs=None):
    """Run a `LeditsSampler` on its inversion's picture; the samples of a LATENT. `runs` as in `feedback`."""
    path = sampler.inversion
    picture = path.latent_format.process_out(path.latents[-1])
    samples = feedback.sample(guider, sampler, picture, sigmas, mask, runs=runs)
    return samples.to(comfy.model_management.intermediate_device())


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
                *edit_inputs(),
                *path_inputs(),
                _cfg(),
                _skip(),
                *fine_inputs(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The edited picture, for VAE Decode.")],
        )

    @classmethod
    def execute(cls, model, positive, negative, inversion, cfg, skip, concepts=None, mask=None, solver=SOLVERS[0],
                attention=None, store=None):
        models.check(model, inversion)
        sigmas = sigmas_after(inversion, skip)
        guider = LeditsGuider(model, positive, negative, cfg, concepts or ())
        sampler = LeditsSampler(inversion, solver, attention, store)
        out = {"samples": edit(guider, sampler, sigmas, mask)}
        if sampler.seen is not None:
            out[sockets.SEEN] = sampler.seen
        return io.NodeOutput(out, ui=feedback.report(guider, len(sigmas) - 1))


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
                *edit_inputs(),
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
            inputs=[*path_inputs(), _skip(), _solver(), *_attention_inputs()],
            outputs=[
                io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustomAdvanced."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The path's noise levels from the first step that runs."),
            ],
        )

    @classmethod
    def execute(cls, inversion, skip, solver=SOLVERS[0], attention=None, store=None):
        sampler = LeditsSampler(inversion, solver, attention, store)
        sampler.tell = feedback.tell
        return io.NodeOutput(sampler, sigmas_after(inversion, skip))


NODES = [LeditsKSampler, LeditsGuiderNode, LeditsSamplerNode]
