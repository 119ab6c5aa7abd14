"""Edit-friendly DDPM inversion (arXiv 2304.06140), the inversion of LEDITS (arXiv 2307.00522)."""

from collections.abc import Callable

import torch
from einops import rearrange, repeat

from .families import Family
from .shapes import append_dims


def draw_noise(shape, levels: int, seed: int) -> torch.Tensor:
    """Independent standard normal noise for every level, float32 [levels, B, C, H, W].

    A seed means the same for ever: picture b of a batch has its own CPU generator with seed `seed + b`, and draws one
    [C, H, W] map per level in order of ascending sigma, the order of the paper's code. The returned maps are in path
    order (descending sigma).
    """
    pictures = []
    for b in range(shape[0]):
        generator = torch.Generator("cpu").manual_seed((seed + b) % 2**64)
        pictures.append(torch.stack([torch.randn(shape[1:], generator=generator) for _ in range(levels)]))
    return torch.stack(pictures, dim=1).flip(0)


def noisy_path(y0: torch.Tensor, sigmas: torch.Tensor, noise: torch.Tensor, *, family: Family) -> torch.Tensor:
    """Latents y_i of y0 and independent noises n_i (arXiv 2304.06140, eq. 6); the last is y0 itself.

    Args:
        y0: the encoded picture, [B, C, H, W].
        sigmas: descending, [N + 1].
        noise: [N, B, C, H, W].

    Returns:
        [N + 1, B, C, H, W].
    """
    levels = append_dims(sigmas[:-1], y0.ndim + 1)
    return torch.cat([family.noisy(y0, levels, noise), y0[None]])


def brownian_path(y0: torch.Tensor, sigmas: torch.Tensor, noise: torch.Tensor, *, family: Family) -> torch.Tensor:
    """As `noisy_path`, but every level adds to the noise of the one below: what the forward process draws.

    The path of CycleDiffusion (arXiv 2210.05559) and sync-SDE (arXiv 2509.24223). With a prediction equal to the picture
    its noise maps at eta 1 have the variance 1 of DDPM's own noise.
    """
    levels, path = sigmas.tolist(), [y0]
    for i in range(len(levels) - 2, -1, -1):
        path.append(family.noisier(path[-1], levels[i + 1], levels[i], noise[i]))
    return torch.stack(path[::-1])


# Where the noise of a path comes from, by the name of the choice.
PATHS = {"independent": noisy_path, "Brownian": brownian_path}
NOISES = tuple(PATHS)


def residuals(latents: torch.Tensor, sigmas: torch.Tensor, etas: torch.Tensor, denoise: Callable, chunk=1, *,
              family: Family) -> torch.Tensor:
    """Residuals R_i = y_{i+1} - keep * y_i - take * D_i of a path (arXiv 2304.06140, eq. 5, before its division).

    The paper divides R by sigma_up to get noise maps z and drops the last; R itself needs no division, keeps the last
    step, and follows the path exactly. As the path is known beforehand, all D_i are independent of each other.

    Args:
        latents: [N + 1, B, C, H, W].
        sigmas, etas: [N + 1] and [N].
        denoise: `(y [M, C, H, W], sigma [M], i) -> D [M, C, H, W]`, called with `chunk` consecutive steps at a time
            (M = steps * B, the pictures of one step together), beginning with step i.
        chunk: steps in one call.
        family: of the model.

    Returns:
        [N, B, C, H, W] on the device of `latents`.
    """
    out = torch.empty_like(latents[:-1])
    batch = latents.shape[1]
    levels = sigmas.tolist()  # read from the device once, not at every step
    for i in range(0, len(out), chunk):
        y = latents[i : min(i + chunk, len(out))]
        sigma = repeat(sigmas[i : i + len(y)], "n -> (n b)", b=batch)
        d = denoise(rearrange(y, "n b ... -> (n b) ..."), sigma, i)
        d = rearrange(d, "(n b) ... -> n b ...", b=batch)
        for j in range(len(y)):
            c = family.step(levels[i + j], levels[i + j + 1], float(etas[i + j]))
            out[i + j] = latents[i + j + 1] - c.keep * y[j] - c.take * d[j]
    return out
