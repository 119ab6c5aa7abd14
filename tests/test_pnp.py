"""Plug-and-Play against its paper's joint batch with explicit matrices."""
import pytest
from comfyui_ledits.attention_hooks.controls.pnp import PlugAndPlay
from oracles import joint_attention
from support import editing, tiny

SOURCE, TARGET = "a cat sits on a sofa", "a marble statue of a cat, in a dark hall"
SHAPES = [("sd1", 16, 16, 1, False), ("sdxl", 24, 16, 2, False), ("sd1", 24, 16, 2, True), ("sdxl", 16, 16, 1, True)]


class Paper(joint_attention.Editor):
    """arXiv 2211.12572, algorithm 1: features of the first residual block of output 1, self-attention from there on."""

    def __init__(self, features, attention):
        self.features, self.attention = features, attention

    def begin(self, step):
        self.step = step

    def feature(self, h, block):
        if block == ("output", 1) and self.step < self.features:
            h = h | {"u_t": h["c_s"], "c_t": h["c_s"]}
        return h

    def self_attention(self, q, k, v, probs, layer):
        if layer[0][0] == "output" and layer[0][1] >= 1 and self.step < self.attention:
            probs = probs | {"u_t": probs["c_s"], "c_t": probs["c_s"]}
        return super().self_attention(q, k, v, probs, layer)


@pytest.mark.parametrize("kind, height, width, batch, apart", SHAPES)
def test_features_and_self_attention_are_the_source_s(kind, height, width, batch, apart):
    model = tiny.model(kind)
    path = editing.path(model, 10, batch, height, width)
    words, empty = editing.prompts(kind, SOURCE, TARGET), editing.negative(kind, "ugly")
    expected = joint_attention.joint_edit(model, path, words.source, words.target, empty, 7.5, Paper(8, 5))
    features = joint_attention.joint_edit(model, path, words.source, words.target, empty, 7.5, Paper(0, 5))
    model = editing.split(model) if apart else model
    control = PlugAndPlay(source=words.source, features=(0, 0.8), attention=(0, 0.5), feature_blocks="output.1.0",
                          attention_blocks="output.1-")
    got, guider = editing.run(model, path, words.target, empty, 7.5, [control])
    assert (got - expected).abs().max() < 1e-4
    assert (got - features).abs().max() > 1e-2
    assert guider.rows == batch * (10 * 2 + 8)
