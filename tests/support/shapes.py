"""An edit next to its paper's joint batch, for pictures of several shapes.

    @on_every_shape
    def test_...(shape):
        scene = Scene(shape, SOURCE, TARGET)
        got, guider = scene.edited(MasaCtrl(prompts=scene.words))
        expected, plain = scene.by_paper(Paper()), scene.by_paper()
"""
from dataclasses import dataclass

import pytest
from oracles import joint_attention

from support import editing, tiny


@dataclass(frozen=True)
class Shape:
    """A batch of latents, and whether ComfyUI has memory for one prediction at a time only (`apart`)."""

    kind: str = "sd1"
    height: int = 16
    width: int = 16
    batch: int = 1
    apart: bool = False

    def __str__(self):
        return f"{self.kind}-{self.height}-{self.width}-{self.batch}-{self.apart}"

    @property
    def tokens(self):
        """Queries of self-attention on the finest grid."""
        return self.height * self.width


SHAPES = (Shape(), Shape(kind="sdxl", height=24, batch=2), Shape(height=24, batch=2, apart=True),
          Shape(kind="sdxl", apart=True))
on_every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


class Scene:
    """A model, a path of `steps` steps and the prompts of an edit.

    Args:
        make: makes the MODEL of a kind that the pack edits with. The paper's batch has a plain one of its own.
    """

    def __init__(self, shape, source, target, negative="", steps=10, cfg=7.5, make=tiny.model):
        self.shape, self.cfg = shape, cfg
        self.model = make(shape.kind)
        self.path = editing.path(self.model, steps, shape.batch, shape.height, shape.width)
        self.words, self.empty = editing.prompts(shape.kind, source, target), editing.negative(shape.kind, negative)
        if shape.apart:
            editing.split(self.model)

    def edited(self, *controls):
        """The pack's latents, and its guider."""
        return editing.run(self.model, self.path, self.words.target, self.empty, self.cfg, controls)

    def by_paper(self, editor=None):
        """The latents of the paper's joint batch; without an editor those of plain guidance."""
        editor = editor or joint_attention.Editor()
        return joint_attention.joint_edit(tiny.model(self.shape.kind), self.path, self.words.source, self.words.target,
                                          self.empty, self.cfg, editor)
