"""What this pack has to know of a ComfyUI MODEL."""

import comfy.model_sampling


def family(model):
    """Key of `steps.FAMILIES` for a MODEL.

    Raises:
        ValueError: a model whose step is another (flow models: SD3, Flux, ...).
    """
    if not isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.EPS):
        raise ValueError(
            f"{type(model.model).__name__} is not a diffusion model of the Stable Diffusion kind (SD3 and Flux, for "
            "example, are flow models). These nodes work with SD 1.x, SD 2.x, SDXL and checkpoints made from them."
        )
    return "ve"


def describe(model):
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


def check(model, inversion):
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
