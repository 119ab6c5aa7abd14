"""Attention stores as files: the same edits after the detour, the same refusals, and any other file is refused."""
import dataclasses
import hashlib
import json
import pickle
import struct

import pytest
import safetensors.torch
import torch
from comfyui_ledits.attention_hooks.controls.masactrl import MasaCtrl
from comfyui_ledits.attention_hooks.controls.p2p import PromptToPrompt
from comfyui_ledits.attention_hooks.controls.pnp import PlugAndPlay
from comfyui_ledits.files import store_file
from safetensors import safe_open
from support import editing, mutations, tiny
from support.mutations import change, item, word
from support.stores import by_hand, same

SOURCE, TARGET = "a cat sits on a sofa", "a dog sits on a sofa"
NAME = "x" + store_file.KIND.suffix


def controls(words):
    """One after another and together they read every kind of tensor, of both branches, with a gap in the steps."""
    return {
        "p2plus": [PromptToPrompt(prompts=words, words=(("dog", (0.6, 1.0)),), cross=(0, 0.3), uncond_self=(0, 0.5))],
        "masactrl": [MasaCtrl(prompts=words, window=(0.1, 1), blocks="output.1-")],
        "pnp": [PlugAndPlay(prompts=words, feature_blocks="output.1.0", attention_blocks="output.1-")],
    }


def scene(kind="sd1"):
    model = tiny.model(kind)
    return model, editing.path(model, 6, 2), editing.prompts(kind, SOURCE, TARGET), editing.negative(kind)


# --- the detour changes nothing -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["p2plus", "masactrl", "pnp"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_an_edit_from_a_file_is_the_same_bit_for_bit(tmp_path, kind, name):
    model, path, words, empty = scene(kind)
    attention = controls(words)[name]
    edit = (model, path, words.target, empty, 7.5, attention)
    store, _ = editing.capture(model, path, empty, attention, start=1, dtype=torch.float32)
    kept, _ = editing.run(*edit, start=1, store=store)
    store_file.save(tmp_path / NAME, store)
    loaded, guider = editing.run(*edit, start=1, store=store_file.load(tmp_path / NAME))
    live, _ = editing.run(*edit, start=1)
    assert torch.equal(loaded, kept) and torch.equal(kept, live)
    assert guider.rows == 2 * 2 * 5  # no source pass
    plain, _ = editing.run(*edit[:5], start=1)
    assert (plain - loaded).abs().max() > 1e-2
    for half in (store_file.load(tmp_path / NAME), editing.capture(model, path, empty, attention, start=1)[0]):
        store_file.save(tmp_path / NAME, half, half=True)
        back = store_file.load(tmp_path / NAME)
        assert back.nbytes * 2 == store.nbytes
        rounded, _ = editing.run(*edit, start=1, store=back)
        assert 20 * torch.log10((live.max() - live.min()) / (rounded - live).square().mean().sqrt()) > 45


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_everything_in_a_store_comes_back(tmp_path, dtype):
    store = by_hand(2, dtype=dtype)
    store_file.save(tmp_path / NAME, store)
    back = store_file.load(tmp_path / NAME)
    assert same(back, store) and back.steps == [1, 2, 3, 7]
    assert (back.origin.path, back.origin.model) == (store.origin.path, store.origin.model)
    assert back.origin.prompts.keys() == store.origin.prompts.keys()
    assert all(torch.equal(back.origin.prompts[k], v) for k, v in store.origin.prompts.items())
    store_file.save(tmp_path / "again", back)
    assert (tmp_path / "again").read_bytes() == (tmp_path / NAME).read_bytes()
    size = store_file.nbytes(store)
    assert size == store.nbytes < (tmp_path / NAME).stat().st_size < size + 4096
    assert not list(tmp_path.glob("*.part"))


def test_safetensors_reads_the_file_too(tmp_path):
    store = by_hand()
    store_file.save(tmp_path / NAME, store)
    theirs = safetensors.torch.load_file(tmp_path / NAME)
    for k, step in enumerate((1, 2, 3, 7)):
        own = store.tensors()[f"{step}/source/attn2/middle.0.0/k"]
        assert torch.equal(theirs["source/attn2/middle.0.0/k/1-3,7"][k], own)
    assert torch.equal(theirs["about/source"], store.origin.prompts["source"])
    with safe_open(tmp_path / NAME, "pt") as file:
        words = file.metadata()
    assert (words["format"], words["version"], words["dtype"]) == ("ledits-attention-store", "2", "float32")
    lines = [f"{json.dumps([key, words[key]])}\n" for key in sorted(words) if key != "sha256"]
    digest = hashlib.sha256("".join(lines).encode())
    for name in sorted(theirs):
        digest.update(f"{name} F32 {list(theirs[name].shape)}\n".encode() + theirs[name].numpy().tobytes())
    assert words["sha256"] == digest.hexdigest()


def test_a_store_that_was_saved_still_serves_its_own_picture_only(tmp_path):
    model, path, words, empty = scene()
    attention = controls(words)["p2plus"]
    store_file.save(tmp_path / NAME, editing.capture(model, path, empty, attention, start=1)[0])
    store = store_file.load(tmp_path / NAME)

    def refused(match, path=path, words=words, empty=empty, attention=attention):
        with tiny.Calls(model) as calls, pytest.raises(ValueError, match=match):
            editing.run(model, path, words.target, empty, 7.5, attention, start=1, store=store)
        assert not calls.calls

    refused("another picture", editing.path(model, 6, 2, seed=8))
    refused("another picture", dataclasses.replace(path, latents=path.latents.half().float()))
    otherwise = editing.prompts("sd1", "a horse sits on a sofa", TARGET)
    refused("another source prompt", words=otherwise, attention=[PromptToPrompt(prompts=otherwise)])
    refused("another negative prompt", empty=editing.negative("sd1", "blurry"))
    refused("step 2 of 5", attention=[PromptToPrompt(prompts=words)])
    store.origin = dataclasses.replace(store.origin, model="SDXL")
    refused("another model")


def test_what_float16_cannot_hold_is_refused(tmp_path):
    store = by_hand()
    store.tensors()["7/source/attn2/middle.0.0/k"][0, 0, 0] = 1e6
    with pytest.raises(ValueError, match="65504"):
        store_file.save(tmp_path / NAME, store, half=True)
    assert not list(tmp_path.iterdir())
    store_file.save(tmp_path / NAME, store)


def test_everything_of_sdxl_fits_the_header(tmp_path):
    """All 70 layers and 27 residual blocks of both branches, in windows of several parts."""
    store = by_hand()
    for branch in ("source", "negative"):
        for n in range(70):
            for site, names in (("attn1", "qkv"), ("attn2", "qk")):
                for name in names:
                    for step in (0, 1, 20, 21, 49):
                        store.add_named(f"{step}/{branch}/{site}/output.{n // 10}.{n % 10}/{name}", torch.ones(1, 2, 2))
    store_file.save(tmp_path / NAME, store)
    assert same(store_file.load(tmp_path / NAME), store)
    for n in range(200, 300):
        for name in "qkv":
            store.add_named(f"0/source/attn1/output.{n}.0/{name}", torch.ones(1, 2, 2))
            store.add_named(f"0/source/attn2/output.{n}.0/{name}", torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match="too many layers"):
        store_file.save(tmp_path / "more", store)
    assert not list(tmp_path.glob("more*"))


# --- files that are refused -----------------------------------------------------------------------------------------

KEY = "source/attn2/middle.0.0/k/1-3,7"


def renamed(new, old=KEY):
    return lambda p: p.header.update({new: p.header.pop(old)})


def half_of(raw):
    tensors = safetensors.torch.load(raw)
    return safetensors.torch.save({k: v.half() for k, v in tensors.items()}, mutations.Parts(raw).header["__metadata__"])


REFUSED = {  # name: (what to do to the file, words of the refusal)
    "empty": (lambda raw: b"", "too short"),
    "a pickle": (lambda raw: pickle.dumps({"a": 1}) * 9, "header"),
    "a LoRA": (lambda raw: safetensors.torch.save({"lora": torch.ones(4)}), "another kind of file"),
    "an inversion": (lambda raw: change(raw, word("format", "ledits-inversion")), "another kind of file"),
    "cut short": (lambda raw: raw[:-1], "cut off"),
    "huge header": (lambda raw: struct.pack("<Q", 140000) + b"{" + b" " * 139999 + raw, "140000 bytes"),
    "newer": (lambda raw: change(raw, word("version", "3")), "newer version of this pack"),
    "no version": (lambda raw: change(raw, word("version", "x")), "version"),
    "other numbers": (lambda raw: raw[:-9] + b"\0" + raw[-8:], "damaged"),
    "NaN": (lambda raw: change(raw, lambda p: p.numbers(KEY, [0.0, float("nan")])), "NaN"),
    "no picture": (lambda raw: change(raw, word("path", "")), "which picture"),
    "lines in the model": (lambda raw: change(raw, word("model", "a\nb")), "name the model"),
    "dtype": (lambda raw: change(raw, word("dtype", "int8")), "neither"),
    "dtype not promised": (lambda raw: change(raw, word("dtype", "float16")), "not what its name promises"),
    "prompts in float16": (lambda raw: change(half_of(raw), word("dtype", "float16")), "not what its name promises"),
    "unknown site": (lambda raw: change(raw, renamed("source/attn3/middle.0.0/k/1-3,7")), "cannot apply"),
    "unknown tensor": (lambda raw: change(raw, renamed("../x/1-3,7")), "cannot apply"),
    "unknown branch": (lambda raw: change(raw, renamed("target/attn2/middle.0.0/k/1-3,7")), "cannot apply"),
    "no steps": (lambda raw: change(raw, renamed(KEY.rpartition("/")[0])), "cannot apply"),
    "other steps": (lambda raw: change(raw, renamed(KEY.replace("1-3,7", "1-3"))), "not what its name promises"),
    "steps backwards": (lambda raw: change(raw, renamed(KEY.replace("1-3,7", "7,1-3"))), "are no steps"),
    "steps without end": (lambda raw: change(raw, renamed(KEY.replace("1-3,7", "1-99999"))), "cannot apply"),
    "twice": (lambda raw: change(raw, renamed(KEY.replace("1-3,7", "2-5"), "source/attn1/input.1.0/q/1-3,7")), "promises"),
    "no prompt": (lambda raw: change(raw, renamed("negative/attn2/middle.0.0/k/1", "about/negative")), "promises"),
    "prompt of another branch": (lambda raw: safetensors.torch.save(
        {k: v for k, v in safetensors.torch.load(raw).items() if k != "about/negative"},
        mutations.Parts(raw).header["__metadata__"]), "prompt is missing"),
    "nothing but prompts": (lambda raw: safetensors.torch.save(
        {k: v for k, v in safetensors.torch.load(raw).items() if "about" in k},
        mutations.Parts(raw).header["__metadata__"]), "tensors are missing"),
    "rank": (lambda raw: change(raw, item(KEY, "shape", [4, 7, 6])), "not what its name promises"),
    "pictures": (lambda raw: change(raw, item(KEY, "shape", [4, 7, 1, 6])), "different numbers of pictures"),
    "offset beyond": (lambda raw: change(raw, item(KEY, "data_offsets", [0, 2**62]), sign=False), "outside of the file"),
}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / NAME
    store_file.save(path, by_hand())
    return path.read_bytes()


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_a_sentence(tmp_path, raw, name):
    damage, words = REFUSED[name]
    path = tmp_path / NAME
    path.write_bytes(damage(raw))
    with pytest.raises(ValueError) as error:
        store_file.load(path)
    assert words in str(error.value) and len(str(error.value)) < 300
    assert str(error.value).endswith((". Choose a file that Save Attention Store has written, or capture again.",
                                      ": update the pack to load it."))
    if name in ("other numbers", "NaN"):
        store_file.check(path)
    else:  # told from the header alone
        with pytest.raises(ValueError) as early:
            store_file.check(path)
        assert str(early.value) == str(error.value)


def test_an_untouched_file_is_not_refused(tmp_path, raw):
    (tmp_path / NAME).write_bytes(change(raw, lambda p: None))
    store_file.check(tmp_path / NAME)
    assert same(store_file.load(tmp_path / NAME), by_hand())


def test_the_checksum_is_of_the_words_too_but_in_version_1(tmp_path, raw):
    path = tmp_path / NAME
    path.write_bytes(change(raw, word("model", "BaseModel, SD16"), sign=False))
    with pytest.raises(ValueError, match="not those that were saved: it is damaged"):
        store_file.load(path)
    old = change(raw, word("version", "1"))
    path.write_bytes(old)
    assert same(store_file.load(path), by_hand())
    path.write_bytes(change(old, word("model", "BaseModel, SD16"), sign=False))
    assert store_file.load(path).origin.model == "BaseModel, SD16"


def test_200_damaged_files(tmp_path):
    """No crash, no hang, and no more memory than twice the file's size: see `mutations`."""
    store_file.save(tmp_path / NAME, by_hand(2, side=96, steps=(1, 2, 3)))
    store_file.save(tmp_path / f"half{store_file.KIND.suffix}", by_hand(2, side=96, steps=(1, 2, 3), dtype=torch.float16))
    raw = (tmp_path / NAME).read_bytes()
    assert mutations.FLOOR < len(raw) < 8 * mutations.FLOOR
    mutations.check_204(tmp_path / NAME, tmp_path / "y", tmp_path / f"half{store_file.KIND.suffix}")
