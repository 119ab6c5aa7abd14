"""DDIM inversion and sampling (arXiv 2010.02502), and the source branches that are made from an inverted path.

A DDIM step is an Euler step of the model's ODE, up as well as down: `y_t = y_s + (sigma_t - sigma_s) * slope`, the slope
being eps in variance-exploding space and the velocity of a flow model. Its exact inverse wants the slope at y_t, which
is not known yet; see `invert` for what is taken instead.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .families import Family, slope
from .shapes import append_dims

CONVENTIONS = ("A", "B")
SOLVERS = ("Euler", "Uni-Inv", "midpoint", "FireFlow")


@dataclass(frozen=True)
class Scaling:
    """Preconditioning of a network F at a noise level: `D = c_skip * y + c_out * F(c_in * y)` (arXiv 2206.00364, eq. 7)."""

    c_in: float
    c_skip: float
    c_out: float


def eps_scaling(sigma: float) -> Scaling:
    """`Scaling` of a network that predicts eps."""
    return Scaling((sigma**2 + 1) ** -0.5, 1.0, -sigma)


def slope_below(y: torch.Tensor, sigma: float, at: float, denoise: Callable, scaling: Callable, i: int) -> torch.Tensor:
    """The slope of a latent at level `sigma`, predicted by the network at another level `at`.

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
           solver="Euler", convention="A", refinements=0, tolerance=0.0, lowest=0.0,
           regularise: Callable | None = None) -> torch.Tensor:
    """The path that sampling would take to a picture.

    From level s to the next higher t, `h = sigma_t - sigma_s`, the latent moves by h times a slope:

      - "Euler": the slope of the latent at s with the network's timestep of t (convention "A"; diffusers, null-text
        inversion, Direct Inversion, ReNoise), or of s (convention "B"; Euler over flipped sigmas);
      - "Uni-Inv" (UniEdit-Flow, arXiv 2504.13109): the slope at t of `y_s + h * slope_before`, the slope of the step
        before; the first step is Euler's;
      - "midpoint" (RF-Solver, arXiv 2411.04746): the slope at the middle of `y_s + h / 2 * slope at s`;
      - "FireFlow" (arXiv 2412.07517): the same with the last middle's slope for the one at s, in half the evaluations.

    Euler and Uni-Inv then refine y_t by fixed-point iteration (arXiv 2403.14602), `y_t <- y_s + h * slope(y_t, t)`,
    whose limit Euler sampling takes back exactly. It converges where guidance is weak (cfg up to about 3).

    Args:
        y0: the encoded picture, at the last of `sigmas`, [B, C, ...].
        sigmas: descending, [N + 1].
        denoise: `(y [B, C, ...], sigma [B], i) -> D`, i being the step between sigmas[i] and sigmas[i + 1].
        family: of the model.
        scaling: `sigma -> Scaling` of the model.
        solver: one of SOLVERS.
        refinements: iterations at each step at most, an evaluation each; midpoint and FireFlow have none.
        tolerance: a picture whose latent an iteration changes by less (root mean square, in units of a latent of unit
            variance) is done.
        lowest: the model's lowest noise level, which stands in for level 0 where the network is told the lower one.
        regularise: None, or `(noise [B, C, H, W], i) -> noise`, what the noise of every prediction is replaced by; see
            `noise_regularisation`. Sampling then takes the path back less exactly.

    Returns:
        [N + 1, B, C, ...], the last being y0.
    """
    levels = [float(s) for s in sigmas]
    second_order = solver in ("midpoint", "FireFlow")

    def regular(value, y, level, i):
        return value if regularise is None else family.change_noise(value, y, level, lambda noise: regularise(noise, i))

    def slope_at(y, level, i):
        return regular(slope(y, denoise(y, y.new_full((len(y),), level), i), level), y, level, i)

    def slope_told(y, low, at, i):
        return regular(slope_below(y, low, at, denoise, scaling, i), y, low, i)

    path, before = [y0], None
    for i in range(len(levels) - 2, -1, -1):
        (high, low), y = levels[i : i + 2], path[-1]
        h, own = high - low, max(low, min(lowest, high))
        if second_order:
            first = before if solver == "FireFlow" and before is not None else slope_told(y, low, own, i)
            before = slope_at(y + h / 2 * first, low + h / 2, i)
        elif solver == "Uni-Inv" and before is not None:
            before = slope_at(y + h * before, high, i)
        else:
            before = slope_told(y, low, own if convention == "B" and solver == "Euler" else high, i)
        guess = y + h * before
        moving = torch.ones(len(y), dtype=torch.bool, device=y.device)
        for _ in range(0 if second_order else refinements):
            better = y + h * slope_at(guess, high, i)
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
