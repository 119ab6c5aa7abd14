"""Cases of the benchmark: other people's code, in the same process and in turns."""

import importlib.util

from . import speed_peers
from .speed_lines import row, rows_of, say
from .workbench import pytorch_attention


def _missing(bench):
    """Whether a comparison with diffusers is impossible here; says why."""
    if bench.options.model == "demo" and importlib.util.find_spec("diffusers") is not None:
        return False
    say("  left out: it needs diffusers and the demo model")
    return True


def drawn(seed=3, side=128):
    """A demo picture, uint8 [side, side, 3]."""
    import numpy as np

    from ...demo import scenes

    drawn = np.round(np.asarray(scenes.render(scenes.random_scene(seed))[0]) * 255).astype(np.uint8)
    return drawn.repeat(side // 128, 0).repeat(side // 128, 1)


def leditspp(bench):
    """LEDITS++ of diffusers: same weights, noise levels, solver and number of predictions, one concept"""
    if _missing(bench):
        return
    import torch

    picture = torch.from_numpy(drawn())[None].float() / 255
    theirs, image = speed_peers.leditspp(bench.model.load_device), picture.movedim(-1, 1)
    state = {}

    def their_inversion():
        theirs.invert(image, source_prompt="", num_inversion_steps=bench.steps, skip=0.15,
                      generator=torch.Generator().manual_seed(0))

    def their_edit():
        return theirs(editing_prompt=["star"], edit_guidance_scale=7.0, edit_threshold=0.9, use_intersect_mask=False,
                      output_type="pt").images

    def our_inversion():
        bench.conds.clear()
        latent = {"samples": bench.vae.encode(picture)}
        state["ours"] = bench.invert(source="", sigmas=state["sigmas"], latent=latent)
        return state["ours"]

    def our_edit():
        bench.conds.clear()
        output = bench.edit(state["ours"].result[0], "", 1.0, 0, bench.concepts(["star"], 0, 0.0), "dpmpp_2m_sde")
        bench.vae.decode(output.result[0]["samples"])
        return output

    their_inversion()
    state["sigmas"] = theirs.scheduler.sigmas[-bench.steps - 1 :].float()
    for name, ours, other in (("inversion", our_inversion, their_inversion), ("edit", our_edit, their_edit)):
        note = f"{rows_of(ours())} rows, {speed_peers.count(theirs.unet, other)} rows"
        t = bench.times(ours=ours, theirs=other)
        yield row(f"LEDITS++ {name}, autoencoder and text included", "this pack", "diffusers", t["ours"], t["theirs"],
                  note=note)
    yield bare_networks(bench, our_edit, theirs.unet, their_edit)
    with pytorch_attention():
        t = bench.times(ours=our_edit, theirs=their_edit)
        yield row("LEDITS++ edit, PyTorch's attention in both", "this pack", "diffusers", t["ours"], t["theirs"])
        yield bare_networks(bench, our_edit, theirs.unet, their_edit)


def bare_networks(bench, our_edit, network, their_edit):
    """The line of the two networks' calls alone."""
    ours, rows = bench.bare(our_edit)
    t = bench.times(ours=ours, theirs=speed_peers.bare(network, their_edit))
    return row("of it the bare networks", "ComfyUI's", "diffusers'", t["ours"], t["theirs"], note=f"{rows} rows")


def sega(bench):
    """SEGA of diffusers: same weights and number of predictions, cfg and two concepts, from noise"""
    if _missing(bench):
        return
    import torch

    theirs = speed_peers.sega(bench.model.load_device)
    path, words = bench.noise_path(), ["star", "red"]

    def their_edit():
        return theirs("a blue circle", editing_prompt=words, edit_guidance_scale=7.0, edit_warmup_steps=2, edit_threshold=0.9,
                      edit_momentum_scale=0.3, edit_mom_beta=0.6, num_inference_steps=bench.steps, height=128, width=128,
                      generator=torch.Generator().manual_seed(0), output_type="pt").images

    def our_edit():
        bench.conds.clear()
        output = bench.edit(path, "a blue circle", skip=0, concepts=bench.concepts(words))
        bench.vae.decode(output.result[0]["samples"])
        return output

    note = f"{rows_of(our_edit())} rows, {speed_peers.count(theirs.unet, their_edit)} rows"
    t = bench.times(ours=our_edit, theirs=their_edit)
    yield row("SEGA, autoencoder and text included", "this pack", "diffusers", t["ours"], t["theirs"], note=note)
    with pytorch_attention():
        t = bench.times(ours=our_edit, theirs=their_edit)
        yield row("SEGA, PyTorch's attention in both", "this pack", "diffusers", t["ours"], t["theirs"])
