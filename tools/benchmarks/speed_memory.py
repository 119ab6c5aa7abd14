"""Cases of the benchmark: peak memory, each side in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

from . import workbench
from .speed_lines import row

RUN = Path(__file__).resolve().parents[1] / "run.py"


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
    yield from _memory(bench, sides, bench.options.model, bench.steps)


def store_memory(bench):
    """the same of edits with the live attention store: U-Net of SD 1.5, random weights, latents 64 x 64, 2 steps"""
    yield from _memory(bench, ("ksampler", *(STORES[:1] if bench.options.quick else STORES)), "sd15", 2)


def joint_memory(bench):
    """the same on Flux.1's blocks at full width, 2 double and 4 single ones, random weights, 512 px, 2 steps"""
    yield from _memory(bench, ("ksampler", *(STORES[:1] if bench.options.quick else STORES)), "flux", 2)


def _memory(bench, sides, model, steps):
    found, how = {}, ["--pytorch-attention"] if bench.options.pytorch_attention else []
    for side in sides:
        command = [sys.executable, RUN, "benchmarks.speed", "--measure", side, "--model", model, "--steps", steps, *how]
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
