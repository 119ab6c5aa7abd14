"""pix2pix-zero: cross-attention guidance (arXiv 2302.03027, section 3.2 and algorithm 1)."""

from dataclasses import dataclass

import torch

from .. import attend, patches
from ..edits import Bound, Control, Guidance, in_window


@dataclass(frozen=True)
class Pix2PixZero(Control):
    """Before a step the target latent moves so that the target's cross-attention maps come nearer to the source's.

        x <- x - xa_guidance * dL/dx,   x = y / sqrt(1 + sigma^2)

    with L of `MapDistance`. Both prompts must have as many tokens: the target is the source prompt plus an edit direction.

    Attributes:
        xa_guidance: lambda; the authors take 0.1 for real pictures and 0.15 for generated ones.
        window: fractions of the steps.
        blocks: selection of the cross-attention layers that are compared.
    """

    xa_guidance: float = 0.1
    window: tuple = (0.0, 1.0)
    blocks: str = "all"

    def bind(self, setting):
        return _Bound(self, setting)


class _Bound(Bound):
    def __init__(self, control, setting):
        self.control, self.steps = control, setting.steps
        layers = setting.layers(control.blocks)
        self._guidance = Guidance(control.source_branch, layers, control.xa_guidance)
        self._acts = bool(layers) and control.xa_guidance != 0

    def guidance(self, step):
        return self._guidance if self._acts and in_window(step, self.steps, self.control.window) else None


class MapDistance:
    """The loss, made of what patches of cross-attention see while the network runs.

        L = 1/2 * sum over layers of the mean over heads of the sum over places and tokens of (P_target - P_source)^2

    The released code takes the mean over heads and over two rows of each picture, negative and positive, and moves each
    row by its own part. This is the positive's part, by which the paper moves the one latent that both are. Pictures and
    conditionings of a batch do not influence each other's part.

    Args:
        batch: pictures.
        entries: conditionings of the positive, which count equally.
        source: `(layer, like) -> (q, k)` of the source, [B, tokens, width].
    """

    def __init__(self, batch, entries, source):
        self._batch, self._entries, self._source, self._parts = batch, entries, source, None

    def begin(self):
        self._parts = []

    def end(self):
        total, self._parts = sum(self._parts), None
        return total

    def __call__(self, layer, q, k, v, extra, previous):
        """The `work` of a `patches.AttentionPatch`: looks, and lets attention be what it is."""
        patches.check_tokens(q, self._batch * len(extra["cond_or_uncond"]), extra)
        heads = extra["n_heads"]
        with torch.no_grad():
            source = attend.maps(*self._source(layer, q), heads)
        target = attend.maps(q.clone(), k.clone(), heads)  # other controls' patches write into q and k
        part = (target.unflatten(0, (-1, self._batch)) - source).square().sum() / (2 * heads * self._entries)
        if self._parts is not None:  # not when a block runs again in the backward pass
            self._parts.append(part)
        return (previous or patches.attention)(q, k, v, extra)
