"""The record that every inversion method fills: a path of latents, and what replays it."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .families import FAMILIES, Family, Step
from .shapes import append_dims


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """A picture as a path through noise levels.

    Attributes:
        sigmas: float32 [N + 1], strictly descending, in the sampling space's own units.
        latents: float32 [N + 1, B, C, H, W], of video models [N + 1, B, C, T, H, W], the latent at every sigma, in the
            model's own latent space (after `process_latent_in`). `latents[-1]` is the encoded picture (of a source
            branch that was sampled anew, what became of it).
        residuals: float32 [N, B, C, H, W] or None. `residuals[i] = latents[i + 1] - keep * latents[i] - take * D_i` is
            the scaled noise `sigma_up * z` of step i: adding it to a step with the same D follows the path exactly.
        shifts: float32 [N, B, C, H, W] or None: what is added to the latent of step i before the model sees it, so
            that D_i is the prediction at `latents[i] + shifts[i]` (DirectEdit, arXiv 2605.02417).
        etas: float32 [N], the stochasticity that each residual was made for.
        family: name of the kind of model, a key of `families.FAMILIES`; `kind` is the object.
        model: description of the model the path was made with (`models.describe`); a replay on another is refused.
        method: name of the method, for people.
        settings: what it was made with, for people and files. Plain values only.
        overrides: per-step embeddings that the method learned or fixed, applied while its path is edited:
            "negative" [N or 1, B or 1, tokens, width] is what the negative's cross-attention sees at each step,
            "negative_pooled" [B or 1, width] its pooled text, "negative.<key>" [B or 1, ...] what else a prompt of a
            flow model holds (`negative_prompt.BESIDE_WORDS`), "value" [N, B or 1, 2, tokens, width] a scale and a
            shift of the positive's words, for `to_v` of cross-attention alone.
        latent_format: the model's `comfy.latent_formats` object, whose `process_out` leads back to a LATENT.
        mask: MASK [M, h, w] that came with the picture's LATENT (Set Latent Noise Mask), or None; edits that are given
            none take it.
    """

    sigmas: torch.Tensor
    latents: torch.Tensor
    residuals: torch.Tensor | None = None
    shifts: torch.Tensor | None = None
    etas: torch.Tensor
    family: str
    model: str
    method: str
    settings: dict = field(default_factory=dict)
    overrides: dict = field(default_factory=dict)
    latent_format: Any = None
    mask: torch.Tensor | None = None

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"Unknown model family '{self.family}': this version knows {', '.join(FAMILIES)}.")
        check_sigmas(self.sigmas, self.kind)
        steps = len(self.sigmas) - 1
        if self.latents.shape[0] != steps + 1:
            raise ValueError(f"The path has {self.latents.shape[0]} latents for {steps + 1} sigmas.")
        if self.residuals is not None and self.residuals.shape != (steps, *self.latents.shape[1:]):
            raise ValueError(
                f"The noise maps have shape {list(self.residuals.shape)}; "
                f"this path needs {[steps, *self.latents.shape[1:]]}."
            )
        if self.shifts is not None and self.shifts.shape != (steps, *self.latents.shape[1:]):
            raise ValueError(f"The input shifts have shape {list(self.shifts.shape)}, which does not fit the path.")
        for name in ("latents", "residuals", "shifts"):
            value = getattr(self, name)
            # the smallest and largest number are NaN or infinite if any is, and need no copy of the path
            if value is not None and value.numel() and not torch.isfinite(torch.stack(value.aminmax())).all():
                raise ValueError(f"The inversion's {name} hold NaN or infinite numbers: invert the picture again.")

    @property
    def steps(self) -> int:
        """Number of steps N."""
        return len(self.sigmas) - 1

    @property
    def batch(self) -> int:
        """Number of latents B of a level: pictures times draws."""
        return self.latents.shape[1]

    @property
    def draws(self) -> int:
        """Paths of every picture that are edited as one (FlowEdit's n_avg): B is (draws, pictures), draws first."""
        return int(self.settings.get("draws", 1))

    @property
    def pictures(self) -> int:
        """Number of pictures."""
        return self.batch // self.draws

    @property
    def kind(self) -> Family:
        """The numbers of the kind of model that the path was made with."""
        return FAMILIES[self.family]

    def step(self, i: int) -> Step:
        """Coefficients of step i (from `sigmas[i]` to `sigmas[i + 1]`)."""
        return self.kind.step(self.sigmas[i], self.sigmas[i + 1], float(self.etas[i]))

    def residual(self, i: int) -> torch.Tensor:
        """Residual of step i [B, C, H, W]; zeros where the method has none."""
        return torch.zeros_like(self.latents[0]) if self.residuals is None else self.residuals[i]

    def denoised(self, i: int) -> torch.Tensor | None:
        """The source prediction D_i [B, C, H, W] that the residual of step i was made from.

        Solved from the definition of the residual, so it need not be stored; None where the method has no residuals.
        """
        if self.residuals is None:
            return None
        step = self.step(i)
        return (self.latents[i + 1] - self.residuals[i] - step.keep * self.latents[i]) / step.take

    def step_at(self, sigma: float) -> int | None:
        """The step that starts at a noise level; None where none does."""
        i = int((self.sigmas[:-1] - sigma).abs().argmin())
        return i if abs(float(self.sigmas[i]) - sigma) <= 1e-3 * sigma else None

    def goal(self, sigma: float) -> torch.Tensor:
        """The D at a noise level that holds the picture, [B, C, H, W]: the picture.

        Noise maps lead from what the model predicted along the path to the picture: where a step has one, that is D_i.
        """
        i = None if self.residuals is None else self.step_at(sigma)
        return self.latents[-1] if i is None else self.denoised(i)

    def with_eta(self, eta: float) -> "Inversion":
        """The same path for another stochasticity at every step, made anew from the predictions that it implies.

        `R_i = latents[i + 1] - keep * latents[i] - take * D_i` with the coefficients of `eta`; no model is asked, as D_i
        does not depend on eta. At eta 0 edits made early last to the end, at 1 they fade (0 is FlowEdit's).

        Raises:
            ValueError: eta is not between 0 and 1, or the path has no residuals.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta:g}: choose a number from 0 to 1.")
        if self.residuals is None:
            raise ValueError(
                f"'{self.method}' has no noise maps, which an edit at an eta of its own needs (FlowEdit's is 0): invert with "
                "Edit-Friendly DDPM Inversion or FlowEdit Source, or leave eta as inverted."
            )
        out = replace(self, etas=torch.full_like(self.etas, float(eta)))
        if torch.equal(out.etas, self.etas):
            return self
        rest = torch.empty_like(self.residuals)
        for i in range(self.steps):
            c = out.step(i)
            rest[i] = self.latents[i + 1] - c.keep * self.latents[i] - c.take * self.denoised(i)
        return replace(out, residuals=rest)

    def noise_maps(self) -> torch.Tensor:
        """The noise maps z = residual / sigma_up, float32 [N, B, C, H, W].

        Where sigma_up is 0 (the last step, and every step at eta 0) no z exists, and the map is the residual itself.
        """
        if self.residuals is None:
            raise ValueError(f"'{self.method}' has no noise maps: only edit-friendly inversions do.")
        return self.residuals / self._up()

    def with_parts(self, latents: torch.Tensor, noise_maps: torch.Tensor | None = None,
                   sigmas: torch.Tensor | None = None) -> "Inversion":
        """The same record with another path, noise maps (undoes `noise_maps`) or noise levels.

        Args:
            latents: [N + 1, B, C, H, W].
            noise_maps: [N, B, C, H, W], or None for none.
            sigmas: [N + 1], or None to keep them.
        """
        changed = replace(self, sigmas=self.sigmas if sigmas is None else sigmas.float().cpu(), latents=latents)
        return replace(changed, residuals=None if noise_maps is None else noise_maps * changed._up())

    def _up(self):
        up = torch.tensor([self.step(i).up or 1.0 for i in range(self.steps)], dtype=torch.float32)
        return append_dims(up, self.latents.ndim)

    def start_of(self, sigmas: torch.Tensor) -> int:
        """The step at which a run over `sigmas` starts.

        Raises:
            ValueError: `sigmas` is not a consecutive part of this path's.
        """
        sigmas = sigmas.detach().float().cpu()
        if len(sigmas) >= 2:
            start = int((self.sigmas - sigmas[0]).abs().argmin())
            part = self.sigmas[start : start + len(sigmas)]
            if part.shape == sigmas.shape and torch.allclose(part, sigmas, rtol=1e-4, atol=1e-6):
                return start
        raise ValueError(
            "These SIGMAS are not the inversion's own, or a consecutive part of them: a path can only be replayed on "
            "the noise levels it was made with. Use the SIGMAS output of the LEDITS Sampler, or invert again with the "
            f"steps and scheduler wanted ({_describe(self.sigmas)} in the inversion, {_describe(sigmas)} asked for)."
        )


def _describe(sigmas: torch.Tensor) -> str:
    return f"{max(len(sigmas) - 1, 0)} steps" + (f" from {sigmas[0]:.4g} to {sigmas[-1]:.4g}" if len(sigmas) else "")


def check_sigmas(sigmas: torch.Tensor, family: Family | None = None):
    """Refuse noise levels that no path can run on.

    Args:
        family: None where the model is not known.

    Raises:
        ValueError: fewer than two, not finite, negative, not strictly descending, or higher than the family's.
    """
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError("SIGMAS must hold at least two noise levels (one step).")
    if not torch.isfinite(sigmas).all() or sigmas.min() < 0:
        raise ValueError("SIGMAS must be finite and not negative.")
    if not (sigmas[1:] < sigmas[:-1]).all():
        raise ValueError(
            "SIGMAS must fall from every step to the next. Ascending ones (FlipSigmas) are not needed here: inversion "
            "takes the same descending SIGMAS as sampling. Repeated ones mean more steps than the model has levels."
        )
    if family is not None and sigmas[0] > family.highest:
        raise ValueError(
            f"SIGMAS begin at {float(sigmas[0]):.4g}; this kind of model has noise levels up to {family.highest:g}. They "
            "were made for another model: use a scheduler with this model."
        )


def check_latent(latents: torch.Tensor, latent_format=None):
    """Refuse a latent that holds NaN or infinite numbers, or none at all, or is of another kind than the model's.

    Args:
        latents: [B, C, ...].
        latent_format: the model's `comfy.latent_formats` object, or None to take any shape.

    Raises:
        ValueError: what is wrong with it.
    """
    if latents.numel() == 0:
        raise ValueError("The LATENT is empty.")
    wanted = None if latent_format is None else (latent_format.latent_channels, latent_format.latent_dimensions)
    if wanted is not None and (latents.shape[1], latents.ndim - 2) != wanted:
        raise ValueError(
            f"The LATENT has shape {list(latents.shape)}; this model works on {wanted[0]} channels of {wanted[1]} "
            "dimensions. Encode the picture with the VAE that belongs to the model."
        )
    if not torch.isfinite(latents).all():
        raise ValueError(
            "The LATENT holds NaN or infinite numbers, so nothing can be inverted. A VAE in float16 is the usual "
            "cause: start ComfyUI with --fp32-vae or use another VAE."
        )
