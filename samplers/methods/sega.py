"""Semantic guidance, SEGA (arXiv 2301.12247) and LEDITS++'s masks (arXiv 2311.16711), with momentum kept in units of eps (of flow models: of the velocity).

Three points differ from diffusers' SemanticStableDiffusionPipeline, each where it breaks: weights that sum to zero
give no edit (it gives NaN); guidance works at any cfg (it is ignored at cfg <= 1); momentum belongs to each concept
(with equal settings the sum over concepts is its one momentum, as the recursion is linear).
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from .shapes import append_dims

SEGA, ATTENTION, NOISE, BOTH = "SEGA", "attention", "noise", "attention and noise"
MASKS = (SEGA, ATTENTION, NOISE, BOTH)
# LEDITS++ smooths with exp(-(x / (2 s))^2) at s 0.5, as its released code does.
_SMOOTH = torch.tensor([math.exp(-1), 1.0, math.exp(-1)]) / (1 + 2 * math.exp(-1))


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
        mask: where it acts: one of MASKS. SEGA takes the largest values of each channel, NOISE (M2 of LEDITS++) the places
            where all channels together are largest, ATTENTION (M1) those that look at its words most, BOTH M1 and M2.
        words: 1 at the tokens of its words, float32 [tokens], for M1.
        area: where it may act at all, 0..1 [1 or B, h, w], applied last; None for everywhere.
        start: as `warmup`, as a share of the steps of the edit.
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
    mask: str = SEGA
    words: Any = None
    area: Any = None
    start: float = 0.0

    def __post_init__(self):
        for name in ("scale", "threshold", "momentum_scale", "momentum_beta", "weight"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"The {name} of a concept is {getattr(self, name)}: choose a number.")

    @property
    def reads_attention(self):
        return self.mask in (ATTENTION, BOTH)

    def started(self, steps: int) -> "Concept":
        """With `start` in `warmup`, for an edit of so many steps."""
        return replace(self, warmup=max(self.warmup, int(self.start * steps + 1e-9)), start=0.0)

    def cooled(self, step):
        return self.cooldown is not None and step >= self.cooldown

    def needed(self, step):
        """Whether the concept's prediction at `step` can matter to the result, now or through momentum."""
        if self.cooled(step) or self.weight <= 0 or self.scale == 0:
            return False
        return step >= self.warmup or (self.momentum_scale != 0 and self.momentum_beta != 1)


def guidance(eps_concept: torch.Tensor, eps_uncond: torch.Tensor, concept: Concept, attention=None) -> torch.Tensor:
    """Masked guidance psi of one concept, [B, C, H, W] (arXiv 2301.12247, eq. 4 to 6; 2311.16711, eq. 10 to 14).

    Quantiles are taken for each picture over all positions, SEGA's for each channel too; scaling comes before them, ties
    are kept, M2 is of the guidance before M1.

    Args:
        attention: of M1, [B, h, w].
    """
    d = (eps_concept - eps_uncond) * (concept.direction * concept.scale)
    keep = torch.ones_like(d[:, :1], dtype=torch.bool)
    if concept.mask == SEGA:
        keep = _largest(d.abs().float(), concept.threshold)
    if concept.mask in (NOISE, BOTH):
        keep = _largest(d.abs().float().sum(1, keepdim=True), concept.threshold)
    if concept.reads_attention:
        keep = keep & attention_mask(attention, concept.threshold, d)
    out = torch.where(keep, d, torch.zeros_like(d))
    return out if concept.area is None else out * _spread(concept.area[:, None].to(d), d, "bilinear")


def _largest(size, threshold):
    """Whether a value is at least the quantile of its picture and channel."""
    return size >= append_dims(torch.quantile(size.flatten(2), threshold, dim=2), size.ndim)


def attention_mask(attention: torch.Tensor, threshold: float, like: torch.Tensor) -> torch.Tensor:
    """M1 of LEDITS++: where a map [B, h, w], smoothed, is at least its quantile; boolean [B, 1, ...] for a latent."""
    smooth = F.pad(attention[:, None].float(), (1, 1, 1, 1), mode="reflect")
    for axis in ((3, 1), (1, 3)):
        smooth = F.conv2d(smooth, _SMOOTH.to(smooth).view(1, 1, *axis))
    return _spread(_largest(smooth, threshold).to(like), like, "nearest").bool()


def _spread(mask, like, mode):
    """A mask [B, 1, h, w] at a latent's size, for every frame of video."""
    mask = F.interpolate(mask, like.shape[-2:], mode=mode)
    return mask if like.ndim == 4 else mask[:, :, None]


class Sega:
    """The concepts of one run, with their momentum. Make a new one for every run.

    Attributes:
        areas: {"concept 1": {step: boolean [B, h, w]}, ...}, where each pushes (SEGA: in any channel; of video in any frame).
    """

    def __init__(self, concepts):
        self.concepts, self.areas = tuple(concepts), {}
        self._momentum = [0.0] * len(self.concepts)
        self._step = None
        self._before = list(self._momentum)

    def needed(self, step):
        """Indices of the concepts whose predictions `__call__` wants at this step."""
        return [i for i, c in enumerate(self.concepts) if c.needed(step)]

    def __call__(self, step, eps_uncond, eps_concepts, attention=None):
        """Guidance to add to the noise prediction at `step` (0 for the first executed step).

        Momentum moves on once per step: a sampler that evaluates a step twice sees the same momentum both times.

        Args:
            step: position in the executed schedule.
            eps_uncond: [B, C, H, W], or None where no concept is needed.
            eps_concepts: {index: [B, C, H, W]} for the indices in `needed(step)`.
            attention: {index: [B, h, w]} of those whose mask is made of it.

        Returns:
            gamma in eps units, [B, C, H, W], or None where nothing acts.
        """
        if step != self._step:
            self._step, self._before = step, list(self._momentum)
        maps = attention or {}
        pushes = {i: guidance(eps_concepts[i], eps_uncond, self.concepts[i], maps.get(i)) for i in self.needed(step)}
        for i, push in pushes.items():
            self.areas.setdefault(f"concept {i + 1}", {})[step] = (push != 0).flatten(1, -3).any(1)
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
