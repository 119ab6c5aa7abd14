"""The edit, as one KSampler-style node and as GUIDER + SAMPLER over the same code."""

from comfy_api.latest import io

from ..samplers import models
from ..samplers.guider import LeditsGuider
from ..samplers.ledits import SOLVERS, LeditsSampler
from . import feedback, sockets
from .choices import known
from .edit_inputs import (
    attention_inputs,
    cfg_input,
    chosen_eta,
    edit,
    edit_inputs,
    eta_input,
    fine_inputs,
    free_steps_input,
    path_inputs,
    sigmas_after,
    skip_input,
    solver_input,
)

CATEGORY = "LEDITS/sampling"


class LeditsKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_KSampler",
            display_name="LEDITS KSampler",
            category=CATEGORY,
            description="Edits an inverted picture: target prompt, semantic concepts, or both, along the picture's own "
            "path and noise maps (LEDITS, arXiv 2307.00522).",
            search_aliases=["ledits", "ledits++", "edit image", "real image editing", "inpaint"],
            inputs=[
                *edit_inputs(),
                *path_inputs(),
                cfg_input(),
                skip_input(),
                *fine_inputs(),
                eta_input(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The edited picture, for VAE Decode.")],
        )

    @classmethod
    def execute(cls, model, positive, negative, inversion, cfg, skip, concepts=None, mask=None, solver=SOLVERS[0],
                attention=None, store=None, eta=-1.0):
        known(cls, solver=solver)
        models.check(model, inversion)
        sigmas = sigmas_after(inversion, skip)
        guider = LeditsGuider(model, positive, negative, cfg, concepts=concepts or ())
        sampler = LeditsSampler(inversion, solver=solver, attention=attention, store=store, eta=chosen_eta(eta))
        out = {"samples": edit(guider, sampler, sigmas, mask=mask)}
        if sampler.observed is not None:
            out[sockets.OBSERVED] = sampler.observed
        note = feedback.guidance_note(model, positive)
        return io.NodeOutput(out, ui=feedback.costs(guider.rows, len(sigmas) - 1, level=float(sigmas[0]), note=note))


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
                cfg_input(),
                sockets.Concepts.Input("concepts", optional=True, tooltip="Semantic concepts to add or remove."),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg, concepts=None):
        return io.NodeOutput(LeditsGuider(model, positive, negative, cfg, concepts=concepts or ()))


class LeditsSamplerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_Sampler",
            display_name="LEDITS Sampler",
            category=CATEGORY,
            description="The LEDITS update along an inverted picture's path, as SAMPLER and SIGMAS for "
            "SamplerCustomAdvanced. Connect the inversion's x_T as latent and Disable Noise as noise.",
            inputs=[
                *path_inputs(), skip_input(), solver_input(), *attention_inputs(), eta_input(), free_steps_input(),
            ],
            outputs=[
                io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustomAdvanced."),
                io.Sigmas.Output(display_name="sigmas",
                                 tooltip="The path's noise levels from the first step that runs."),
            ],
        )

    @classmethod
    def execute(cls, inversion, skip, solver=SOLVERS[0], attention=None, store=None, eta=-1.0, free_steps=0):
        known(cls, solver=solver)
        sampler = LeditsSampler(inversion, solver=solver, attention=attention, store=store, eta=chosen_eta(eta),
                                free_steps=free_steps)
        sampler.on_phase = feedback.tell
        return io.NodeOutput(sampler, sigmas_after(inversion, skip))


NODES = [LeditsKSampler, LeditsGuiderNode, LeditsSamplerNode]
