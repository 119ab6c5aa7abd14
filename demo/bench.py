"""What editing costs: seconds and memory of this pack beside the bare network, plain sampling and diffusers.

    python dev.py bench [CASE ...] [--model demo|tiny|CHECKPOINT] [--steps 50] [--repeat 5] [--quick] [--json FILE]

The two sides of a ratio are measured in one process, in turns (A B A B ...), and given as medians; nothing is asserted.
Memory is measured in a fresh process for each side. A new comparison is one function in CASES.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from demo import workbench  # noqa: E402


def row(name, first, second, a, b, unit="s", note=""):
    """One line of the table: a of `first` beside b of `second`."""
    return {"name": name, "first": first, "second": second, "a": a, "b": b, "unit": unit, "ratio": a / b, "note": note}


def rows_of(output):
    """Rows (pictures x predictions) that a node's run cost."""
    return output.ui["ledits"][0]["unet_rows"]


# --- the cases ------------------------------------------------------------------------------------------------------


def inversion(bench):
    """edit-friendly inversion: all steps in few batches, or one by one"""
    for pictures in (1,) if bench.options.quick else (1, 4):
        t = bench.times(batched=lambda: bench.invert(pictures), single=lambda: bench.invert(pictures, steps_at_once=1))
        yield row(f"inversion, {pictures} picture{'s' * (pictures > 1)}, {bench.steps} steps", "batched", "one by one",
                  t["batched"], t["single"])  # fmt: skip


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


MEMORY = {
    "ksampler": lambda bench: bench.ksampler(),
    "inversion": lambda bench: bench.invert(),
    "inversion one by one": lambda bench: bench.invert(steps_at_once=1),
    "edit": lambda bench: bench.edit(bench.invert(steps_at_once=1).result[0]),
}


def memory(bench):
    """peak memory beside a KSampler run's (on the CPU of the whole process, with ComfyUI, torch and weights)"""
    found = {}
    for side in MEMORY:
        command = [sys.executable, __file__, "--measure", side, "--model", bench.options.model, "--steps", bench.steps]
        done = subprocess.run([str(c) for c in command], cwd=workbench.ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"The memory of '{side}' could not be measured:\n{done.stderr[-2000:]}")
        found[side] = json.loads(done.stdout.splitlines()[-1])
    plain = found.pop("ksampler")
    for side, (before, peak) in found.items():
        yield row(f"peak memory of {side}", side, "KSampler", peak / 1e6, plain[1] / 1e6, "MB",
                  f"above the loaded model: {(peak - before) / 1e6:.0f}, {(plain[1] - plain[0]) / 1e6:.0f}")  # fmt: skip


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
    from comfyui_ledits.demo import scenes

    picture = torch.from_numpy(scenes.render(scenes.random_scene(3))[0])[None]
    theirs, count = workbench.leditspp(bench.model.load_device)
    image = picture.movedim(-1, 1)
    state = {}

    def their_inversion():
        theirs.invert(image, source_prompt="", num_inversion_steps=bench.steps, skip=0.15,
                      generator=torch.Generator().manual_seed(0))  # fmt: skip

    def their_edit():
        return theirs(editing_prompt=["star"], edit_guidance_scale=7.0, edit_threshold=0.9, use_intersect_mask=False,
                      output_type="pt").images  # fmt: skip

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
        yield row(f"LEDITS++ {name}, autoencoder and text included", "this pack", "diffusers", t["ours"], t["theirs"], note=note)


CASES = (inversion, overhead, memory, diffusers)


# --- the table ------------------------------------------------------------------------------------------------------


def say(text):
    print(text, flush=True)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="; ".join(f"{c.__name__}: {c.__doc__}" for c in CASES))
    parser.add_argument("--model", default="demo", help="demo, tiny (random weights) or a checkpoint file")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--repeat", type=int, help="how often each side is measured")
    parser.add_argument("--quick", action="store_true", help="6 steps, once: shows that everything runs")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--measure", choices=MEMORY, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.steps = options.steps or (6 if options.quick else 50)
    options.repeat = options.repeat or (1 if options.quick else 5)
    if unknown := set(options.cases) - {c.__name__ for c in CASES}:
        parser.error(f"no case {', '.join(sorted(unknown))}: choose of {', '.join(c.__name__ for c in CASES)}")
    return options


def main(arguments):
    options = parse(arguments)
    workbench.prepare()
    import torch

    found = []
    with torch.inference_mode():  # as ComfyUI runs nodes
        bench = workbench.Bench(options)
        if options.measure:
            return measure(bench, options.measure)
        device = torch.cuda.get_device_name() if bench.cuda else f"CPU, {torch.get_num_threads()} threads"
        machine = f"{device}, torch {torch.__version__}"
        say(f"{options.model} model, {options.steps} steps, {options.repeat} repetitions; {machine}")
        for case in CASES:
            if options.cases and case.__name__ not in options.cases:
                continue
            say(f"\n{case.__doc__}")
            for r in case(bench):
                found.append(r | {"case": case.__name__})
                say(f"  {r['name']:50} {r['first']:>20} {r['a']:9.3f} {r['unit']:2}  {r['second']:>10} {r['b']:9.3f} "
                    f"{r['unit']:2}  ratio {r['ratio']:.3f}  {r['note']}")  # fmt: skip
    if options.json:
        settings = {"machine": machine, "model": options.model, "steps": options.steps, "repeat": options.repeat}
        options.json.write_text(json.dumps(settings | {"rows": found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
