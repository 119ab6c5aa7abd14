"""DDIM inversion and sampling (arXiv 2010.02502), and the source branches that are made from an inverted path.

A DDIM step is an Euler step in variance-exploding space, up as well as down: `y_t = y_s + (sigma_t - sigma_s) * eps`.
Its exact inverse wants eps at y_t, which is not known yet; see `invert` for what is taken instead.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .families import Family
from .shapes import append_dims

CONVENTIONS = ("A", "B")


@dataclass(frozen=True)
class Scaling:
    """Preconditioning of a network F at a noise level: `D = c_skip * y + c_out * F(c_in * y)` (arXiv 2206.00364, eq. 7)."""

    c_in: float
    c_skip: float
    c_out: float


def eps_scaling(sigma: float) -> Scaling:
    """`Scaling` of a network that predicts eps."""
    return Scaling((sigma**2 + 1) ** -0.5, 1.0, -sigma)


def eps_below(y: torch.Tensor, sigma: float, at: float, denoise: Callable, scaling: Callable, i: int) -> torch.Tensor:
    """eps of a latent at level `sigma`, predicted by the network at another level `at`.

    The network sees the variance-preserving latent of `sigma` and the timestep of `at`; its answer is read at `sigma`
    (diffusers' DDIMInverseScheduler does so too, which matters for v-prediction). Nothing is divided by `sigma`, so it
    may be 0.

    Args:
        y: [B, C, H, W].
        denoise: `(y [B, C, H, W], sigma [B], i) -> D`.
        scaling: `sigma -> Scaling` of the model.
        i: the step, handed on.
    """
    level = max(sigma, 1e-6)  # the limit at 0
    here, other = scaling(level), scaling(at)
    fed = y * (here.c_in / other.c_in)
    output = (denoise(fed, y.new_full((len(y),), at), i) - other.c_skip * fed) / other.c_out
    return (1 - here.c_skip) / level * y - here.c_out / level * output


def invert(y0: torch.Tensor, sigmas: torch.Tensor, denoise: Callable, *, family: Family, scaling: Callable,
           convention="A", refinements=0, tolerance=0.0, lowest=0.0,
           regularise: Callable | None = None) -> torch.Tensor:
    """The path that DDIM sampling would take to a picture.

    From level s to the next higher t it takes eps of the latent at s with the network's timestep
      - of t (convention "A"; diffusers, null-text inversion, Direct Inversion, ReNoise), or
      - of s (convention "B"; Euler over flipped sigmas),
    then refines y_t by fixed-point iteration (arXiv 2403.14602), `y_t <- y_s + (sigma_t - sigma_s) * eps(y_t, t)`,
    whose limit DDIM sampling takes back exactly. It converges where guidance is weak (cfg up to about 3).

    Args:
        y0: the encoded picture, at the last of `sigmas`, [B, C, H, W].
        sigmas: descending, [N + 1].
        denoise: `(y [B, C, H, W], sigma [B], i) -> D`, i being the step between sigmas[i] and sigmas[i + 1].
        family: of the model.
        scaling: `sigma -> Scaling` of the model.
        refinements: iterations at each step at most, an evaluation each.
        tolerance: a picture whose latent an iteration changes by less (root mean square, in units of a latent of unit
            variance) is done.
        lowest: the model's lowest noise level, which stands in for level 0 in convention B.
        regularise: None, or `(eps [B, C, H, W], i) -> eps`, what every prediction is replaced by; see
            `noise_regularisation`. Sampling then takes the path back less exactly.

    Returns:
        [N + 1, B, C, H, W], the last being y0.
    """
    levels = [float(s) for s in sigmas]
    regularise = regularise or (lambda eps, i: eps)
    path = [y0]
    for i in range(len(levels) - 2, -1, -1):
        (high, low), y = levels[i : i + 2], path[-1]
        at = high if convention == "A" else max(low, min(lowest, high))
        guess = y + (high - low) * regularise(eps_below(y, low, at, denoise, scaling, i), i)
        moving = torch.ones(len(y), dtype=torch.bool, device=y.device)
        for _ in range(refinements):
            eps = family.noise(guess, denoise(guess, y.new_full((len(y),), high), i), high)
            better = y + (high - low) * regularise(eps, i)
            change = (better - guess).flatten(1).pow(2).mean(1).sqrt() / family.power(high) ** 0.5
            guess = torch.where(append_dims(moving, y.ndim), better, guess)
            moving = moving & (change >= tolerance)
            if tolerance > 0 and not moving.any():
                break
        path.append(guess)
    return torch.stack(path[::-1])


def simulate(path: torch.Tensor, sigmas: torch.Tensor, denoise: Callable, scale=0.0, every=1, *,
             family: Family) -> torch.Tensor:
    """A source branch that is sampled from the path's noisiest latent and, now and then, drawn back to the path.

    After every step i with `i % every == 0` the branch moves by `scale` of what it lacks of the path. 0 is plain DDIM
    sampling, as in papers before Direct Inversion (arXiv 2310.01506); 1 at every step gives the path itself, which is
    Direct Inversion; between lie the ablations of its table.

    Args:
        path: [N + 1, B, C, H, W].
        sigmas: descending, [N + 1].
        denoise: `(y [B, C, H, W], sigma [B], i) -> D`, with the guidance of the edit.

    Returns:
        [N + 1, B, C, H, W].
    """
    levels = [float(s) for s in sigmas]
    branch = [path[0]]
    for i in range(len(levels) - 1):
        y, c = branch[-1], family.step(levels[i], levels[i + 1], 0.0)
        y = c.keep * y + c.take * denoise(y, y.new_full((len(y),), levels[i]), i)
        branch.append(y + scale * (path[i + 1] - y) if scale and i % every == 0 else y)
    return torch.stack(branch)


def one_noise_path(y0: torch.Tensor, sigmas: torch.Tensor, noise: torch.Tensor, *, family: Family) -> torch.Tensor:
    """The path of SDEdit (arXiv 2108.01073): the picture with the same noise at every level.

    Args:
        y0, noise: [B, C, H, W].
        sigmas: [N + 1].
    """
    return family.noisy(y0, append_dims(sigmas.to(y0), y0.ndim + 1), noise)
