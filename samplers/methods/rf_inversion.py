"""RF-Inversion (arXiv 2410.10792): an ODE path that is drawn to one noise, and an edit that is drawn to the picture.

The paper runs time the other way (t = 1 - s) and its velocity has the other sign. The released diffusers pipeline tells
the network levels that are not those it integrates over; here both are the same.
"""

from collections.abc import Callable

import torch

from .ddim import slope_below
from .record import Inversion


def invert(x0: torch.Tensor, sigmas: torch.Tensor, denoise: Callable, noise: torch.Tensor, gamma: float, *,
           scaling: Callable, lowest=0.0) -> torch.Tensor:
    """The controlled forward ODE (arXiv 2410.10792, eq. 8) of a flow model, from the picture up to noise.

        x+ = x + (s+ - s) * ((1 - gamma) * v(x, s) + gamma * (noise - x) / (1 - s))

    Args:
        x0: the encoded picture, [B, C, ...].
        sigmas: descending, [N + 1], none above 1.
        denoise: `(x [B, C, ...], s [B], i) -> D`.
        noise: what the path is drawn to, [B, C, ...].
        gamma: 0 follows the model, 1 goes straight to the noise.
        scaling: `s -> ddim.Scaling` of the model.
        lowest: the model's lowest noise level, which stands in for level 0.

    Returns:
        [N + 1, B, C, ...], the last being x0.
    """
    levels, path = [float(s) for s in sigmas], [x0]
    for i in range(len(levels) - 2, -1, -1):
        (high, low), x = levels[i : i + 2], path[-1]
        v = slope_below(x, low, max(low, min(lowest, high)), denoise, scaling, i)
        path.append(x + (high - low) * ((1 - gamma) * v + gamma * (noise - x) / (1 - low)))
    return torch.stack(path[::-1])


class HoldPicture:
    """A `sampler_post_cfg_function` that draws predictions to the picture in a window of steps (eq. 15).

    The paper's controlled velocity `v + eta * (v_picture - v)` is an ordinary step with `D + eta * (picture - D)`; what
    stands for the picture on a path with noise maps, see `Inversion.goal`.

    Args:
        inversion: whose picture.
        strength: eta, 0..1; at 1 the step follows the picture alone.
        start, stop: the window, as shares of the inversion's steps.
        decay: `strength * (1 - share of the steps)^decay`; 0 keeps it as it is.
    """

    def __init__(self, inversion: Inversion, strength: float, start=0.0, stop=0.25, decay=0.0):
        if stop <= start:
            raise ValueError(f"The window from {start:g} to {stop:g} is empty: stop must be above start.")
        self.inversion, self.strength, self.start, self.stop, self.decay = inversion, strength, start, stop, decay

    def __call__(self, args):
        d, path = args["denoised"], self.inversion
        if path.latents.shape[2:] != d.shape[1:] or path.batch not in (1, len(d)):
            raise ValueError(
                f"Hold to Picture has an inversion of shape {list(path.latents.shape[1:])}, but the latent that is sampled has "
                f"{list(d.shape)}: connect the inversion that is edited."
            )
        sigma = float(args["sigma"].flatten()[0])
        share = int((path.sigmas > sigma * (1 + 1e-3)).sum()) / path.steps
        if not self.start <= share < self.stop:
            return d
        return d + self.strength * (1 - share) ** self.decay * (path.goal(sigma).to(d) - d)
