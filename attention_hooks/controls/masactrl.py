"""MasaCtrl: mutual self-attention (arXiv 2304.08465)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..edits import COND, NEGATIVE, Bound, Control, SelfEdit, in_window
from ..text.align import columns

NAME = "MasaCtrl"  # of its masks


@dataclass(frozen=True, kw_only=True)
class MasaCtrl(Control):
    """The target's queries look up the source's keys and values: the object keeps its look, its pose follows the prompt.

    In both branches; the cond half reads the source prompt's branch, the uncond half the negative's.

    Attributes:
        window: (start, end) fractions of the steps (start_step 4 of 50 in the paper).
        blocks: block selection (start_layer 10 of 16 in the paper).
        own_keys: the target's own keys and values are looked up too (the paper's "union").
        source_mask, target_mask: MASK of the object in source and target, [1 or B, H, W], or None.
        source_words, target_words: phrases of the prompts whose maps make the masks.
        threshold: of these maps, after they are stretched to 0..1.
        map_blocks: selection of the cross-attention layers that give the maps.
    """

    window: tuple = (0.08, 1.0)
    blocks: str = "masactrl"
    own_keys: bool = False
    source_mask: Any = None
    target_mask: Any = None
    source_words: tuple = ()
    target_words: tuple = ()
    threshold: float = 0.1
    map_blocks: str = "words"

    def check(self):
        given, worded = self.source_mask is not None, bool(self.source_words)
        if given != (self.target_mask is not None) or worded != bool(self.target_words):
            raise ValueError(
                "MasaCtrl's masks come in pairs: connect source_mask and target_mask, or write source_words and "
                "target_words, or neither."
            )
        if given and worded:
            raise ValueError("MasaCtrl takes either masks or words for masks: disconnect one or empty the other.")
        if worded and self.prompts is None:
            raise ValueError("MasaCtrl needs the prompts of Edit Prompts to find source_words and target_words in.")
        if worded:
            for tokens, words in ((self.prompts.source_tokens, self.source_words),
                                  (self.prompts.target_tokens, self.target_words)):
                for word in words:
                    tokens.find(word)

    def bind(self, setting):
        return MasaCtrlRun(self, setting)


class MasaCtrlRun(Bound):
    def __init__(self, control, setting):
        self.control, self.steps, self.batch, self.device = control, setting.steps, setting.batch, setting.device
        self.layers = setting.layers(control.blocks)
        for name in ("source_mask", "target_mask"):
            mask = getattr(control, name)
            if mask is not None and len(mask) not in (1, setting.batch):
                raise ValueError(
                    f"MasaCtrl's {name} holds {len(mask)} masks, the inversion {setting.batch} "
                    f"picture{'s' * (setting.batch > 1)}: give one mask for all, or one for each."
                )
        self.map_layers = frozenset()
        self.reads_words = bool(control.source_words)
        if self.reads_words:
            setting.check_one_frame()
            self.map_layers = setting.layers(control.map_blocks)
            self.columns = (columns(control.prompts.source_tokens, control.source_words)[:, None],
                            columns(control.prompts.target_tokens, control.target_words)[:, None])
        self._maps, self._step, self._masks = {}, None, {}

    def self_edit(self, step, layer, branch):
        if layer.key not in self.layers or not in_window(step, self.steps, self.control.window):
            return None
        source = self.control.source_branch if branch == COND else NEGATIVE
        masks = None
        if self.control.source_mask is not None:
            masks = self._kept(step, self._given)
        elif self.reads_words:
            masks = self._kept(step, self._from_words(step, layer))
        return SelfEdit(k=source, v=source, own_keys=self.control.own_keys, masks=masks)

    def word_maps(self, step, layer):
        wanted = layer.key in self.map_layers and in_window(step, self.steps, self.control.window)
        return self.columns if wanted else None

    def see_maps(self, step, layer, grid, source, target):
        if step != self._step:
            self._step, self._maps = step, {}
        self._maps[layer.key] = layer.order, grid, torch.stack([source, target])[..., 0].float()

    def observed_masks(self):
        return {NAME: self._masks} if self._masks else {}

    def _kept(self, step, masks):
        """Wraps `masks` and keeps the last result on the finest grid, for Preview Attention."""

        def kept(grid):
            pair = masks(grid)
            if pair is not None:
                last = [m.unflatten(-1, grid) for m in pair]
                if last[0].numel() >= (self._masks[step][0].numel() if step in self._masks else 0):
                    self._masks[step] = last
            return pair

        return kept

    def _given(self, grid):
        pair = self.control.source_mask, self.control.target_mask
        masks = [F.interpolate(m[:, None].float(), grid).flatten(1).to(self.device) for m in pair]
        return [(m >= 0.5).expand(self.batch, -1) for m in masks]

    def _from_words(self, step, layer):
        """Masks from the maps that this step has given before the layer; the uncond half takes the cond half's."""

        def masks(grid):
            seen = [x for x in self._maps.values() if x[0] < layer.order] if self._step == step else []
            if not seen:
                return None
            finest = max((at for _, at, _ in seen), key=math.prod)
            maps = torch.stack([F.interpolate(m.unflatten(-1, at), finest) for _, at, m in seen]).mean(0)
            least, top = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
            maps = (maps - least) / (top - least).clamp(min=1e-12)
            return [m.flatten(1) >= self.control.threshold for m in F.interpolate(maps, grid)]

        return masks
