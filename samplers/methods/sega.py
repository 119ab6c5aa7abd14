"""Semantic guidance, SEGA (arXiv 2301.12247), with momentum kept in units of eps (of flow models: of the velocity).

Three points differ from diffusers' SemanticStableDiffusionPipeline, each where it breaks: weights that sum to zero
give no edit (it gives NaN); guidance works at any cfg (it is ignored at cfg <= 1); momentum belongs to each concept
(with equal settings the sum over concepts is its one momentum, as the recursion is linear).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from .shapes import append_dims


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A concept to push towards or away from.

    Attributes:
        conditioning: what the concept is (ComfyUI CONDITIONING, or whatever the caller's model takes).
        direction: 1 towards, -1 away.
        scale: guidance scale s_e.
        threshold: quantile lambda of |d| below which nothing changes, 0..1 (1 excluded).
        warmup: first step, counted from the start of the edit, at which the concept acts (delta).
        cooldown: step at which it stops; None for never.
        momentum_scale, momentum_beta: s_m and beta_m.
        weight: g, the concept's share beside others, 0 or more.
    """

    conditioning: Any
    direction: int = 1
    scale: float = 5.0
    threshold: float = 0.9
    warmup: int = 10
    cooldown: int | None = None
    momentum_scale: float = 0.1
    momentum_beta: float = 0.4
    weight: float = 1.0

    def __post_init__(self):
        for name in ("scale", "threshold", "momentum_scale", "momentum_beta", "weight"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"The {name} of a concept is {getattr(self, name)}: choose a number.")

    def cooled(self, step):
        return self.cooldown is not None and step >= self.cooldown

    def needed(self, step):
        """Whether the concept's prediction at `step` can matter to the result, now or through momentum."""
        if self.cooled(step) or self.weight <= 0 or self.scale == 0:
            return False
        return step >= self.warmup or (self.momentum_scale != 0 and self.momentum_beta != 1)


def guidance(eps_concept: torch.Tensor, eps_uncond: torch.Tensor, concept: Concept) -> torch.Tensor:
    """Thresholded guidance psi of one concept (arXiv 2301.12247, eq. 4 to 6), [B, C, H, W].

    The quantile is taken for each picture and channel over all positions; scaling comes before it, ties are kept.
    """
    d = (eps_concept - eps_uncond) * (concept.direction * concept.scale)
    size = d.abs().float()
    least = torch.quantile(size.flatten(2), concept.threshold, dim=2)
    return torch.where(size >= append_dims(least, d.ndim), d, torch.zeros_like(d))


class Sega:
    """The concepts of one run, with their momentum. Make a new one for every run."""

    def __init__(self, concepts):
        self.concepts = tuple(concepts)
        self._momentum = [0.0] * len(self.concepts)
        self._step = None
        self._before = list(self._momentum)

    def needed(self, step):
        """Indices of the concepts whose predictions `__call__` wants at this step."""
        return [i for i, c in enumerate(self.concepts) if c.needed(step)]

    def __call__(self, step, eps_uncond, eps_concepts):
        """Guidance to add to the noise prediction at `step` (0 for the first executed step).

        Momentum moves on once per step: a sampler that evaluates a step twice sees the same momentum both times.

        Args:
            step: position in the executed schedule.
            eps_uncond: [B, C, H, W], or None where no concept is needed.
            eps_concepts: {index: [B, C, H, W]} for the indices in `needed(step)`.

        Returns:
            gamma in eps units, [B, C, H, W], or None where nothing acts.
        """
        if step != self._step:
            self._step, self._before = step, list(self._momentum)
        pushes = {i: guidance(eps_concepts[i], eps_uncond, self.concepts[i]) for i in self.needed(step)}
        total = None
        for i, concept in enumerate(self.concepts):
            push = concept.weight * pushes[i] if i in pushes else 0.0
            gamma = push + concept.momentum_scale * self._before[i]  # eq. 7
            self._momentum[i] = concept.momentum_beta * self._before[i] + (1 - concept.momentum_beta) * gamma  # eq. 8
            total = gamma if total is None else total + gamma
        warm = [i for i, c in enumerate(self.concepts) if step >= c.warmup]
        if len(warm) < len(self.concepts):  # some still warm up: weighted mean of the others, no momentum
            weight = sum(self.concepts[i].weight for i in warm if not self.concepts[i].cooled(step))
            shares = (self.concepts[i].weight / weight * pushes[i] for i in warm if i in pushes)
            total = sum(shares) if weight > 0 else None
        return total if isinstance(total, torch.Tensor) else None
