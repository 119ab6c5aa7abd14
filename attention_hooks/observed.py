"""The attention of a run, to be looked at when it is over: maps of words, and masks."""

from dataclasses import dataclass, field
from typing import Any

import torch

SIDES = ("source", "target")


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Made by a run when it is over; on the CPU.

    Attributes:
        steps: how many were executed.
        size: height and width of the picture, in pixels.
        latent: what the run ended at, [B, C, h, w] in the sampler's space: tells one run from another.
        tokens: (source, target) `Tokens` of the maps, or None where none were recorded.
        maps: {step: (source, target)}, cross-attention of every word [B, words, h, w], mean over heads and layers, the
            target's after its edit.
        masks: {name of the method, or of a concept: {step: (source, target)}}, boolean [B, h, w] each; source is None
            where there is one mask.
    """

    steps: int
    size: tuple[int, int]
    latent: torch.Tensor
    tokens: Any = None
    maps: dict = field(default_factory=dict)
    masks: dict = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "maps", _on_cpu(self.maps))
        object.__setattr__(self, "masks", {name: _on_cpu(trace) for name, trace in self.masks.items()})

    def words(self):
        """The words of both prompts, each once, the source's first."""
        return tuple(dict.fromkeys(word.text for tokens in self.tokens for word in tokens.words))

    def check(self, phrases):
        """Refuse a phrase that is in neither prompt.

        Raises:
            ValueError: names it and the prompts.
        """
        source, target = self.tokens
        for phrase in phrases:
            if not source.search(phrase) and not target.search(phrase):
                raise ValueError(
                    f"The word '{phrase}' is in neither prompt. Source: '{source.text}'. Target: '{target.text}'."
                )

    def word_map(self, phrase, side, step=None):
        """Attention to a phrase, summed over its words, [B, h, w]; None where the prompt does not have it.

        Args:
            side: "source" or "target".
            step: executed step, or None for the mean over all that were recorded.
        """
        k = SIDES.index(side)
        positions = set(self.tokens[k].search(phrase))
        its = [n for n, word in enumerate(self.tokens[k].words) if positions.issuperset(word.positions)]
        if not positions:
            return None
        steps = self.maps if step is None else [step]
        return torch.stack([self.maps[s][k][:, its].sum(1) for s in steps]).mean(0)


def pixels(path) -> tuple[int, int]:
    """Height and width of the picture of an `Inversion`."""
    scale = getattr(path.latent_format, "spacial_downscale_ratio", 8)
    return tuple(side * scale for side in path.latents.shape[-2:])


def _on_cpu(trace):
    return {step: tuple(None if t is None else t.cpu() for t in pair) for step, pair in trace.items()}
