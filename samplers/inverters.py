"""SAMPLER objects that invert: run through a guider, so that ComfyUI loads, hooks, previews and cleans up.

Here what all share, and the inversion of known paths; those that follow the model's ODE are in `ode_inverters`.
"""

import math

import comfy.model_base
import comfy.model_management
import torch
from comfy.samplers import CFGGuider
from tqdm.auto import trange

from ..attention_hooks.conditioning import repeats_by_picture
from . import models, other_packs
from .methods import edit_friendly
from .methods.record import Inversion, check_latent, check_sigmas
from .model_inputs import check_levels_are_one
from .phased import PhasedSampler, Run

# Pictures in one call: on a CPU 16 take a tenth less time than calls of 4 each, and 64 a fifth more. More than one of
# 64 x 64 places fills a CPU: further ones in the call gain nothing, and at SD 1.5's width cost a tenth.
_MOST_PICTURES = 16
_CPU_PLACES = 64 * 64


class AlongPath(PhasedSampler):
    """Base class: evaluations at the path's levels, shown as they come.

    `sample` returns `x_T`; the whole record is then in `inversion`, and in `note` what is to be known of it, or "".
    """

    inversion, phase, note = None, "inverting", ""

    def denoiser(self, run: Run, bar, pictures: int, upwards=False, extra_args: dict | None = None):
        """`(y, sigma, i) -> D` as the functions of `ddim` and `edit_friendly` take it.

        Args:
            bar: progress over the steps of the path.
            pictures: latents of one step.
            upwards: whether the steps come from the last to the first.
            extra_args: of every call, in place of the run's.
        """
        extra_args = extra_args or run.extra_args
        check_caches(run.options)
        check_levels_are_one(run)

        def denoise(y, sigma, i):
            comfy.model_management.throw_exception_if_processing_interrupted()
            d = run.guider(y, sigma, **extra_args)
            done = bar.total - i if upwards else i + len(y) // pictures
            bar.update(done - bar.n)
            run.show(done - 1, d[-pictures:], y[-pictures:], bar.total)
            self.tell(f"{self.phase} {done}/{bar.total}")
            return d

        return denoise

    def check_repeats(self, run: Run):
        """Note where a record of residuals will not lead back to the picture, as the model does not repeat itself.

        Asked only where other packs have something on the model: one level once more, when all is done, so that what they
        remember from step to step is as it will be in the edit.
        """
        path = self.inversion
        if not other_packs.of_predictions(run.options, run.guider.conds):
            return
        i = path.steps // 4
        y = (path.latents[i] if path.shifts is None else path.latents[i] + path.shifts[i]).to(run.device)
        sigma = path.sigmas[i].to(run.device).repeat(len(y))
        if not other_packs.repeats(y, sigma, path.denoised(i), run.guider(y, sigma, **run.extra_args)):
            self.note = f"{other_packs.NOT_REPEATED}, so that edits do not come back to the picture exactly"

    def record(self, run: Run, latents: torch.Tensor, rest: torch.Tensor | None, etas: torch.Tensor, method: str):
        scale = models.noise_scale(run.model)
        self.inversion = Inversion(
            sigmas=run.sigmas.float().cpu(),
            latents=latents.cpu(),
            residuals=rest,
            etas=etas,
            family=models.family(run.model).name,
            model=models.describe(run.model),
            method=method,
            settings=self.settings if scale == 1 else {**self.settings, "noise_scale": scale},
            latent_format=run.model.model.latent_format,
        )
        return latents[0]


class EditFriendlyInverter(AlongPath):
    """Edit-friendly DDPM inversion (arXiv 2304.06140), and its relatives with other noise in the path.

    Args:
        seed: of the path's noise, see `edit_friendly.draw_noise`.
        etas: float32 [N].
        steps_at_once: U-Net evaluations of different steps in one batch; 0 chooses, see `levels_at_once`.
        noise: of the path, one of `edit_friendly.NOISES`.
        method, settings: go into the record.
    """

    def __init__(self, seed: int, etas: torch.Tensor, steps_at_once=0, noise="independent",
                 method="edit-friendly DDPM", settings: dict | None = None):
        if noise not in edit_friendly.NOISES:
            raise ValueError(f"Unknown noise '{noise}': choose one of {', '.join(edit_friendly.NOISES)}.")
        self.seed, self.etas, self.steps_at_once, self.noise = seed, etas, steps_at_once, noise
        self.method, self.settings = method, settings or {}

    def run(self, run: Run) -> torch.Tensor:
        family, picture = models.family(run.model), run.latent_image
        check_sigmas(run.sigmas, family)
        check_latent(picture)
        draws = edit_friendly.draw_noise(picture.shape, run.steps, self.seed).to(picture)
        scale = models.noise_scale(run.model)
        draws = draws if scale == 1 else draws * scale
        latents = edit_friendly.PATHS[self.noise](picture, run.sigmas, draws, family=family)
        chunk = levels_at_once(run.guider, picture.shape, run.options, self.steps_at_once)
        with trange(run.steps, disable=run.quiet) as bar:
            denoise = self.denoiser(run, bar, len(picture))
            rest = edit_friendly.residuals(latents, run.sigmas, self.etas, denoise, chunk, family=family)
        x_T = self.record(run, latents, rest.cpu(), self.etas, self.method)
        self.check_repeats(run)
        return x_T


def check_caches(options: dict):
    """Refuse caches that leave out evaluations (EasyCache, LazyCache): each level of a path is evaluated for itself.

    Raises:
        ValueError: what to do.
    """
    wrappers = options.get("transformer_options", {}).get("wrappers", {})
    if any(key in ("easycache", "lazycache") for by_key in wrappers.values() for key, own in by_key.items() if own):
        raise ValueError(
            "EasyCache or LazyCache on the model leaves out evaluations, and an inversion needs every one of them. Connect "
            "the model before the cache to the inversion; the edit may have it."
        )


def levels_at_once(model_wrap: CFGGuider, shape, options: dict, wanted=0) -> int:
    """Steps of a known path to evaluate in one call: `wanted`, or at 0 what memory and the limits above allow."""
    entries = [entry for cond in model_wrap.conds.values() for entry in cond]
    if not (can_batch_levels(model_wrap.conds, options) and repeats_by_picture(entries, shape[0])):
        return 1
    if isinstance(model_wrap.inner_model, comfy.model_base.HunyuanVideo) and one_level_only(model_wrap, entries):
        return 1
    if wanted:
        return wanted
    free = comfy.model_management.get_free_memory(model_wrap.model_patcher.load_device)
    # Cond and uncond of one step. `calc_cond_batch` splits a call that needs 1.5 times the estimate of what is free;
    # asked for more than 0.8 of it here, it would split again, which only costs time.
    need = 1.5 * model_wrap.inner_model.memory_required([2 * shape[0], *shape[1:]])
    most = _MOST_PICTURES // shape[0]
    if model_wrap.model_patcher.load_device.type == "cpu":
        most = min(most, _CPU_PLACES // (shape[0] * math.prod(shape[2:])))
    return int(min(max(free * 0.8 // need, 1), max(most, 1)))


def one_level_only(model_wrap: CFGGuider, entries: list[dict]) -> bool:
    """Whether a HunyuanVideo network wants rows of one level: with a mask of its words it takes a single row, and where
    it was distilled with mean flow it looks up the next level by the first row's."""
    masked = any("attention_mask" in entry.get("model_conds", {}) for entry in entries)
    return masked or bool(model_wrap.inner_model.model_config.unet_config.get("meanflow"))


def can_batch_levels(conds: dict, options: dict) -> bool:
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
    kinds = [inner.get(kind, {}) for kind in ("wrappers", "callbacks")]
    wrapped = [w for by_type in kinds for by_key in by_type.values() for w in by_key.values()]
    return not (functions or patched or any(wrapped) or options.get("context_handler"))
