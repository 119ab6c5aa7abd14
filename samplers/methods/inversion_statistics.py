"""Measures of an inversion that need no model: its noise against theory, and how exactly it replays."""

from dataclasses import dataclass

import torch

from .record import Inversion


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Noise of an inversion at each of K places of its path.

    Attributes:
        what: "noise maps" z, or for a method without them "noise in the path", (y_i - y_N) / sigma_i.
        steps: list of K step numbers.
        norms: float64 [K, B], Euclidean norm over the C * H * W numbers of a picture.
        variances: float64 [K, B], over the same numbers.
        expected: float64 [K], the variance in theory.
        numbers: C * H * W; the norm in theory is `sqrt(numbers * expected)`.
    """

    what: str
    steps: list
    norms: torch.Tensor
    variances: torch.Tensor
    expected: torch.Tensor
    numbers: int

    @property
    def expected_norms(self):
        """float64 [K]."""
        return (self.numbers * self.expected).sqrt()


def noise(inversion: Inversion) -> Noise:
    """Noise statistics, see `Noise`.

    Theory for noise maps: in edit-friendly inversion the noises of neighbouring levels are independent, so that, with
    a prediction D equal to the picture, `sigma_up * z = sigma_p * n' - keep * sigma * n` and

        Var z = (sigma_p^2 + keep^2 * sigma^2) / sigma_up^2,   at eta 1:  (1 + r^2) / (1 - r^2),   r = sigma_p / sigma

    (arXiv 2304.06140, section 3: larger than the 1 of DDPM's own noise). Errors of D add to it. Steps without noise
    (sigma_up 0) are left out. Theory for the noise in a path is 1, and at eta 1 for the noise maps of a Brownian path,
    whose noise is DDPM's own. A model that starts from larger noise (`settings["noise_scale"]`) has all of it larger.
    """
    unit = inversion.settings.get("noise_scale", 1.0) ** 2
    brownian = inversion.settings.get("noise") == "Brownian"
    steps = [i for i in range(inversion.steps) if inversion.residuals is not None and inversion.step(i).up > 0]
    if steps:
        values = [inversion.residuals[i].double() / inversion.step(i).up for i in steps]
        levels, etas = inversion.sigmas, inversion.etas
        expected = [unit * inversion.kind.noise_map_variance(levels[i], levels[i + 1], float(etas[i]), brownian)
                    for i in steps]
        what = "noise maps"
    else:
        steps = list(range(inversion.steps))
        picture, levels = inversion.latents[-1], inversion.sigmas.tolist()
        values = [inversion.kind.noise(inversion.latents[i].double(), picture, levels[i]) for i in steps]
        expected, what = [unit] * len(steps), "noise in the path"
    flat = [v.flatten(1) for v in values]
    return Noise(
        what=what,
        steps=steps,
        norms=torch.stack([v.norm(dim=1) for v in flat]),
        variances=torch.stack([v.var(1, False) for v in flat]),
        expected=torch.tensor(expected, dtype=torch.float64),
        numbers=flat[0].shape[1],
    )


def replay_errors(inversion: Inversion) -> torch.Tensor:
    """Distance of a replay from the path after each step, [N, B]: RMS of the difference / RMS of the picture.

    The replay is the sampler's own float32 arithmetic from `latents[0]` with the predictions that the record implies,
    so this is what rounding alone costs. A path without noise maps is the source branch itself and has no error.
    """
    errors = torch.zeros(inversion.steps, inversion.batch, dtype=torch.float64)
    if inversion.residuals is None:
        return errors
    size = rms(inversion.latents[-1]).clamp(min=1e-12)
    y = inversion.latents[0].float()
    for i in range(inversion.steps):
        c = inversion.step(i)
        y = c.keep * y + c.take * inversion.denoised(i) + inversion.residuals[i]
        errors[i] = rms(y - inversion.latents[i + 1]) / size
    return errors


def predictions(inversion: Inversion, i: int) -> torch.Tensor:
    """The clean latent that step i heads for, [B, C, H, W]: D_i, or the same solved from a path without noise maps."""
    d = inversion.denoised(i)
    if d is not None:
        return d
    c = inversion.step(i)
    return (inversion.latents[i + 1] - c.keep * inversion.latents[i]) / c.take


def rms(values: torch.Tensor) -> torch.Tensor:
    """Root mean square of every picture, float64 [B]."""
    return values.double().square().flatten(1).mean(1).sqrt()
