"""The SAMPLER object of the LEDITS update, which edits a picture along its inverted path."""

import functools
from collections.abc import Sequence

import comfy.model_management
import torch
from comfy.samplers import CFGGuider
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
from .phased import PhasedSampler

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
        seen: what the attention controls have to show of the last run, `attention_hooks.observed.Observed` or None.
    """

    phase = "editing"
    seen = None

    def __init__(self, inversion: Inversion, solver="ddpm", attention: Sequence[Control] = (),
                 store: AttentionStore | None = None, source_steps=0):
        if solver not in SOLVERS:
            raise ValueError(f"Unknown solver '{solver}': choose one of {', '.join(SOLVERS)}.")
        self.inversion, self.solver = inversion, solver
        self.attention, self.store, self.source_steps = tuple(attention or ()), store, source_steps

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        path, steps = self.inversion, len(sigmas) - 1
        self.seen = None
        start, prescribed, run = self.begin(model_wrap, sigmas, extra_args, noise, latent_image, denoise_mask)
        device = noise.device
        y = path.latents[start].to(device)
        on_device = path.sigmas.to(device)
        edit, source = _History(self.solver, path.kind), _History(self.solver, path.kind)
        mask_at = functools.partial(_mask_at, denoise_mask, model_wrap, sigmas, extra_args)
        progress = _Progress(callback, self.tell, self.phase, steps, 0 if run is None else run.source_steps())
        for i in trange(start, start + steps, disable=disable_pbar):
            comfy.model_management.throw_exception_if_processing_interrupted()
            levels, step = (path.sigmas[i], path.sigmas[i + 1]), path.step(i)
            residual = self._residual(i, step, source, levels).to(device)  # before the model is busy: a copy waits for it
            prescribed.apply(i)
            own = prescribed.extra_args
            if run is not None:
                progress.source_pass(run, i, path)
                own = own | {"model_options": run.prepare(i)}
                moved = run.before_step(i, y, own["model_options"], latent_gradient)
                y = moved if denoise_mask is None else y + mask_at(i - start) * (moved - y)
            denoised = model_wrap(y, on_device[i].repeat(len(y)), **own)
            progress.edited(denoised, y)
            y = step.keep * y + step.take * edit(denoised, *levels) + residual
            if run is not None:
                y = run.after_step(i, y)
            if denoise_mask is not None:
                mask = mask_at(min(i + 1 - start, steps - 1))
                y = mask * y + (1 - mask) * path.latents[i + 1].to(device)
        self.seen = None if run is None else run.observed(y)
        return y

    def begin(self, model_wrap: CFGGuider, sigmas: torch.Tensor, extra_args, noise, latent_image=None, denoise_mask=None):
        """Everything of a run that comes before its first prediction, and can be refused.

        Returns:
            the first path step; the `Overrides`; the `AttentionRun`, or None.

        Raises:
            ValueError: model, SIGMAS, latent, mask, prompts, controls or store do not fit the inversion.
        """
        path = self.inversion
        models.check(model_wrap.model_patcher, path)
        start = path.start_of(sigmas)
        if tuple(noise.shape) != tuple(path.latents.shape[1:]):
            raise ValueError(
                f"The LATENT has shape {list(noise.shape)}, the inversion {list(path.latents.shape[1:])}: connect the "
                "x_T that the inversion node gives."
            )
        if denoise_mask is not None and not denoise_mask.any():
            raise ValueError(
                "The mask is empty, so nothing of the picture may change. Paint the area to edit in the mask editor, "
                "or disconnect the mask to edit the whole picture."
            )
        encoding = {"latent_image": latent_image, "denoise_mask": denoise_mask}
        prescribed = Overrides(model_wrap, path, noise, extra_args, **encoding)
        return start, prescribed, self._attention_run(
            model_wrap, start, len(sigmas) - 1, extra_args, prescribed, encoding
        )

    def _attention_run(self, guider: CFGGuider, start: int, steps: int, extra_args, prescribed: Overrides, encoding):
        """The attention control of one run; None where there is none."""
        if not self.attention:
            return None
        return AttentionRun(
            controls=self.attention, guider=guider, path=self.inversion, start=start, steps=steps,
            options=prescribed.extra_args["model_options"], kept=self.store,
            batch_levels=can_batch_levels({}, extra_args["model_options"]), steps_at_once=self.source_steps, **encoding,
        )

    def _residual(self, i: int, step: Step, source: "_History", levels):
        """Residual of step i for this run's solver, [B, C, H, W]."""
        first_order = self.inversion.residual(i)
        d = self.inversion.denoised(i) if self.solver != "ddpm" else None
        return first_order if d is None else first_order - step.take * (source(d, *levels) - d)


class _Progress:
    """Progress over the steps of the edit, and over those of the source where they are evaluated too."""

    def __init__(self, callback, tell, phase, steps, source_steps):
        self._callback, self._tell, self._phase, self._steps = callback, tell, phase, steps
        self._total, self._edited, self._captured, self._shown = steps + source_steps, 0, 0, None

    def _show(self, d, y):
        if self._callback is not None:
            self._callback(self._edited + self._captured - 1, d, y, self._total)

    def source_pass(self, run: AttentionRun, i: int, path: Inversion):
        """Let the `AttentionRun` capture what path step i needs of the source."""
        pending = run.pending(i)
        if not pending:
            return
        first, last = (pending[k][0] + 1 for k in (0, -1))
        self._tell(f"source pass, steps {first} to {last} of {self._steps}")
        run.fill(pending)
        self._captured += len(pending)
        self._show(*(self._shown or (path.latents[-1].to(run.device), path.latents[i].to(run.device))))

    def edited(self, d, y):
        """A step of the edit was evaluated."""
        self._edited, self._shown = self._edited + 1, (d, y)
        self._show(d, y)
        self._tell(f"{self._phase} {self._edited}/{self._steps}")


def _mask_at(mask, guider, sigmas, extra_args, step):
    """The mask of an executed step, which the MODEL may change from step to step (DifferentialDiffusion)."""
    change = extra_args["model_options"].get("denoise_mask_function")
    if change is None:
        return mask
    return change(sigmas[step].expand(len(mask)), mask, extra_options={"model": guider, "sigmas": sigmas})


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
