"""MasaCtrl against its paper's joint batch with explicit matrices."""
import pytest
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import optimized_attention
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfyui_ledits.attention_hooks.controls.masactrl import MasaCtrl
from oracles import joint_attention
from support import editing, tiny
from support.shapes import Scene, Shape, on_every_shape

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


# --- another pack's patch on its layers -------------------------------------------------------------------------------

class Added(Paper):
    """The paper's, and 0.3 * q on every self-attention."""

    def self_attention(self, q, k, v, probs, layer):
        return {n: out + 0.3 * q[n] for n, out in super().self_attention(q, k, v, probs, layer).items()}


def adding(kind):
    """A MODEL with a patch on every self-attention that adds 0.3 * q, as IP-Adapter adds its own."""
    own = tiny.model(kind)

    def patch(q, k, v, extra):
        assert q.shape == k.shape == v.shape
        return optimized_attention(q, k, v, extra["n_heads"], attn_precision=extra["attn_precision"]) + 0.3 * q

    for part, number in (("input", 1), ("input", 2), ("input", 3), ("middle", 0), *(("output", n) for n in range(4))):
        own.set_model_attn1_replace(patch, part, number)
    return own


@on_every_shape
@pytest.mark.parametrize("union, masked", [(False, False), (True, False), (False, True)])
def test_a_patch_on_its_layers_is_kept_and_sees_as_many_keys_as_queries(shape, union, masked):
    scene, given = Scene(shape, SOURCE, TARGET, make=adding), masks(shape)
    words = dict(zip(("source_mask", "target_mask"), given)) if masked else {}
    got, _ = scene.edited(MasaCtrl(prompts=scene.words, window=(0.1, 1), blocks=DECODER[shape.kind], own_keys=union, **words))
    paper = {"first": first(shape), "union": union, "masks": given if masked else None}
    assert (got - scene.by_paper(Added(**paper))).abs().max() < 1e-4
    assert (got - scene.by_paper(Paper(**paper))).abs().max() > 1e-2


@pytest.mark.parametrize("how", ["plain", "union", "masks", "words"])
@on_every_shape
def test_self_attention_guidance_goes_with_it_on_all_blocks(shape, how):
    """Stock SAG reads the whole self-attention of the negative in the middle block."""
    more = {"plain": {}, "union": {"own_keys": True}, "masks": dict(zip(("source_mask", "target_mask"), masks(shape))),
            "words": {"source_words": ("cat",), "target_words": ("cat",), "map_blocks": "@1/2"}}[how]
    edits = []
    for scale in (0.0, 0.5):
        scene = Scene(shape, SOURCE, TARGET, steps=3,
                      make=lambda kind, scale=scale: SelfAttentionGuidance.execute(tiny.model(kind), scale, 2.0)[0])
        edits.append(scene.edited(MasaCtrl(prompts=scene.words, window=(0, 1), blocks="all", **more))[0])
    assert torch.isfinite(edits[1]).all() and (edits[0] - edits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("which", ["source_mask", "target_mask"])
@pytest.mark.parametrize("batch, given", [(3, 2), (1, 2), (2, 3)])
def test_masks_of_another_number_than_the_pictures_are_refused_before_the_model_runs(batch, given, which):
    scene = Scene(Shape(batch=batch), SOURCE, TARGET)
    counts = {name: torch.ones(given if name == which else 1, 128, 128) for name in ("source_mask", "target_mask")}
    with tiny.Calls(scene.model) as calls, pytest.raises(ValueError, match=f"{which} holds {given} masks.*{batch} picture"):
        scene.edited(MasaCtrl(prompts=scene.words, blocks="output.1-", **counts))
    assert not calls.calls


def test_without_a_source_prompt_the_negative_serves_and_is_evaluated_once():
    model = tiny.model()
    path = editing.path(model, 10)
    words, empty = editing.prompts("sd1", SOURCE, TARGET), editing.negative("sd1")
    expected = joint_attention.joint_edit(model, path, empty, words.target, empty, 7.5, Paper(1, start=4))
    got, guider = editing.run(model, path, words.target, empty, 7.5, [MasaCtrl(window=(0.4, 1), blocks="output.1-")])
    assert (got - expected).abs().max() < 1e-4
    assert guider.rows == 10 * 2 + 6
