"""Kinds of networks: their blocks, where tokens lie, how to reach them."""

from . import joint, unet
from .joint import Joint
from .unet import UNet

Backbone = UNet | Joint


def of(model) -> Backbone:
    """The backbone of a `BaseModel`.

    Raises:
        ValueError: a network that is not known.
    """
    for kind, made in ((unet, UNet), (joint, Joint)):
        if kind.known(model):
            return made(model)
    raise ValueError(
        f"Attention control does not know how {type(model).__name__} ({type(model.diffusion_model).__name__}) lays out its "
        "attention. It knows SD 1.x, SD 2.x, SDXL, SD3 and SD3.5, Flux, Chroma, Qwen-Image, Z-Image, Lumina 2, HiDream I1, "
        "AuraFlow, HunyuanVideo and Wan (text to video), and checkpoints made from them. On other models edit with a "
        "target prompt alone (LEDITS KSampler or FlowEdit), with concepts and with a mask."
    )
