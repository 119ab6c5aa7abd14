"""Checks and descriptions of a ComfyUI MODEL."""

import comfy.model_sampling
import torch
from comfy.model_patcher import ModelPatcher

from .methods.ddim import Scaling, eps_scaling
from .methods.families import FAMILIES, Family
from .methods.record import Inversion


def family(model: ModelPatcher) -> Family:
    """The family of a MODEL.

    Raises:
        ValueError: a model whose step is another (flow models: SD3, Flux, ...).
    """
    if not isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.EPS):
        raise ValueError(
            f"{type(model.model).__name__} is not a diffusion model of the Stable Diffusion kind (SD3 and Flux, for "
            "example, are flow models). These nodes work with SD 1.x, SD 2.x, SDXL and checkpoints made from them."
        )
    return FAMILIES["ve"]


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
    parts = [
        type(model.model).__name__,
        type(model.model.latent_format).__name__,
        f"{config.get('in_channels')} channels",
        f"context {config.get('context_dim')}",
        f"width {config.get('model_channels')}",
    ]
    return ", ".join(str(p) for p in parts)


def check(model: ModelPatcher, inversion: Inversion):
    """Refuse a replay of an inversion on a model it was not made with.

    Raises:
        ValueError: names both models.
    """
    family(model)
    here = describe(model)
    if here != inversion.model:
        raise ValueError(
            "This inversion was made with another kind of model. Invert the picture again with the model that is to "
            f"edit it. (Inversion: {inversion.model}. Here: {here}.)"
        )
