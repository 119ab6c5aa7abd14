"""MasaCtrl against its paper's joint batch with explicit matrices."""
import pytest
import torch
import torch.nn.functional as F
from comfyui_ledits.attention_hooks.controls.masactrl import MasaCtrl
from oracles import joint_attention
from support import editing, tiny
from support.shapes import Scene, on_every_shape

SOURCE, TARGET = "a cat sits on a sofa", "a cat runs on a sofa"
DECODER = {"sd1": "output.1-", "sdxl": "output.0-"}


class Paper(joint_attention.Editor):
    """arXiv 2304.08465, equations 4 to 7; from step `start` on, in the decoder's layers from `first` on."""

    def __init__(self, first, start=1, union=False, masks=None, words=None, threshold=0.1):
        self.first, self.start, self.union, self.masks = first, start, union, masks
        self.words, self.threshold = words, threshold

    def begin(self, step):
        self.step, self.seen = step, []

    def cross_maps(self, probs, layer):
        if self.words and layer[1] == self.words["grid"]:
            self.seen.append([probs[n][..., self.words[n]].sum(-1).mean(1) for n in ("c_s", "c_t")])
        return probs

    def object(self, grid):
        """Masks of source and target, [B, tokens]."""
        if self.masks is not None:
            return [F.interpolate(m[:, None], grid).flatten(1) >= 0.5 for m in self.masks]
        if not self.seen:
            return None
        out = []
        for which in (0, 1):
            m = torch.stack([layer[which] for layer in self.seen]).mean(0)
            m = (m - m.amin(1, True)) / (m.amax(1, True) - m.amin(1, True))
            out.append(F.interpolate(m.unflatten(1, self.words["grid"])[:, None], grid).flatten(1) >= self.threshold)
        return out

    def self_attention(self, q, k, v, probs, layer):
        (part, number, _), grid = layer
        out = {n: probs[n] @ v[n] for n in probs}
        if part != "output" or number < self.first or self.step < self.start:
            return out
        masks = self.object(grid)
        for half in "uc":
            s, t = f"{half}_s", f"{half}_t"
            keys, values = k[s], v[s]
            if self.union:
                keys, values = torch.cat([k[s], k[t]], -2), torch.cat([v[s], v[t]], -2)
            sim = q[t] @ keys.mT * q[t].shape[-1] ** -0.5
            if masks is None:
                out[t] = sim.softmax(-1) @ values
                continue
            inside = masks[0][:, None, None, :]
            fore = sim.masked_fill(~inside, -torch.inf).softmax(-1) @ values
            back = sim.masked_fill(inside, -torch.inf).softmax(-1) @ values
            out[t] = torch.where(masks[1][:, None, :, None], fore, back)
        return out


def first(shape):
    """The first of the paper's layers in a tiny model's decoder."""
    return 1 if shape.kind == "sd1" else 0


def masks(shape):
    """Objects in source and target, at the size of the picture; those of the pictures differ."""
    source, target = torch.zeros(2, shape.batch, 8 * shape.height, 8 * shape.width)
    for b in range(shape.batch):
        source[b, 20 : 70 + 16 * b, 10:80] = 1
        target[b, 40:100, 30 : 100 - 16 * b] = 1
    return source, target


@on_every_shape
@pytest.mark.parametrize("union", [False, True])
def test_queries_look_up_the_source(shape, union):
    scene = Scene(shape, SOURCE, TARGET)
    got, _ = scene.edited(MasaCtrl(prompts=scene.words, window=(0.1, 1), blocks=DECODER[shape.kind], own_keys=union))
    assert (got - scene.by_paper(Paper(first(shape), union=union))).abs().max() < 1e-4
    assert (got - scene.by_paper()).abs().max() > 1e-2


@on_every_shape
def test_given_masks_keep_object_and_ground_apart(shape):
    scene, (source, target) = Scene(shape, SOURCE, TARGET), masks(shape)
    got, _ = scene.edited(MasaCtrl(prompts=scene.words, window=(0.1, 1), blocks=DECODER[shape.kind], source_mask=source,
                                   target_mask=target))
    assert (got - scene.by_paper(Paper(first(shape), masks=(source, target)))).abs().max() < 1e-4
    assert (got - scene.by_paper()).abs().max() > 1e-2


@on_every_shape
def test_masks_from_the_words_of_the_prompts(shape):
    scene, where = Scene(shape, SOURCE, TARGET), dict(window=(0.1, 1), blocks=DECODER[shape.kind])
    paper = Paper(first(shape), threshold=0.5,
                  words={"grid": (shape.height // 2, shape.width // 2), "c_s": [2], "c_t": [2]})
    got, _ = scene.edited(MasaCtrl(prompts=scene.words, **where, source_words=("cat",), target_words=("cat",),
                                   threshold=0.5, map_blocks="@1/2"))
    assert (got - scene.by_paper(paper)).abs().max() < 1e-4
    without, _ = scene.edited(MasaCtrl(prompts=scene.words, **where))
    assert (got - without).abs().max() > 1e-3


def test_without_a_source_prompt_the_negative_serves_and_is_evaluated_once():
    model = tiny.model()
    path = editing.path(model, 10)
    words, empty = editing.prompts("sd1", SOURCE, TARGET), editing.negative("sd1")
    expected = joint_attention.joint_edit(model, path, empty, words.target, empty, 7.5, Paper(1, start=4))
    got, guider = editing.run(model, path, words.target, empty, 7.5, [MasaCtrl(window=(0.4, 1), blocks="output.1-")])
    assert (got - expected).abs().max() < 1e-4
    assert guider.rows == 10 * 2 + 6
