"""The guider of all edits: classifier-free guidance and semantic guidance through ComfyUI's own batching."""

import math

import comfy.samplers

from ..attention_hooks.conditioning import equal_but, in_range
from ..attention_hooks.edits import BRANCHES_DIFFER
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


class LeditsGuider(comfy.samplers.CFGGuider):
    """GUIDER of an edit: `D = D_u + cfg * (D_p - D_u) - sigma * gamma`, gamma by SEGA (arXiv 2301.12247).

    gamma is in units of eps, of flow models in units of the velocity, in which it is finite at level 1 too. Thresholds
    are the same in both, momentum is not.

    Works with every SAMPLER; warm-up and cool-down count the steps of the schedule that is run. A prediction that
    cannot matter is not made: the positive at cfg 0, the negative at cfg 1, a second one where both are equal, a
    concept while it can have no effect.

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
        self._sega = self._compared = None
        conds = {"positive": positive, "negative": negative}
        self.inner_set_conds(conds | {f"concept_{i}": c.conditioning for i, c in enumerate(self.concepts)})
        self.set_cfg(cfg)

    def sample(self, *args, **kwargs):
        """As `CFGGuider.sample`; `rows` then holds the number of U-Net rows (pictures x predictions) evaluated."""
        self._sega, self.rows = Sega(self.concepts), 0
        try:
            return super().sample(*args, **kwargs)
        finally:
            self._sega = self._compared = None

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        options = model_options
        step = self._position(timestep, options) if self.concepts else 0
        wanted = self._sega.needed(step) if self.concepts else []
        watched = any(options.get(name) for name in _CFG_FUNCTIONS)
        core_skips_uncond = math.isclose(self.cfg, 1.0) and not options.get("disable_cfg1_optimization", False)
        use_positive = watched or not math.isclose(self.cfg, 0.0)
        use_negative = bool(wanted) or not core_skips_uncond
        shared = use_positive and use_negative and not watched and self._one_serves_both()
        shared = shared and not options.get(BRANCHES_DIFFER)  # attention control edits one of them only

        positive, negative = self.conds["positive"], self.conds["negative"]
        conds = [positive if use_positive else None, negative if use_negative and not shared else None]
        predictions = self._evaluate(conds + [self.conds[f"concept_{i}"] for i in wanted], x, timestep, options)
        if shared:
            predictions[1] = predictions[0]

        pair, pushed = predictions[:2], predictions[2:]
        for fn in options.get("sampler_pre_cfg_function", []):
            pair = fn({"conds": conds, "conds_out": pair, "cond_scale": self.cfg, "timestep": timestep, "input": x,
                       "sigma": timestep, "model": self.inner_model, "model_options": options})
        denoised = comfy.samplers.cfg_function(
            self.inner_model, pair[0], pair[1], self.cfg, x, timestep, options, cond=conds[0], uncond=conds[1]
        )
        if not self.concepts:
            return denoised

        sigma = append_dims(timestep, x.ndim)
        eps = {i: slope(x, d, sigma) for i, d in zip(wanted, pushed)}
        gamma = self._sega(step, slope(x, predictions[1], sigma) if wanted else None, eps)
        return denoised if gamma is None else denoised - sigma * gamma

    def _one_serves_both(self):
        """Compared again only where a sampler has put another conditioning in place (`overrides`)."""
        pair = self.conds["positive"], self.conds["negative"]
        if self._compared is None or any(x is not y for x, y in zip(pair, self._compared)):
            self._compared = (*pair, one_serves_both(*pair))
        return self._compared[2]

    def _evaluate(self, conds, x, timestep, options):
        """Predictions D for each CONDITIONING; None gives zeros, as in core."""
        self.rows += x.shape[0] * sum(in_range(c, timestep[0]) for cond in conds if cond is not None for c in cond)
        replacement = options.get("sampler_calc_cond_batch_function")
        if replacement is None:
            return comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)
        return list(replacement({"conds": conds, "input": x, "sigma": timestep, "model": self.inner_model,
                         "model_options": options}))

    @staticmethod
    def _position(timestep, options):
        """Step of the schedule that is being run, from its noise level (samplers may evaluate a step twice)."""
        sigmas = options["transformer_options"]["sample_sigmas"]
        level = timestep.flatten()[0]
        passed = int((sigmas.to(level) >= level * (1 - 1e-4)).sum()) - 1
        return min(max(passed, 0), max(len(sigmas) - 2, 0))
