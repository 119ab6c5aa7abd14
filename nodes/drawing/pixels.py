"""Pictures as tensors and as PIL images."""

import numpy
import torch
from PIL import Image


def to_image(picture: torch.Tensor) -> Image.Image:
    """A float picture [H, W, 3] in 0..1, values beyond clipped."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().cpu().numpy())


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An image as float32 [H, W, 3] in 0..1, on the CPU."""
    return torch.from_numpy(numpy.asarray(image, numpy.float32) / 255)


def to_batch(images: list[Image.Image]) -> torch.Tensor:
    """Images of one size as IMAGE [B, H, W, 3], on the CPU."""
    return torch.stack([to_tensor(image) for image in images])


def decoded(vae, samples: torch.Tensor) -> torch.Tensor:
    """A LATENT's samples as IMAGE [B, H, W, 3], as VAE Decode gives it: frames of a video one after another."""
    pictures = vae.decode(samples)
    return pictures.flatten(0, 1) if pictures.ndim == 5 else pictures
