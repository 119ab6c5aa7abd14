"""What is recorded of an edit's attention: maps against explicit probabilities, masks against what the edit did."""

import comfy.model_management
import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from comfyui_ledits.attention_hooks.controls.local_blend import LocalBlend
from comfyui_ledits.attention_hooks.controls.masactrl import MasaCtrl
from comfyui_ledits.attention_hooks.controls.p2p import PromptToPrompt
from comfyui_ledits.attention_hooks.controls.record import Record
from comfyui_ledits.nodes import capture_attention, sampling, sockets
from comfyui_ledits.nodes.preview import PreviewAttention, RecordAttention
from comfyui_ledits.samplers.ledits import LeditsSampler
from oracles import joint_attention
from support import editing, tiny

SOURCE, TARGET = "a cat sits on a sofa", "a dog sits on a sofa"
PLACES = {"a": [1, 5], "cat": [2], "dog": [2], "sits on": [3, 4], "a sofa": [5, 6], "sofa": [6]}  # by hand; 0 is the start
LONG = "a very big old and tired red cat with a green hat sits all day long on the soft blue sofa"


class Watch(joint_attention.Editor):
    """Notes explicit probabilities [B, heads, tokens, words] of the positive at one grid, after the edit."""

    def __init__(self, grid, cross=0):
        self.grid, self.cross, self.steps = grid, cross, []

    def begin(self, step):
        self.step = step
        self.steps.append([])

    def cross_maps(self, probs, layer):
        if self.step < self.cross:
            probs["c_t"] = probs["c_s"]
        if layer[1] == self.grid:
            self.steps[-1].append((layer[0], probs["c_s"].clone(), probs["c_t"].clone()))
        return probs

    def expected(self, places, side, step=None):
        """Mean over heads and layers (and steps) of the sum over tokens: [B, h, w]."""
        steps = self.steps if step is None else [self.steps[step]]
        each = [torch.stack([layer[1 + side][..., places].sum(-1).mean(1) for layer in s]).mean(0) for s in steps]
        return torch.stack(each).mean(0).unflatten(1, self.grid)


def run(model, path, words, empty, sampler, cfg=7.5):
    guider = editing.LeditsGuider(model, words.target, empty, cfg)
    picture = path.latent_format.process_out(path.latents[-1])
    with torch.inference_mode():
        out = guider.sample(torch.zeros_like(picture), picture, sampler, path.sigmas, disable_pbar=True)
    return path.latent_format.process_in(out), guider


# --- maps -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, height, width, batch", [("sd1", 16, 16, 1), ("sdxl", 24, 16, 2)])
@pytest.mark.parametrize("cross", [0.0, 0.5])
def test_maps_are_the_explicit_probabilities(kind, height, width, batch, cross):
    model = tiny.model(kind)
    path, words = editing.path(model, 5, batch, height, width), editing.prompts(kind, SOURCE, TARGET)
    empty = editing.negative(kind)
    watch = Watch((height // 2, width // 2), int(cross * 6))
    joint_attention.joint_edit(model, path, words.source, words.target, empty, 7.5, watch)
    attention = [Record(prompts=words, blocks="@1/2")] + [PromptToPrompt(prompts=words, cross=(0, cross), self_=(0, 0))] * (cross > 0)
    sampler = LeditsSampler(path, attention=attention)
    run(model, path, words, empty, sampler)
    seen, prompts = sampler.observed, (SOURCE, TARGET)
    for phrase, places in PLACES.items():
        for side in (0, 1):
            for step in (None, 0, 4):
                got = seen.word_map(phrase, ("source", "target")[side], step)
                if phrase.split()[-1] not in prompts[side].split():
                    assert got is None
                    continue
                expected = watch.expected(places, side, step)
                assert got.shape == (batch, height // 2, width // 2)
                assert (got - expected).abs().max() < 1e-3 * expected.max()
    assert (watch.expected([2], 0) - watch.expected([6], 0)).abs().max() > 1e-3  # words differ
    if not cross:  # and so do source and target
        assert (watch.expected([6], 0) - watch.expected([6], 1)).abs().max() > 1e-4


def test_a_prompt_of_more_words_than_a_head_is_wide():
    """Twenty-one words in attentions of sixteen channels; the grid nearest to 16 x 16, in encoder and decoder."""
    model = tiny.model()
    path, words = editing.path(model, 2), editing.prompts("sd1", LONG, LONG.replace("cat", "dog"))
    assert len(words.source_tokens.words) == 21 > 16
    watch = Watch((16, 16))
    joint_attention.joint_edit(model, path, words.source, words.target, editing.negative("sd1"), 7.5, watch)
    sampler = LeditsSampler(path, attention=[Record(prompts=words)])
    run(model, path, words, editing.negative("sd1"), sampler)
    for phrase, places in {"very": [2], "cat": [8], "soft blue sofa": [19, 20, 21]}.items():
        expected = watch.expected(places, 0)
        assert (sampler.observed.word_map(phrase, "source") - expected).abs().max() < 1e-3 * expected.max()
    assert torch.allclose(sampler.observed.word_map("dog", "target"), watch.expected([8], 1), rtol=1e-3)


def test_recording_changes_nothing_of_the_edit_and_leaves_nothing_behind():
    model = tiny.model()
    path, words, empty = editing.path(model, 5, 2), editing.prompts("sd1", SOURCE, TARGET), editing.negative("sd1")
    before, _ = editing.run(model, path, words.target, empty, 7.5)
    edit = [PromptToPrompt(prompts=words, cross=(0, 1))]
    plain, _ = editing.run(model, path, words.target, empty, 7.5, edit)
    assert torch.equal(plain, editing.run(model, path, words.target, empty, 7.5, [*edit, Record(prompts=words)])[0])
    alone, guider = editing.run(model, path, words.target, empty, 7.5, [Record(prompts=words)])
    assert torch.equal(alone, before)
    assert guider.rows == 2 * 5 * (2 + 1)
    assert not model.model_options.get("transformer_options", {}).get("patches_replace")


def test_an_interrupted_run_shows_nothing():
    model = tiny.model()
    path, words, empty = editing.path(model, 3), editing.prompts("sd1", SOURCE, TARGET), editing.negative("sd1")
    sampler = LeditsSampler(path, attention=[Record(prompts=words)])
    run(model, path, words, empty, sampler)
    assert sorted(sampler.observed.maps) == [0, 1, 2]

    def interrupt(calls):
        if calls == 3:
            raise comfy.model_management.InterruptProcessingException()

    with tiny.Calls(model, interrupt), pytest.raises(comfy.model_management.InterruptProcessingException):
        run(model, path, words, empty, sampler)
    assert sampler.observed is None


def test_a_kept_store_serves_the_recording():
    model = tiny.model()
    path, words, empty = editing.path(model, 4), editing.prompts("sd1", SOURCE, TARGET), editing.negative("sd1")
    attention = RecordAttention.execute(prompts=words, attention=(PromptToPrompt(prompts=words, cross=(0,
        0.5)),)).args[0]
    with torch.inference_mode():
        store, = capture_attention.CaptureAttention.execute(model=model, negative=empty, inversion=path,
            attention=attention, skip=0, precision="float32").args
    live, kept = LeditsSampler(path, attention=attention), LeditsSampler(path, attention=attention, store=store)
    for sampler in (live, kept):
        _, guider = run(model, path, words, empty, sampler)
    assert guider.rows == 4 * 2
    for step in range(4):
        assert torch.allclose(live.observed.word_map("sofa", "source", step), kept.observed.word_map("sofa", "source", step), rtol=1e-4)


# --- masks ----------------------------------------------------------------------------------------------------------

def test_the_blend_mask_is_where_the_picture_changed():
    model = tiny.model()
    path, words, empty = editing.path(model, 6, 2, 24, 16), editing.prompts("sd1", SOURCE, TARGET), editing.negative("sd1")
    control = PromptToPrompt(prompts=words, blend=LocalBlend(words=("cat", "dog"), blocks="@1/2", threshold=0.9))
    with torch.inference_mode():
        latent = sampling.LeditsKSampler.execute(model=model, positive=words.target, negative=empty, inversion=path,
            cfg=7.5, skip=0, attention=(control,)).args[0]
        picture, mask, *none = PreviewAttention.execute(latent=latent, words="", view="average").args
    changed = (latent["samples"] - path.latent_format.process_out(path.latents[-1])).abs().amax(1) > 1e-4
    assert 0.02 < changed.float().mean() < 0.98
    assert torch.equal(mask, changed.float().repeat_interleave(8, 1).repeat_interleave(8, 2))
    names = ("MasaCtrl", "MasaCtrl", "concepts")
    assert all(isinstance(m, ExecutionBlocker) and f"without {name}" in m.message for m, name in zip(none, names, strict=True))
    seen = latent[sockets.OBSERVED]
    assert sorted(seen.masks["local blend"]) == [1, 2, 3, 4, 5]  # start_blend 0.2 of 6 steps
    assert picture.shape[0] == 2 and picture.shape[3] == 3


def test_masactrl_s_masks_are_those_of_the_maps():
    """Of the first step, whose encoder's maps come before everything that the edit changes."""
    model, grid = tiny.model(), (8, 8)
    path, words, empty = editing.path(model, 4, 2), editing.prompts("sd1", SOURCE, TARGET), editing.negative("sd1")
    control = MasaCtrl(prompts=words, window=(0, 0.25), blocks="output.2-", source_words=("cat",), target_words=("dog", "sits"),
                       threshold=0.4, map_blocks="input@1/2, middle")
    sampler = LeditsSampler(path, attention=[control])
    out, _ = run(model, path, words, empty, sampler)
    assert sorted(sampler.observed.masks["MasaCtrl"]) == [0]
    watch = Watch(grid)
    joint_attention.joint_edit(model, path, words.source, words.target, empty, 7.5, watch)
    seen = [layer for layer in watch.steps[0] if layer[0][0] != "output"]
    assert len(seen) == 2
    latent = {"samples": path.latent_format.process_out(out), sockets.OBSERVED: sampler.observed}
    with torch.inference_mode():
        _, blend, *masks = PreviewAttention.execute(latent=latent, words="", view="by step").args
    assert isinstance(blend, ExecutionBlocker) and "without local blend" in blend.message
    for side, places in enumerate(([2], [2, 3])):
        m = torch.stack([layer[1 + side][..., places].sum(-1).mean(1) for layer in seen]).mean(0)
        m = (m - m.amin(1, True)) / (m.amax(1, True) - m.amin(1, True))
        expected = (m >= 0.4).unflatten(1, grid).float()
        assert 0 < expected.mean() < 1
        assert torch.equal(masks[side], expected.repeat_interleave(16, 1).repeat_interleave(16, 2))


def test_masks_that_were_given_come_back():
    model = tiny.model()
    path, words, empty = editing.path(model, 2), editing.prompts("sd1", SOURCE, TARGET), editing.negative("sd1")
    given = [torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)]
    given[0][:, 3:9, 4:12], given[1][:, 8:, :7] = 1, 1
    control = MasaCtrl(prompts=words, window=(0, 1), blocks="output.1-", source_mask=given[0], target_mask=given[1])
    sampler = LeditsSampler(path, attention=[control])
    run(model, path, words, empty, sampler)
    for own, mask in zip(sampler.observed.masks["MasaCtrl"][1], given):
        assert torch.equal(own.float(), mask)
