"""How well every inversion gives held-out demo pictures back at an edit's guidance, and what it costs.

Run with -s to read the table. LEDITS_DEMO_PICTURES makes it smaller.
"""

import functools
import time

import numpy as np
import pytest
import torch
from comfyui_ledits.demo import captions
from comfyui_ledits.nodes.ddim_inversions import DDIMInversion, DirectInversion, NegativePromptInversion
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.learned_inversions import NullTextInversion, StyleDiffusionInversion
from comfyui_ledits.nodes.sdedit import SDEditPath
from comfyui_ledits.tools import measure
from support import runs
from support.demo_nodes import DemoNodes, draw, held_out

pytestmark = pytest.mark.demo

COUNT, AT_ONCE, STEPS, CFG = 40, 20, 50, 7.5


def sdedit(latent, pair, on, steps):
    return SDEditPath.execute(model=on, latent=latent, steps=steps, scheduler="ddim_uniform", seed=0)


METHODS = {
    "edit-friendly DDPM": functools.partial(runs.invert, EditFriendlyInversion, cfg=CFG),
    "Direct": functools.partial(runs.invert, DirectInversion),
    "null-text": functools.partial(runs.invert, NullTextInversion, cfg=CFG, inner_steps=10),
    "StyleDiffusion": functools.partial(runs.invert, StyleDiffusionInversion, cfg=CFG, first_steps=100,
                                        attention_loss=0.0),
    "negative-prompt": functools.partial(runs.invert, NegativePromptInversion),
    "DDIM, one refinement, cfg 1": functools.partial(runs.invert, DDIMInversion, refinements=1),
    "DDIM, re-simulated": functools.partial(runs.invert, DDIMInversion, path={"path": "re-simulated", "edit_cfg": CFG}),
    "SDEdit": sdedit,
}


def rebuilt(name, nodes, inversion, prompts):
    """The latents that an edit with the source prompt at guidance 7.5 starts from or arrives at."""
    if name in ("Direct", "DDIM, re-simulated"):  # their source branch is the stored path itself
        return inversion.latent_format.process_out(inversion.latents[-1])
    cfg = 1.0 if name.endswith("cfg 1") else CFG
    return runs.edit("demo", inversion, pair=prompts, on=nodes.model, cfg=cfg)


@pytest.mark.usefixtures("inference_mode")
def test_every_inversion_rebuilds_the_pictures_in_the_order_of_its_means():
    nodes, found, cost = DemoNodes(), {}, {}
    drawn = [(captions.sentence(scene), draw(scene)[0]) for scene in held_out(COUNT)]
    groups = [drawn[i : i + AT_ONCE] for i in range(0, len(drawn), AT_ONCE)]
    for group in groups:
        texts, pictures = zip(*group)
        latent, prompts = nodes.encode(pictures), (nodes.prompts(texts), nodes.prompts([""]))
        results = {"autoencoder alone": latent["samples"]}
        for name, invert in METHODS.items():
            start = time.perf_counter()
            made = invert(latent=latent, pair=prompts, on=nodes.model, steps=STEPS)
            seconds = time.perf_counter() - start
            row = cost.setdefault(name, [0, 0.0])
            row[0], row[1] = row[0] + made.ui["ledits"][0]["unet_rows"], row[1] + seconds
            results[name] = rebuilt(name, nodes, made.result[0], prompts)
        for name, samples in results.items():
            found.setdefault(name, []).extend(
                (measure.psnr(picture, again), float(torch.sqrt(((y - x) ** 2).mean())))
                for picture, again, y, x in zip(pictures, nodes.decode(samples), samples, latent["samples"])
            )
    print(f"\n{len(drawn)} pictures, {STEPS} steps, guidance {CFG}: PSNR, latent error (RMS), rows and seconds a picture")
    for name, values in found.items():
        rows, seconds = cost.get(name, (0, 0.0))
        print(f"{name:28} {np.mean(values, 0)[0]:6.2f} dB {np.mean(values, 0)[1]:9.2e} "
              f"{rows / len(drawn):8.0f} {seconds / len(drawn):7.2f} s")
    psnr = {name: np.mean(values, 0)[0] for name, values in found.items()}
    whole = psnr["autoencoder alone"]
    for name in ("edit-friendly DDPM", "Direct"):
        assert abs(psnr[name] - whole) < 0.02, name
    for name in ("null-text", "StyleDiffusion"):
        assert whole - 3 < psnr[name] and psnr["negative-prompt"] < psnr[name] + 0.1, name
    others = [v for name, v in psnr.items() if name not in ("DDIM, re-simulated", "SDEdit")]
    assert psnr["DDIM, re-simulated"] < min(others)
