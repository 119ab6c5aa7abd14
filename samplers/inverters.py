"""SAMPLER objects that invert: run through a guider, so that ComfyUI loads, hooks, previews and cleans up."""

import comfy.model_management
import comfy.samplers
from tqdm.auto import trange

from . import edit_friendly, models
from .inversion import Inversion, check_latent, check_sigmas
from .steps import FAMILIES


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
            "edit-friendly DDPM", self.settings, latent_format=model.model.latent_format,
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
