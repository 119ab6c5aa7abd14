"""SAMPLER objects: the edit-friendly inversion of a picture, and the LEDITS update that edits it."""

import comfy.model_management
import comfy.samplers
import torch
from tqdm.auto import trange

from . import edit_friendly, models
from .inversion import Inversion, check_latent, check_sigmas
from .steps import FAMILIES, second_order

SOLVERS = ("ddpm", "dpmpp_2m_sde")


class EditFriendlyInverter(comfy.samplers.Sampler):
    """Edit-friendly DDPM inversion (arXiv 2304.06140) as a SAMPLER, so that ComfyUI loads, hooks and cleans up.

    `sample` returns `x_T`; the whole record is then in `inversion`.

    Args:
        seed: of the path's noise, see `edit_friendly.draw_noise`.
        etas: float32 [N].
        steps_at_once: U-Net evaluations of different steps in one batch; 0 chooses by free memory.
        settings: goes into the record.
    """

    def __init__(self, seed, etas, steps_at_once=0, settings=None):
        self.seed, self.etas, self.steps_at_once, self.settings = seed, etas, steps_at_once, settings or {}
        self.inversion = None

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        model = model_wrap.model_patcher
        family = models.family(model)
        check_sigmas(sigmas)
        check_latent(latent_image)
        draws = edit_friendly.draw_noise(latent_image.shape, len(sigmas) - 1, self.seed).to(latent_image)
        latents = edit_friendly.noisy_path(latent_image, sigmas, draws)
        bar = trange(len(sigmas) - 1, disable=disable_pbar)

        def denoise(y, sigma, i):
            comfy.model_management.throw_exception_if_processing_interrupted()
            d = model_wrap(y, sigma, **extra_args)
            done = len(y) // len(latent_image)
            bar.update(done)
            if callback is not None:
                callback(i + done - 1, d[-len(latent_image) :], y[-len(latent_image) :], len(sigmas) - 1)
            return d

        chunk = self._chunk(model_wrap, latent_image.shape, extra_args["model_options"])
        with bar:
            rest = edit_friendly.residuals(latents, sigmas, self.etas, denoise, chunk, FAMILIES[family])
        self.inversion = Inversion(
            sigmas.float().cpu(), latents.cpu(), rest.cpu(), self.etas, family, models.describe(model),
            "edit-friendly DDPM", self.settings, model.model.latent_format,
        )  # fmt: skip
        return latents[0]

    def _chunk(self, model_wrap, shape, options):
        """How many steps to evaluate in one call."""
        if not can_batch_levels(model_wrap.conds, options):
            return 1
        if self.steps_at_once:
            return self.steps_at_once
        device = model_wrap.model_patcher.load_device
        free = comfy.model_management.get_free_memory(device)
        # cond and uncond of one step; core splits them again by the same measure, which only costs time
        need = 1.5 * model_wrap.inner_model.memory_required([2 * shape[0], *shape[1:]])
        return int(min(max(free * 0.8 // need, 1), 16))


def can_batch_levels(conds, options):
    """Whether rows of different noise levels may share one U-Net call.

    ComfyUI looks at the first row's level only where a conditioning has a range, ControlNet or hooks; patches and
    wrappers of other packs may do so too.
    """
    keys = ("control", "timestep_start", "timestep_end", "hooks", "gligen")
    if any(key in c for cond in conds.values() for c in cond for key in keys):
        return False
    functions = [k for k in options if k.startswith("sampler_") or k == "model_function_wrapper"]
    inner = options.get("transformer_options", {})
    patched = [k for k in ("patches", "patches_replace", "optimized_attention_override") if inner.get(k)]
    wrapped = [w for kind in ("wrappers", "callbacks") for by_key in inner.get(kind, {}).values() for w in by_key.values()]
    return not (functions or patched or any(wrapped) or options.get("context_handler"))


class LeditsSampler(comfy.samplers.Sampler):
    """The LEDITS update along a stored path (arXiv 2307.00522, eq. 3): `y_next = keep * y + take * D + R`.

    Starts on the path at the first of the SIGMAS it is given, which must be a consecutive part of the inversion's.
    Noise and latent of the caller are not used. Outside a mask the picture stays on the stored path.

    Args:
        inversion: the path.
        solver: "ddpm" (LEDITS), or "dpmpp_2m_sde", which extrapolates D to second order (LEDITS++).
    """

    def __init__(self, inversion, solver="ddpm"):
        if solver not in SOLVERS:
            raise ValueError(f"Unknown solver '{solver}': choose one of {', '.join(SOLVERS)}.")
        self.inversion, self.solver = inversion, solver

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
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
        device = noise.device
        y = path.latents[start].to(device)
        ones = torch.ones(len(y), device=device)
        edit, source = _History(self.solver), _History(self.solver)
        for i in trange(start, start + len(sigmas) - 1, disable=disable_pbar):
            comfy.model_management.throw_exception_if_processing_interrupted()
            levels = path.sigmas[i], path.sigmas[i + 1]
            denoised = model_wrap(y, levels[0].to(device) * ones, **extra_args)
            step = path.step(i)
            if callback is not None:
                callback(i - start, denoised, y, len(sigmas) - 1)
            y = step.keep * y + step.take * edit(denoised, *levels) + self._residual(i, step, source, levels).to(device)
            if denoise_mask is not None:
                y = denoise_mask * y + (1 - denoise_mask) * path.latents[i + 1].to(device)
        return y

    def _residual(self, i, step, source, levels):
        """Residual of step i for this run's solver, [B, C, H, W]."""
        first_order = self.inversion.residual(i)
        d = self.inversion.denoised(i) if self.solver != "ddpm" else None
        return first_order if d is None else first_order - step.take * (source(d, *levels) - d)


class _History:
    """D of the step before, for a multistep solver; the first step of a run has none."""

    def __init__(self, solver):
        self.multistep, self.denoised, self.sigma = solver == "dpmpp_2m_sde", None, None

    def __call__(self, denoised, sigma, sigma_next):
        out = second_order(denoised, self.denoised, self.sigma, sigma, sigma_next) if self.multistep else denoised
        self.denoised, self.sigma = denoised, sigma
        return out
