"""Plug-and-Play diffusion features (arXiv 2211.12572)."""

from dataclasses import dataclass

from ..edits import Bound, Control, SelfEdit, in_window


@dataclass(frozen=True, kw_only=True)
class PlugAndPlay(Control):
    """The source's decoder features and self-attention maps keep the layout, in both branches of the target.

    Attributes:
        features: window of the feature injection (pnp_f_t).
        attention: window of the self-attention injection (pnp_attn_t).
        feature_blocks, attention_blocks: block selections.
    """

    features: tuple = (0.0, 0.8)
    attention: tuple = (0.0, 0.5)
    feature_blocks: str = "pnp_features"
    attention_blocks: str = "pnp"

    def bind(self, setting):
        return PlugAndPlayRun(self, setting)


class PlugAndPlayRun(Bound):
    def __init__(self, control, setting):
        self.control, self.steps = control, setting.steps
        self.blocks = setting.resblocks(control.feature_blocks)
        self.layers = setting.layers(control.attention_blocks)
        if setting.layout.joint and not in_window(0, setting.steps, control.attention):
            raise ValueError(
                f"{setting.layout.name} has no residual blocks, so of Plug-and-Play only the attention acts there, and "
                "pnp_attn_t is 0: set it to 0.2, for instance."
            )

    def self_edit(self, step, layer, branch):
        if layer.key not in self.layers or not in_window(step, self.steps, self.control.attention):
            return None
        return SelfEdit(q=self.control.source_branch, k=self.control.source_branch)

    def feature_edit(self, step, block, branch):
        if block.key not in self.blocks or not in_window(step, self.steps, self.control.features):
            return None
        return self.control.source_branch
