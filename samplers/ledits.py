"""The SAMPLER object of the LEDITS update, which edits a picture along its inverted path."""

import functools
from collections.abc import Sequence

import comfy.model_management
import torch
from tqdm.auto import trange

from ..attention_hooks.edits import Control
from ..attention_hooks.run import AttentionRun
from ..attention_hooks.store import AttentionStore
from . import models
from .inverters import can_batch_levels
from .latent_gradient import latent_gradient
from .methods.families import Family, Step, second_order
from .methods.record import Inversion
from .overrides import Overrides
from .phased import PhasedSampler, Run

SOLVERS = ("ddpm", "dpmpp_2m_sde")


class LeditsSampler(PhasedSampler):
    """The LEDITS update along a stored path (arXiv 2307.00522, eq. 3): `y_next = keep * y + take * D + R`.

    Starts on the path at the first of the SIGMAS it is given, which must be a consecutive part of the inversion's.
    Noise and latent of the caller are not used. Outside a mask the picture stays on the stored path.

    Args:
        inversion: the path.
        solver: "ddpm" (LEDITS), or "dpmpp_2m_sde", which extrapolates D to second order (LEDITS++).
        attention: chained attention controls (`attention_hooks.edits.Control`).
        store: a kept `AttentionStore` in place of their source pass.
        source_steps: steps of the source pass in one call; 0 chooses by memory.

    Attributes:
        observed: maps and masks of the last run's attention controls, `attention_hooks.observed.Observed` or None.
    """

    phase = "editing"
    observed = None

    def __init__(self, inversion: Inversion, solver="ddpm", attention: Sequence[Control] = (),
                 store: AttentionStore | None = None, source_steps=0):
        if solver not in SOLVERS:
            raise ValueError(f"Unknown solver '{solver}': choose one of {', '.join(SOLVERS)}.")
        self.inversion, self.solver = inversion, solver
        self.attention, self.store, self.source_steps = tuple(attention or ()), store, source_steps

    def run(self, run: Run) -> torch.Tensor:
        path, steps, mask = self.inversion, run.steps, run.denoise_mask
        self.observed = None
        start, prescribed, attention = self.begin(run)
        y, levels_there = path.latents[start].to(run.device), path.sigmas.to(run.device)
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
            denoised = run.guider(y, levels_there[i].repeat(len(y)), **extra_args)
            progress.edited(denoised, y)
            y = step.keep * y + step.take * edit(denoised, *levels) + residual
            if attention is not None:
                y = attention.after_step(i, y)
            if mask is not None:
                free = mask_at(min(i + 1 - start, steps - 1))
                y = free * y + (1 - free) * path.latents[i + 1].to(run.device)
        self.observed = None if attention is None else attention.observed(y)
        return y

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
