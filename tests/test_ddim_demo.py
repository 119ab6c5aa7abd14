"""DDIM inversion on the demo model: what refinement is worth, and the nodes in a real server."""
import numpy as np
import pytest
import torch
from comfyui_ledits.demo import captions, loader, pictures, scenes
from comfyui_ledits.nodes.ddim_inversions import DDIMInversion
from comfyui_ledits.tools.api.client import ComfyClient
from support import runs
from support.graphs import node


def round_trip(refinements, weights=loader.nets.WEIGHTS):
    """Root mean square error of 50 steps up and down again at guidance 1, over three held-out pictures."""
    model, clip, vae = loader.load(weights)
    drawn = pictures.held_out(900_000, 3, things=1)

    def prompt(texts):
        return [[torch.cat([clip.encode_from_tokens_scheduled(clip.tokenize(t))[0][0] for t in texts]), {}]]

    pair = prompt([captions.sentence(scene) for scene in drawn]), prompt([""])
    latent = {"samples": vae.encode(torch.from_numpy(np.stack([scenes.render(scene)[0] for scene in drawn])))}
    inversion = runs.invert(DDIMInversion, latent=latent, pair=pair, on=model, steps=50, refinements=refinements)[0]
    again = runs.edit("demo", inversion, pair=pair, on=model, cfg=1.0)
    return float((again - latent["samples"]).pow(2).mean().sqrt())


@pytest.mark.usefixtures("inference_mode")
def test_one_refinement_lowers_the_round_trip_error_at_least_five_times():
    without, one = round_trip(0), round_trip(1)
    assert without > 1e-3
    assert one < without / 5


def test_all_nodes_run_in_a_server_with_their_nested_inputs(server_url):
    server = ComfyClient(server_url)
    graph = {
        "model": node("LEDITS_LoadDemoModel"),
        "words": node("CLIPTextEncode", text="a red star on a grey ground", clip=["model", 1]),
        "empty": node("CLIPTextEncode", text="", clip=["model", 1]),
        "drawn": node("EmptyImage", width=128, height=128, batch_size=1, color=0x3070C0),
        "picture": node("VAEEncode", pixels=["drawn", 0], vae=["model", 2]),
    }
    levels = {"model": ["model", 0], "latent": ["picture", 0], "steps": 2, "scheduler": "ddim_uniform"}
    common = {**levels, "positive": ["words", 0], "negative": ["empty", 0], "cfg": 1.0, "refinements": 1,
              "tolerance": 1e-5, "convention": "A"}
    again = {"path": "re-simulated", "path.edit_cfg": 3.0}
    made = {
        "ddim": node("LEDITS_DDIMInversion", **common, path="inverted"),
        "ddim again": node("LEDITS_DDIMInversion", **common, **again),
        "direct": node("LEDITS_DirectInversion", **common, ablation="none"),
        "scaled": node("LEDITS_DirectInversion", **common,
                       **{"ablation": "scaled offset", "ablation.edit_cfg": 3.0, "ablation.scale": 0.8}),
        "every": node("LEDITS_DirectInversion", **common,
                      **{"ablation": "every n-th step", "ablation.edit_cfg": 3.0, "ablation.every": 2}),
        "target": node("LEDITS_DirectInversion", **common, **{"ablation": "target side", "ablation.edit_cfg": 3.0}),
        "npi": node("LEDITS_NegativePromptInversion", **common, **again, interpolation=0.3),
        "sdedit": node("LEDITS_SDEditPath", **levels, seed=1),
    }
    for name in list(made):
        graph[f"proximal {name}"] = node("LEDITS_ProximalGuidance", model=["model", 0], quantile=0.5, kind="soft",
                                         inversion=[name, 0], hold="path", strength=0.5, start=0.0, radius=1)
        graph[f"edit {name}"] = node("LEDITS_KSampler", model=[f"proximal {name}", 0], positive=["words", 0],
                                     negative=["empty", 0], inversion=[name, 0], cfg=3.0, skip=0)
        graph[f"saved {name}"] = node("SaveLatent", samples=[f"edit {name}", 0], filename_prefix="ddim")
    entry = server.run(graph | made)
    rows = {name: entry["outputs"][name]["ledits"][0]["unet_rows"] for name in made}
    assert rows == {"ddim": 4, "ddim again": 8, "direct": 4, "scaled": 8, "every": 8, "target": 8, "npi": 8, "sdedit": 0}
    assert all(f"saved {name}" in entry["outputs"] for name in made)
