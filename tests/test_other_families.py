"""Attention control on models that have no such blocks: refused with a sentence, and nothing of the network runs."""

import dataclasses
import functools

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import pytest
import torch
from comfyui_ledits.nodes.capture_attention import CaptureAttention
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from support import chain_parts, tiny
from support.chain_parts import CONTROLS, scene

import nodes


def other_family(name):
    """A tiny MODEL that is no U-Net, its LATENT and CONDITIONING."""
    family, base, config, side = {
        "SD3": (comfy.supported_models.SD3, comfy.model_base.SD3, {
            "in_channels": 16, "depth": 1, "input_size": None, "patch_size": 2, "pos_embed_max_size": 8,
            "num_patches": 64, "adm_in_channels": 24, "context_embedder_config": {
                "target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 64}}}, 8),
        "Flux": (comfy.supported_models.Flux, comfy.model_base.Flux, {
            "image_model": "flux", "guidance_embed": False, "in_channels": 16, "out_channels": 16, "vec_in_dim": 24,
            "context_in_dim": 32, "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 4, "depth": 1,
            "depth_single_blocks": 1, "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True,
            "txt_ids_dims": []}, 8),
        "PixArt": (comfy.supported_models.PixArtAlpha, comfy.model_base.PixArt, {
            "input_size": 64, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 1, "num_heads": 2,
            "caption_channels": 32, "pe_interpolation": 1, "micro_condition": False, "model_max_length": 77}, 40),
    }[name]
    settings = family({})
    settings.unet_config = config | {"dtype": torch.float32}
    inner = base(settings)
    tiny.fill(inner.diffusion_model, 0)
    model = comfy.model_patcher.ModelPatcher(inner, torch.device("cpu"), torch.device("cpu"))
    picture = torch.randn(1, inner.latent_format.latent_channels, side, side, generator=torch.Generator().manual_seed(1))
    words = [[chain_parts.words().target[0][0], {"pooled_output": torch.randn(1, 24)}]]
    return model, {"samples": picture}, words


@pytest.mark.parametrize("name", ["SD3", "Flux"])
def test_flow_models_are_refused_by_inversion_edit_and_capture(name):
    model, latent, words = other_family(name)
    runs = [lambda: EditFriendlyInversion.execute(model=model, positive=words, negative=words, latent=latent,
        cfg=1.0, steps=2, scheduler="simple", eta=1.0, seed=0)]
    parts = dataclasses.replace(scene(), model=model, positive=words, negative=words)
    for edit in CONTROLS:
        runs += [functools.partial(parts.edit, edit), functools.partial(parts.edit, edit, through="parts"),
                 lambda edit=edit: CaptureAttention.execute(model=model, negative=words, inversion=parts.path,
                     attention=tuple(chain_parts.attention(edit)), skip=1)]
    with torch.inference_mode():
        nodes.common_ksampler(model, 1, 1, 2.0, "euler", "simple", words, words, latent)  # it does work
    refused(model, runs, f"{name} is not a diffusion model.*SD3 and Flux.*flow models")


@pytest.mark.parametrize("edit", CONTROLS)
def test_a_transformer_that_can_be_inverted_is_refused_by_the_controls(edit):
    model, latent, words, path = inverted_transformer()
    parts = chain_parts.Parts(model, path, words, words)
    runs = [functools.partial(parts.edit, edit), functools.partial(parts.edit, edit, through="parts"),
            lambda: CaptureAttention.execute(model=model, negative=words, inversion=path,
                attention=tuple(chain_parts.attention(edit)), skip=1)]
    refused(model, runs, "PixArt has no U-Net.*SD3 and Flux.*SD 1.x, SD 2.x, SDXL")


@functools.cache
def inverted_transformer():
    model, latent, words = other_family("PixArt")
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
