"""SAMPLER objects that invert: run through a guider, so that ComfyUI loads, hooks, previews and cleans up."""

from dataclasses import replace

import comfy.model_management
import torch
from comfy.samplers import CFGGuider
from tqdm.auto import trange

from . import models
from .methods import ddim, edit_friendly
from .methods.record import Inversion, check_latent, check_sigmas
from .overrides import Overrides
from .phased import PhasedSampler, Run

# Pictures in one call: on a CPU 16 take a tenth less time than calls of 4 each, and 64 a fifth more.
_MOST_PICTURES = 16


class _AlongPath(PhasedSampler):
    """Base class: evaluations at the path's levels, shown as they come.

    `sample` returns `x_T`; the whole record is then in `inversion`.
    """

    inversion, phase = None, "inverting"

    def _denoiser(self, run: Run, bar, pictures: int, upwards=False, extra_args: dict | None = None):
        """`(y, sigma, i) -> D` as the functions of `ddim` and `edit_friendly` take it.

        Args:
            bar: progress over the steps of the path.
            pictures: latents of one step.
            upwards: whether the steps come from the last to the first.
            extra_args: of every call, in place of the run's.
        """
        extra_args = extra_args or run.extra_args

        def denoise(y, sigma, i):
            comfy.model_management.throw_exception_if_processing_interrupted()
            d = run.guider(y, sigma, **extra_args)
            done = bar.total - i if upwards else i + len(y) // pictures
            bar.update(done - bar.n)
            run.show(done - 1, d[-pictures:], y[-pictures:], bar.total)
            self.tell(f"{self.phase} {done}/{bar.total}")
            return d

        return denoise

    def _record(self, run: Run, latents: torch.Tensor, rest: torch.Tensor | None, etas: torch.Tensor, method: str):
        self.inversion = Inversion(
            sigmas=run.sigmas.float().cpu(),
            latents=latents.cpu(),
            residuals=rest,
            etas=etas,
            family=models.family(run.model).name,
            model=models.describe(run.model),
            method=method,
            settings=self.settings,
            latent_format=run.model.model.latent_format,
        )
        return latents[0]


class EditFriendlyInverter(_AlongPath):
    """Edit-friendly DDPM inversion (arXiv 2304.06140).

    Args:
        seed: of the path's noise, see `edit_friendly.draw_noise`.
        etas: float32 [N].
        steps_at_once: U-Net evaluations of different steps in one batch; 0 chooses, see `levels_at_once`.
        settings: goes into the record.
    """

    def __init__(self, seed: int, etas: torch.Tensor, steps_at_once=0, settings: dict | None = None):
        self.seed, self.etas, self.steps_at_once, self.settings = seed, etas, steps_at_once, settings or {}

    def run(self, run: Run) -> torch.Tensor:
        family, picture = models.family(run.model), run.latent_image
        check_sigmas(run.sigmas)
        check_latent(picture)
        draws = edit_friendly.draw_noise(picture.shape, run.steps, self.seed).to(picture)
        latents = edit_friendly.noisy_path(picture, run.sigmas, draws, family=family)
        chunk = levels_at_once(run.guider, picture.shape, run.options, self.steps_at_once)
        with trange(run.steps, disable=run.quiet) as bar:
            denoise = self._denoiser(run, bar, len(picture))
            rest = edit_friendly.residuals(latents, run.sigmas, self.etas, denoise, chunk, family=family)
        return self._record(run, latents, rest.cpu(), self.etas, "edit-friendly DDPM")


class DDIMInverter(_AlongPath):
    """DDIM inversion, see `ddim.invert`; the path is the record's source branch, without noise maps.

    Args:
        convention, refinements, tolerance, regularise: see `ddim.invert`.
        method, settings: go into the record.
    """

    def __init__(self, convention="A", refinements=0, tolerance=0.0, method="DDIM", settings=None, regularise=None):
        if convention not in ddim.CONVENTIONS:
            raise ValueError(f"Unknown convention '{convention}': choose one of {', '.join(ddim.CONVENTIONS)}.")
        self.convention, self.refinements, self.tolerance = convention, refinements, tolerance
        self.method, self.settings, self.regularise = method, settings or {}, regularise

    def run(self, run: Run) -> torch.Tensor:
        family, picture = models.family(run.model), run.latent_image
        check_sigmas(run.sigmas)
        check_latent(picture)
        lowest = float(run.model.get_model_object("model_sampling").sigma_min)
        with trange(run.steps, disable=run.quiet) as bar:
            denoise = self._denoiser(run, bar, len(picture), upwards=True)
            latents = ddim.invert(
                picture, run.sigmas, denoise, family=family, scaling=models.scaling(run.model),
                convention=self.convention, refinements=self.refinements, tolerance=self.tolerance, lowest=lowest,
                regularise=self.regularise,
            )
        if not torch.isfinite(latents[0]).all():
            raise ValueError(
                "The inversion did not converge: invert at cfg 1, or with fewer refinements. With both already low, "
                "the model itself gave NaN or infinite numbers (--force-fp32 helps where float16 is the cause)."
            )
        return self._record(run, latents, None, torch.zeros(run.steps), self.method)


class SourceBranch(_AlongPath):
    """Replaces a record's path by one that is sampled at the guider's guidance, see `ddim.simulate`.

    Args:
        inversion: a record without noise maps; embeddings it prescribes are used.
        scale, every: see `ddim.simulate`.
        method: goes into the record.
    """

    phase = "sampling the source"

    def __init__(self, inversion: Inversion, scale=0.0, every=1, method: str | None = None):
        self.inversion, self.scale, self.every = inversion, scale, every
        self.method = method or inversion.method

    def run(self, run: Run) -> torch.Tensor:
        path = self.inversion
        prescribed = Overrides(run, path)
        with trange(path.steps, disable=run.quiet) as bar:
            evaluate = self._denoiser(run, bar, path.batch, extra_args=prescribed.extra_args)

            def denoise(y, sigma, i):
                prescribed.apply(i)
                return evaluate(y, sigma, i)

            latents = path.latents.to(run.device)
            branch = ddim.simulate(latents, path.sigmas, denoise, self.scale, self.every, family=path.kind)
        self.inversion = replace(path, latents=branch.cpu(), method=self.method)
        return branch[0]


class TargetOffset(_AlongPath):
    """Gives a record without noise maps what each of its DDIM steps lacks of the path at the guider's guidance.

    An edit then adds the source's offset to its own branch ("add-source" in the ablations of arXiv 2310.01506).

    Args:
        inversion: a record without noise maps or prescribed embeddings.
        steps_at_once: see `EditFriendlyInverter`.
        method: goes into the record.
    """

    phase = "measuring the offset"

    def __init__(self, inversion: Inversion, steps_at_once=0, method: str | None = None):
        self.inversion, self.steps_at_once = inversion, steps_at_once
        self.method = method or inversion.method

    def run(self, run: Run) -> torch.Tensor:
        path = self.inversion
        latents, levels = path.latents.to(run.device), path.sigmas.to(run.device)
        chunk = levels_at_once(run.guider, run.noise.shape, run.options, self.steps_at_once)
        with trange(path.steps, disable=run.quiet) as bar:
            denoise = self._denoiser(run, bar, path.batch)
            rest = edit_friendly.residuals(latents, levels, path.etas, denoise, chunk, family=path.kind)
        self.inversion = replace(path, residuals=rest.cpu(), method=self.method)
        return latents[0]


def levels_at_once(model_wrap: CFGGuider, shape, options: dict, wanted=0) -> int:
    """Steps of a known path to evaluate in one call: `wanted`, or at 0 what memory and _MOST_PICTURES allow."""
    if not can_batch_levels(model_wrap.conds, options):
        return 1
    if wanted:
        return wanted
    free = comfy.model_management.get_free_memory(model_wrap.model_patcher.load_device)
    # Cond and uncond of one step. `calc_cond_batch` splits a call that needs 1.5 times the estimate of what is free;
    # asked for more than 0.8 of it here, it would split again, which only costs time.
    need = 1.5 * model_wrap.inner_model.memory_required([2 * shape[0], *shape[1:]])
    return int(min(max(free * 0.8 // need, 1), max(_MOST_PICTURES // shape[0], 1)))


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
