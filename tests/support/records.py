"""Inversions made from the formulas alone, without a model."""
import comfy.latent_formats
import torch
from comfyui_ledits.files import inversion_file, latent_formats
from comfyui_ledits.samplers.methods.record import Inversion


def levels(steps):
    return torch.cat([torch.linspace(12.0, 0.1, steps), torch.zeros(1)])


def record(steps=6, batch=2, size=8, residuals=True, overrides=None, latent_format=None, **settings):
    """An inversion and the predictions [N, B, C, H, W] its residuals were made from, by the formula, in float64."""
    g = torch.Generator().manual_seed(3)
    sigmas, shape = levels(steps), (batch, 4, size, size)
    picture, noise = torch.randn(shape, generator=g), torch.randn(steps, *shape, generator=g)
    latents = torch.cat([picture + sigmas[:-1].view(-1, 1, 1, 1, 1) * noise, picture[None]])
    predictions = picture + 0.1 * torch.randn(steps, *shape, generator=g)
    r2 = ((sigmas[1:].double() / sigmas[:-1].double()) ** 2).view(-1, 1, 1, 1, 1)
    rest = (latents[1:] - r2 * latents[:-1] - (1 - r2) * predictions).float()
    made = Inversion(
        sigmas=sigmas, latents=latents, residuals=rest if residuals else None,
        etas=torch.ones(steps) if residuals else torch.zeros(steps), family="ve", model="BaseModel, SD15",
        method="edit-friendly DDPM", settings=settings, overrides=overrides or {},
        latent_format=latent_format or comfy.latent_formats.SD15(),
    )
    return made, predictions


def saved(path, inversion, half=False):
    """The inversion after a file, and what `save` says."""
    cost = inversion_file.save(path, inversion, latent_formats.describe(inversion.latent_format), half)
    return inversion_file.load(path, latent_formats.make), cost
