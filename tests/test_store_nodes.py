"""Save and Load Attention Store: nothing outside of ComfyUI's folders, nothing that does not fit, the same in a server."""
import json
import os
import shutil
from types import SimpleNamespace

import comfy.model_management
import pytest
import safetensors.torch
import torch
from comfyui_ledits.files import inversion_file, places, store_file
from comfyui_ledits.nodes.store_files import LoadAttentionStore, SaveAttentionStore
from comfyui_ledits.tools.api.client import ComfyClient
from support.graphs import node
from support.records import record, saved
from support.stores import by_hand, same

NAME = "x" + store_file.KIND.suffix


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / NAME
    store_file.save(path, by_hand())
    return path.read_bytes()


def test_the_nodes_save_and_load(folders):
    store = by_hand(2)
    shown = SaveAttentionStore.execute(store=store, filename_prefix="a/b", dtype="as captured").ui["text"][0]
    name = f"a/b_00001_{store_file.KIND.suffix}"
    assert shown.startswith(f"{name}\n") and shown.endswith("4 steps, 2 pictures, float32")
    assert LoadAttentionStore.validate_inputs(f"{name} [output]") is True
    result = LoadAttentionStore.execute(file=f"{name} [output]")
    assert same(result[0], store) and "4 steps, 2 pictures, float32\nBaseModel, SD15" in result.ui["text"][0]
    assert SaveAttentionStore.execute(store=store, filename_prefix="a/b",
        dtype="float16").ui["text"][0].endswith("float16")
    back = LoadAttentionStore.execute(file=f"a/b_00002_{store_file.KIND.suffix} [output]")[0]
    assert {t.dtype for t in back.tensors().values()} == {torch.float16}


def test_the_pickers_tell_stores_and_inversions_apart(folders, raw):
    out, into = folders
    SaveAttentionStore.execute(store=by_hand(), filename_prefix="deep/er/one")
    (into / "mine.safetensors").write_bytes(raw)
    saved(into / "path.safetensors", record()[0])
    os.utime(into / "mine.safetensors", (1, 1))
    one = f"deep/er/one_00001_{store_file.KIND.suffix} [output]"
    assert LoadAttentionStore.INPUT_TYPES()["required"]["file"][1]["options"] == [one, "mine.safetensors"]
    assert places.list_files(inversion_file.KIND) == ["path.safetensors"]
    before = LoadAttentionStore.fingerprint_inputs("mine.safetensors")
    os.utime(into / "mine.safetensors", (2, 2))
    assert LoadAttentionStore.fingerprint_inputs("mine.safetensors") != before


@pytest.mark.parametrize("name", ["../x.safetensors", "{secret}", "link.safetensors", "gone.safetensors", "C:/x.safetensors",
                                  "x.safetensors [temp]", "folder/x.safetensors [output]"])
def test_nothing_outside_of_the_folders_is_loaded(folders, raw, tmp_path, name):
    secret = tmp_path / "secret" / "x.safetensors"
    secret.parent.mkdir()
    for path in (secret, tmp_path / "x.safetensors"):
        path.write_bytes(raw)
    for folder in folders:
        try:
            (folder / "link.safetensors").symlink_to(secret)
            (folder / "folder").symlink_to(secret.parent)
        except OSError:
            pytest.skip("links cannot be made here")
    told = LoadAttentionStore.validate_inputs(name.format(secret=secret))
    assert isinstance(told, str) and told.endswith(".")
    with pytest.raises(ValueError):
        LoadAttentionStore.execute(file=name.format(secret=secret))


@pytest.mark.parametrize("prefix", ["../x", "/x", "a/../../x", "{outside}/x", "link/x", ""])
def test_nothing_is_saved_outside_of_the_output_folder(folders, tmp_path, prefix):
    outside = tmp_path / "outside"
    outside.mkdir()
    try:
        (folders[0] / "link").symlink_to(outside)
    except OSError:
        pytest.skip("links cannot be made here")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError):
        SaveAttentionStore.execute(store=by_hand(), filename_prefix=prefix.format(outside=outside))
    assert sorted(tmp_path.rglob("*")) == before


def test_what_does_not_fit_is_refused_with_numbers(folders, raw, monkeypatch):
    (folders[1] / NAME).write_bytes(raw)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *args: 2 * len(raw) - 1)
    with pytest.raises(ValueError, match=r"0.00 GB of host memory, but only 0.00 GB are free"):
        LoadAttentionStore.execute(file=NAME)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *args: 2 * len(raw))
    assert same(LoadAttentionStore.execute(file=NAME)[0], by_hand())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(ValueError, match="0.00 GB are free on the disk"):
        SaveAttentionStore.execute(store=by_hand(), filename_prefix="x")
    assert not list(folders[0].iterdir())


def test_in_a_server(server_url):
    """Capture and save; the picker shows the file; the edit from it is the same, and another picture is refused."""
    client = ComfyClient(server_url)

    def graph(colour, store, **more):
        return {
            "model": node("LEDITS_LoadDemoModel"),
            "words": node("LEDITS_EditPrompts", clip=["model", 1], source="a red star", target="a blue star", mapping="auto"),
            "empty": node("CLIPTextEncode", text="", clip=["model", 1]),
            "picture": node("EmptyImage", width=128, height=128, batch_size=1, color=colour),
            "encoded": node("VAEEncode", pixels=["picture", 0], vae=["model", 2]),
            "inversion": node("LEDITS_EditFriendlyInversion", model=["model", 0], positive=["words", 0], negative=["empty", 0],
                              latent=["encoded", 0], cfg=1.0, steps=4, scheduler="ddim_uniform", eta=1.0, seed=0),
            "p2p": node("LEDITS_PromptToPrompt", prompts=["words", 2], cross_replace_steps=0.8, self_replace_steps=0.4),
            "edit": node("LEDITS_KSampler", model=["model", 0], positive=["words", 1], negative=["empty", 0], cfg=3.0, skip=1,
                         inversion=["inversion", 0], attention=["p2p", 0], store=store),
            "kept": node("SaveLatent", samples=["edit", 0], filename_prefix="x"),
        } | more

    def latent(entry):
        return safetensors.torch.load(client.fetch(entry["outputs"]["kept"]["latents"][0]))["latent_tensor"]

    captured = node("LEDITS_CaptureAttention", model=["model", 0], negative=["empty", 0], inversion=["inversion", 0],
                    attention=["p2p", 0], skip=1)
    save = node("LEDITS_SaveAttentionStore", store=["captured", 0], filename_prefix="attention/demo", dtype="as captured")
    direct = client.run(graph(0x3070C0, ["captured", 0], captured=captured, save=save))
    assert direct["outputs"]["save"]["text"][0].startswith(f"attention/demo_00001_{store_file.KIND.suffix}\n")
    choice = json.loads(client.ask("/object_info/LEDITS_LoadAttentionStore"))["LEDITS_LoadAttentionStore"]
    name = choice["input"]["required"]["file"][1]["options"][0]
    assert name == f"attention/demo_00001_{store_file.KIND.suffix} [output]"
    loaded = {"loaded": node("LEDITS_LoadAttentionStore", file=name)}
    again = client.run(graph(0x3070C0, ["loaded", 0], **loaded))
    assert torch.equal(latent(direct), latent(again))
    with pytest.raises(Exception, match="captured from another picture"):
        client.run(graph(0xC07030, ["loaded", 0], **loaded))
    with pytest.raises(Exception, match="not a plain name"):
        client.run(graph(0x3070C0, ["loaded", 0], loaded=node("LEDITS_LoadAttentionStore", file="../" + name)))
