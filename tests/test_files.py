"""Save Inversion and Load Inversion: the same edit after the detour, and nothing outside of ComfyUI's folders."""
import dataclasses
import functools
import json
import os
import time

import pytest
import safetensors.torch
import torch
from comfyui_ledits.files import inversion_file, places
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.inversion_files import LoadInversion, SaveInversion
from comfyui_ledits.tools.api.client import ComfyClient
from support import runs, tiny
from support.graphs import node
from support.records import record, saved

pytestmark = pytest.mark.usefixtures("inference_mode")


@functools.cache
def inverted(kind):
    return runs.invert(EditFriendlyInversion, kind, batch=2, cfg=3.5, steps=4)[0]


def edit(kind, inversion):
    return runs.edit(kind, inversion, cfg=7.5, skip=1, prompt=runs.TARGET)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """The bytes of a saved inversion."""
    path = tmp_path_factory.mktemp("file") / "x"
    saved(path, record()[0])
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_an_edit_after_a_file_is_the_same_bit_for_bit(folders, kind):
    inversion = inverted(kind)
    words = torch.randn(4, 2, 77, tiny.CONTEXT, generator=torch.Generator().manual_seed(8))
    inversion = dataclasses.replace(inversion, overrides={"negative": words})
    SaveInversion.execute(inversion=inversion, filename_prefix="a/b", dtype="float32")
    back = LoadInversion.execute(file="a/b_00001_.ledits.safetensors [output]")[0]
    assert torch.equal(edit(kind, back), edit(kind, inversion))
    assert not torch.equal(edit(kind, back), edit(kind, inverted(kind)))  # the embeddings do something


def test_the_node_says_what_float16_costs(folders):
    made, _ = record()
    cost = saved(folders[1] / "x", made, half=True)[1]  # compared with the true errors in test_inversion_file.py
    text = SaveInversion.execute(inversion=made, filename_prefix="x", dtype="float16").ui["text"][0]
    for part in ("path", "noise_maps", "picture"):
        assert f"up to {cost[part]['abs']:.2g} ({100 * cost[part]['rel']:.2g} %)" in text
    assert "error" not in SaveInversion.execute(inversion=made, filename_prefix="x", dtype="float32").ui["text"][0]


def test_a_refusal_before_the_workflow_runs(folders, raw):
    (folders[1] / "x.safetensors").write_bytes(raw)
    assert LoadInversion.validate_inputs("x.safetensors") is True
    (folders[1] / "x.safetensors").write_bytes(raw[:-1])
    assert "cut off" in LoadInversion.validate_inputs("x.safetensors")
    with pytest.raises(ValueError, match="cut off"):
        LoadInversion.execute(file="x.safetensors")


# --- names ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [
    "../x.safetensors", "a/../../x.safetensors", "..\\x.safetensors", "{secret}", "{secret} [output]", "C:/x.safetensors",
    "\\\\host\\x.safetensors", "x.safetensors\0", "", " ", "link.safetensors", "link.safetensors [output]",
    "folder/x.safetensors [output]", "gone.safetensors", "out [output]", "x.safetensors [temp]",
])
def test_nothing_outside_of_the_folders_is_loaded(folders, raw, tmp_path, name):
    secret = tmp_path / "secret" / "x.safetensors"
    secret.parent.mkdir()
    secret.write_bytes(raw)
    (tmp_path / "x.safetensors").write_bytes(raw)
    for folder in folders:
        try:
            (folder / "link.safetensors").symlink_to(secret)
            (folder / "folder").symlink_to(secret.parent)
        except OSError:
            pytest.skip("links cannot be made here")
    name = name.format(secret=secret)
    told = LoadInversion.validate_inputs(name)
    assert isinstance(told, str) and told.endswith(".")
    with pytest.raises(ValueError):
        LoadInversion.execute(file=name)
    assert places.list_files(inversion_file.KIND) == []


@pytest.mark.parametrize("prefix", ["../x", "a/../../x", "/x", "C:\\x", "{outside}/x", "link/x", "", "x\0", "..\\x"])
def test_nothing_is_saved_outside_of_the_output_folder(folders, tmp_path, prefix):
    outside = tmp_path / "outside"
    outside.mkdir()
    try:
        (folders[0] / "link").symlink_to(outside)
    except OSError:
        pytest.skip("links cannot be made here")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError):
        SaveInversion.execute(inversion=record()[0], filename_prefix=prefix.format(outside=outside), dtype="float32")
    assert sorted(tmp_path.rglob("*")) == before


def test_names_are_counted_and_dated(folders):
    made, _ = record()
    now = time.localtime()
    for prefix, name in [
        ("p", "p_00001_"), ("p", "p_00002_"), ("q/p", "q/p_00001_"), ("p_%width%x%height%", "p_8x8_00001_"),
        ("%year%/p", f"{now.tm_year}/p_00001_"), ("%date:yyyy%/r", f"{now.tm_year}/r_00001_"),
    ]:
        result = SaveInversion.execute(inversion=made, filename_prefix=prefix, dtype="float32")
        assert (folders[0] / (name + ".ledits.safetensors")).is_file()
        assert result.ui["text"][0].startswith(name + ".ledits.safetensors\n")
        file = result.ui["inversions"][0]
        assert folders[0] / file["subfolder"] / file["filename"] == folders[0] / (name + ".ledits.safetensors")
    moment = time.strptime("2031-02-03 04:05:06", "%Y-%m-%d %H:%M:%S")
    assert places.with_date("a %date% %date:yy.MM.dd-hh.mm.ss% %year%", moment) == "a 2031-02-03 31.02.03-04.05.06 %year%"


def test_the_picker_lists_inversions_newest_first(folders, raw):
    out, into = folders
    SaveInversion.execute(inversion=record()[0], filename_prefix="deep/er/one", dtype="float32")
    (into / "mine.safetensors").write_bytes(raw)
    (into / "lora.safetensors").write_bytes(safetensors.torch.save({"lora": torch.ones(4)}))
    (into / "notes.txt").write_bytes(raw)
    os.utime(into / "mine.safetensors", (1, 1))
    assert places.list_files(inversion_file.KIND) == ["deep/er/one_00001_.ledits.safetensors [output]", "mine.safetensors"]
    os.utime(out / "deep/er/one_00001_.ledits.safetensors", (0, 0))
    options = LoadInversion.INPUT_TYPES()["required"]["file"][1]["options"]
    assert options == ["mine.safetensors", "deep/er/one_00001_.ledits.safetensors [output]"]


def test_a_replaced_file_is_read_again(folders, raw):
    (folders[1] / "x.safetensors").write_bytes(raw)
    before = LoadInversion.fingerprint_inputs("x.safetensors")
    assert LoadInversion.fingerprint_inputs("x.safetensors") == before
    os.utime(folders[1] / "x.safetensors", ns=(5, 5))
    assert LoadInversion.fingerprint_inputs("x.safetensors") != before


def test_a_prompt_is_noted(folders):
    SaveInversion.execute(inversion=record()[0], filename_prefix="x", dtype="float32", source_prompt="a cat\non a mat")
    inversion, x_T, prompt, _ = LoadInversion.execute(file="x_00001_.ledits.safetensors [output]").result
    assert prompt == "a cat\non a mat" == inversion.settings["source_prompt"]
    assert torch.equal(x_T["samples"], inversion.latents[0] / 0.18215)
    with pytest.raises(ValueError, match="shorten the prompt"):
        SaveInversion.execute(inversion=record()[0], filename_prefix="y", dtype="float32",
            source_prompt="long " * 20000)


def test_in_a_server(server_url):
    """Invert and save; the picker shows the file; the edit from it is the same as without the detour."""
    client = ComfyClient(server_url)

    base = {
        "model": node("LEDITS_LoadDemoModel"),
        "words": node("CLIPTextEncode", text="a red star", clip=["model", 1]),
        "picture": node("EmptyImage", width=128, height=128, batch_size=1, color=0x3070C0),
        "encoded": node("VAEEncode", pixels=["picture", 0], vae=["model", 2]),
        "inversion": node("LEDITS_EditFriendlyInversion", model=["model", 0], positive=["words", 0], negative=["words", 0],
                          latent=["encoded", 0], cfg=1.0, steps=4, scheduler="ddim_uniform", eta=1.0, seed=0),
    }

    def latent(inversion, **more):
        edit = node("LEDITS_KSampler", model=["model", 0], positive=["words", 0], negative=["words", 0], cfg=3.0, skip=1,
                    inversion=inversion)
        entry = client.run(base | more | {"edit": edit, "kept": node("SaveLatent", samples=["edit", 0], filename_prefix="x")})
        return entry, safetensors.torch.load(client.fetch(entry["outputs"]["kept"]["latents"][0]))["latent_tensor"]

    save = node("LEDITS_SaveInversion", inversion=["inversion", 0], filename_prefix="inversions/demo", dtype="float32")
    entry, direct = latent(["inversion", 0], save=save)
    assert entry["outputs"]["save"]["text"][0].startswith("inversions/demo_00001_.ledits.safetensors\n")
    choice = json.loads(client.ask("/object_info/LEDITS_LoadInversion"))["LEDITS_LoadInversion"]
    name = choice["input"]["required"]["file"][1]["options"][0]
    assert name == "inversions/demo_00001_.ledits.safetensors [output]"
    _, again = latent(["loaded", 0], loaded=node("LEDITS_LoadInversion", file=name),
                      seen=node("LEDITS_InspectInversion", inversion=["loaded", 0], vae=["model", 2]))
    assert torch.equal(direct, again)
    with pytest.raises(Exception, match="not a plain name"):
        latent(["loaded", 0], loaded=node("LEDITS_LoadInversion", file="../" + name))
