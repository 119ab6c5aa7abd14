"""The source pass, live and kept; what a run leaves behind; and who else may patch the same layers."""
import types

import comfy.model_management
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfyui_ledits.attention_hooks import backbones
from comfyui_ledits.attention_hooks.backbones.unet import layout_of
from comfyui_ledits.attention_hooks.blocks import select
from comfyui_ledits.attention_hooks.controls.local_blend import LocalBlend
from comfyui_ledits.attention_hooks.controls.masactrl import MasaCtrl
from comfyui_ledits.attention_hooks.controls.p2p import PromptToPrompt
from comfyui_ledits.attention_hooks.controls.pnp import PlugAndPlay
from comfyui_ledits.attention_hooks.store import AttentionStore
from comfyui_ledits.samplers.methods.sega import Concept
from oracles import joint_attention
from support import editing, tiny

SOURCE, TARGET = "a cat sits on a sofa", "a dog sits on a sofa"


def controls(words):
    return {
        "p2p": [PromptToPrompt(prompts=words, blend=LocalBlend(words=("cat", "dog"), blocks="@1/2", threshold=0.9))],
        "p2plus": [PromptToPrompt(prompts=words, uncond_self=(0, 0.5))],
        "masactrl": [MasaCtrl(prompts=words, window=(0.1, 1), blocks="output.1-")],
        "pnp": [PlugAndPlay(prompts=words, feature_blocks="output.1.0", attention_blocks="output.1-")],
        "both": [PromptToPrompt(prompts=words), PlugAndPlay(prompts=words, attention=(0, 0))],
    }


@pytest.fixture
def scene():
    """model, path of two pictures, prompts, negative"""
    model = tiny.model()
    return model, editing.path(model, 6, 2), editing.prompts("sd1", SOURCE, TARGET), editing.negative("sd1")


def psnr(a, b):
    return 20 * torch.log10((b.max() - b.min()) / (a - b).square().mean().sqrt())


@pytest.mark.parametrize("name", ["p2p", "p2plus", "masactrl", "pnp", "both"])
def test_live_ahead_kept_and_named_stores_give_the_same_picture(scene, name):
    model, path, words, empty = scene
    attention = controls(words)[name]
    single, guider = editing.run(model, path, words.target, empty, 7.5, attention, source_steps=1)
    ahead, _ = editing.run(model, path, words.target, empty, 7.5, attention, source_steps=4)
    assert (single - ahead).abs().max() < 1e-4
    store, source_rows = editing.capture(model, path, empty, attention, dtype=torch.float32)
    assert guider.rows == 6 * 2 * 2 + source_rows
    kept, guider = editing.run(model, path, words.target, empty, 7.5, attention, store=store)
    assert (kept - single).abs().max() < 1e-4
    assert guider.rows == 6 * 2 * 2
    loaded = AttentionStore(origin=store.origin)
    for slot, tensor in store.tensors().items():
        loaded.add_named(slot, tensor)
    again, _ = editing.run(model, path, words.target, empty, 7.5, attention, store=loaded)
    assert torch.equal(again, kept)
    half, _ = editing.capture(model, path, empty, attention)
    assert half.nbytes * 2 == store.nbytes
    assert psnr(editing.run(model, path, words.target, empty, 7.5, attention, store=half)[0], single) > 45


def test_a_store_serves_other_target_prompts_and_nothing_else(scene):
    model, path, words, empty = scene
    store, _ = editing.capture(model, path, empty, [PromptToPrompt(prompts=words)], dtype=torch.float32)
    other = editing.prompts("sd1", SOURCE, "a big red cat sits on a sofa")
    live, _ = editing.run(model, path, other.target, empty, 7.5, [PromptToPrompt(prompts=other)])
    kept, _ = editing.run(model, path, other.target, empty, 7.5, [PromptToPrompt(prompts=other)], store=store)
    assert (live - kept).abs().max() < 1e-4
    with pytest.raises(ValueError, match="step 3 of 6"):
        editing.run(model, path, words.target, empty, 7.5, [PromptToPrompt(prompts=words, self_=(0, 0.9))], store=store)
    with pytest.raises(ValueError, match="another picture"):
        editing.run(model, editing.path(model, 6, 2, seed=8), words.target, empty, 7.5, [PromptToPrompt(prompts=words)], store=store)
    otherwise = editing.prompts("sd1", "a horse sits on a sofa", TARGET)
    with pytest.raises(ValueError, match="another source prompt"):
        editing.run(model, path, otherwise.target, empty, 7.5, [PromptToPrompt(prompts=otherwise)], store=store)
    wide, _ = editing.capture(model, path, empty, [PromptToPrompt(prompts=words)], dtype=torch.float32, all_steps=True)
    editing.run(model, path, words.target, empty, 7.5, [PromptToPrompt(prompts=words, self_=(0, 0.9))], store=wide)


def test_a_store_that_does_not_fit_is_refused_with_numbers(scene, monkeypatch):
    model, path, words, empty = scene
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *args, **kwargs: 2**20)
    with tiny.Calls(model) as calls, pytest.raises(ValueError, match=r"\d GB of host memory for 6 .*0.00 GB are free"):
        editing.capture(model, path, empty, [PromptToPrompt(prompts=words)])
    assert not calls.calls


def test_the_estimate_is_the_size(scene, caplog):
    model, path, words, empty = scene
    with caplog.at_level("INFO"):
        store, _ = editing.capture(model, path, empty, controls(words)["p2plus"] + controls(words)["pnp"])
    assert f"keeps {store.nbytes / 2**30:.2f} GB" in caplog.text


def test_the_source_runs_ahead_only_where_a_control_reads_it(scene):
    model, path, words, empty = scene
    attention = [PromptToPrompt(prompts=words, cross=(0, 0.5), self_=(0, 0))]
    with tiny.Calls(model) as calls:
        _, guider = editing.run(model, path, words.target, empty, 7.5, attention)
    assert calls.rows == guider.rows == 2 * (6 * 2 + 3)
    assert [len(t) for t, _ in calls.calls] == [3 * 2, *[4] * 6]  # three steps of two pictures at once, then the edit
    other = model.clone()
    other.set_model_attn1_patch(lambda n, k, v, extra: (n, k, v))  # may look at the noise level: one per call
    with tiny.Calls(model) as calls:
        editing.run(other, path, words.target, empty, 7.5, attention)
    assert [len(t) for t, _ in calls.calls] == [2, 4] * 3 + [4] * 3
    _, guider = editing.run(model, path, words.target, empty, 1.0, [PromptToPrompt(prompts=words, uncond_self=(0, 1))])
    assert guider.rows == 2 * (6 + 5)  # nothing of the negative at cfg 1


@pytest.mark.parametrize("name", ["p2p", "p2plus", "masactrl", "pnp"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_equal_prompts_give_the_picture_back(kind, name):
    """On a path that is the source's own: y_next = y + (sigma_next - sigma) * eps at every step."""
    model = tiny.model(kind)
    path, words = editing.path(model, 6, 1), editing.prompts(kind, SOURCE, SOURCE)
    path = editing.own_path(model, path, words.source, editing.negative(kind))
    attention = controls(words)[name] if name != "p2p" else [PromptToPrompt(prompts=words)]
    out, _ = editing.run(model, path, words.target, editing.negative(kind), 1.0, attention)
    assert (out - path.latents[-1]).abs().max() < 1e-4


def test_another_pack_s_patch_is_called(scene):
    model, path, words, empty = scene
    seen = {"attn1": 0, "attn2": 0}

    def patched(name, scale):
        def patch(q, k, v, extra):
            seen[name] += len(extra["cond_or_uncond"])
            assert len(q) == len(k) == len(v) == 2 * len(extra["cond_or_uncond"])
            return optimized_attention(q, k, v, extra["n_heads"], attn_precision=extra["attn_precision"]) * scale
        return patch

    other = model.clone()
    other.set_model_attn1_replace(patched("attn1", 0.5), "output", 2, 0)
    other.set_model_attn2_replace(patched("attn2", 0.5), "output", 3)
    attention = [PromptToPrompt(prompts=words), MasaCtrl(prompts=words, window=(0.5, 1), blocks="output.1-", own_keys=True)]
    with_both, _ = editing.run(other, path, words.target, empty, 7.5, attention)
    assert seen["attn1"] >= 6 * 2 and seen["attn2"] >= 6 * 2
    without, _ = editing.run(model, path, words.target, empty, 7.5, attention)
    assert (with_both - without).abs().max() > 1e-3


def test_what_another_patch_adds_to_cross_attention_stays_exactly(scene):
    """A patch that adds something of its own to the words' attention, as IP-Adapter does."""
    model, path, words, empty = scene
    key = ("output", 3, 0)

    def adding(q, k, v, extra):
        return optimized_attention(q, k, v, extra["n_heads"], attn_precision=extra["attn_precision"]) + 0.3 * q

    other = model.clone()
    other.set_model_attn2_replace(adding, *key)
    got, _ = editing.run(other, path, words.target, empty, 7.5, [PromptToPrompt(prompts=words, self_=(0, 0))])

    class Paper(joint_attention.Editor):
        def begin(self, step):
            self.step = step

        def cross_maps(self, probs, layer):
            if self.step < int(0.8 * 7):
                probs["c_t"] = probs["c_s"]
            return probs

    to_q = model.model.diffusion_model.output_blocks[3][1].transformer_blocks[0].attn2.to_q
    to_out = model.model.diffusion_model.output_blocks[3][1].transformer_blocks[0].attn2.to_out[0]
    queries = []
    hooks = [to_q.register_forward_hook(lambda m, a, out: queries.append(out)),
             to_out.register_forward_pre_hook(lambda m, a: (a[0] + 0.3 * queries.pop(),))]
    try:
        expected = joint_attention.joint_edit(model, path, words.source, words.target, empty, 7.5, Paper())
    finally:
        for hook in hooks:
            hook.remove()
    assert (got - expected).abs().max() < 1e-4


def test_concepts_follow_the_negative_and_areas_stay_untouched(scene):
    model, path, words, empty = scene
    concept = Concept(conditioning=tiny.conditioning(seed=5), warmup=0, scale=3.0, threshold=0.5)
    attention = [MasaCtrl(prompts=words, window=(0, 1), blocks="output.1-")]
    same = Concept(conditioning=empty, warmup=0, scale=3.0, threshold=0.5)
    plain, _ = editing.run(model, path, words.target, empty, 7.5, attention)
    nothing, _ = editing.run(model, path, words.target, empty, 7.5, attention, concepts=(same,))
    assert (plain - nothing).abs().max() < 1e-4  # eps_e - eps_u is zero: both were edited alike
    something, _ = editing.run(model, path, words.target, empty, 7.5, attention, concepts=(concept,))
    assert (plain - something).abs().max() > 1e-3
    area = [[words.target[0][0], {"area": (8, 16, 8, 0), "strength": 1.0}]]
    out, _ = editing.run(model, path, words.target + area, empty, 7.5, [PromptToPrompt(prompts=words)])
    assert torch.isfinite(out).all()


def test_equal_positive_and_negative_are_told_apart(scene):
    model, path, words, _ = scene
    concept = Concept(conditioning=tiny.conditioning(seed=5), warmup=0, scale=3.0, threshold=0.5)
    attention = [PromptToPrompt(prompts=words, cross=(0, 1), self_=(0, 1))]
    out, guider = editing.run(model, path, words.target, words.target, 7.5, attention, concepts=(concept,))
    assert guider.rows == 2 * 6 * (3 + 1)


@pytest.mark.parametrize("name", ["p2p", "masactrl", "pnp"])
@pytest.mark.parametrize("fail_at", [1, 4])
def test_nothing_is_left_on_the_model(scene, name, fail_at):
    model, path, words, empty = scene
    before, _ = editing.run(model, path, words.target, empty, 7.5)
    hooks = [len(m._forward_hooks) for m in model.model.diffusion_model.modules()]

    def interrupt(calls):
        if calls == fail_at:
            raise comfy.model_management.InterruptProcessingException()

    with tiny.Calls(model, interrupt), pytest.raises(comfy.model_management.InterruptProcessingException):
        editing.run(model, path, words.target, empty, 7.5, controls(words)[name])
    editing.run(model, path, words.target, empty, 7.5, controls(words)[name])
    after, _ = editing.run(model, path, words.target, empty, 7.5)
    assert torch.equal(before, after)
    assert hooks == [len(m._forward_hooks) for m in model.model.diffusion_model.modules()]
    assert not model.model_options.get("transformer_options", {}).get("patches_replace")


def test_what_does_not_fit_is_refused_before_anything_runs(scene):
    model, path, words, empty = scene

    def refused(match, attention, positive=words.target):
        with tiny.Calls(model) as calls, pytest.raises(ValueError, match=match):
            editing.run(model, path, positive, empty, 7.5, attention)
        assert not calls.calls

    refused("no block 'output.17'.*output.3", [PromptToPrompt(prompts=words, self_blocks="output.17")])
    refused("no block selection", [PlugAndPlay(prompts=words, attention_blocks="decoder")])
    refused("Two Prompt-to-Prompt", [PromptToPrompt(prompts=words), PromptToPrompt(prompts=words)])
    refused("not the target prompt", [PromptToPrompt(prompts=words)], words.source)
    refused("not the target prompt", [PromptToPrompt(prompts=words)], tiny.conditioning(tokens=154))
    other = editing.prompts("sd1", "a horse", TARGET)
    refused("different source prompts", [PromptToPrompt(prompts=words), PlugAndPlay(prompts=other)])
    unknown = types.SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="does not know how SimpleNamespace .Linear. lays out its attention"):
        backbones.of(unknown)


def test_blocks_of_sd_and_sdxl_by_name():
    """The numbers are the published layers' (spec of the papers' code), on the real layouts."""
    import comfy.supported_models
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    shapes = {"SD": (comfy.supported_models.SD15, {"num_heads": 8, "num_head_channels": -1}, 8, [2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0, 0],
                     [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], 1, [1, 2, 4, 4]),
              "SDXL": (comfy.supported_models.SDXL, {"num_heads": -1, "num_head_channels": 8}, 8, [2, 2, 2], [0, 0, 2, 2, 10, 10],
                       [0, 0, 0, 2, 2, 2, 10, 10, 10], 10, [1, 2, 4])}
    for kind, (_, heads, _, blocks, down, up, middle, mult) in shapes.items():
        with torch.device("meta"):
            unet = UNetModel(image_size=32, in_channels=4, model_channels=32, out_channels=4, num_res_blocks=blocks,
                             channel_mult=mult, transformer_depth=list(down), transformer_depth_output=list(up),
                             transformer_depth_middle=middle, context_dim=16, use_spatial_transformer=True,
                             legacy=False, **heads)
        found = layout_of(unet)
        assert found.kind == kind
        assert len(found.layers) == {"SD": 16, "SDXL": 70}[kind]
        size = {"SD": (64, 64), "SDXL": (128, 128)}[kind]

        def chosen(text, blocks=found.layers, found=found, size=size):
            return sorted({(part, number) for part, number, _ in select(text, blocks, found, size)})

        if kind == "SD":
            assert chosen("masactrl") == [("output", n) for n in range(6, 12)]
            assert chosen("pnp") == [("output", n) for n in range(4, 12)]
            assert chosen("pnp_features", found.resblocks) == [("output", 4)]
            assert chosen("words") == [("input", 7), ("input", 8), ("output", 3), ("output", 4), ("output", 5)]
            assert chosen("p2p") == [("input", 4), ("input", 5), ("input", 7), ("input", 8), ("middle", 0),
                                     *[("output", n) for n in range(3, 9)]]
            assert chosen("p2p, -middle, -output.3-5") == [("input", n) for n in (4, 5, 7, 8)] + [
                ("output", n) for n in (6, 7, 8)]
            assert chosen("@1") == [("input", 1), ("input", 2), ("output", 9), ("output", 10), ("output", 11)]
            order = [x.name for x in sorted(found.layers, key=lambda x: x.order)]
            assert order[10] == "output.6.0"
        else:
            assert [x.name for x in found.layers][44] == "output.1.0"
            assert chosen("masactrl") == [("output", n) for n in range(1, 6)]
            assert select("input.7.0-3", found.layers, found, size) == {("input", 7, n) for n in range(4)}
        assert chosen("none") == []
        for wrong in ("output.40", "output.3-40", "@1/16", "outputs", "input.4.50", "6"):
            with pytest.raises(ValueError):
                chosen(wrong)


def test_a_negative_over_the_whole_picture_may_say_so_by_its_area():
    """As a positive may: the area of Conditioning (Set Area) that covers everything limits nothing."""
    model, words = tiny.model(), editing.prompts("sd1", "a cat sits", "a dog sits")
    path, negative = editing.path(model, 4), editing.negative("sd1")
    whole = [[negative[0][0], {**negative[0][1], "area": (16, 16, 0, 0), "strength": 1.0}]]
    control = [PlugAndPlay(feature_blocks="output.1.0", attention_blocks="output.1-")]
    plain, _ = editing.run(model, path, words.target, negative, 7.5, control)
    covered, _ = editing.run(model, path, words.target, whole, 7.5, control)
    assert torch.allclose(plain, covered, atol=1e-5)
