"""Prompt-to-Prompt (arXiv 2208.01626) and P2Plus (arXiv 2303.15649)."""

from dataclasses import dataclass

import torch

from ..edits import COND, NEGATIVE, SOURCE, Bound, Control, CrossEdit, SelfEdit, in_window
from ..text.align import equalizer, word_schedule
from . import local_blend
from .local_blend import LocalBlend


@dataclass(frozen=True, kw_only=True)
class PromptToPrompt(Control):
    """The target's attention follows the source's: cross-attention by aligned words, self-attention by place.

    Windows are (start, end) fractions of the executed steps; cross-attention rounds with T + 1 and self-attention with T,
    as the released code does. P2Plus is this with `uncond_self`.

    Attributes:
        cross: window in which the words keep the source's cross-attention.
        words: (phrase, window) pairs of target words with windows of their own.
        equalizer: (phrase, factor) pairs of target words, whose attention is scaled inside their window.
        self_: window in which the positive's self-attention maps are the source's.
        uncond_self: the same in the negative's branch (tau_u of P2Plus).
        cross_blocks, self_blocks: block selections.
        blend: `LocalBlend` or None.
    """

    cross: tuple = (0.0, 0.8)
    words: tuple = ()
    equalizer: tuple = ()
    self_: tuple = (0.0, 0.4)
    uncond_self: tuple = (0.0, 0.0)
    cross_blocks: str = "all"
    self_blocks: str = "p2p"
    blend: LocalBlend | None = None

    def check(self):
        word_schedule(self.prompts.target_tokens, 1, self.cross, self.words)
        equalizer(self.prompts.target_tokens, self.equalizer)
        if self.blend is not None:
            self.blend.check(self.prompts)

    def bind(self, setting):
        return PromptToPromptRun(self, setting)


class PromptToPromptRun(Bound):
    def __init__(self, control, setting):
        self.control, self.steps, self.device = control, setting.steps, setting.device
        self.self_layers = setting.layers(control.self_blocks)
        if setting.layout.joint and any(factor < 0 for _, factor in control.equalizer):
            raise ValueError(
                f"On {setting.layout.name} words and picture share one attention, in which a factor below 0 has no meaning: "
                "write 0 in the equalizer to leave a word out, or push away from it with a Semantic Concept."
            )
        self.cross_layers = setting.layers(control.cross_blocks)
        tokens, alignment = control.prompts.target_tokens, control.prompts.alignment
        self.schedule = word_schedule(tokens, setting.steps, control.cross, control.words)
        self.factors = equalizer(tokens, control.equalizer)
        self.matrix, self.own = alignment.matrix, alignment.own
        self.blend = None if control.blend is None else control.blend.bind(control.prompts, setting)
        self._edits = {}

    def check_chain(self, before):
        if any(isinstance(other, PromptToPromptRun) for other in before):
            raise ValueError(
                "Two Prompt-to-Prompt (or P2Plus) controls are chained; both would edit the same cross-attention. Keep one: "
                "it takes any number of words."
            )

    def self_edit(self, step, layer, branch):
        window = self.control.self_ if branch == COND else self.control.uncond_self
        if layer.key not in self.self_layers or not in_window(step, self.steps, window):
            return None
        source = SOURCE if branch == COND else NEGATIVE
        return SelfEdit(q=source, k=source)

    def cross_edit(self, step, layer):
        if layer.key not in self.cross_layers:
            return None
        active = tuple(self.schedule[step].tolist())
        if active not in self._edits:  # mostly one for all steps of the window
            self._edits[active] = self._cross_edit(self.schedule[step])
        return self._edits[active]

    def _cross_edit(self, alpha):
        """`P_new = alpha e (P_s M + P_t own) + (1 - alpha) P_t`, column by column."""
        if not alpha.any():
            return None
        factors = torch.where(alpha, self.factors, 1.0)
        parts = self.matrix * alpha, self.own * alpha + (~alpha).float(), factors
        used = (*(part.any() for part in parts[:2]), (factors != 1).any())
        whole = not used[1] and bool((parts[0].sum(1) - 1).abs().max() < 1e-6)
        return CrossEdit(*(part.to(self.device) if is_used else None for part, is_used in zip(parts, used)), whole=whole)

    def word_maps(self, step, layer):
        return None if self.blend is None else self.blend.word_maps(layer)

    def see_maps(self, step, layer, grid, source, target):
        self.blend.see(step, layer, grid, source, target)

    def forget_maps(self):
        if self.blend is not None:
            self.blend.forget()

    def after_step(self, step, y, source):
        return y if self.blend is None else self.blend.after_step(step, y, source)

    def observed_masks(self):
        if self.blend is None or not self.blend.masks:
            return {}
        return {local_blend.NAME: {step: (None, mask) for step, mask in self.blend.masks.items()}}
