"""Prompt-to-Prompt and P2Plus against the papers' joint batch with explicit matrices."""
import pytest
import torch
import torch.nn.functional as F
from comfyui_ledits.attention_hooks.controls.local_blend import LocalBlend
from comfyui_ledits.attention_hooks.controls.p2p import PromptToPrompt
from oracles import joint_attention
from support import editing, tiny
from support.shapes import SHAPES, Scene, on_every_shape

SOURCE, REFINED, SWAPPED = "a cat on a sofa", "a silver cat on a sofa", "a schnauzer on a sofa"
# Positions of the tokens, counted by hand: <start> a cat on a sofa <end>; "schnauzer" is two of them.
WORDS = {SOURCE: {"cat": [2], "sofa": [5]}, REFINED: {"silver": [2], "cat": [3], "sofa": [6]},
         SWAPPED: {"schnauzer": [2, 3], "sofa": [6]}}


class Paper(joint_attention.Editor):
    """Equations of arXiv 2208.01626, section 3, on the maps of one head."""

    def __init__(self, target, tokens, cross, self_until, uncond_until=0, words=None, eq=None, blend=None, steps=10):
        self.target, self.tokens, self.steps, self.cross, self.self_until = target, tokens, steps, cross, self_until
        self.uncond_until, self.words, self.eq, self.blend = uncond_until, words or {}, eq or {}, blend
        self.total = {}

    def begin(self, step):
        self.step = step

    def self_attention(self, q, k, v, probs, layer):
        (key, (h, w)) = layer
        if h * w <= self.tokens / 4:
            if self.step < int(self.steps * self.self_until):
                probs["c_t"] = probs["c_s"]
            if self.step < int(self.steps * self.uncond_until):
                probs["u_t"] = probs["u_s"]
        return super().self_attention(q, k, v, probs, layer)

    def cross_maps(self, probs, layer):
        old, new = probs["c_s"], probs["c_t"]
        follow = self.follow(old, new)
        out = new.clone()
        for n in range(77):
            factor = 1.0
            start, end = 0.0, self.cross
            for word, positions in WORDS[self.target].items():
                if n in positions:
                    factor = self.eq.get(word, 1.0)
                    start, end = self.words.get(word, (start, end))
            if int(start * (self.steps + 1)) <= self.step < int(end * (self.steps + 1)):
                out[..., n] = factor * follow[..., n]
        probs["c_t"] = out
        if self.blend and layer[1] == self.blend["grid"]:
            for name, text in (("c_s", SOURCE), ("c_t", self.target)):
                for kind in ("words", "substruct"):
                    columns = [p for word in self.blend[kind] for p in WORDS[text].get(word, [])]
                    seen = probs[name][..., columns].sum(-1).mean(1).unflatten(-1, layer[1])
                    self.total.setdefault((name, kind), []).append(seen)
        return probs

    def follow(self, old, new):
        out = new.clone()
        if self.target == REFINED:  # "silver" is new; what follows it was one token earlier; padding stays
            for n in range(77):
                if n != 2:
                    out[..., n] = old[..., {0: 0, 1: 1, 3: 2, 4: 3, 5: 4, 6: 5, 7: 6}.get(n, n)]
        elif self.target == SWAPPED:  # two tokens share the cat's attention; what follows was one token earlier
            for n in range(77):
                out[..., n] = old[..., 2] / 2 if n in (2, 3) else old[..., n if n < 2 else n - 1]
        else:
            out = old.clone()
        return out

    def latent(self, x, source, step):
        if not self.blend or step < int(self.steps * self.blend["start"]):
            return x

        def mask(kind, threshold):
            out = False
            for name in ("c_s", "c_t"):
                m = sum(self.total[name, kind])[:, None]
                m = F.max_pool2d(m, 3, 1, 1) if kind == "words" else m
                m = F.interpolate(m, x.shape[-2:])
                out = (m / m.amax((-2, -1), keepdim=True) > threshold) | out
            return out

        area = mask("words", self.blend["threshold"])
        if self.blend["substruct"]:
            area = area & ~mask("substruct", self.blend["threshold"])
        self.area = area
        return source + area.float() * (x - source)


@on_every_shape
def test_plain_guidance_is_the_joint_batch_without_an_editor(shape):
    scene = Scene(shape, SOURCE, REFINED)
    got, _ = scene.edited()
    assert (got - scene.by_paper()).abs().max() < 1e-4


@on_every_shape
@pytest.mark.parametrize("target", [REFINED, SWAPPED])
def test_words_and_places_follow_the_source(shape, target):
    scene = Scene(shape, SOURCE, target)
    got, _ = scene.edited(PromptToPrompt(prompts=scene.words, cross=(0, 0.6), self_=(0, 0.4)))
    assert (got - scene.by_paper(Paper(target, shape.tokens, cross=0.6, self_until=0.4))).abs().max() < 1e-4
    assert (got - scene.by_paper()).abs().max() > 1e-2


@on_every_shape
def test_p2plus_replaces_self_attention_of_the_negative_too(shape):
    scene = Scene(shape, SOURCE, REFINED)
    got, _ = scene.edited(PromptToPrompt(prompts=scene.words, cross=(0, 0.8), self_=(0, 0.4), uncond_self=(0, 0.5)))
    without, _ = scene.edited(PromptToPrompt(prompts=scene.words, cross=(0, 0.8), self_=(0, 0.4)))
    paper = Paper(REFINED, shape.tokens, cross=0.8, self_until=0.4, uncond_until=0.5)
    assert (got - scene.by_paper(paper)).abs().max() < 1e-4
    assert (got - without).abs().max() > 1e-3


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_words_are_reweighted_and_have_windows_of_their_own(shape):
    scene = Scene(shape, SOURCE, REFINED)
    got, _ = scene.edited(PromptToPrompt(prompts=scene.words, cross=(0, 0.8), self_=(0, 0),
                                         words=(("sofa", (0.2, 0.5)),), equalizer=(("cat", -1.5), ("Silver", 3.0))))
    paper = Paper(REFINED, shape.tokens, cross=0.8, self_until=0, words={"sofa": (0.2, 0.5)},
                  eq={"cat": -1.5, "silver": 3.0})
    assert (got - scene.by_paper(paper)).abs().max() < 1e-4
    assert (got - scene.by_paper()).abs().max() > 1e-2


@on_every_shape
def test_local_blend_keeps_the_picture_where_the_words_are_not(shape):
    scene, grid = Scene(shape, SOURCE, REFINED), (shape.height // 2, shape.width // 2)
    paper = Paper(REFINED, shape.tokens, cross=0.8, self_until=0.4, blend={
        "grid": grid, "words": ["cat", "silver"], "substruct": ["sofa"], "threshold": 0.9, "start": 0.2})
    blend = LocalBlend(words=("cat", "silver"), substruct_words=("sofa",), threshold=0.9, substruct_threshold=0.9,
                       start=0.2, blocks="@1/2")
    got, _ = scene.edited(PromptToPrompt(prompts=scene.words, cross=(0, 0.8), self_=(0, 0.4), blend=blend))
    assert (got - scene.by_paper(paper)).abs().max() < 1e-4
    assert 0 < paper.area.float().mean() < 1
    assert (got - scene.by_paper()).abs().max() > 1e-2


@pytest.mark.parametrize(("target", "words"), [
    ("a cat sitting on a couch", ("sofa", "couch")), ("a dog sitting on a sofa", ("cat", "dog")),
    ("a red cat sitting on a sofa", ("red", "cat"))])
def test_local_blend_finds_the_words_that_change(target, words):
    """As if they were written."""
    model = tiny.model()
    path, both = editing.path(model, 4), editing.prompts("sd1", "a cat sitting on a sofa", target)
    out = [editing.run(model, path, both.target, editing.negative("sd1"), 7.5, [
        PromptToPrompt(prompts=both, blend=LocalBlend(words=given, blocks="@1/2", threshold=0.9))])[0] for given in (words, ())]
    assert torch.equal(*out)
    same = editing.prompts("sd1", target, target)
    with pytest.raises(ValueError, match="have the same words"):
        PromptToPrompt(prompts=same, blend=LocalBlend()).check()


@pytest.mark.parametrize("empty", ["", " ", "\n"])
def test_local_blend_wants_a_target_where_no_words_are_written(empty):
    both = editing.prompts("sd1", "a cat sitting on a sofa", empty)
    with pytest.raises(ValueError, match="the target prompt is empty"):
        PromptToPrompt(prompts=both, blend=LocalBlend()).check()
    PromptToPrompt(prompts=both, blend=LocalBlend(words=("cat",))).check()
    PromptToPrompt(prompts=editing.prompts("sd1", empty, "a cat"), blend=LocalBlend()).check()


@pytest.mark.parametrize("apart", [False, True])
def test_a_longer_negative_in_the_same_call(apart):
    """ComfyUI repeats the shorter prompt: every copy of a token has its share of the attention."""
    model = tiny.model()
    path, words = editing.path(model, 10), editing.prompts("sd1", SOURCE, REFINED)
    long = editing.negative("sd1", "ugly " * 100)

    class Copies(Paper):
        def cross_maps(self, probs, layer):
            halves = [super(Copies, self).cross_maps({n: p[..., part].clone() for n, p in probs.items()}, layer)
                      for part in (slice(0, 77), slice(77, 154))]
            return probs | {"c_t": torch.cat([half["c_t"] for half in halves], -1)}

    paper = Copies(REFINED, tokens=256, cross=0.8, self_until=0.4)
    twice = [[[c[0][0].repeat(1, 2, 1), {}]] for c in (words.source, words.target)]
    expected = joint_attention.joint_edit(model, path, *twice, long, 7.5, paper)
    control = PromptToPrompt(prompts=words, cross=(0, 0.8), self_=(0, 0.4))
    got, _ = editing.run(editing.split(model) if apart else model, path, words.target, long, 7.5, [control])
    assert (got - expected).abs().max() < 1e-4


def test_prompts_of_different_lengths():
    """Source of one chunk, target of two: where both say the same, the pictures still follow each other."""
    model = tiny.model()
    path, words = editing.path(model, 4), editing.prompts("sd1", SOURCE, "a silver cat on a sofa" + " word" * 90)
    blend = LocalBlend(words=("cat",), blocks="@1/2")
    control = PromptToPrompt(prompts=words, uncond_self=(0, 0.5), blend=blend)
    empty = editing.negative("sd1")
    together, _ = editing.run(model, path, words.target, empty, 7.5, [control])
    apart, _ = editing.run(editing.split(model), path, words.target, empty, 7.5, [control])
    plain, _ = editing.run(model, path, words.target, empty, 7.5)
    assert (together - apart).abs().max() < 1e-4
    assert (together - plain).abs().max() > 1e-2
