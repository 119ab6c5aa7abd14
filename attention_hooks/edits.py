"""The edits that a control declares for a step: plain values that `plan` collects and the target pass carries out.

A control is a frozen dataclass with settings. `bind` makes the object that serves one run; it may hold state, because
ComfyUI never copies it. Steps count the executed ones, 0 to T - 1. Target branches are "cond" and "uncond" (concepts follow
"uncond"); source branches are "source" (the source prompt) and "negative".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from .blocks import Layer, Layout, select

SOURCE, NEGATIVE = "source", "negative"
COND, UNCOND = "cond", "uncond"

BRANCHES_DIFFER = "ledits_branches_differ"  # in model_options: an equal positive and negative are edited differently
VALUE_PRESCRIBED = "value_prescribed"  # in an encoded entry: the inversion prescribes what its `to_v` sees


class Slot(NamedTuple):
    """One captured tensor: [B, tokens, width], or [B, C, H, W] for a feature."""

    branch: str  # SOURCE or NEGATIVE
    site: str  # "attn1", "attn2", "joint" or "feature"
    key: tuple  # Layer.key
    name: str  # "q", "k", "v" (of "joint": the picture's), "t" (of "joint": k of all other tokens), or "h"


class SourcePath(Protocol):
    """The inverted picture as a run needs it (`samplers.methods.record.Inversion` is one).

    Attributes:
        sigmas: [N + 1].
        latents: [N + 1, B, C, h, w].
        batch: pictures B.
        overrides: embeddings that the inversion prescribes.
        model: description of the model.
        kind: the family, whose `input_scale` is asked.
        latent_format: ComfyUI's.
    """

    sigmas: torch.Tensor
    latents: torch.Tensor
    batch: int
    overrides: dict
    model: str
    kind: Any
    latent_format: Any


@dataclass(frozen=True, kw_only=True)
class SelfEdit:
    """Self-attention rows to take from a source branch (spec: row copies, no matrix).

    Attributes:
        q, k, v: source branch, or None for the target's own.
        own_keys: k and v are added to the target's own instead of replacing them.
        masks: None, or `grid (h, w) -> (source, target)` boolean or 0..1 [B, h * w] each, or None for no masks: queries
            inside the target mask see only keys inside the source mask, those outside only keys outside.
        where: None, or `grid (h, w) -> [B, h * w]` boolean: the places whose rows are taken. Of video every frame's.
    """

    q: str | None = None
    k: str | None = None
    v: str | None = None
    own_keys: bool = False
    masks: Callable | None = None
    where: Callable | None = None


@dataclass(frozen=True)
class CrossEdit:
    """Attention to the words of the target's cond rows as a linear mix of source and target maps.

    `P_new = (P_s @ matrix + P_t * own) * factors`. In joint attention P_s and P_t are the shares among the words, P_new
    is scaled to the target's own share of words before the factors, and the whole row to 1 after them.

    Attributes:
        matrix: float32 [source tokens, target tokens], or None where no source attention is used.
        own: float32 [target tokens], or None where nothing of the target's own attention stays.
        factors: float32 [target tokens], or None for ones.
        whole: whether the mix sums to 1 before the factors, as it stands (`matrix` alone, of rows that sum to 1).
    """

    matrix: torch.Tensor | None
    own: torch.Tensor | None
    factors: torch.Tensor | None = None
    whole: bool = False

    def of(self, change: Callable) -> "CrossEdit":
        """With every tensor changed."""
        parts = (None if part is None else change(part) for part in (self.matrix, self.own, self.factors))
        return CrossEdit(*parts, whole=self.whole)

    def folded(self) -> "CrossEdit":
        """With the factors in the two others."""
        if self.factors is None:
            return self
        return CrossEdit(*(None if part is None else part * self.factors for part in (self.matrix, self.own)))


@dataclass(frozen=True)
class Comparison:
    """Cross-attention of the target to compare with the source's before a step, see `Bound.before_step`.

    Attributes:
        source: source branch whose maps they are.
        layers: keys of the layers that are compared.
    """

    source: str
    layers: frozenset


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes of one run, for `Control.bind`.

    Attributes:
        layout: of the model.
        size: height and width of the latent.
        steps: number of executed steps T.
        batch: pictures.
        device: where the model computes.
        frames: of tokens, for video.
    """

    layout: Layout
    size: tuple[int, int]
    steps: int
    batch: int
    device: torch.device
    frames: int = 1

    def layers(self, text: str) -> frozenset:
        """Keys of the transformer blocks that a selection names."""
        return select(text, self.layout.layers, self.layout, self.size)

    def resblocks(self, text: str) -> frozenset:
        """Keys of the residual blocks that a selection names; none where the network has none."""
        return select(text, self.layout.resblocks, self.layout, self.size) if self.layout.resblocks else frozenset()

    def check_one_frame(self):
        """Refuse video where a mask is made from the attention of words.

        Raises:
            ValueError: what to do.
        """
        if self.frames > 1:
            raise ValueError(
                f"Masks and maps from the attention of words are made for pictures, and this latent has {self.frames} "
                "frames. Leave the words for masks empty (local blend, MasaCtrl, Record Attention), or edit one frame."
            )


@dataclass(frozen=True, kw_only=True)
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

    def bind(self, setting: Setting) -> "Bound":
        """The object that serves one run.

        Raises:
            ValueError: a block that the model does not have.
        """
        raise NotImplementedError


class Bound:
    """A control bound to one run. Subclasses override the hooks they need; the defaults do nothing."""

    reads_words = False  # whether its edits depend on maps seen earlier in the same step (then cond goes first)

    def check_chain(self, before: "list[Bound]"):
        """Refuse the controls that are chained before this one.

        Raises:
            ValueError: one of them does what only one can do.
        """

    def self_edit(self, step: int, layer: Layer, branch: str) -> SelfEdit | None:
        return None

    def cross_edit(self, step: int, layer: Layer) -> CrossEdit | None:
        return None

    def feature_edit(self, step: int, block: Layer, branch: str) -> str | None:
        """Source branch whose residual-branch output replaces the target's at a residual block."""
        return None

    def word_maps(self, step: int, layer: Layer) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Token columns to sum the cross-attention over: (source [M_s, G], target [M_t, G])."""
        return None

    def see_maps(self, step, layer: Layer, grid, source: torch.Tensor, target: torch.Tensor):
        """Given the maps asked for, [B, tokens, G] each (heads averaged, the target's after its edit)."""

    def forget_maps(self):
        """Discard this step's maps: the latent has moved; the maps of the real prediction follow."""

    def comparison(self, step: int) -> Comparison | None:
        """The maps that `before_step` compares."""
        return None

    def check_lengths(self, source: int, positive: set[int]):
        """Refuse prompts whose maps cannot be compared.

        Args:
            source: number of tokens of the source prompt.
            positive: numbers of tokens of the target's conditionings over the whole picture.

        Raises:
            ValueError: what to do.
        """

    def before_step(self, step: int, y: torch.Tensor, size: float, gradient: Callable) -> torch.Tensor:
        """The target latent with which the step is evaluated.

        Args:
            y: [B, C, H, W].
            size: root mean square of a latent at this noise level, `y / size` being of unit variance.
            gradient: `(comparison, loss) -> dL/dx` at `x = y / size`, [B, C, H, W].
        """
        return y

    def after_step(self, step: int, y: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """The target latent after a step; `source` is the path's at the same level, [B, C, H, W]."""
        return y

    def observed_words(self):
        """(tokens, maps) as in `Observed`, or None."""
        return None

    def observed_masks(self) -> dict:
        """{name: {step: (source or None, target)}}, boolean [B, h, w] each."""
        return {}


def in_window(step, steps, window):
    """Whether `floor(T * start) <= step < floor(T * end)`, for fractions of T executed steps."""
    return int(steps * window[0] + 1e-9) <= step < int(steps * window[1] + 1e-9)
