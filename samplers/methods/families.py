"""Families of models: what a noise level means, and one sampling step as `y_next = keep * y + take * D + up * z`.

`y` is a latent in ComfyUI's sampling space, `D` the model's prediction of the clean latent ("denoised"), `z` a noise
map. A family knows the numbers; every inversion method and every sampler asks it and never writes them itself.

What both families share needs no object: the slope of the path that a model's ODE takes, `dy/dsigma = (y - D) / sigma`,
is eps for `VarianceExploding` and the velocity for `Flow`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Step:
    """Coefficients of one step; `up` is the standard deviation of the fresh noise."""

    keep: float
    take: float
    up: float


class Family(Protocol):
    """The numbers of one kind of model. Noise levels are ComfyUI's sigmas.

    Attributes:
        name: what an inversion is saved with.
        what: the kind of model, in words.
        highest: the highest noise level that there is.
        bounded: whether there is one, at which nothing of the picture is left.
        solver: of `ddim.SOLVERS`, what an ODE path is inverted with where nothing else is asked for.
    """

    name: str
    what: str
    highest: float
    bounded: bool
    solver: str

    def step(self, sigma: float, sigma_next: float, eta: float) -> Step:
        """From `sigma` to `sigma_next`, `sigma > sigma_next >= 0`, with stochasticity `eta` in 0..1."""

    def noisy(self, x0: torch.Tensor, sigma, noise: torch.Tensor) -> torch.Tensor:
        """The latent at level `sigma` of a clean latent and a noise; `sigma` is a number or broadcasts."""

    def noise(self, y: torch.Tensor, x0: torch.Tensor, sigma: float) -> torch.Tensor:
        """The noise in a latent at level `sigma` > 0: undoes `noisy`; with D for `x0` it is eps."""

    def noisier(self, y: torch.Tensor, sigma: float, higher: float, noise: torch.Tensor) -> torch.Tensor:
        """From level `sigma` up to `higher` by fresh noise: one step of the forward process (a Brownian path)."""

    def change_noise(self, slope: torch.Tensor, y: torch.Tensor, sigma: float, change: Callable) -> torch.Tensor:
        """The slope whose noise is `change(noise)` and whose D is as before."""

    def log_snr_gain(self, sigma: float, sigma_next: float) -> torch.Tensor:
        """By how much `ln(signal / noise)` rises from a level to the next, both > 0: a second-order solver's step."""

    def power(self, sigma):
        """Mean square of a latent at level `sigma` whose clean latent is of unit variance."""

    def input_scale(self, sigma: float) -> float:
        """A latent in units of what a U-Net of the family is given: `y = input_scale * x`."""

    def noise_map_variance(self, sigma: float, sigma_next: float, eta: float, brownian=False) -> float:
        """Variance of the noise maps of a step, were D the picture itself, see `inversion_statistics`.

        Args:
            brownian: whether the noise of `sigma` contains that of `sigma_next` (`noisier`); else they are independent.
        """


class VarianceExploding:
    """SD 1.x, SD 2.x and SDXL, eps- and v-prediction alike: `y = x0 + sigma * n`.

    In terms of the papers' variance-preserving latent x: `y = x / sqrt(abar)`, `sigma = sqrt((1 - abar) / abar)` and
    `eps = (y - D) / sigma`.
    """

    name, what, highest, bounded, solver = "ve", "a diffusion model", math.inf, False, "Euler"

    def step(self, sigma, sigma_next, eta=1.0):
        """DDIM with stochasticity `eta` (arXiv 2010.02502, eq. 12 and 16).

        `eta` 0 is the DDIM (Euler) step, `eta` 1 the DDPM posterior (arXiv 2006.11239, eq. 7), which is what LEDITS and
        edit-friendly DDPM inversion use:

            sigma_up   = eta * sigma_next * sqrt(1 - r^2),   r = sigma_next / sigma
            sigma_down = sqrt(sigma_next^2 - sigma_up^2)
            y_next     = D + (sigma_down / sigma) * (y - D) + sigma_up * z

        At `eta` 1 that is `r^2 * y + (1 - r^2) * D + sigma_up * z`. Exact also where `sigma_next` is 0.
        """
        sigma, sigma_next = float(sigma), float(sigma_next)
        r2 = (sigma_next / sigma) ** 2
        up2 = eta**2 * sigma_next**2 * (1 - r2)
        keep = (max(sigma_next**2 - up2, 0.0)) ** 0.5 / sigma
        return Step(keep, 1 - keep, up2**0.5)

    def noisy(self, x0, sigma, noise):
        return x0 + sigma * noise

    def noise(self, y, x0, sigma):
        return (y - x0) / sigma

    def noisier(self, y, sigma, higher, noise):
        return y + (float(higher) ** 2 - float(sigma) ** 2) ** 0.5 * noise

    def change_noise(self, slope, y, sigma, change):
        return change(slope)

    def log_snr_gain(self, sigma, sigma_next):
        return torch.log(torch.as_tensor(float(sigma) / float(sigma_next)))

    def power(self, sigma):
        return 1 + sigma**2

    def input_scale(self, sigma):
        return (1 + sigma**2) ** 0.5

    def noise_map_variance(self, sigma, sigma_next, eta, brownian=False):
        """`(sigma_next^2 + keep^2 * sigma^2) / sigma_up^2`; at eta 1 `(1 + r^2) / (1 - r^2)` (arXiv 2304.06140, 3).

        Of a Brownian path `2 * keep * sigma_next^2` is taken off, which leaves 1 at eta 1.
        """
        sigma, sigma_next, step = float(sigma), float(sigma_next), self.step(sigma, sigma_next, eta)
        shared = 2 * step.keep * sigma_next**2 if brownian else 0.0
        return (sigma_next**2 + step.keep**2 * sigma**2 - shared) / step.up**2


class Flow:
    """Flow matching (ComfyUI's CONST: SD3, Flux, Qwen-Image, ...): `x = (1 - s) * x0 + s * n`, s from 1 to 0.

    The network predicts the velocity `v = n - x0`; `D = x - s * v`. With `y = x / (1 - s)` and `sigma = s / (1 - s)` it
    is `VarianceExploding`; written in x, nothing is divided by 1 - s, so that s = 1 needs no case of its own.
    """

    name, what, highest, bounded, solver = "flow", "a flow model", 1.0, True, "Uni-Inv"

    def step(self, sigma, sigma_next, eta=1.0):
        """The step of `VarianceExploding` under y = x / (1 - s); at `eta` 0 the Euler step `x + (s' - s) * v`.

            r    = s' (1 - s) / (s (1 - s'))          the ratio of the two sigmas
            keep = s' / s * sqrt(1 - eta^2 (1 - r^2))
            take = (1 - s') - keep * (1 - s)
            up   = eta * s' * sqrt(1 - r^2)
        """
        s, s_next = float(sigma), float(sigma_next)
        fresh = eta**2 * (1 - (s_next * (1 - s) / (s * (1 - s_next))) ** 2)
        keep = s_next / s * math.sqrt(max(1 - fresh, 0.0))
        return Step(keep, (1 - s_next) - keep * (1 - s), s_next * math.sqrt(max(fresh, 0.0)))

    def noisy(self, x0, sigma, noise):
        return (1 - sigma) * x0 + sigma * noise

    def noise(self, y, x0, sigma):
        return (y - (1 - sigma) * x0) / sigma

    def noisier(self, y, sigma, higher, noise):
        """Finite at level 1, where nothing of the picture is left."""
        s, higher = float(sigma), float(higher)
        keep = (1 - higher) / (1 - s)
        return keep * y + math.sqrt(max(higher**2 - (keep * s) ** 2, 0.0)) * noise

    def change_noise(self, slope, y, sigma, change):
        noise = y + (1 - sigma) * slope
        return slope + (change(noise) - noise)

    def log_snr_gain(self, sigma, sigma_next):
        s, s_next = float(sigma), float(sigma_next)
        return torch.tensor(math.inf if s == 1 else math.log(s * (1 - s_next) / ((1 - s) * s_next)))

    def power(self, sigma):
        return (1 - sigma) ** 2 + sigma**2

    def input_scale(self, sigma):
        return 1.0

    def noise_map_variance(self, sigma, sigma_next, eta, brownian=False):
        """As of `VarianceExploding`, both sides of its fraction being multiplied by (1 - s')^2."""
        sigma, sigma_next, step = float(sigma), float(sigma_next), self.step(sigma, sigma_next, eta)
        shared = 2 * step.keep * sigma_next**2 * (1 - sigma) / (1 - sigma_next) if brownian else 0.0
        return (sigma_next**2 + step.keep**2 * sigma**2 - shared) / step.up**2


# Every family that can be inverted, by the name that an inversion carries.
FAMILIES: dict[str, Family] = {family.name: family for family in (VarianceExploding(), Flow())}


def slope(y: torch.Tensor, denoised: torch.Tensor, sigma) -> torch.Tensor:
    """`dy/dsigma` of a model's ODE at level `sigma`, a number or one that broadcasts: eps, or a flow's velocity."""
    return (y - denoised) / sigma


def second_order(denoised: torch.Tensor, previous: torch.Tensor | None, sigma_before, sigma, sigma_next, *,
                 family: Family) -> torch.Tensor:
    """Second-order extrapolation of D for SDE-DPM-Solver++(2M) (arXiv 2211.01095; LEDITS++, arXiv 2311.16711, eq. 3).

        D~ = D + h / (2 * h_before) * (D - D_before),   h = gain of ln(signal / noise)

    The last step to `sigma_next` 0 has infinite h and stays first order, as does a first step (`previous` None).

    Args:
        denoised, previous: D at `sigma` and at `sigma_before`, the level of the step before.
    """
    if previous is None or float(sigma_next) == 0:
        return denoised
    h, h_before = family.log_snr_gain(sigma, sigma_next), family.log_snr_gain(sigma_before, sigma)
    return denoised + float(h / (2 * h_before)) * (denoised - previous)
