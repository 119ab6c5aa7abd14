"""The guider of all edits: classifier-free guidance and semantic guidance through ComfyUI's own batching."""

import math

import comfy.samplers
import torch

from .sega import Sega

# Functions of other packs that look at cond and uncond: where one is set, both are always evaluated.
_CFG_FUNCTIONS = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function")


def equal_conditioning(a, b):
    """Whether two CONDITIONINGs are the same thing, so that one evaluation serves for both."""

    def equal(x, y):
        if x is y:
            return True
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y)
        return type(x) is type(y) and isinstance(x, (str, int, float, bool, type(None))) and x == y

    return len(a) == len(b) and all(
        equal(x[0], y[0]) and x[1].keys() == y[1].keys() and all(equal(v, y[1][k]) for k, v in x[1].items())
        for x, y in zip(a, b)
    )


class LeditsGuider(comfy.samplers.CFGGuider):
    """GUIDER of an edit: `D = D_u + cfg * (D_p - D_u) - sigma * gamma`, gamma by SEGA (arXiv 2301.12247).

    Works with every SAMPLER; warm-up and cool-down count the steps of the schedule that is run. A prediction that
    cannot matter is not made: the positive at cfg 0, the negative at cfg 1, a second one where both are equal, a
    concept while it can have no effect.

    Args:
        model_patcher: MODEL.
        positive, negative: CONDITIONING.
        cfg: classifier-free guidance scale.
        concepts: `sega.Concept`s, their conditioning being CONDITIONING.
    """

    def __init__(self, model_patcher, positive, negative, cfg, concepts=()):
        super().__init__(model_patcher)
        self.concepts = tuple(concepts)
        self.rows = 0
        self._one_serves_both = equal_conditioning(positive, negative)
        self._sega = None
        conds = {"positive": positive, "negative": negative}
        self.inner_set_conds(conds | {f"concept_{i}": c.conditioning for i, c in enumerate(self.concepts)})
        self.set_cfg(cfg)

    def sample(self, *args, **kwargs):
        """As `CFGGuider.sample`; `rows` then holds the number of U-Net rows (pictures x predictions) evaluated."""
        self._sega, self.rows = Sega(self.concepts), 0
        try:
            return super().sample(*args, **kwargs)
        finally:
            self._sega = None

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        options = model_options
        step = self._position(timestep, options) if self.concepts else 0
        wanted = self._sega.needed(step) if self.concepts else []
        watched = any(options.get(name) for name in _CFG_FUNCTIONS)
        core_skips_uncond = math.isclose(self.cfg, 1.0) and not options.get("disable_cfg1_optimization", False)
        use_positive = watched or not math.isclose(self.cfg, 0.0)
        use_negative = bool(wanted) or not core_skips_uncond
        shared = self._one_serves_both and use_positive and use_negative and not watched

        positive, negative = self.conds["positive"], self.conds["negative"]
        conds = [positive if use_positive else None, negative if use_negative and not shared else None]
        predictions = self._evaluate(conds + [self.conds[f"concept_{i}"] for i in wanted], x, timestep, options)
        if shared:
            predictions[1] = predictions[0]

        pair, pushed = predictions[:2], predictions[2:]
        for fn in options.get("sampler_pre_cfg_function", []):
            pair = fn({"conds": conds, "conds_out": pair, "cond_scale": self.cfg, "timestep": timestep, "input": x,
                       "sigma": timestep, "model": self.inner_model, "model_options": options})  # fmt: skip
        denoised = comfy.samplers.cfg_function(
            self.inner_model, pair[0], pair[1], self.cfg, x, timestep, options, cond=conds[0], uncond=conds[1]
        )
        if not self.concepts:
            return denoised

        sigma = timestep.view(-1, *[1] * (x.ndim - 1))
        eps = {i: (x - d) / sigma for i, d in zip(wanted, pushed)}
        gamma = self._sega(step, (x - predictions[1]) / sigma if wanted else None, eps)
        return denoised if gamma is None else denoised - sigma * gamma

    def _evaluate(self, conds, x, timestep, options):
        """Predictions D for each CONDITIONING; None gives zeros, as in core."""
        self.rows += x.shape[0] * sum(len(c) for c in conds if c is not None)
        own = options.get("sampler_calc_cond_batch_function")
        if own is None:
            return comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)
        return list(own({"conds": conds, "input": x, "sigma": timestep, "model": self.inner_model,
                         "model_options": options}))  # fmt: skip

    @staticmethod
    def _position(timestep, options):
        """Step of the schedule that is being run, from its noise level (samplers may evaluate a step twice)."""
        sigmas = options["transformer_options"]["sample_sigmas"]
        level = timestep.flatten()[0]
        passed = int((sigmas.to(level) >= level * (1 - 1e-4)).sum()) - 1
        return min(max(passed, 0), max(len(sigmas) - 2, 0))
