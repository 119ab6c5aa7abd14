"""Rows of the source's attention in place of the target's, chosen one by one: what structure and look hang on.

    q, k    structure: which place looks at which (arXiv 2508.07519 "qiki", 2510.17803)
    k, v    look: what the places find there (arXiv 2411.14430, 2502.17363)
    v       values alone (arXiv 2411.04746, 2510.17803)
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F

from ..edits import COND, NEGATIVE, Bound, Control, SelfEdit, in_window


@dataclass(frozen=True, kw_only=True)
class CopyAttention(Control):
    """In both branches; the cond half reads the source prompt's branch, the uncond half the negative's.

    Attributes:
        rows: "qk", "kv" or "v".
        window: (start, end) fractions of the steps.
        blocks: block selection.
        mask: MASK [1 or B, H, W] of the places whose rows are taken, or None for all.
        outside: the places outside the mask instead.
    """

    rows: str = "qk"
    window: tuple = (0.0, 0.2)
    blocks: str = "all"
    mask: Any = None
    outside: bool = True

    def bind(self, setting):
        return CopyAttentionRun(self, setting)


class CopyAttentionRun(Bound):
    def __init__(self, control, setting):
        self.control, self.steps, self.batch, self.device = control, setting.steps, setting.batch, setting.device
        self.layers = setting.layers(control.blocks)
        masks = 1 if control.mask is None else len(control.mask)
        if masks not in (1, setting.batch):
            raise ValueError(
                f"Copy Attention was given {masks} masks for {setting.batch} pictures: connect one, or one for each picture."
            )
        self._places = {}

    def self_edit(self, step, layer, branch):
        control = self.control
        if layer.key not in self.layers or not in_window(step, self.steps, control.window):
            return None
        source = control.source_branch if branch == COND else NEGATIVE
        rows = {name: source if name in control.rows else None for name in "qkv"}
        return SelfEdit(**rows, where=None if control.mask is None else self._where)

    def _where(self, grid):
        if grid not in self._places:
            share = F.interpolate(self.control.mask[:, None].float(), grid, mode="area").flatten(1).to(self.device)
            inside = (share >= 0.5).expand(self.batch, -1)
            self._places[grid] = ~inside if self.control.outside else inside
        return self._places[grid]
