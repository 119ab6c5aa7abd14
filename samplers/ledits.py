"""The SAMPLER object of the LEDITS update, which edits a picture along its inverted path."""

import dataclasses
import functools
from collections.abc import Sequence

import comfy.model_management
import torch
from einops import reduce, repeat
from tqdm.auto import trange

from ..attention_hooks.edits import Control
from ..attention_hooks.observed import Observed, pixels
from ..attention_hooks.run import AttentionRun
from ..attention_hooks.store import AttentionStore
from . import model_inputs, models
from .inverters import can_batch_levels
from .latent_gradient import latent_gradient
from .methods.families import Family, Step, second_order
from .methods.record import Inversion
from .methods.shapes import append_dims
from .overrides import Overrides
from .phased import PhasedSampler, Run

SOLVERS = ("ddpm", "dpmpp_2m_sde")
# Of a latent's root mean square: what a step in float32 may be off at strong guidance, and what all steps together.
# float16 rounds to 25 times the first.
_ROUNDING, _ROUNDING_IN_ALL = 2e-5, 1e-3


class LeditsSampler(PhasedSampler):
    """The LEDITS update along a stored path (arXiv 2307.00522, eq. 3): `y_next = keep * y + take * D + R`.

    Starts on the path at the first of the SIGMAS it is given, which must be a consecutive part of the inversion's; or,
    given the latent that an earlier stage of the same path has left there (SplitSigmas), with that. Outside a mask the
    picture stays on the stored path. With eta 0 it is FlowEdit (arXiv 2412.08629).

    Args:
        inversion: the path.
        solver: "ddpm" (LEDITS), or "dpmpp_2m_sde", which extrapolates D to second order (LEDITS++).
        attention: chained attention controls (`attention_hooks.edits.Control`).
        store: a kept `AttentionStore` in place of their source pass.
        source_steps: steps of the source pass in one call; 0 chooses by memory.
        eta: stochasticity of the edit's steps, 0..1, see `Inversion.with_eta`; None as the inversion was made.
        free_steps: so many steps at the end follow the prompt alone, without the path's noise maps (FlowEdit's n_min).

    Attributes:
        observed: maps and masks of the last run's attention controls and concepts, `attention_hooks.observed.Observed` or
            None.
    """

    phase = "editing"
    observed = None

    def __init__(self, inversion: Inversion, solver="ddpm", attention: Sequence[Control] = (),
                 store: AttentionStore | None = None, source_steps=0, eta: float | None = None, free_steps=0):
        if solver not in SOLVERS:
            raise ValueError(f"Unknown solver '{solver}': choose one of {', '.join(SOLVERS)}.")
        self.inversion = inversion if eta is None else inversion.with_eta(eta)
        self.solver, self.free_steps = solver, free_steps
        self.attention, self.store, self.source_steps = tuple(attention or ()), store, source_steps

    def run(self, run: Run) -> torch.Tensor:
        path, steps, mask = self.inversion, run.steps, run.denoise_mask
        self.observed = None
        start, prescribed, attention = self.begin(run)
        y, levels_there = self._first(run, start), path.sigmas.to(run.device)
        edit, source = _History(self.solver, path.kind), _History(self.solver, path.kind)
        mask_at = functools.partial(_mask_at, run)
        progress = _Progress(run, self.tell, self.phase, 0 if attention is None else attention.source_steps())
        for i in trange(start, start + steps, disable=run.quiet):
            comfy.model_management.throw_exception_if_processing_interrupted()
            levels, step = (path.sigmas[i], path.sigmas[i + 1]), path.step(i)
            # before the model is busy: a copy waits for it
            residual = self._residual(i, step, source, levels).to(run.device)
            prescribed.apply(i)
            extra_args = prescribed.extra_args
            if attention is not None:
                progress.source_pass(attention, i, path)
                extra_args = extra_args | {"model_options": attention.prepare(i)}
                moved = attention.before_step(i, y, extra_args["model_options"], latent_gradient)
                y = moved if mask is None else y + mask_at(i - start) * (moved - y)
            seen = y if path.shifts is None else y + path.shifts[i].to(run.device)
            denoised = run.guider(seen, levels_there[i].repeat(len(y)), **extra_args)
            progress.edited(denoised, y)
            y = step.keep * y + step.take * edit(denoised, *levels)
            if i < path.steps - self.free_steps:
                y = self._one_edit(y + residual, i)
            if attention is not None:
                y = attention.after_step(i, y)
            y = self._settled(y, i)
            if mask is not None:
                free = mask_at(min(i + 1 - start, steps - 1))
                y = free * y + (1 - free) * path.latents[i + 1].to(run.device)
        self.observed = _observed(run, y, path, attention)
        y = y[: path.pictures]
        # the end of the path is the picture, whatever its level
        return y if start + steps == path.steps else models.leave(run.model, levels_there[start + steps], y)

    def _first(self, run: Run, start: int) -> torch.Tensor:
        """The latent that path step `start` begins with, [B, C, ...].

        Raises:
            ValueError: the LATENT is neither this path's picture or x_T, nor an earlier stage's.
        """
        path, given = self.inversion, run.latent_image
        y, picture, x_T = (path.latents[i].to(run.device) for i in (start, -1, 0))
        if given is None or not given.any() or any(_near(given, latent) for latent in (picture, x_T)):
            return y
        left = models.enter(run.model, run.sigmas[0], run.noise, given)
        clean = path.kind.noisy(picture, float(path.sigmas[start]), torch.zeros_like(picture))
        noise = (y - clean).flatten(1)
        share = ((left - clean).flatten(1) * noise).sum(1) / noise.square().sum(1)  # of the path's noise in it
        if not (share > 0.5).all():
            if _near(given, picture, 0.05):  # encoded anew, by other hardware or in another precision
                return y
            raise ValueError(
                "The LATENT is not of this inversion: neither its picture or x_T, nor what an earlier stage on the same "
                "path has left at the first of the SIGMAS. Connect the x_T that the inversion node gives, or the output "
                "of the stage before, with the SIGMAS that follow it (SplitSigmas)."
            )
        return left

    def _settled(self, y: torch.Tensor, i: int) -> torch.Tensor:
        """After step i: pictures that are off their path by rounding alone are put back on it.

        Strong guidance enlarges what differs between two latents from step to step (at cfg 15 by several times a step),
        also the rounding of float32, which depends on how many rows a call had. An edit is far above it.
        """
        there, most = self.inversion.latents[i + 1].to(y), min(_ROUNDING, _ROUNDING_IN_ALL / self.inversion.steps)
        off, size = (y - there).abs().flatten(1).amax(1), there.square().flatten(1).mean(1).sqrt()
        return torch.where(append_dims(off <= most * size, y.ndim), there, y)

    def _one_edit(self, y: torch.Tensor, i: int) -> torch.Tensor:
        """After step i: the draws of a picture go on with their mean edit (FlowEdit's n_avg)."""
        path = self.inversion
        if path.draws == 1:
            return y
        there = path.latents[i + 1].to(y)
        change = reduce(y - there, "(k b) ... -> b ...", "mean", k=path.draws)
        return there + repeat(change, "b ... -> (k b) ...", k=path.draws)

    def begin(self, run: Run) -> tuple[int, Overrides, AttentionRun | None]:
        """Everything of a run that comes before its first prediction, and can be refused.

        Returns:
            the first path step; the `Overrides`; the `AttentionRun`, or None.

        Raises:
            ValueError: model, SIGMAS, latent, mask, prompts, controls or store do not fit the inversion.
        """
        path = self.inversion
        models.check(run.model, path)
        start = path.start_of(run.sigmas)
        if tuple(run.noise.shape) != tuple(path.latents.shape[1:]):
            raise ValueError(
                f"The LATENT has shape {list(run.noise.shape)}, the inversion {list(path.latents.shape[1:])}: connect "
                "the x_T that the inversion node gives."
            )
        if not 0 <= self.free_steps <= path.steps:
            raise ValueError(f"free_steps is {self.free_steps}, but the inversion has {path.steps} steps.")
        if self.free_steps and (path.residuals is None or path.shifts is not None):
            raise ValueError(
                f"free_steps leave out noise maps, which '{path.method}' does not have: set it to 0, or invert with "
                "Edit-Friendly DDPM Inversion or FlowEdit Source."
            )
        if self.attention and (path.draws > 1 or path.shifts is not None):
            raise ValueError(
                "Attention control cannot follow an inversion of several draws or with input shifts, as its source is "
                "one latent at each step. Invert with one draw and without input shift."
            )
        model_inputs.check(run, path)
        if run.denoise_mask is not None and not torch.isfinite(run.denoise_mask).all():
            raise ValueError("The mask holds NaN or infinite numbers: look at the node that makes it.")
        if run.denoise_mask is not None and not run.denoise_mask.any():
            raise ValueError(
                "The mask is empty, so nothing of the picture may change. Paint the area to edit in the mask editor, "
                "or disconnect the mask to edit the whole picture."
            )
        prescribed = Overrides(run, path)
        if not self.attention:
            return start, prescribed, None
        return start, prescribed, AttentionRun(
            controls=self.attention, guider=run.guider, path=path, start=start, steps=run.steps,
            options=prescribed.extra_args["model_options"], kept=self.store,
            batch_levels=can_batch_levels({}, run.options), steps_at_once=self.source_steps, **run.encoding,
        )

    def _residual(self, i: int, step: Step, source: "_History", levels):
        """Residual of step i for this run's solver, [B, C, H, W]."""
        first_order = self.inversion.residual(i)
        d = self.inversion.denoised(i) if self.solver != "ddpm" else None
        return first_order if d is None else first_order - step.take * (source(d, *levels) - d)


class _Progress:
    """Progress over the steps of the edit, and over those of the source where they are evaluated too."""

    def __init__(self, run: Run, tell, phase: str, source_steps: int):
        self._run, self._tell, self._phase, steps = run, tell, phase, run.steps
        self._total, self._edited, self._captured, self._shown = steps + source_steps, 0, 0, None

    def _show(self, d, y):
        self._run.show(self._edited + self._captured - 1, d, y, self._total)

    def source_pass(self, run: AttentionRun, i: int, path: Inversion):
        """Let the `AttentionRun` capture what path step i needs of the source."""
        pending = run.pending(i)
        if not pending:
            return
        first, last = (pending[k][0] + 1 for k in (0, -1))
        self._tell(f"source pass, steps {first} to {last} of {self._run.steps}")
        run.fill(pending)
        self._captured += len(pending)
        self._show(*(self._shown or (path.latents[-1].to(run.device), path.latents[i].to(run.device))))

    def edited(self, d, y):
        """A step of the edit was evaluated."""
        self._edited, self._shown = self._edited + 1, (d, y)
        self._show(d, y)
        self._tell(f"{self._phase} {self._edited}/{self._run.steps}")


def _near(a: torch.Tensor, b: torch.Tensor, tolerance=1e-3) -> bool:
    """Whether two latents are the same but for rounding."""
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * b.norm())


def _mask_at(run: Run, step: int) -> torch.Tensor:
    """The mask of an executed step, which the MODEL may change from step to step (DifferentialDiffusion)."""
    change, mask = run.options.get("denoise_mask_function"), run.denoise_mask
    if change is None:
        return mask
    return change(run.sigmas[step].expand(len(mask)), mask, extra_options={"model": run.guider, "sigmas": run.sigmas})


class _History:
    """D of the step before, for a multistep solver; the first step of a run has none."""

    def __init__(self, solver: str, family: Family):
        self.multistep, self.family = solver == "dpmpp_2m_sde", family
        self.denoised = self.sigma = None

    def __call__(self, denoised, sigma, sigma_next):
        out = denoised
        if self.multistep:
            out = second_order(denoised, self.denoised, self.sigma, sigma, sigma_next, family=self.family)
        self.denoised, self.sigma = denoised, sigma
        return out


def _observed(run: Run, y: torch.Tensor, path: Inversion, attention: AttentionRun | None) -> Observed | None:
    """What there is to be looked at of a run that ended at y."""
    seen = None if attention is None else attention.observed(y)
    areas = getattr(run.guider, "areas", {})
    if not areas:
        return seen
    if seen is None:
        seen = Observed(steps=run.steps, size=pixels(path), latent=y.cpu())
    concepts = {name: {step: (None, area) for step, area in trace.items()} for name, trace in areas.items()}
    return dataclasses.replace(seen, masks=seen.masks | concepts)
