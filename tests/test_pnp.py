"""Plug-and-Play against its paper's joint batch with explicit matrices."""
from comfyui_ledits.attention_hooks.controls.pnp import PlugAndPlay
from oracles import joint_attention
from support.shapes import Scene, on_every_shape

SOURCE, TARGET = "a cat sits on a sofa", "a marble statue of a cat, in a dark hall"


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


@on_every_shape
def test_features_and_self_attention_are_the_source_s(shape):
    scene = Scene(shape, SOURCE, TARGET, negative="ugly")
    got, guider = scene.edited(PlugAndPlay(source=scene.words.source, features=(0, 0.8), attention=(0, 0.5),
                                           feature_blocks="output.1.0", attention_blocks="output.1-"))
    assert (got - scene.by_paper(Paper(features=8, attention=5))).abs().max() < 1e-4
    assert (got - scene.by_paper(Paper(features=0, attention=5))).abs().max() > 1e-2
    assert guider.rows == shape.batch * (10 * 2 + 8)
