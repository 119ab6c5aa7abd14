"""Pictures and masks that some models take as a part of their input: inpainting checkpoints, Flux Fill, some video models.

What such a model predicted along a path holds for the picture and the mask that it was given then. An edit that gives it
others would compare two different questions.
"""

import comfy.sampler_helpers
import comfy.samplers
import torch
from einops import rearrange

from ..attention_hooks.conditioning import equal_but
from .methods.record import Inversion
from .phased import Run


def shaped_mask(mask: torch.Tensor, pictures: int, draws: int, frames: bool) -> torch.Tensor:
    """A MASK [M, h, w] as core's `denoise_mask` is given, so that several masks are those of their pictures.

    Args:
        mask: [M, h, w], or [B, 1, T, h, w] as it is.
        frames: whether latents have them; core takes several masks as frames, which they are of one video alone.
    """
    if mask.ndim == 5 or len(mask) != pictures or pictures == 1:
        return mask
    mask = mask.repeat(draws, 1, 1)
    return rearrange(mask, "b h w -> b 1 1 h w") if frames else mask


def check_levels_are_one(run: Run):
    """Refuse a mask that tells the model which frames are clean (Wan 2.2 5B, LTXV): on a path none of them is.

    Raises:
        ValueError: what to do without it.
    """
    entries = [entry for cond in run.guider.conds.values() for entry in cond or ()]
    if any("denoise_mask" in entry.get("model_conds", {}) for entry in entries):
        raise ValueError(
            f"{type(run.guider.inner_model).__name__} takes the mask of a latent as an input (frames that are given clean), "
            "and along a path no frame is. Disconnect the mask; to keep a part of the picture, composite the result over "
            "the source."
        )


def check(run: Run, path: Inversion):
    """Refuse an edit whose picture and mask are an input of the model, and are not those of the inversion.

    Raises:
        ValueError: what to connect.
    """
    check_levels_are_one(run)
    concat = {name: cond for name, cond in run.guider.conds.items()
              if any("c_concat" in entry.get("model_conds", {}) for entry in cond or ())}
    if not concat:
        return
    mask = None
    if path.mask is not None:
        mask = shaped_mask(path.mask, path.pictures, path.draws, path.latents.ndim == 6)
        mask = comfy.sampler_helpers.prepare_mask(mask, run.noise.shape, run.device)
    picture = path.latents[-1].to(run.device)
    for name, entries in concat.items():
        here = _encoded(run, name, entries, run.latent_image, run.denoise_mask)
        before = _encoded(run, name, entries, picture, mask)
        if not all(map(equal_but, here, before)):
            raise ValueError(
                f"{type(run.guider.inner_model).__name__} takes picture and mask as an input, and these are not the "
                "inversion's: give the mask to the LATENT that is inverted (Set Latent Noise Mask) and none to the edit, and "
                "edit with LEDITS KSampler; or give picture and mask by InpaintModelConditioning, to both."
            )


def _encoded(run: Run, name: str, entries: list[dict], latent_image, denoise_mask) -> list[dict]:
    """What the model adds to its input for each entry, by a picture and a mask."""
    bare = [{**entry, "model_conds": {}} for entry in entries]
    encoded = comfy.samplers.encode_model_conds(
        run.guider.inner_model.extra_conds, bare, run.noise, run.device, name, latent_image=latent_image,
        denoise_mask=denoise_mask, seed=run.extra_args.get("seed"),
    )
    return [{key: value for key, value in entry["model_conds"].items() if key == "c_concat"} for entry in encoded]
