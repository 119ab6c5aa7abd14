"""Local blend of Prompt-to-Prompt: the picture changes only where the words are (arXiv 2208.01626, section 3.2)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..text.align import columns, places

NAME = "local blend"  # of its masks


@dataclass(frozen=True, kw_only=True)
class LocalBlend:
    """Settings of the mask.

    Attributes:
        words: phrases whose place may change, in either prompt; empty for those that tell where the two prompts differ
            (`align.places`).
        substruct_words: phrases whose place may not.
        threshold, substruct_threshold: share of the map's maximum above which a place belongs to a word.
        start: fraction of the steps after which the mask is applied.
        blocks: selection of the cross-attention layers that give the maps.
    """

    words: tuple = ()
    substruct_words: tuple = ()
    threshold: float = 0.3
    substruct_threshold: float = 0.3
    start: float = 0.2
    blocks: str = "words"

    def check(self, prompts):
        """Refuse a phrase that is in neither prompt; without phrases, prompts that do not say where.

        Raises:
            ValueError: names it, or says which prompt to change.
        """
        if not self.words and not prompts.target_tokens.words:
            raise ValueError(
                "Local blend is to find the words that change, but the target prompt is empty: write what the picture is to show "
                "(target), or write blend_words."
            )
        if not self.words and not any(places(prompts.source_tokens, prompts.target_tokens)):
            raise ValueError(
                "Local blend is to find the words that change, but source and target prompt have the same words: change the "
                "target in Edit Prompts, or write blend_words."
            )
        for phrase in (*self.words, *self.substruct_words):
            if not prompts.source_tokens.search(phrase):
                prompts.target_tokens.find(phrase)

    def bind(self, prompts, setting):
        return BoundBlend(self, prompts, setting)


class BoundBlend:
    """The maps of one run, and the mask they give.

    Attributes:
        mask: the last one, [B, 1, h, w], None before.
        masks: {step: boolean [B, h, w]} of all steps.
    """

    def __init__(self, settings, prompts, setting):
        setting.check_one_frame()
        self.settings, self.size, self.mask = settings, setting.size, None
        self.start = int(setting.steps * settings.start + 1e-9)
        self.layers = setting.layers(settings.blocks)
        both = prompts.source_tokens, prompts.target_tokens
        words = [columns(tokens, settings.words) for tokens in both]
        if not settings.words:
            for column, positions in zip(words, places(*both)):
                column[list(positions)] = 1
        self.columns = tuple(
            torch.stack([column, columns(tokens, settings.substruct_words)], dim=1) for column, tokens in zip(words, both)
        )
        self._sums, self._step, self.masks = {}, {}, {}

    def word_maps(self, layer):
        return self.columns if layer.key in self.layers else None

    def see(self, step, layer, grid, source, target):
        """Maps of one layer at a step; of further predictions (another pack's guidance) nothing is taken."""
        self._step.setdefault(layer.key, (grid, torch.stack([source, target]).float()))

    def forget(self):
        """Drop what was seen at this step."""
        self._step = {}

    def after_step(self, step, y, source):
        for key, (grid, maps) in self._step.items():
            before = self._sums.get(key)
            self._sums[key] = grid, maps if before is None else before[1] + maps
        self._step = {}
        if step < self.start or not self._sums:
            return y
        mask = self._mask(average(self._sums.values()), y.shape[-2:])
        self.mask, self.masks[step] = mask.to(y), mask[:, 0]
        free = self.mask if y.ndim == 4 else self.mask[:, :, None]  # the same in every frame
        return source + free * (y - source)

    def _mask(self, maps, size):
        """Mask [B, 1, h, w] from maps [2 (source, target), B, 2 (words, substruct words), h, w]."""
        blend, substruct = maps[:, :, 0], maps[:, :, 1]
        mask = above(F.max_pool2d(blend, 3, 1, 1), self.settings.threshold, size)
        if self.settings.substruct_words:
            mask &= ~above(substruct, self.settings.substruct_threshold, size)
        return mask[:, None]


def average(maps):
    """Mean over layers of (grid, [2, B, h * w, G]) as [2, B, G, h, w] on the finest of their grids."""
    maps = list(maps)
    finest = max((grid for grid, _ in maps), key=lambda grid: grid[0] * grid[1])
    spread = [m.mT.unflatten(-1, grid) for grid, m in maps]
    spread = [m if m.shape[-2:] == finest else F.interpolate(m.flatten(0, 1), finest).unflatten(0, m.shape[:2]) for m in spread]
    return torch.stack(spread).mean(0)


def above(maps, threshold, size):
    """Whether source or target exceed a share of their maximum: [2, B, h, w] to boolean [B, *size]."""
    maps = F.interpolate(maps, size)
    top = maps.amax((-2, -1), keepdim=True)
    return ((maps > threshold * top) & (top > 0)).any(0)
