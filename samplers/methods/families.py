"""One sampling step as a linear update, `y_next = keep * y + take * D + up * z`.

`y` is a latent in ComfyUI's sampling space, `D` the model's prediction of the clean latent ("denoised"), `z` a noise
map. A model family differs from another only in the three coefficients, so every inversion method and every sampler
here takes the function that gives them.

Variance-exploding space (SD 1.x, SD 2.x, SDXL; eps- and v-prediction alike): `y = x / sqrt(abar)`,
`sigma = sqrt((1 - abar) / abar)`, `eps = (y - D) / sigma`.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Step:
    """Coefficients of one step; `up` is the standard deviation of the fresh noise."""

    keep: float
    take: float
    up: float


def ve_step(sigma, sigma_next, eta=1.0):
    """DDIM with stochasticity `eta` in variance-exploding space (arXiv 2010.02502, eq. 12 and 16).

    `eta` 0 is the DDIM (Euler) step, `eta` 1 the DDPM posterior (arXiv 2006.11239, eq. 7), which is what LEDITS and
    edit-friendly DDPM inversion use:

        sigma_up   = eta * sigma_next * sqrt(1 - r^2),   r = sigma_next / sigma
        sigma_down = sqrt(sigma_next^2 - sigma_up^2)
        y_next     = D + (sigma_down / sigma) * (y - D) + sigma_up * z

    At `eta` 1 that is `r^2 * y + (1 - r^2) * D + sigma_up * z`. Exact also where `sigma_next` is 0.

    Args:
        sigma, sigma_next: noise levels, `sigma > sigma_next >= 0`.
        eta: 0..1.
    """
    sigma, sigma_next = float(sigma), float(sigma_next)
    r2 = (sigma_next / sigma) ** 2
    up2 = eta**2 * sigma_next**2 * (1 - r2)
    keep = (max(sigma_next**2 - up2, 0.0)) ** 0.5 / sigma
    return Step(keep, 1 - keep, up2**0.5)


# The step function of every model family that can be inverted, by the name that an inversion carries.
FAMILIES = {"ve": ve_step}


def second_order(denoised, previous, sigma_before, sigma, sigma_next):
    """Second-order extrapolation of D for SDE-DPM-Solver++(2M) (arXiv 2211.01095; LEDITS++, arXiv 2311.16711, eq. 3).

        D~ = D + h / (2 * h_before) * (D - D_before),   h = ln(sigma / sigma_next)

    The last step to `sigma_next` 0 has infinite h and stays first order, as does a first step (`previous` None).

    Args:
        denoised, previous: D at `sigma` and at `sigma_before`, the level of the step before.
    """
    if previous is None or float(sigma_next) == 0:
        return denoised
    h = torch.log(torch.as_tensor(float(sigma) / float(sigma_next)))
    h_before = torch.log(torch.as_tensor(float(sigma_before) / float(sigma)))
    return denoised + float(h / (2 * h_before)) * (denoised - previous)
