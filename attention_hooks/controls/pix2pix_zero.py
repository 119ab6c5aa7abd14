"""pix2pix-zero: cross-attention guidance (arXiv 2302.03027, section 3.2 and algorithm 1)."""

from dataclasses import dataclass

import torch

from .. import attend
from ..edits import Bound, Comparison, Control, in_window


@dataclass(frozen=True, kw_only=True)
class Pix2PixZero(Control):
    """Before a step the target latent moves so that the target's cross-attention maps come nearer to the source's.

        x <- x - xa_guidance * dL/dx,   x = y / sqrt(1 + sigma^2)

    with L of `MapDistance`. Both prompts must have as many tokens: the target is the source prompt plus an edit direction.

    Attributes:
        xa_guidance: lambda; the authors take 0.1 for real pictures and 0.15 for generated ones.
        window: fractions of the steps.
        blocks: selection of the cross-attention layers that are compared.
    """

    xa_guidance: float = 0.1
    window: tuple = (0.0, 1.0)
    blocks: str = "all"

    def bind(self, setting):
        return Pix2PixZeroRun(self, setting)


class Pix2PixZeroRun(Bound):
    def __init__(self, control, setting):
        self.control, self.steps, self.batch = control, setting.steps, setting.batch
        if setting.layout.joint:
            raise ValueError(
                f"pix2pix-zero follows the slope of a network of the Stable Diffusion kind (SD 1.x, SD 2.x, SDXL), which "
                f"{setting.layout.name} is not. Use Prompt-to-Prompt or Plug-and-Play there."
            )
        layers = setting.layers(control.blocks)
        self._comparison = Comparison(control.source_branch, layers) if layers and control.xa_guidance != 0 else None

    @property
    def acts(self):
        """Whether it moves the latent at any step."""
        return any(self.comparison(step) is not None for step in range(self.steps))

    def check_chain(self, before):
        if self.acts and any(isinstance(other, Pix2PixZeroRun) and other.acts for other in before):
            raise ValueError("Two pix2pix-zero controls are chained; both would guide the same latent. Keep one.")

    def check_lengths(self, source, positive):
        if source not in positive:
            has = " and ".join(map(str, sorted(positive))) or "none over the whole picture"
            raise ValueError(
                f"pix2pix-zero compares target and source token by token. The source prompt has {source} tokens, the "
                f"positive of the sampler {has}: make it from the source prompt with Edit Direction."
            )

    def comparison(self, step):
        return self._comparison if in_window(step, self.steps, self.control.window) else None

    def before_step(self, step, y, size, gradient):
        comparison = self.comparison(step)
        if comparison is None:
            return y
        slope = gradient(comparison, MapDistance(self.batch))
        return y - self.control.xa_guidance * size * slope


class MapDistance:
    """The loss, made of the maps of each layer while the network runs.

        L = 1/2 * sum over layers of the mean over heads of the sum over places and tokens of (P_target - P_source)^2

    The released code takes the mean over heads and over two rows of each picture, negative and positive, and moves each
    row by its own part. This is the positive's part, by which the paper moves the one latent that both are. Pictures and
    conditionings of a batch do not influence each other's part.

    Args:
        batch: pictures.
    """

    def __init__(self, batch):
        self._batch, self._parts = batch, None

    def begin(self):
        self._parts = []

    def end(self):
        total, self._parts = sum(self._parts), None
        return total

    def add(self, q, k, source_q, source_k, heads, entries):
        """The part of one layer.

        Args:
            q, k: the target's, [entries * B, tokens, width].
            source_q, source_k: [B, tokens, width].
            heads: of the layer.
            entries: conditionings of the positive, which count equally.
        """
        with torch.no_grad():
            source = attend.maps(source_q, source_k, heads)
        target = attend.maps(q.clone(), k.clone(), heads)  # other controls' patches write into q and k
        part = (target.unflatten(0, (-1, self._batch)) - source).square().sum() / (2 * heads * entries)
        if self._parts is not None:  # not when a block runs again in the backward pass
            self._parts.append(part)
