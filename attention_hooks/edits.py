"""What a control declares about a step: plain values that the run reads and carries out.

A control is a frozen dataclass with settings. `bind` makes the object that serves one run; it may hold state, because
ComfyUI never copies it. Steps count the executed ones, 0 to T - 1. Target branches are "cond" and "uncond" (concepts follow
"uncond"); source branches are "source" (the source prompt) and "negative".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .blocks import Layout, select

SOURCE, NEGATIVE = "source", "negative"
COND, UNCOND = "cond", "uncond"


class Slot(NamedTuple):
    """One captured tensor: [B, tokens, width], or [B, C, H, W] for a feature."""

    branch: str  # SOURCE or NEGATIVE
    site: str  # "attn1", "attn2" or "feature"
    key: tuple  # Layer.key
    name: str  # "q", "k", "v" or "h"


@dataclass(frozen=True)
class SelfEdit:
    """Self-attention rows to take from a source branch (spec: row copies, no matrix).

    Attributes:
        q, k, v: source branch, or None for the target's own.
        own_keys: k and v are added to the target's own instead of replacing them.
        masks: None, or `grid (h, w) -> (source, target)` boolean or 0..1 [B, h * w] each, or None for no masks: queries
            inside the target mask see only keys inside the source mask, those outside only keys outside.
    """

    q: str | None = None
    k: str | None = None
    v: str | None = None
    own_keys: bool = False
    masks: Callable | None = None


@dataclass(frozen=True)
class CrossEdit:
    """Cross-attention of the target's cond rows as a linear mix of source and target maps.

    `P_new = P_s @ matrix + P_t * own`, so `out = attention(Q_s, K_s, matrix @ V_t) + attention(Q_t, K_t, own * V_t)`.

    Attributes:
        matrix: float32 [source tokens, target tokens], or None where no source attention is used.
        own: float32 [target tokens], or None where nothing of the target's own attention stays.
    """

    matrix: torch.Tensor | None
    own: torch.Tensor | None


@dataclass(frozen=True)
class Guidance:
    """One step of the target latent that draws its cross-attention maps to the source's, see `controls.pix2pix_zero`.

    Attributes:
        source: source branch whose maps they are.
        layers: keys of the layers that are compared.
        amount: length of the step (lambda).
    """

    source: str
    layers: frozenset
    amount: float


@dataclass(frozen=True)
class Setting:
    """What one run is made of, for `Control.bind`.

    Attributes:
        layout: of the model.
        size: height and width of the latent.
        steps: number of executed steps T.
        batch: pictures.
        device: where the model computes.
    """

    layout: Layout
    size: tuple[int, int]
    steps: int
    batch: int
    device: Any

    def layers(self, text):
        """Keys of the transformer blocks that a selection names."""
        return select(text, self.layout.layers, self.layout, self.size)

    def resblocks(self, text):
        """Keys of the residual blocks that a selection names."""
        return select(text, self.layout.resblocks, self.layout, self.size)


@dataclass(frozen=True)
class Control:
    """Settings of one editing method.

    Attributes:
        prompts: `prompts.EditPrompts` or None.
        source: CONDITIONING of the source picture, or None for that of the prompts.
    """

    prompts: Any = None
    source: Any = None

    @property
    def source_conditioning(self):
        """CONDITIONING of the source branch; None where the edit's negative serves."""
        return self.source if self.source is not None or self.prompts is None else self.prompts.source

    @property
    def source_branch(self):
        return NEGATIVE if self.source_conditioning is None else SOURCE

    def check(self):
        """Refuse settings that no model could serve, when the node runs.

        Raises:
            ValueError: a word that is not in its prompt, or settings that exclude each other.
        """

    def bind(self, setting) -> "Bound":
        """The object that serves one run.

        Raises:
            ValueError: a block that the model does not have.
        """
        raise NotImplementedError


class Bound:
    """One control in one run. What a method does not do, it leaves as it is here."""

    reads_words = False  # whether its edits depend on maps seen earlier in the same step (then cond goes first)

    def self_edit(self, step, layer, branch) -> SelfEdit | None:
        return None

    def cross_edit(self, step, layer) -> CrossEdit | None:
        return None

    def feature_edit(self, step, block, branch) -> str | None:
        """Source branch whose residual-branch output replaces the target's at a residual block."""
        return None

    def guidance(self, step) -> Guidance | None:
        """How the target latent is moved before the step is evaluated."""
        return None

    def word_maps(self, step, layer):
        """Token columns to sum the cross-attention over: (source [M_s, G], target [M_t, G]), or None."""
        return None

    def see_maps(self, step, layer, grid, source, target):
        """Given the maps asked for, [B, tokens, G] each (heads averaged, the target's after its edit)."""

    def forget_maps(self):
        """The maps given so far at this step were of a latent that has moved since; those of the prediction follow."""

    def after_step(self, step, y, source):
        """The target latent after a step; `source` is the path's at the same level, [B, C, H, W]."""
        return y

    def seen(self):
        """What there is to look at when the run is over: fields of `seen.Seen`."""
        return {}


def in_window(step, steps, window):
    """Whether `floor(T * start) <= step < floor(T * end)`, for fractions of T executed steps."""
    return int(steps * window[0] + 1e-9) <= step < int(steps * window[1] + 1e-9)
