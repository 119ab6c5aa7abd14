"""The cases of the benchmark. Each is a function of a `workbench.Bench` that yields lines of the table."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from . import workbench

RUN = Path(__file__).resolve().parents[1] / "run.py"


def say(text):
    print(text, flush=True)


def row(name, first, second, a, b, unit="s", note=""):
    """One line of the table: a of `first` beside b of `second`."""
    return {"name": name, "first": first, "second": second, "a": a, "b": b, "unit": unit, "ratio": a / b, "note": note}


def rows_of(output):
    """Rows (pictures x predictions) that a node's run cost."""
    return output.ui["ledits"][0]["unet_rows"]


def inversion(bench):
    """edit-friendly inversion: all steps in few batches, or one by one"""
    for pictures in (1,) if bench.options.quick else (1, 4):
        t = bench.times(batched=lambda: bench.invert(pictures), single=lambda: bench.invert(pictures, steps_at_once=1))
        yield row(f"inversion, {pictures} picture{'s' * (pictures > 1)}, {bench.steps} steps", "batched", "one by one",
                  t["batched"], t["single"])


def overhead(bench):
    """a whole edit, and for comparison a KSampler run, beside the bare network on the same batches"""
    path = bench.invert().result[0]
    sides = {
        "LEDITS edit, 2 concepts and cfg": lambda: bench.edit(path),
        "ComfyUI's KSampler, cfg": lambda: bench.ksampler(steps=bench.steps - bench.skip),
    }
    for name, run in sides.items():
        bare, rows = bench.bare(run)
        t = bench.times(whole=run, bare=bare)
        yield row(name, "whole", "bare U-Net", t["whole"], t["bare"], note=f"{rows} rows")


def methods(bench):
    """every inversion method, beside DDIM inversion: seconds, and U-Net rows forward and backward"""
    found = {}
    for name, run in bench.methods().items():
        learns = name in ("null-text", "StyleDiffusion")  # minutes each: once, and not in turns
        forward, backward, seconds = bench.counted(run)
        found[name] = (seconds if learns else bench.times(run=run)["run"]), forward, backward
    for name, (seconds, forward, backward) in found.items():
        yield row(f"{name} inversion, {bench.steps} steps", name, "DDIM", seconds, found["DDIM"][0],
                  note=f"{forward} rows forward, {backward} backward")


def batches(bench):
    """pictures inverted in one batch: seconds a picture beside those of one alone"""
    for pictures in (4, 16):
        t = bench.times(together=lambda: bench.invert(pictures), alone=lambda: bench.invert(1))
        yield row(f"inversion of {pictures} pictures, {bench.steps} steps", "each", "alone",
                  t["together"] / pictures, t["alone"])


def attention(bench):
    """Prompt-to-Prompt on the Direct path, and a second edit from a kept store, beside the bare network on the rows"""
    inversion = bench.methods()["Direct"]()
    path, control = inversion.result[0], (bench.prompt_to_prompt(),)
    store = bench.capture(path, control)
    sides = {
        "P2P on the Direct path": (
            lambda: bench.edit(path, skip=0, concepts=(), attention=control), rows_of(inversion)
        ),
        "second edit, kept store": (
            lambda: bench.edit(path, skip=0, concepts=(), attention=control, store=store.result[0]), 0
        ),
    }
    for name, (run, before) in sides.items():
        bare, rows = bench.bare(run)
        t = bench.times(whole=run, bare=bare)
        more = f", with the inversion's {before + rows}" if before else ""
        yield row(name, "whole", "bare U-Net", t["whole"], t["bare"], note=f"{rows} rows{more}")


def controlled(bench, control):
    """An edit with a control along a path that needs no network, so that it is the edit alone."""
    return bench.edit(bench.noise_path(), skip=0, concepts=(), attention=(control,))


MEMORY = {
    "ksampler": lambda bench: bench.ksampler(),
    "inversion": lambda bench: bench.invert(),
    "inversion one by one": lambda bench: bench.invert(steps_at_once=1),
    "edit": lambda bench: bench.edit(bench.invert(steps_at_once=1).result[0]),
    "P2P edit": lambda bench: controlled(bench, bench.prompt_to_prompt(1, 1)),
    "MasaCtrl edit": lambda bench: controlled(bench, bench.masactrl()),
}
STORES = ("P2P edit", "MasaCtrl edit")


def memory(bench):
    """peak memory beside a KSampler run's (on the CPU of the whole process, with ComfyUI, torch and weights)"""
    sides = [side for side in MEMORY if side not in STORES]
    yield from _memory(sides, bench.options.model, bench.steps)


def store_memory(bench):
    """the same of edits with the live attention store: U-Net of SD 1.5, random weights, latents 64 x 64, 2 steps"""
    yield from _memory(("ksampler", *(STORES[:1] if bench.options.quick else STORES)), "sd15", 2)


def joint_memory(bench):
    """the same on Flux.1's blocks at full width, 2 double and 4 single ones, random weights, 512 px, 2 steps"""
    yield from _memory(("ksampler", *(STORES[:1] if bench.options.quick else STORES)), "flux", 2)


def _memory(sides, model, steps):
    found = {}
    for side in sides:
        command = [sys.executable, RUN, "benchmarks.speed", "--measure", side, "--model", model, "--steps", steps]
        done = subprocess.run([str(c) for c in command], cwd=workbench.ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"The memory of '{side}' could not be measured:\n{done.stderr[-2000:]}")
        found[side] = json.loads(done.stdout.splitlines()[-1])
    plain = found.pop("ksampler")
    for side, (before, peak) in found.items():
        yield row(f"peak memory of {side}", side, "KSampler", peak / 1e6, plain[1] / 1e6, "MB",
                  f"above the loaded model: {(peak - before) / 1e6:.0f}, {(plain[1] - plain[0]) / 1e6:.0f}")


def measure(bench, side):
    """Print [bytes before, bytes at the peak] of one side of MEMORY."""
    import comfy.model_management

    import nodes  # noqa: F401 - what every side imports

    comfy.model_management.load_models_gpu([bench.model])
    bench.cond("")
    workbench.forget_peak()
    before = workbench.peak_memory()
    MEMORY[side](bench)
    print(json.dumps([before, workbench.peak_memory()]))


def diffusers(bench):
    """LEDITS++ of diffusers: same weights, noise levels, solver and number of predictions, one concept"""
    if bench.options.model != "demo" or importlib.util.find_spec("diffusers") is None:
        say("  left out: it needs diffusers and the demo model")
        return
    import torch

    from ...demo import scenes

    picture = torch.from_numpy(scenes.render(scenes.random_scene(3))[0])[None]
    theirs, count = workbench.leditspp(bench.model.load_device)
    image = picture.movedim(-1, 1)
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
        note = f"{rows_of(ours())} rows, {count(other)} rows"
        t = bench.times(ours=ours, theirs=other)
        yield row(f"LEDITS++ {name}, autoencoder and text included", "this pack", "diffusers", t["ours"], t["theirs"],
                  note=note)


CASES = (inversion, methods, batches, overhead, attention, memory, store_memory, joint_memory, diffusers)
