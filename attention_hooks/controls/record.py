"""A control that changes nothing and remembers the cross-attention of every word, to be looked at."""

from dataclasses import dataclass

import torch

from ..edits import Bound, Control
from .local_blend import average


@dataclass(frozen=True, kw_only=True)
class Record(Control):
    """Settings of a recording.

    Attributes:
        blocks: selection of the cross-attention layers that give the maps.
    """

    blocks: str = "words"

    def bind(self, setting):
        return RecordRun(self, setting)


class RecordRun(Bound):
    def __init__(self, control, setting):
        setting.check_one_frame()
        self.layers = setting.layers(control.blocks)
        self.tokens = control.prompts.source_tokens, control.prompts.target_tokens
        self.columns = tuple(_columns(tokens).to(setting.device) for tokens in self.tokens)
        self._step, self._maps = {}, {}

    def word_maps(self, step, layer):
        return self.columns if layer.key in self.layers else None

    def see_maps(self, step, layer, grid, source, target):
        self._step.setdefault(layer.key, (grid, source.float(), target.float()))

    def forget_maps(self):
        self._step = {}

    def after_step(self, step, y, source):
        if self._step:
            seen = self._step.values()
            self._maps[step] = tuple(average((pair[0], pair[side][None]) for pair in seen)[0] for side in (1, 2))
        self._step = {}
        return y

    def observed_words(self):
        return (self.tokens, self._maps) if self._maps else None


def _columns(tokens):
    """One column for every word of a prompt, 1 at its tokens: float32 [tokens, words]."""
    out = torch.zeros(len(tokens), len(tokens.words))
    for n, word in enumerate(tokens.words):
        out[list(word.positions), n] = 1
    return out
