"""What is on a MODEL beside the pack's own: patches, wrappers and functions of other packs, and what they allow; see also
`attention_hooks.foreign`.
"""

import torch

from ..attention_hooks.foreign import NEUTRAL, of_rows
from .methods.families import slope
from .methods.shapes import append_dims

# Of a slope's root mean square. Where something draws random numbers it differs by several hundredths; float16 and
# bfloat16 round to a thousandth, and mostly answer alike.
_REPEATS = 5e-3
NOT_REPEATED = (
    "The model gives another prediction when it is asked the same again: a patch on it draws random numbers (Token Merging, "
    "for instance) or remembers earlier steps"
)


def of_predictions(options: dict, conds: dict) -> bool:
    """Whether something on a model or on its conditionings may change a prediction in a way that this pack cannot know."""
    inner = options.get("transformer_options", {})
    functions = any(value for name, value in options.items() if name.startswith("sampler_"))
    wrapped = any(own for by_key in inner.get("wrappers", {}).values() for key, own in by_key.items() if key not in NEUTRAL)
    return of_rows(options) or functions or wrapped or any("hooks" in c for cond in conds.values() for c in cond or ())


def repeats(y: torch.Tensor, sigma: torch.Tensor, first: torch.Tensor, again: torch.Tensor) -> bool:
    """Whether two predictions D of one latent [B, C, ...] at noise levels [B] are the same but for rounding."""
    level = append_dims(sigma, y.ndim)
    a, b = (slope(y, d, level).float() for d in (first.to(y), again.to(y)))
    return bool((a - b).square().mean() <= _REPEATS**2 * a.square().mean())
