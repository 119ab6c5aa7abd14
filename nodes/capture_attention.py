"""Capture Attention: the source's attention, to keep for many edits."""

import torch
from comfy_api.latest import io

from ..attention_hooks import backbones
from ..attention_hooks.source_pass import source_conditioning
from ..samplers import models
from ..samplers.capture_sampler import CaptureSampler
from ..samplers.guider import LeditsGuider
from . import feedback, sockets
from .attention_inputs import CATEGORY
from .choices import known
from .edit_inputs import sigmas_after

DTYPES = {"float16": torch.float16, "float32": torch.float32}


class CaptureAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_CaptureAttention",
            display_name="Capture Attention",
            category=CATEGORY,
            description="Runs the source picture once and keeps what attention controls read of it, so that every "
            "further edit of the picture costs what plain sampling costs.",
            search_aliases=["attention store", "source attention", "cache attention"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will make the edits."),
                io.Conditioning.Input("negative", tooltip="The edits' negative. Only P2Plus, MasaCtrl and controls "
                                      "without a source prompt read it."),
                sockets.Inversion.Input("inversion", tooltip="The picture's path, the same as the sampler's."),
                sockets.Attention.Input("attention", tooltip="The controls to capture for. Other target prompts, and "
                                        "shorter windows, can use the store too."),
                io.Int.Input("skip", default=18, min=0, max=999, tooltip="As in the sampler."),
                io.Combo.Input("precision", options=list(DTYPES), default="float16", optional=True, advanced=True,
                               tooltip="float16 takes half the memory."),
                io.Boolean.Input("all_steps", default=False, optional=True, advanced=True,
                                 tooltip="Keep every step, not only those inside the controls' windows, so that "
                                 "windows can be changed later. Takes more memory."),
                io.Conditioning.Input("positive", optional=True, tooltip="The edits' positive, for its guidance (FluxGuidance) "
                                      "and reference pictures, where the model takes those. Its words are not read."),
            ],
            outputs=[sockets.Store.Output(display_name="store", tooltip="For the store input of a LEDITS sampler.")],
        )

    @classmethod
    def execute(cls, model, negative, inversion, attention, skip, precision="float16", all_steps=False,
                positive=None):
        known(cls, precision=precision)
        models.check(model, inversion)
        backbones.of(model.model)
        sigmas = sigmas_after(inversion, skip)
        sampler = CaptureSampler(inversion, attention, dtype=DTYPES[precision], all_steps=all_steps)
        guider = LeditsGuider(model, positive or source_conditioning(attention) or negative, negative, 1.0)
        picture = inversion.latent_format.process_out(inversion.latents[-1])
        feedback.sample(guider, sampler, picture, sigmas, mask=inversion.mask)
        costs = feedback.costs(guider.rows, len(sigmas) - 1, store_bytes=sampler.store.nbytes)
        return io.NodeOutput(sampler.store, ui=costs)


NODES = [CaptureAttention]
