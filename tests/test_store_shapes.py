"""A kept store whose tensors are not what the model's layers take: refused with a sentence."""

import itertools

import pytest
import torch
from comfyui_ledits.attention_hooks.controls.p2p import PromptToPrompt
from comfyui_ledits.attention_hooks.controls.pnp import PlugAndPlay
from comfyui_ledits.attention_hooks.store import AttentionStore
from comfyui_ledits.files import store_file
from support import editing, tiny

SOURCE, TARGET = "a cat sits on a sofa", "a dog sits on a sofa"
BLOCK = "output.1.0"


@pytest.fixture(scope="module")
def scene():
    """Runs an edit that reads every kind of tensor, from the store that it is given; its model; a store that fits."""
    model, words, empty = tiny.model(), editing.prompts("sd1", SOURCE, TARGET), editing.negative("sd1")
    path = editing.path(model, 3, 2)
    attention = [PromptToPrompt(prompts=words, cross=(0, 1), self_=(0, 0)),
                 PlugAndPlay(prompts=words, features=(0, 1), attention=(0, 1), feature_blocks=BLOCK, attention_blocks="output.1-")]
    store, _ = editing.capture(model, path, empty, attention, dtype=torch.float32)
    return lambda store: editing.run(model, path, words.target, empty, 7.5, attention, store=store)[0], model, store


def with_another(store, slot, change):
    """The store with another tensor in a slot of the source, at the last step."""
    out, tensors = AttentionStore(origin=store.origin), store.tensors()
    last = max(name for name in tensors if name.endswith(f"/source/{slot}"))
    for name, tensor in tensors.items():
        out.add_named(name, change(tensor).clone() if name == last else tensor)
    return out


WRONG = {
    "narrow": lambda t: t.narrow(1 if t.ndim == 4 else 2, 0, 3),
    "one picture": lambda t: t[:1],
    "flat": lambda t: t[:, 0],
    "a word less": lambda t: t[:, :-1],
}
SLOTS = [f"attn1/{BLOCK}/q", f"attn1/{BLOCK}/k", f"attn2/{BLOCK}/q", f"attn2/{BLOCK}/k", f"feature/{BLOCK}/h"]


@pytest.mark.parametrize(("slot", "wrong"), [
    *itertools.product(SLOTS, ["narrow", "one picture", "flat"]), (f"attn2/{BLOCK}/k", "a word less"),
])
def test_other_widths_pictures_and_words_are_refused_before_the_model_runs(scene, slot, wrong):
    """The picture, model and prompt are the right ones, so that nothing else speaks against the store."""
    edit, model, store = scene
    site, _, name = slot.split("/")
    with tiny.Calls(model) as calls, pytest.raises(ValueError, match=f"for {BLOCK} {site} {name}, where .*damaged"):
        edit(with_another(store, slot, WRONG[wrong]))
    assert not calls.calls


def test_a_file_of_other_widths_is_refused_too(scene, tmp_path):
    """Every tensor of a layer may fit the others of its file."""
    edit, model, store = scene
    forged = AttentionStore(origin=store.origin)
    for name, tensor in store.tensors().items():
        forged.add_named(name, tensor[..., :4].clone() if f"attn1/{BLOCK}" in name else tensor)
    store_file.save(tmp_path / "x", forged)
    with tiny.Calls(model) as calls, pytest.raises(ValueError, match=f"for {BLOCK} attn1 .*damaged"):
        edit(store_file.load(tmp_path / "x"))
    assert not calls.calls


@pytest.mark.parametrize("slot", [slot for slot in SLOTS if slot[-1] in "qh"])
def test_another_grid_is_refused_with_a_sentence(scene, slot):
    """Patches may scale features within the U-Net, so what a layer takes is known when it runs."""
    edit, _, store = scene
    with pytest.raises(ValueError, match=f"{BLOCK} .*the model's patches are not those"):
        edit(with_another(store, slot, lambda t: t[:, :, :-1] if t.ndim == 4 else t[:, :-1]))


def test_the_right_one_is_not(scene):
    edit, _, store = scene
    assert torch.isfinite(edit(store)).all()
