"""The guider of all edits: classifier-free guidance and semantic guidance through ComfyUI's own batching."""

import math

import comfy.samplers
import torch

from ..attention_hooks.concept_maps import ConceptMaps
from ..attention_hooks.conditioning import equal_but, in_range
from ..attention_hooks.edits import BRANCHES_DIFFER
from ..attention_hooks.target_pass import CondFirst
from . import other_packs
from .methods.families import slope
from .methods.sega import Sega
from .methods.shapes import append_dims

# Functions of other packs that look at cond and uncond: where one is set, both are always evaluated.
_CFG_FUNCTIONS = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function")
# Not compared: keys already covered by `model_conds`, and the entry's id.
_NOT_COMPARED = ("model_conds", "cross_attn", "pooled_output", "uuid")


def one_serves_both(a: list[dict], b: list[dict]) -> bool:
    """Whether two encoded conditionings (`CFGGuider.conds[...]`) ask the same of the model."""
    return len(a) == len(b) and all(
        equal_but(x["model_conds"], y["model_conds"]) and equal_but(x, y, _NOT_COMPARED) for x, y in zip(a, b)
    )


def predicted(model, conds: list, x: torch.Tensor, timestep: torch.Tensor, options: dict) -> list[torch.Tensor]:
    """Predictions D for each encoded CONDITIONING, as core makes them; None gives zeros.

    Args:
        model: a running guider's `inner_model`.
        conds: encoded conditionings (`CFGGuider.conds[...]`).
        x: [B, C, ...].
        timestep: noise levels [B].
        options: `model_options` of the call.
    """
    replacement = options.get("sampler_calc_cond_batch_function")
    if replacement is None:
        return comfy.samplers.calc_cond_batch(model, conds, x, timestep, options)
    return list(replacement({"conds": conds, "input": x, "sigma": timestep, "model": model, "model_options": options}))


def guided(model, conds: list, pair: list[torch.Tensor], cfg: float, x: torch.Tensor, timestep: torch.Tensor,
           options: dict) -> torch.Tensor:
    """Guidance as core makes it, or functions of other packs in its place, which are given what core gives them.

    Args:
        conds: positive and negative, None where it was not evaluated.
        pair: their predictions D.
        model, x, timestep, options: see `predicted`.
    """
    for fn in options.get("sampler_pre_cfg_function", []):
        pair = fn({"conds": conds, "conds_out": pair, "cond_scale": cfg, "timestep": timestep, "input": x,
                   "sigma": timestep, "model": model, "model_options": options})
    return comfy.samplers.cfg_function(model, pair[0], pair[1], cfg, x, timestep, options, cond=conds[0], uncond=conds[1])


class LeditsGuider(comfy.samplers.CFGGuider):
    """GUIDER of an edit: `D = D_u + cfg * (D_p - D_u) - sigma * gamma`, gamma by SEGA (arXiv 2301.12247).

    gamma is in units of eps, of flow models in units of the velocity, in which it is finite at level 1 too. Thresholds
    are the same in both, momentum is not.

    Works with every SAMPLER; warm-up and cool-down count the steps of the schedule that is run. A prediction that
    cannot matter is not made: the positive at cfg 0, the negative at cfg 1, a second one where both are equal, a
    concept while it can have no effect.

    Where other packs have patches on the MODEL, they see the calls of core's guider: positive and negative together,
    equal or not, and every concept in a call of its own, as the second of a pair without a first (as the negative, from
    which its difference is taken).

    Args:
        model_patcher: MODEL.
        positive, negative: CONDITIONING.
        cfg: classifier-free guidance scale.
        concepts: `sega.Concept`s, their conditioning being CONDITIONING.

    Raises:
        ValueError: cfg is not a number.
    """

    def __init__(self, model_patcher, positive, negative, cfg, concepts=()):
        super().__init__(model_patcher)
        if not math.isfinite(cfg):
            raise ValueError(f"cfg is {cfg}: choose a number.")
        self.concepts = tuple(concepts)
        self.rows = 0
        self._sega = self._compared = self._maps = None
        conds = {"positive": positive, "negative": negative}
        self.inner_set_conds(conds | {f"concept_{i}": c.conditioning for i, c in enumerate(self.concepts)})
        self.set_cfg(cfg)

    def sample(self, *args, **kwargs):
        """As `CFGGuider.sample`; `rows` then holds the number of U-Net rows (pictures x predictions) evaluated."""
        steps = len(kwargs["sigmas"] if "sigmas" in kwargs else args[3]) - 1
        self._sega, self.rows = Sega(concept.started(steps) for concept in self.concepts), 0
        try:
            return super().sample(*args, **kwargs)
        finally:
            self._sega = self._compared = self._maps = None

    @property
    def areas(self) -> dict:
        """Where each concept has pushed in the present run (`Sega.areas`)."""
        return self._sega.areas if self._sega is not None else {}

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        options = model_options
        step = self._position(timestep, options) if self.concepts else 0
        wanted = self._sega.needed(step) if self.concepts else []
        as_core = other_packs.of_rows(self.model_options)
        watched = as_core or any(options.get(name) for name in _CFG_FUNCTIONS)
        core_skips_uncond = math.isclose(self.cfg, 1.0) and not options.get("disable_cfg1_optimization", False)
        use_positive = watched or not math.isclose(self.cfg, 0.0)
        use_negative = bool(wanted) or not core_skips_uncond
        shared = use_positive and use_negative and not watched and self._one_serves_both()
        shared = shared and not options.get(BRANCHES_DIFFER)  # attention control edits one of them only

        positive, negative = self.conds["positive"], self.conds["negative"]
        conds = [positive if use_positive else None, negative if use_negative and not shared else None]
        evaluate = self._as_core if as_core and wanted else self._evaluate
        if self._maps is None:
            self._maps = self._look(x)
        watching = self._maps.install(options) if self._maps and wanted else options
        predictions = evaluate(conds + [self.conds[f"concept_{i}"] for i in wanted], x, timestep, watching)
        maps = self._maps.maps(wanted) if self._maps and wanted else None
        if shared:
            predictions[1] = predictions[0]

        pair, pushed = predictions[:2], predictions[2:]
        # functions of other packs may change what they are given
        negative = predictions[1].clone() if wanted and watched else predictions[1]
        denoised = guided(self.inner_model, conds, pair, self.cfg, x, timestep, options)
        if not self.concepts:
            return denoised

        sigma = append_dims(timestep, x.ndim)
        eps = {i: slope(x, d, sigma) for i, d in zip(wanted, pushed)}
        gamma = self._sega(step, slope(x, negative, sigma) if wanted else None, eps, maps)
        return denoised if gamma is None else denoised - sigma * gamma

    def _look(self, x) -> ConceptMaps | bool:
        """`ConceptMaps` of the concepts whose masks are made of attention, False where there are none; once a run, before
        anything is predicted.

        Raises:
            ValueError: as `ConceptMaps`, or masks of another number than the pictures.
        """
        for concept in self.concepts:
            if concept.area is not None and len(concept.area) not in (1, len(x)):
                raise ValueError(
                    f"A concept was given {len(concept.area)} masks for {len(x)} picture{'s' * (len(x) > 1)}: connect one for "
                    "all, or one for each."
                )
        words = {i: c.words for i, c in enumerate(self.concepts) if c.reads_attention}
        return ConceptMaps(self, words, {i: self.conds[f"concept_{i}"] for i in words}, x) if words else False

    def _one_serves_both(self):
        """Compared again only where a sampler has put another conditioning in place (`overrides`)."""
        pair = self.conds["positive"], self.conds["negative"]
        if self._compared is None or any(x is not y for x, y in zip(pair, self._compared)):
            self._compared = (*pair, one_serves_both(*pair))
        return self._compared[2]

    def _as_core(self, conds, x, timestep, options):
        """As `_evaluate`, in calls of core's own kind.

        Concepts come before the pair, as patches may keep what they saw last for a `sampler_post_cfg_function`
        (SelfAttentionGuidance). Where attention control reads the positive's maps, the positive comes before all others,
        and once more with the negative.
        """
        pair, concepts, name = conds[:2], conds[2:], "sampler_calc_cond_batch_function"
        if isinstance(options.get(name), CondFirst):
            self._evaluate([pair[0], None], x, timestep, options)
            options = {**options, name: options[name].previous}
        pushed = [self._evaluate([None, concept], x, timestep, options)[1] for concept in concepts]
        return [*self._evaluate(pair, x, timestep, options), *pushed]

    def _evaluate(self, conds, x, timestep, options):
        """Predictions D for each CONDITIONING; None gives zeros, as in core."""
        self.rows += x.shape[0] * sum(in_range(c, timestep[0]) for cond in conds if cond is not None for c in cond)
        return predicted(self.inner_model, conds, x, timestep, options)

    @staticmethod
    def _position(timestep, options):
        """Step of the schedule that is being run, from its noise level (samplers may evaluate a step twice)."""
        sigmas = options["transformer_options"]["sample_sigmas"]
        level = timestep.flatten()[0]
        passed = int((sigmas.to(level) >= level * (1 - 1e-4)).sum()) - 1
        return min(max(passed, 0), max(len(sigmas) - 2, 0))
