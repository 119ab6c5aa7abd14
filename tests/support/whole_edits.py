"""Edits from the picture on, inversion included, each a function of the MODEL.

    samples = whole_edits.run("p2p", placed(whole_edits.model("p2p"), "cuda"))
"""
import functools

import torch
from comfyui_ledits.attention_hooks.controls.masactrl import MasaCtrl
from comfyui_ledits.attention_hooks.controls.p2p import PromptToPrompt
from comfyui_ledits.nodes.ddim_inversions import DirectInversion
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.learned_inversions import NullTextInversion
from comfyui_ledits.samplers.methods.sega import Concept

from support import chain_parts, flow_editing, runs, tiny, tiny_flow

STEPS, EVERY = 4, (0.0, 1.0)
# name: (kind of model, inversion, its inputs)
EDITS = {
    "sega": ("sdxl", EditFriendlyInversion, {}),
    "p2p": ("sd1", DirectInversion, {}),
    "masactrl": ("sd1", DirectInversion, {}),
    "pnp": ("sd1", DirectInversion, {}),
    "pix2pix": ("sd1", DirectInversion, {}),
    "null-text": ("sd1", NullTextInversion, {"cfg": 5.0, "inner_steps": 2, "early_stop": 0.0}),
    "flow p2p": ("flux", EditFriendlyInversion, {"eta": 0.0, "scheduler": "simple"}),
    "flow masactrl": ("sd3", EditFriendlyInversion, {"eta": 0.0, "scheduler": "simple"}),
}


def model(name):
    """The MODEL of an edit, float32 on the CPU."""
    return runs.model(EDITS[name][0])


def latent(name):
    """The LATENT that is edited."""
    kind = EDITS[name][0]
    return runs.parts_of(kind).latent(kind, height=16, width=16)


def run(name, on):
    """The edited latents of the MODEL `on`, in its own space."""
    kind, inversion, inputs = EDITS[name]
    source, target, negative, edit = _prompts(name)
    with torch.inference_mode():
        path = runs.invert(inversion, kind, latent(name), pair=(source, negative), on=on, steps=STEPS, **inputs)[0]
        made = runs.edit(kind, path, pair=(target, negative), on=on, cfg=5.0, **edit)
        return runs.in_model_space(kind, made)


@functools.cache
def _prompts(name):
    """Source, target and negative, and more inputs of the sampler."""
    kind = EDITS[name][0]
    if name.startswith("flow"):
        words = flow_editing.prompts(kind)
        control = (PromptToPrompt(prompts=words, cross=EVERY, self_=(0, 0)) if name == "flow p2p" else
                   MasaCtrl(prompts=words, window=EVERY, blocks="all"))
        return words.source, words.target, tiny_flow.conditioning(kind, flow_editing.NEGATIVE), {"attention": (control,)}
    if name == "sega":
        concept = Concept(conditioning=tiny.conditioning(kind, 5), warmup=0, scale=3.0, threshold=0.5)
        return *runs.prompts(kind, runs.SOURCE, runs.TARGET, runs.EMPTY), {"concepts": (concept,)}
    words = chain_parts.words()
    more = {} if name == "null-text" else {"attention": tuple(chain_parts.attention(name))}
    return words.source, words.target, chain_parts.empty(), more
