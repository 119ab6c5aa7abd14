"""Text, numbers and files that nobody means: answered at once, with a sentence."""
import dataclasses
import functools
import json
import math
import time

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfyui_ledits.attention_hooks import blocks
from comfyui_ledits.attention_hooks.backbones.unet import UNet
from comfyui_ledits.attention_hooks.text import widget_text
from comfyui_ledits.files import inversion_file, latent_formats
from comfyui_ledits.nodes import attention_inputs, compare
from comfyui_ledits.nodes.attention import MasaCtrlNode
from comfyui_ledits.nodes.copy_attention import REGIONS, ROWS, CopyAttentionNode
from comfyui_ledits.nodes.ddim_inversions import DDIMInversion, DirectInversion, NegativePromptInversion
from comfyui_ledits.nodes.drawing import text
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.edit_metrics import EditMetrics
from comfyui_ledits.nodes.edit_prompts import EditPrompts
from comfyui_ledits.nodes.inversion_inputs import noise_levels
from comfyui_ledits.nodes.learned_inversions import NullTextInversion, StyleDiffusionInversion
from comfyui_ledits.nodes.pix2pix_zero_edit import EditDirection
from comfyui_ledits.nodes.sampling import LeditsSamplerNode
from comfyui_ledits.nodes.semantic_concept import SemanticConcept
from comfyui_ledits.nodes.unpack_pack import PackInversion, UnpackInversion
from comfyui_ledits.samplers.guider import LeditsGuider
from comfyui_ledits.samplers.methods.sega import Concept
from support import editing, mutations, runs, tiny
from support.runs import TARGET, edit, model, prompts

pytestmark = pytest.mark.usefixtures("inference_mode")
LONG = 200_000


def soon(call):
    """A call takes no time that grows with the square of what it is given."""
    begun = time.perf_counter()
    with pytest.raises(ValueError) as error:
        call()
    assert time.perf_counter() - begun < 2
    assert len(str(error.value)) < 600
    return str(error.value)


# --- text -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("given", ["a:" + " " * LONG + ":b", "a" * LONG, "1" * LONG + ":", ":" * LONG, " " * LONG + "x"])
@pytest.mark.parametrize("parse", [widget_text.factors, widget_text.windows, widget_text.phrases])
def test_long_lists_of_words_are_refused_at_once(parse, given):
    assert "characters" in soon(lambda: parse(given))


@pytest.mark.parametrize("given", ["a:" + " " * 9000 + ":b", "1" * 4000 + "-" * 4000 + ": x", "a: " + "1" * 9000 + "x"])
def test_lists_of_the_longest_size_are_read_at_once(given):
    soon(lambda: widget_text.windows(given))


@pytest.mark.parametrize("given", [" " * LONG + "%x", "1" * LONG, "1" * LONG + "x", "9" * 400, "1 " * 9 + "%" * LONG])
@pytest.mark.parametrize("parse", [lambda text: compare.skips_of(text, 50), compare.scales_of])
def test_long_numbers_are_refused_at_once(parse, given):
    soon(lambda: parse(given))


def test_numbers_are_read_as_before():
    assert compare.skips_of("0, 0.15; 30 %  18", 50) == [0, 8, 15, 18]
    assert compare.scales_of("3, 7.5;15") == [3.0, 7.5, 15.0]
    assert widget_text.factors("smiling: 2, hat= -1, a:b: .5") == (("smiling", 2.0), ("hat", -1.0), ("a:b", 0.5))
    assert widget_text.windows("dog: 0.2; sofa: 0.1 - 0.6") == (("dog", (0.0, 0.2)), ("sofa", (0.1, 0.6)))


def test_a_sweep_has_an_end():
    path = runs.invert(EditFriendlyInversion, "sd1", steps=4)[0]
    target, empty = prompts("sd1", TARGET, runs.EMPTY)
    sweep = functools.partial(compare.Sweep.execute, model=model(), positive=target, negative=empty, inversion=path, vae=None)
    assert "edits" in soon(lambda: sweep(skip_values="0 " * 600, cfg_values="1 " * 600))


@pytest.mark.parametrize("given", ["@0", "@1/0", "@0/4", "@" + "9" * 400, "input." + "9" * 400, "@1/" + "9" * 400, "@<=0"])
def test_impossible_blocks_are_no_selection(given):
    layout = UNet(model().model).layout
    assert "no block" in soon(lambda: blocks.select(given, layout.layers, layout, (16, 16)))


def test_a_long_label_is_cut_where_letter_by_letter_would_cut_it():
    def width(words):
        return 7.5 * len(words)

    def slowly(words, room):
        if width(words) <= room:
            return words
        while words and width(words + "...") > room:
            words = words[:-1]
        return words.rstrip() + "..."

    words = "a word " * 60
    for room in (0, 10, 22.5, 100, 333, 5000):
        assert text.cut(words, room, width) == slowly(words, room)


# --- numbers ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e999"])
def test_a_factor_that_is_no_number_is_refused(number):
    assert "dog" in soon(lambda: widget_text.factors(f"dog: {number}"))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_guidance_that_is_no_number_is_refused_before_the_model_runs(number):
    source, empty = prompts("sd1")
    assert "cfg" in soon(lambda: LeditsGuider(model(), source, empty, number))
    for name in ("scale", "threshold", "momentum_scale", "momentum_beta", "weight"):
        assert name in soon(lambda name=name: Concept(conditioning=source, **{name: number}))


def test_a_mask_that_holds_nan_is_refused_before_the_model_runs():
    path, mask = runs.invert(EditFriendlyInversion, "sd1", steps=4)[0], torch.ones(1, 64, 64)
    mask[0, :32] = math.nan
    with tiny.Calls(model()) as calls:
        assert "mask" in soon(lambda: edit("sd1", path, cfg=2.0, mask=mask))
    assert not calls.calls


def hole(*shape):
    """A mask with a value that is no number."""
    mask = torch.ones(shape)
    mask[..., 0, 0] = math.nan
    return mask


CONCEPT = {"prompt": "red", "direction": "towards", "scale": 5.0, "threshold": 0.9, "warmup": 1, "cooldown": 0, "momentum_scale": 0.0,
           "momentum_beta": 0.4, "weight": 1.0}
MASKED = {
    "MasaCtrl, source": lambda mask, words: MasaCtrlNode.execute(start_step=0.0, source=words, source_mask=mask),
    "MasaCtrl, target": lambda mask, words: MasaCtrlNode.execute(start_step=0.0, source=words, source_mask=mask * 0 + 1, target_mask=mask),
    "Copy Attention": lambda mask, words: CopyAttentionNode.execute(rows=next(iter(ROWS)), end_step=0.3, region=next(iter(REGIONS)),
                                                                    source=words, mask=mask),
    "Semantic Concept": lambda mask, words: SemanticConcept.execute(conditioning=words, mask=mask, **CONCEPT),
    "Edit Metrics": lambda mask, words: EditMetrics.execute(torch.zeros(1, 32, 32, 3), torch.zeros(1, 32, 32, 3), "plain", "", "", mask),
}


@pytest.mark.parametrize("node", MASKED)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nodes_mask_that_holds_no_number_is_refused(node, bad):
    assert "mask" in soon(lambda: MASKED[node](hole(1, 32, 32).nan_to_num(bad), prompts("sd1")[0]))


@pytest.mark.parametrize("region", REGIONS)
def test_a_mask_that_leaves_no_rows_to_take_is_refused(region):
    given = {"rows": next(iter(ROWS)), "end_step": 0.3, "region": region, "source": prompts("sd1")[0]}
    nothing = torch.ones(1, 32, 32) if "outside" in region else torch.zeros(1, 32, 32)
    assert "no rows would be taken" in soon(lambda: CopyAttentionNode.execute(mask=nothing, **given))
    assert CopyAttentionNode.execute(mask=1 - nothing, **given)


def test_masks_of_a_concept_are_one_or_as_many_as_the_pictures():
    path = runs.invert(EditFriendlyInversion, "sd1", steps=4)[0]
    concepts, = SemanticConcept.execute(conditioning=prompts("sd1")[1], mask=torch.ones(3, 64, 64), **CONCEPT)
    pictures = path.latents.shape[1]
    with tiny.Calls(model()) as calls:
        assert f"3 masks for {pictures} picture" in soon(lambda: edit("sd1", path, cfg=2.0, concepts=concepts))
    assert not calls.calls


@pytest.mark.parametrize("node", ["Edit Prompts", "Semantic Concept", "Edit Direction"])
def test_halves_of_letters_are_question_marks_in_prompts(node):
    """JSON can hold a lone surrogate, no tokenizer takes one."""
    clip = editing.clip()

    def encoded(text):
        if node == "Edit Prompts":
            return EditPrompts.execute(clip=clip, source=text, target=text)[0]
        if node == "Semantic Concept":
            return SemanticConcept.execute(clip=clip, **CONCEPT | {"prompt": text})[0][0].conditioning
        return EditDirection.execute(clip=clip, conditioning=EditPrompts.execute(clip=clip, source="a", target="a")[0],
                                     source_sentences="a dog", target_sentences=text, strength=1.0)[0]

    assert torch.equal(encoded("a \ud800 cat")[0][0], encoded("a ? cat")[0][0])


@pytest.mark.parametrize("start, end, fine", [(0.0, 0.4, True), (0.9, 0.2, False), (0.5, 0.5, False), (0.9, 0.0, True)])
def test_a_window_that_ends_before_it_begins_is_refused(start, end, fine):
    if fine:
        assert attention_inputs.window(start, end, ("from", "to")) == (start, end)
    else:
        assert "ends before it begins" in soon(lambda: attention_inputs.window(start, end, ("from", "to")))


# --- files ------------------------------------------------------------------------------------------------------------

def test_numbers_that_no_latent_has_are_refused(tmp_path):
    path = runs.invert(EditFriendlyInversion, "sd1", steps=4)[0]
    huge = dataclasses.replace(path, latents=path.latents * 1e30)
    inversion_file.save(tmp_path / "x.safetensors", huge, latent_formats.describe(path.latent_format))
    assert "too large" in soon(lambda: inversion_file.load(tmp_path / "x.safetensors", latent_formats.make))
    assert "impossible scale" in soon(lambda: latent_formats.make({"name": "SD15", "scale_factor": 1e-300}))


@pytest.mark.parametrize("settings", [
    {"tau_v": None}, {"tau_v": 7}, {"cfg": 10**400}, {"note": "\ud800"}, {"\ud800": 1}, {"notes": [[1, {"a": "\udfff"}]]},
    {"draws": 0}, {"draws": 2}, {"draws": "many"}, {"noise_scale": 0}, {"noise_scale": None}, {"noise_scale": "1"},
])
def test_settings_that_the_next_node_would_fall_over_are_refused(tmp_path, settings):
    path = runs.invert(EditFriendlyInversion, "sd1", steps=4)[0]
    inversion_file.save(tmp_path / "x.safetensors", path, latent_formats.describe(path.latent_format))
    file, words = tmp_path / "x.safetensors", json.dumps({**path.settings, **settings})
    file.write_bytes(mutations.change(file.read_bytes(), mutations.word("settings", words)))
    assert "cannot be loaded" in soon(lambda: inversion_file.load(tmp_path / "x.safetensors", latent_formats.make))


def damaged(kind, **overrides):
    path = runs.invert(NegativePromptInversion, kind, steps=4, scheduler="simple")[0]
    return dataclasses.replace(path, overrides={**path.overrides, **overrides})


WRONG = {  # words of the refusal: (kind of model, overrides)
    "words of width 5, this model's have 32": ("sd1", {"negative": torch.ones(1, 1, 77, 5)}),
    "pooled words of width 5, this model's have 24": ("sdxl", {"negative_pooled": torch.ones(1, 5)}),
    "pooled words of width 6": ("flux", {"negative_pooled": torch.ones(1, 6)}),
    "layers x width of words 2 x 5": ("hidream", {"negative.conditioning_llama3": torch.ones(1, 2, 12, 5)}),
    "layers x width of words 1 x 32": ("hidream", {"negative.conditioning_llama3": torch.ones(1, 1, 12, 32)}),
    "12 words and a mask of 7": ("qwen", {"negative.attention_mask": torch.ones(1, 7)}),
    "values for 2 steps": ("sd1", {"value": torch.ones(2, 1, 2, 77, tiny.CONTEXT)}),
    "values of width 9": ("sd1", {"value": torch.ones(4, 1, 2, 77, 9)}),
    "which only U-Nets have": ("flux", {"value": torch.ones(4, 1, 2, 12, 32)}),
    "other words at every step": ("flux", {"negative": torch.ones(4, 1, 12, 32)}),
}


@pytest.mark.parametrize("words", WRONG)
def test_embeddings_that_do_not_fit_the_model_are_refused_before_it_runs(words):
    kind, overrides = WRONG[words]
    path = damaged(kind, **overrides)
    network, calls = model(kind).model.diffusion_model, []
    handle = network.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        assert words in soon(lambda: edit(kind, path, cfg=2.0))
        assert not calls
        edit(kind, damaged(kind), cfg=2.0)
        assert calls
    finally:
        handle.remove()


def test_latents_of_another_number_of_channels_are_refused_before_the_model_runs():
    path = runs.invert(EditFriendlyInversion, "sd1", steps=4)[0]
    path = dataclasses.replace(path, residuals=path.residuals.repeat(1, 1, 4, 1, 1), latents=path.latents.repeat(1, 1, 4, 1, 1))
    with tiny.Calls(model()) as calls:
        assert "16 channels in 2 dimensions, this model of 4" in soon(lambda: edit("sd1", path, cfg=2.0))
    assert not calls.calls


def test_refusals_say_whose_the_fault_is():
    inversion = runs.invert(EditFriendlyInversion, "sd1", steps=4)[0]
    path, maps, _ = UnpackInversion.execute(inversion=inversion).result
    maps["samples"][0, 0, 0, 0] = math.nan
    assert "node that changed it" in soon(lambda: PackInversion.execute(inversion=inversion, noise_maps=maps))


@pytest.mark.parametrize("steps", [1, 2, 999])
@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
@pytest.mark.parametrize("kind", ["sd1", "flux"])
def test_levels_that_a_scheduler_cannot_make_are_refused_in_its_name(kind, scheduler, steps):
    try:
        sigmas = noise_levels(model(kind), scheduler, steps)
        assert torch.isfinite(sigmas).all() and (sigmas[1:] < sigmas[:-1]).all()
    except ValueError as error:
        assert f"{scheduler} cannot make {steps} steps" in str(error) and "SIGMAS" not in str(error)
        assert ("more steps" in str(error)) == (steps < 3)


def test_kl_optimal_cannot_make_one_step():
    with pytest.raises(ValueError, match="kl_optimal cannot make 1 steps.*Choose more steps or another scheduler"):
        noise_levels(model("flux"), "kl_optimal", 1)


# --- caches -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cache", [EasyCacheNode, LazyCacheNode])
@pytest.mark.parametrize("node", [DDIMInversion, DirectInversion, EditFriendlyInversion, NullTextInversion,
                                  StyleDiffusionInversion])
def test_a_cache_on_an_inversion_is_refused_before_the_model_runs(node, cache):
    cached = cache.execute(model=model(), reuse_threshold=0.2, start_percent=0.15, end_percent=0.95, verbose=False)[0]
    with tiny.Calls(model()) as calls:
        assert "inversion needs every one" in soon(lambda: runs.invert(node, "sd1", on=cached, steps=4))
    assert not calls.calls


# --- a sampler inside another ------------------------------------------------------------------------------------------

def test_a_node_that_runs_samplers_inside_its_own_is_told_why_it_cannot():
    """As Detail Daemon and its like do: KSAMPLER's fields are read, its function is called."""
    path = runs.invert(EditFriendlyInversion, "sd1", steps=4)[0]
    inner, sigmas = LeditsSamplerNode.execute(inversion=path, skip=0).result

    def wrapped(model, x, sigmas, **options):
        return inner.sampler_function(model, x, sigmas, **{**options, **inner.extra_options})

    outer = comfy.samplers.KSAMPLER(wrapped, inpaint_options=inner.inpaint_options)
    guider = LeditsGuider(model(), *prompts("sd1"), 1.0)
    latent = {"samples": path.latent_format.process_out(path.latents[0])}
    with tiny.Calls(model()) as calls:
        assert "inside another sampler" in soon(lambda: runs.in_parts(guider, outer, sigmas, latent))
    assert not calls.calls
