"""Checks and descriptions of a ComfyUI MODEL."""

import comfy.model_sampling
import torch
from comfy.model_patcher import ModelPatcher

from .methods.ddim import Scaling, eps_scaling
from .methods.families import FAMILIES, Family
from .methods.record import Inversion

# Sampling that only looks like a family's: these models turn one picture into another, from no noise at all.
_FROM_A_PICTURE = (comfy.model_sampling.IMG_TO_IMG, comfy.model_sampling.IMG_TO_IMG_FLOW)
# What tells networks apart that are no U-Nets: settings as ComfyUI detects them in a checkpoint.
_SHAPE = ("image_model", "model_type", "in_channels", "in_dim", "hidden_size", "dim", "num_attention_heads", "n_heads",
          "depth", "depth_single_blocks", "num_blocks", "num_layers", "num_single_layers", "n_layers",
          "n_double_layers", "context_in_dim", "guidance_embed")


def family(model: ModelPatcher) -> Family:
    """The family of a MODEL.

    Raises:
        ValueError: a model that cannot be inverted, by its name.
    """
    sampling, name = model.get_model_object("model_sampling"), type(model.model).__name__
    if isinstance(sampling, _FROM_A_PICTURE):
        raise ValueError(
            f"{name} makes one picture from another in place of noise, so there is no path from noise to a picture to "
            "invert. Use a checkpoint that makes pictures from a prompt."
        )
    _check_latents(model, name)
    if isinstance(sampling, (comfy.model_sampling.EPS, comfy.model_sampling.COSMOS_RFLOW)):
        return FAMILIES["ve"]  # COSMOS_RFLOW is a flow model that ComfyUI samples in variance-exploding space
    if isinstance(sampling, comfy.model_sampling.CONST):
        return FAMILIES["flow"]
    raise ValueError(
        f"{name} samples in a way that these nodes do not know. They work with Stable Diffusion (SD 1.x, SD 2.x, SDXL) "
        "and with flow models (SD3, Flux, Qwen-Image, Z-Image, Chroma, Lumina 2, HiDream, AuraFlow, Wan, ...)."
    )


def _check_latents(model: ModelPatcher, name: str):
    """Refuse latents that are no pictures of one shape throughout."""
    latent_format = model.model.latent_format
    kind = type(latent_format).__name__
    if latent_format.latent_dimensions == 1 or "Audio" in kind:
        raise ValueError(f"{name} works on sound or shapes ({kind}), not on pictures: these nodes edit pictures.")
    if kind.endswith("AV"):
        raise ValueError(f"{name} makes pictures and sound in one latent ({kind}), which these nodes cannot invert.")
    if kind == "HunyuanImage21Refiner":
        raise ValueError(
            f"{name} refines a finished picture, in latents of another shape than those that it is given ({kind}). "
            "Invert with the model that it refines for."
        )


def noise_scale(model: ModelPatcher) -> float:
    """Standard deviation of the noise that a model starts from, 1 but for HiDream-O1."""
    return float(getattr(model.get_model_object("model_sampling"), "noise_scale", 1.0))


def leave(model: ModelPatcher, sigma: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What a SAMPLER returns of a latent at level `sigma`, so that the next one's `noise_scaling` brings it back."""
    return model.get_model_object("model_sampling").inverse_noise_scaling(sigma, y) if float(sigma) > 0 else y


def enter(model: ModelPatcher, sigma: torch.Tensor, noise: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """The latent at level `sigma` that a SAMPLER begins with: undoes `leave` where the noise is 0."""
    return model.get_model_object("model_sampling").noise_scaling(sigma, noise.clone(), latent)


def scaling(model: ModelPatcher):
    """`sigma -> ddim.Scaling` of a MODEL, from the formulas it samples with: eps- and v-prediction alike.

    Of networks that predict neither (LCM, x0) D is taken as it is.
    """
    sampling = model.get_model_object("model_sampling")
    zero, one = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def at(sigma):
        level = torch.tensor([sigma], dtype=torch.float64)
        return Scaling(
            float(sampling.calculate_input(level, one)),
            float(sampling.calculate_denoised(level, zero, one)),
            float(sampling.calculate_denoised(level, one, zero)),
        )

    near = at(1e-6)
    return at if abs(near.c_skip - 1) < 1e-3 and 0.5 < abs(near.c_out) / 1e-6 < 2 else eps_scaling


def describe(model: ModelPatcher) -> str:
    """One line that is equal for models whose latents and networks can share an inversion (LoRA does not change it)."""
    config = model.model.model_config.unet_config
    parts = [type(model.model).__name__, type(model.model.latent_format).__name__]
    eps = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.EPS)
    if eps or "model_channels" in config:  # in the words that saved inversions hold
        parts += [f"{config.get('in_channels')} channels", f"context {config.get('context_dim')}",
                  f"width {config.get('model_channels')}"]
    else:
        parts += [f"{key} {config[key]}" for key in _SHAPE if isinstance(config.get(key), (int, str))]
    return ", ".join(parts)


def check(model: ModelPatcher, inversion: Inversion):
    """Refuse a replay of an inversion on a model it was not made with.

    Raises:
        ValueError: names both models.
    """
    kind, here = family(model), describe(model)
    if kind is not inversion.kind and here == inversion.model:
        raise ValueError(
            f"{type(model.model).__name__} samples as {kind.what} here and did as {inversion.kind.what} when the "
            "inversion was made (a ModelSampling node makes the difference). Connect the model as it was, or invert again."
        )
    if here != inversion.model:
        raise ValueError(
            "This inversion was made with another kind of model. Invert the picture again with the model that is to "
            f"edit it. (Inversion: {inversion.model}. Here: {here}.)"
        )
    latent_format, shape = model.model.latent_format, inversion.latents.shape
    if (shape[2], len(shape) - 3) != (latent_format.latent_channels, latent_format.latent_dimensions):
        raise ValueError(
            f"The inversion has latents of {shape[2]} channels in {len(shape) - 3} dimensions, this model of "
            f"{latent_format.latent_channels} in {latent_format.latent_dimensions}: it is damaged. Invert the picture again."
        )
