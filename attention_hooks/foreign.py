"""Patches and wrappers of other packs on a MODEL, and whether they look at the rows of a call."""

from comfy.patcher_extension import WrappersMP

# Wrappers that take every row for itself: core's, and what `gradients.differentiable` adds.
NEUTRAL = ("torch.compile", "easycache", "lazycache", "ledits_gradients")
_OF_CALLS = (WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)


def of_rows(options: dict) -> bool:
    """Whether something on a model may look at the rows of a call, or compare them: which are the positive's, which the
    negative's, in core's own order and number. Such patches are made for the calls that core's guider makes."""
    inner = options.get("transformer_options", {})
    if any(options.get(name) for name in ("model_function_wrapper", "sampler_calc_cond_batch_function")):
        return True
    return any(inner.get(name) for name in ("patches", "patches_replace", "optimized_attention_override")) or any(
        own for kind in _OF_CALLS for key, own in inner.get("wrappers", {}).get(kind, {}).items() if key not in NEUTRAL
    )
