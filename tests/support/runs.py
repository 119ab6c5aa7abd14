"""Inversions and edits by the pack's nodes on the tiny models. A test names the inputs that it is about.

    inversion = runs.invert(DDIMInversion, "sdxl", steps=20)[0]
    samples = runs.edit("sdxl", inversion, cfg=7.5, prompt=runs.TARGET)
"""
import functools

from comfy_extras.nodes_custom_sampler import DisableNoise, SamplerCustomAdvanced
from comfyui_ledits.nodes.ddim_inversions import DDIMInversion, DirectInversion, NegativePromptInversion
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.learned_inversions import ON_INTERRUPT, NullTextInversion, StyleDiffusionInversion
from comfyui_ledits.nodes.rf_inversion import RFInversion
from comfyui_ledits.nodes.sampling import LeditsKSampler

from support import tiny, tiny_flow

SOURCE, EMPTY, TARGET = 1, 2, 3  # seeds of the prompts
INVERTED, RESIMULATED = {"path": "inverted"}, {"path": "re-simulated", "edit_cfg": 7.5}

DDIM = {"refinements": 0, "tolerance": 0.0, "convention": "A"}
LEARNING = {"learning_rate": 0.01, "early_stop": 1e-5, "on_interrupt": ON_INTERRUPT[0]}
OWN = {  # inputs that only some inversions have
    EditFriendlyInversion: {"eta": 1.0, "seed": 0},
    DDIMInversion: {**DDIM, "path": INVERTED},
    DirectInversion: {**DDIM, "ablation": {"ablation": "none"}},
    NegativePromptInversion: {**DDIM, "path": INVERTED, "interpolation": 0.0},
    RFInversion: {"seed": 0, "gamma": 0.5},
    NullTextInversion: {**LEARNING, "inner_steps": 3},
    StyleDiffusionInversion: {**LEARNING, "first_steps": 3, "attention_loss": 1.0, "tau_v": 1.0},
}


def model(kind="sd1"):
    """The MODEL of a kind, one for all tests, with weights as core's loaders make them."""
    return _model(kind)


@functools.cache
def _model(kind):
    return tiny.frozen(kind) if kind in tiny.KINDS else tiny_flow.model(kind)


def parts_of(kind):
    """`tiny` or `tiny_flow`, which of them knows the kind."""
    return tiny if kind in tiny.KINDS else tiny_flow


def in_model_space(kind, samples):
    """What a LATENT's samples are to the model."""
    return model(kind).model.process_latent_in(samples)


def error(kind, samples, latent):
    """Largest difference of two LATENTs in the model's space, in units of the second's standard deviation."""
    a, b = (in_model_space(kind, x["samples"] if isinstance(x, dict) else x) for x in (samples, latent))
    return float((a - b).abs().max() / b.std())


def prompts(kind="sd1", *seeds):
    """CONDITIONINGs; without seeds the source's and the empty one."""
    return [parts_of(kind).conditioning(kind, seed) for seed in seeds or (SOURCE, EMPTY)]


def invert(node, kind="sd1", latent=None, *, batch=1, pair=None, on=None, **inputs):
    """What an inversion node gives, by default at guidance 1 in 10 steps.

    Args:
        pair: positive and negative, if they are not the source's and the empty prompt.
        on: another MODEL than that of the kind.
        inputs: of the node.
    """
    positive, negative = pair or prompts(kind)
    latent = parts_of(kind).latent(kind, batch) if latent is None else latent
    inputs = {"cfg": 1.0, "steps": 10, "scheduler": "ddim_uniform", **OWN[node], **inputs}
    return node.execute(model=on or model(kind), positive=positive, negative=negative, latent=latent, **inputs)


def edit_node(kind, inversion, *, cfg, skip=0, prompt=SOURCE, negative=EMPTY, pair=None, on=None, **inputs):
    """What LEDITS KSampler gives for prompts of these seeds, or for a pair of CONDITIONINGs."""
    positive, negative = pair or prompts(kind, prompt, negative)
    return LeditsKSampler.execute(model=on or model(kind), positive=positive, negative=negative, inversion=inversion,
                                  cfg=cfg, skip=skip, **inputs)


def edit(kind, inversion, **inputs):
    """The edited latents [B, 4, h, w] of `edit_node`."""
    return edit_node(kind, inversion, **inputs)[0]["samples"]


def in_parts(guider, sampler, sigmas, latent, noise=None):
    """The latents [B, 4, h, w] of SamplerCustomAdvanced, without noise of its own unless it is given some."""
    noise = noise or DisableNoise.execute()[0]
    return SamplerCustomAdvanced.execute(noise=noise, guider=guider, sampler=sampler, sigmas=sigmas,
                                         latent_image=latent)[0]["samples"]
