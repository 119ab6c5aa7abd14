"""Which tokens of a flow model's attention are which, found out by changing its inputs and its projections' outputs."""
import dataclasses

import pytest
import torch
from comfyui_ledits.attention_hooks.controls.copy_attention import CopyAttention
from comfyui_ledits.attention_hooks.controls.masactrl import MasaCtrl
from comfyui_ledits.attention_hooks.controls.pnp import PlugAndPlay
from oracles.joint_softmax import KINDS, Explicit
from support import flow_editing, tiny_flow

PICTURE = {"flux2": 64, "wan": 48, "hunyuan": 48}  # tokens of the picture; 16 elsewhere
EVERY = (0.0, 1.0)


def projections(network, kind):
    """[(module, where the picture's tokens are among its output's: "all", "last" or "first", "q" / "k" / "v" or "qkv")]."""
    if kind in ("flux", "schnell", "flux2", "chroma", "hunyuan"):
        return ([(block.img_attn.qkv, "all", "qkv") for block in network.double_blocks]
                + [(block.linear1, "last", "qkv") for block in network.single_blocks])
    if kind == "sd3":
        return [(block.x_block.attn.qkv, "all", "qkv") for block in network.joint_blocks]
    if kind in ("zimage", "lumina2"):
        return [(block.attention.qkv, "last", "qkv") for block in network.layers]
    if kind == "aura":
        names = [(block.attn, "w2", "all") for block in network.double_layers]
        names += [(block.attn, "w1", "last") for block in network.single_layers]
    elif kind == "hidream":
        names = [(block.block.attn1, "to_", "all") for block in network.double_stream_blocks]
        names += [(block.block.attn1, "to_", "first") for block in network.single_stream_blocks]
    elif kind == "qwen":
        names = [(block.attn, "to_", "all") for block in network.transformer_blocks]
    else:
        names = [(block.self_attn, "", "all") for block in network.blocks]
    return [(getattr(attention, prefix + name), where, name) for attention, prefix, where in names for name in "qkv"]


def columns(network, kind, names):
    """Where q, k and v, or some of them that lie together, are in an output that holds all three."""
    if kind in ("zimage", "lumina2"):
        attention = network.layers[0].attention
        q, kv = attention.n_local_heads * attention.head_dim, attention.n_local_kv_heads * attention.head_dim
    else:
        q = kv = network.hidden_size
    begin = {"q": 0, "k": q, "v": q + kv}
    return slice(begin[names[0]], begin[names[-1]] + (q if names[-1] == "q" else kv))


CONTROLS = {
    "qk": lambda words: PlugAndPlay(prompts=words, features=(0, 0), attention=EVERY),
    "kv": lambda words: MasaCtrl(prompts=words, window=EVERY, blocks="all"),
    "v": lambda words: CopyAttention(prompts=words, rows="v", window=EVERY),
}


@pytest.mark.parametrize("lengths", [(9, 12), (30, 12), (9, 40)])
@pytest.mark.parametrize("names", CONTROLS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_projections(kind, names, lengths):
    """Against the outputs of the layers that make them, before positions are applied, with prompts of any lengths."""
    path, words = flow_editing.path(kind, 1), flow_editing.prompts(kind, *lengths)
    network, kept, state = tiny_flow.model(kind).model.diffusion_model, {}, {"name": None}
    picture = PICTURE.get(kind, 16)
    padding = -picture % 32 if kind == "zimage" else 0
    places = {"all": slice(0, picture), "first": slice(0, picture), "last": slice(-picture - padding, -padding or None)}

    def hook(number, where, part):
        def replace(module, inputs, out):
            if state["name"] == "source":
                kept[number] = out[:, where, part].clone()
                return out
            out = out.clone()
            out[:, where, part] = kept[number]
            return out
        return replace

    handles = []
    for number, (module, where, name) in enumerate(projections(network, kind)):
        if name == "qkv" or name in names:
            part = columns(network, kind, names) if name == "qkv" else slice(None)
            handles.append(module.register_forward_hook(hook(number, places[where], part)))

    def override(step, name):
        state["name"] = name
        return lambda func, *args, **kwargs: func(*args, **kwargs)

    try:
        expected = flow_editing.slow_edit(kind, path, {"source": words.source, "target": words.target}, override)
    finally:
        for handle in handles:
            handle.remove()
    out = flow_editing.edit(kind, path, words, [CONTROLS[names](words)])
    assert (expected - flow_editing.edit(kind, path, words, [])).abs().max() > 3e-4
    assert (out - expected).abs().max() < 1e-5


def call_of(kind, path, conditioning, but):
    """The first call of attention in a block, but one of a kind."""
    recorded, count = {}, conditioning[0][0].shape[1] * (2 if kind == "hidream" else 1)

    def override(step, name):
        return Explicit(kind, PICTURE.get(kind, 16), count, recorded=recorded)

    flow_editing.slow_edit(kind, path, {"source": conditioning, "target": conditioning}, override)
    return next(call for _, call in sorted(recorded.items()) if call.site != but)


def changed(before, after):
    """How much each token's key differs."""
    return (after.k - before.k).norm(dim=-1)[0].amax(0)


REFINED = ("lumina2", "zimage", "hunyuan")  # words look at each other before the first block


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_where_a_changed_row_of_the_prompt_shows(kind):
    path, given = flow_editing.path(kind, 1, 1), tiny_flow.conditioning(kind, 1, 12)
    before = call_of(kind, path, given, but="self")
    for n in (0, 4, 11):
        words, llama = given[0][0].clone(), n + 12
        words[:, n] += 5
        at = {"words": (before.words[n : n + 1], [[words, given[0][1]]])}
        if kind == "hidream":  # two encoders; the second's words stand there twice
            more = given[0][1]["conditioning_llama3"].clone()
            more[:, :, n] += 5
            at["llama"] = before.words[[llama, llama + 12]], [[given[0][0], {**given[0][1], "conditioning_llama3": more}]]
        for where, conditioning in at.values():
            moved = changed(before, call_of(kind, path, conditioning, but="self"))
            others = torch.ones_like(moved, dtype=torch.bool)
            others[where] = False
            assert moved[where].min() > (1 if kind in REFINED else 1e6) * moved[others].max()
            if before.site == "joint":
                assert moved[before.image].max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_is_where_a_changed_patch_shows(kind):
    path, given = flow_editing.path(kind, 1, 1), tiny_flow.conditioning(kind, 1, 12)
    before, side = call_of(kind, path, given, but="cross"), 1 if kind == "flux2" else 2
    width = path.latents.shape[-1] // side
    frames = path.latents.shape[-3] if kind in ("wan", "hunyuan") else 1
    for frame, y, x in {(0, 0, 0), (frames - 1, 1, 2), (frames - 1, width - 1, width - 1)}:
        latents = path.latents.clone()
        picture = latents[..., frame, :, :] if latents.ndim == 6 else latents
        picture[..., y * side : (y + 1) * side, x * side : (x + 1) * side] += 5
        moved = changed(before, call_of(kind, dataclasses.replace(path, latents=latents), given, but="cross"))
        assert int(moved.argmax()) == before.image.start + (frame * width + y) * width + x
