"""Keeps the noise that an inversion predicts like Gaussian noise (pix2pix-zero, arXiv 2302.03027, section 3.1).

Noise that is correlated with itself, or not of unit variance, leads to latents that edit badly. Gradients are written
out, so nothing here needs autograd.
"""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import repeat


@dataclass(frozen=True, kw_only=True)
class NoiseRegularisation:
    """Makes eps of one step a little more like Gaussian noise: `eps' = regularisation(eps, i)`.

    As the released code: `steps` times, `rolls` steps down the gradient of the auto-correlation, each with other shifts
    and `lambda_ac / rolls` long, then one down that of the divergence, `lambda_kl` long.

    Attributes:
        lambda_ac, lambda_kl: lengths of the steps; 0 leaves a term out.
        steps, rolls: how often.
        seed: of the shifts. A step of the path draws the same ones whenever it is asked.
    """

    lambda_ac: float = 20.0
    lambda_kl: float = 20.0
    steps: int = 5
    rolls: int = 5
    seed: int = 0

    def __call__(self, eps: torch.Tensor, i: int) -> torch.Tensor:
        """eps [B, C, H, W] of path step i; every picture on its own, with the same shifts. Frames count as channels."""
        if eps.ndim == 5:
            return self(eps.flatten(1, 2), i).view_as(eps)
        draw = random.Random(f"{self.seed}, {i}")
        for _ in range(self.steps):
            for _ in range(self.rolls if self.lambda_ac else 0):
                shifts = draw_shifts(eps.shape, draw)
                eps = eps - self.lambda_ac / self.rolls * correlation_slope(eps, shifts)
            if self.lambda_kl:
                eps = eps - self.lambda_kl * divergence_slope(eps)
        return eps


def draw_shifts(shape, draw):
    """Shifts of a noise [B, C, H, W]: for every level of the pyramid one for each channel, 1 to below half a side.

    The paper's pyramid halves the noise until its side is 8 or less.
    """
    shifts, side = [], min(shape[-2:])
    while True:
        shifts.append([draw.randrange(1, max(side // 2, 2)) for _ in range(shape[1])])
        if side <= 8:
            return shifts
        side //= 2


def correlation_slope(noise: torch.Tensor, shifts: list) -> torch.Tensor:
    """Gradient of the auto-correlation [B, C, H, W].

        L = sum over levels, channels and both axes of mean(n * roll(n, shift))^2,   the next level being avg_pool(n, 2)

    Args:
        noise: [B, C, H, W].
        shifts: see `draw_shifts`.
    """
    slope, here = torch.zeros_like(noise), torch.tensor(shifts[0], device=noise.device)
    for axis in (-2, -1):
        ahead, back = _rolled(noise, here, axis), _rolled(noise, -here, axis)
        correlation = (noise * ahead).mean((-2, -1), keepdim=True)
        slope += 2 * correlation * (ahead + back) / noise[0, 0].numel()
    if len(shifts) > 1:
        below = correlation_slope(F.avg_pool2d(noise, 2), shifts[1:])
        below = repeat(below, "b c h w -> b c (h 2) (w 2)") / 4
        slope[..., : below.shape[-2], : below.shape[-1]] += below
    return slope


def _rolled(noise: torch.Tensor, shifts: torch.Tensor, axis: int):
    """`torch.roll` of every channel by a shift of its own."""
    size = noise.shape[axis]
    index = (torch.arange(size, device=noise.device) - shifts[:, None]) % size  # [C, size]
    index = index[:, :, None] if axis == -2 else index[:, None, :]
    return noise.gather(axis, index.expand(noise.shape))


def divergence_slope(noise: torch.Tensor) -> torch.Tensor:
    """Gradient of `var + mean^2 - 1 - ln(var + 1e-7)`, twice the divergence from unit Gaussian noise, by picture."""
    axes, count = tuple(range(1, noise.ndim)), noise[0].numel()
    mean, var = noise.mean(axes, keepdim=True), noise.var(axes, keepdim=True)
    return 2 * (noise - mean) / (count - 1) * (1 - 1 / (var + 1e-7)) + 2 * mean / count
