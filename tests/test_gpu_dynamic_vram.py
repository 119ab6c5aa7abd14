"""Edits in a real server under dynamic VRAM (comfy-aimdo) are those without it."""
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from comfyui_ledits.nodes.learned_inversions import ON_INTERRUPT
from conftest import COMFYUI
from support.graphs import node
from test_controls_server import STEPS, edit
from test_server import Server
from test_server import edit as edit_with_concept

import dev

# Of the edited latent's standard deviation, in float32. Memory that counts as free may choose other numbers of rows in a
# call, whose other rounding guidance enlarges from step to step.
ALIKE = 0.02


def learned():
    """Null-text inversion, for which a MODEL under dynamic VRAM is loaded a second time, and an edit on it."""
    inversion = node("LEDITS_NullTextInversion", model=["model", 0], positive=["words", 0], negative=["empty", 0],
                     latent=["encoded", 0], cfg=5.0, steps=STEPS, scheduler="ddim_uniform", inner_steps=2,
                     learning_rate=0.01, early_stop=0.0, on_interrupt=ON_INTERRUPT[0])
    return edit("LEDITS_MasaCtrl", inversion=inversion)


def flow():
    """Prompt-to-Prompt by joint attention, on the demo flow model."""
    inversion = node("LEDITS_EditFriendlyInversion", model=["model", 0], positive=["words", 0], negative=["empty", 0],
                     latent=["encoded", 0], cfg=1.0, steps=STEPS, scheduler="simple", eta=0.0, seed=0)
    control = node("LEDITS_PromptToPrompt", prompts=["words", 2], cross_replace_steps=0.8, self_replace_steps=0.0)
    return edit("LEDITS_PromptToPrompt") | {
        "model": node("LEDITS_LoadDemoModel", network="flow"), "inversion": inversion, "control": control}


GRAPHS = {"concept": edit_with_concept, "p2p": lambda: edit("LEDITS_PromptToPrompt"),
          "masactrl": lambda: edit("LEDITS_MasaCtrl"), "pix2pix-zero": lambda: edit("LEDITS_Pix2PixZero"),
          "null-text": learned, "flow": flow}


def edits(url, names):
    """{name: edited latent} of the demo models, by a server."""
    server, made = Server(url), {}
    for name in names:
        made[name] = server.latent(server.run(GRAPHS[name]()), "saved").float()
        assert torch.isfinite(made[name]).all()
    return made


def test_the_graphs_run(server_url):
    made = edits(server_url, ("null-text", "flow"))
    assert all(latent.std() > 0.1 for latent in made.values())


@pytest.mark.gpu
def test_edits_under_dynamic_vram_are_those_without_it(tmp_path, monkeypatch):
    if importlib.util.find_spec("comfy_aimdo") is None:
        pytest.skip("comfy-aimdo, which brings dynamic VRAM, is not installed")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")  # float32 in full, in the servers
    made = []
    for how in ("dynamic", "disable-dynamic-vram"):
        flags = ["--force-fp32", *([] if how == "dynamic" else [f"--{how}"])]  # where it works it is on by itself
        base, log = tmp_path / how, tmp_path / f"{how}.log"
        dev.link_pack(base)
        with dev.start_server(dev.Home(Path(sys.executable), COMFYUI, base), *flags, log=log) as (url, _):
            if how == "dynamic" and "DynamicVRAM support detected and enabled" not in log.read_text(errors="replace"):
                pytest.skip("dynamic VRAM is off here by ComfyUI's own choice: its log does not say that it is enabled")
            made.append(edits(url, GRAPHS))
    dynamic, plain = made
    for name, expected in plain.items():
        off = float((dynamic[name] - expected).abs().max() / expected.std())
        print(f"{name:12} under dynamic VRAM off by {off:.1e}")
        assert off < ALIKE, name
