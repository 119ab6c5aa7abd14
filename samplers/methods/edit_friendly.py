"""Edit-friendly DDPM inversion (arXiv 2304.06140), the inversion of LEDITS (arXiv 2307.00522)."""

import torch

from .families import ve_step


def draw_noise(shape, levels, seed):
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


def noisy_path(y0, sigmas, noise):
    """Latents `y_i = y0 + sigma_i * n_i` with independent n_i (arXiv 2304.06140, eq. 6); the last is y0 itself.

    Args:
        y0: the encoded picture, [B, C, H, W].
        sigmas: descending, [N + 1].
        noise: [N, B, C, H, W].

    Returns:
        [N + 1, B, C, H, W].
    """
    levels = sigmas[:-1].view(-1, *[1] * y0.ndim)
    return torch.cat([y0 + levels * noise, y0[None]])


def residuals(latents, sigmas, etas, denoise, chunk=1, step=ve_step):
    """Residuals R_i = y_{i+1} - keep * y_i - take * D_i of a path (arXiv 2304.06140, eq. 5, before its division).

    The paper divides R by sigma_up to get noise maps z and drops the last; R itself needs no division, keeps the last
    step, and follows the path exactly. As the path is known beforehand, all D_i are independent of each other.

    Args:
        latents: [N + 1, B, C, H, W].
        sigmas, etas: [N + 1] and [N].
        denoise: `(y [M, C, H, W], sigma [M], i) -> D [M, C, H, W]`, called with `chunk` consecutive steps at a time
            (M = steps * B, the pictures of one step together), beginning with step i.
        chunk: steps in one call.
        step: step function of the model family.

    Returns:
        [N, B, C, H, W] on the device of `latents`.
    """
    out = torch.empty_like(latents[:-1])
    batch = latents.shape[1]
    levels = sigmas.tolist()  # read from the device once, not at every step
    for i in range(0, len(out), chunk):
        y = latents[i : min(i + chunk, len(out))]
        d = denoise(y.flatten(0, 1), sigmas[i : i + len(y)].repeat_interleave(batch), i).view_as(y)
        for j in range(len(y)):
            c = step(levels[i + j], levels[i + j + 1], float(etas[i + j]))
            out[i + j] = latents[i + j + 1] - c.keep * y[j] - c.take * d[j]
    return out
