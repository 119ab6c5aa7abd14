"""Proximal guidance (arXiv 2306.05414): guidance acts only where it is strong, so that the rest of a picture stays.

As a MODEL patch it goes with every guider and sampler. All of it is written on D: a threshold that is a quantile is the
same for differences of D and of eps.
"""

import torch
import torch.nn.functional as F

from .record import Inversion
from .shapes import append_dims

KINDS = ("soft", "hard")
RELEASED = "picture (released)"
HOLDS = ("nothing", "picture", "path", RELEASED)


def shrink(delta: torch.Tensor, quantile: float, kind="soft"):
    """Guidance without its weak parts, and the threshold, for each picture its own.

    Args:
        delta: `D_p - D_u` or the same of eps, [B, C, H, W].
        quantile: share of |delta| that becomes 0, 0..1; 0 leaves all as it is.
        kind: "soft" takes the threshold off the rest too (the reference code's "l0"), "hard" leaves it as it is.

    Returns:
        [B, C, H, W] and [B, 1, 1, 1].
    """
    size = delta.abs()
    threshold = torch.quantile(size.float().flatten(1), quantile, dim=1) if quantile > 0 else size.new_zeros(len(size))
    threshold = append_dims(threshold.to(delta), delta.ndim)
    if kind == "soft":
        return delta.sign() * (size - threshold).clamp(min=0), threshold
    return torch.where(size > threshold, delta, torch.zeros_like(delta)), threshold


def edited(delta: torch.Tensor, threshold: torch.Tensor, radius: int) -> torch.Tensor:
    """1 where thresholded guidance still exceeds its threshold or is within `radius` of such a place, else 0."""
    mask = (delta.abs() > threshold).to(delta.dtype)
    if not radius:
        return mask
    frames = mask.flatten(1, -3)  # channels, and the frames of a video
    return F.max_pool2d(frames, 2 * radius + 1, stride=1, padding=radius).view_as(mask)


class Proximal:
    """A `sampler_pre_cfg_function` that thresholds guidance. At cfg 1 there is none, and nothing is done.

    With `hold`, from the noise level `start` on, what lies outside of the edit is drawn to the source: to the
    "picture" (reconstruction guidance: D moves by `strength` towards `Inversion.goal`), to the "path" (inversion guidance: the
    latent that a step of the path's own kind leads to moves by `strength` towards the stored one), or to the picture as the
    released code has it: the x0 of the step moves by `strength`, and its noise stays that of the prediction, which is 1 / take
    times as far for D.

    Args:
        quantile, kind: see `shrink`.
        hold: one of HOLDS.
        inversion: the source; not needed where nothing is held.
        strength: 0..1.
        start: noise level; above it nothing is held.
        radius: of the dilation of the edit, in latent pixels.
    """

    def __init__(self, quantile, kind="soft", hold="nothing", inversion: Inversion | None = None, strength=0.1,
                 start=0.0, radius=1):
        if hold != "nothing" and inversion is None:
            raise ValueError(f"To hold to the {hold}, the inversion is needed: connect it, or set hold to 'nothing'.")
        self.quantile, self.kind, self.hold, self.inversion = quantile, kind, hold, inversion
        self.strength, self.start, self.radius = strength, start, radius

    def __call__(self, args):
        positive, negative, *others = args["conds_out"]
        if any(cond is None for cond in args["conds"][:2]):
            return args["conds_out"]
        delta, threshold = shrink(positive - negative, self.quantile, self.kind)
        sigma = float(args["sigma"].flatten()[0])
        if self.hold != "nothing" and sigma <= self.start:
            d = negative + args["cond_scale"] * delta
            goal = self._goal(args["input"], sigma).to(d)
            moved = self.strength * (1 - edited(delta, threshold, self.radius)) * (goal - d)
            negative = negative + (moved if self.hold != RELEASED else self._in_d(moved, sigma, args["model_options"]))
        return [negative + delta, negative, *others]

    def _goal(self, y: torch.Tensor, sigma: float):
        """The D that holds the source, [B, C, H, W]."""
        path = self.inversion
        if path.latents.shape[2:] != y.shape[1:] or path.batch not in (1, len(y)):
            raise ValueError(
                f"Proximal Guidance holds to an inversion of shape {list(path.latents.shape[1:])}, but the latent that "
                f"is sampled has {list(y.shape)}: connect the inversion that is edited."
            )
        if self.hold in ("picture", RELEASED):
            return path.goal(sigma)
        i = path.step_at(sigma)
        if i is None:
            raise ValueError(
                "Proximal Guidance holds to the inversion's path, but the sampler runs on other noise levels: use the "
                "inversion's own SIGMAS, or hold to the picture."
            )
        step = path.step(i)
        following, rest = path.latents[i + 1].to(y), path.residual(i).to(y)
        y = y if path.shifts is None else y - path.shifts[i].to(y)  # what the model sees is not what the step starts from
        return (following - step.keep * y - rest) / step.take

    def _in_d(self, moved: torch.Tensor, sigma: float, options: dict) -> torch.Tensor:
        """By how much D moves for the x0 of a step from `sigma` to move by `moved` while its noise stays, [B, C, H, W].

        The next level is the schedule's; stochasticity that of the path's own step, elsewhere none.
        """
        path = self.inversion
        levels = options.get("transformer_options", {}).get("sample_sigmas", path.sigmas)
        following = max((level for level in levels.tolist() if level < sigma * (1 - 1e-4)), default=0.0)
        i = path.step_at(sigma)
        own = i is not None and abs(float(path.sigmas[i + 1]) - following) <= 1e-3 * sigma
        step = path.kind.step(sigma, following, float(path.etas[i]) if own else 0.0)
        return path.kind.noisy(moved, following, torch.zeros_like(moved)) / step.take
