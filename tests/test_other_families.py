"""Attention control on models that have no such blocks: refused with a sentence, and nothing of the network runs."""

import functools

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import pytest
import torch
from comfyui_ledits.nodes.capture_attention import CaptureAttention
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.learned_inversions import NullTextInversion, StyleDiffusionInversion
from support import chain_parts, runs, tiny, tiny_flow
from support.chain_parts import CONTROLS


def other_family(name):
    """A tiny MODEL that is no U-Net, its LATENT and CONDITIONING."""
    if name != "PixArt":
        kind = {"SD3": "sd3", "Flux": "flux"}[name]
        return tiny_flow.model(kind), tiny_flow.latent(kind), tiny_flow.conditioning(kind)
    settings = comfy.supported_models.PixArtAlpha({})
    settings.unet_config = {
        "input_size": 64, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 1, "num_heads": 2,
        "caption_channels": 32, "pe_interpolation": 1, "micro_condition": False, "model_max_length": 77,
        "dtype": torch.float32}
    inner = comfy.model_base.PixArt(settings)
    tiny.fill(inner.diffusion_model, 0)
    model = comfy.model_patcher.ModelPatcher(inner, torch.device("cpu"), torch.device("cpu"))
    picture = torch.randn(1, inner.latent_format.latent_channels, 40, 40, generator=torch.Generator().manual_seed(1))
    return model, {"samples": picture}, chain_parts.words().target


@pytest.mark.parametrize("name", ["SD3", "Flux"])
@pytest.mark.parametrize("node", [NullTextInversion, StyleDiffusionInversion])
def test_flow_models_are_refused_by_inversions_that_learn(name, node):
    model, latent, words = other_family(name)
    learn = functools.partial(runs.invert, node, latent=latent, pair=(words, words), on=model)
    refused(model, [learn], f"{name} is not a U-Net.*SD 1.x, SD 2.x, SDXL.*Edit-Friendly")


@pytest.mark.parametrize("edit", CONTROLS)
def test_a_transformer_that_is_not_known_is_refused_by_the_controls(edit):
    refused_by(edit, "PixArt", "does not know how PixArt .PixArtMS.*It knows SD 1.x, SD 2.x, SDXL, SD3.*FlowEdit")


@pytest.mark.parametrize("name", ["SD3", "Flux"])
def test_what_needs_a_slope_is_refused_on_transformers(name):
    refused_by("pix2pix", name, f"pix2pix-zero follows the slope.*which {name}.* is not. Use Prompt-to-Prompt")


def refused_by(edit, name, match):
    model, latent, words, path = inverted_transformer(name)
    parts = chain_parts.Parts(model, path, words, words)
    edits = [functools.partial(parts.edit, edit), functools.partial(parts.edit, edit, through="parts"),
            lambda: CaptureAttention.execute(model=model, negative=words, inversion=path,
                attention=tuple(chain_parts.attention(edit)), skip=1)]
    refused(model, edits, match)


@functools.cache
def inverted_transformer(name):
    model, latent, words = other_family(name)
    with torch.inference_mode():
        path = EditFriendlyInversion.execute(model=model, positive=words, negative=words, latent=latent, cfg=1.0,
            steps=2, scheduler="simple", eta=1.0, seed=0)[0]
        chain_parts.Parts(model, path, words, words).edit("plain")  # an edit without attention control works
    return model, latent, words, path


def refused(model, runs, match):
    """Every run is a sentence, and nothing of the network has run."""
    asked = []
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda *_: asked.append(1))
    try:
        for run in runs:
            with torch.inference_mode(), pytest.raises(ValueError, match=match):
                run()
    finally:
        handle.remove()
    assert not asked
