"""docs/performance.md: what the benchmark measures, model by model, as tables."""

import copy
import datetime
import importlib.metadata
from pathlib import Path

from .speed_lines import say

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
# Title; model, side of the latents, steps, repetitions; cases. Full width is slow on a CPU: few steps, few repetitions.
PLAN = (
    ("Demo size, Stable Diffusion", "demo", None, 30, 3,
     ("inversion", "batches", "methods", "overhead", "attention", "second_edits", "growth", "memory", "start", "records")),
    ("Demo size, flow model", "demo-flow", None, 30, 3, ("inversion", "overhead", "attention", "second_edits")),
    ("Beside diffusers, demo weights", "demo", None, 30, 3, ("leditspp", "sega")),
    ("Beside the authors' code, demo weights", "demo", None, 3, 1, ("references",)),
    ("SD 1.5's full width, random weights, latents 64 x 64", "sd15", 64, 2, 1,
     ("inversion", "overhead", "attention", "store_memory")),
    ("Flux.1's blocks at full width (2 double, 4 single), random weights, latents 32 x 32", "flux", 32, 4, 1,
     ("inversion", "overhead", "attention", "joint_memory")),
)
HEAD = """# Performance

Written by `python dev.py bench --report` on {date}: {machine}; ComfyUI {comfyui}, diffusers {diffusers}.

The two sides of a line are measured in one process, in turns, and given as medians; memory is that of a fresh process for each side.
A ratio tells more than its seconds: it is of one machine and one run. "Rows" are pictures x predictions that the network is given.
{missing}"""


def write(options, run, machine):
    """Measure PLAN with `run(options)` and write the page to `options.report`.

    With --quick everything is measured once, with few steps; with cases or a model named, only those parts of the plan.
    """
    import comfyui_version
    import torch

    missing = "" if torch.cuda.is_available() else "\nNo GPU has been measured: `bench --report` writes the same page on one.\n"
    parts = [HEAD.format(date=datetime.date.today(), machine=machine, comfyui=comfyui_version.__version__,
                         diffusers=importlib.metadata.version("diffusers"), missing=missing)]
    for title, model, size, steps, repeat, cases in PLAN:
        cases = [case for case in cases if not options.cases or case in options.cases]
        if "references" in cases and not options.reference:
            continue
        if not cases or options.quick and model in ("sd15", "flux"):
            continue
        say(f"\n== {title}")
        own = copy.copy(options)
        own.model, own.size, own.cases = model, size, cases
        own.steps, own.repeat = (2, 1) if options.quick else (steps, repeat)
        parts.append(section(title, own, run(own)))
        options.report.write_text("\n".join(parts), "utf-8")  # after each part: the whole takes most of an hour on a CPU
    say(f"\nwrote {options.report}")


def section(title, options, lines):
    """One part of the page."""
    times = "once" if options.repeat == 1 else f"medians of {options.repeat}"
    out = [f"## {title}", "", f"{options.steps} steps, {times}."]
    shown = None
    for line in lines:
        if line["title"] != shown:
            shown = line["title"]
            out += ["", f"**{line['case']}**: {shown}", "", "| what | A | | B | | A / B | |", "|---|---|---:|---|---:|---:|---|"]
        a, b = (f"{line[side]:.3g} {line['unit']}" if line["unit"] == "s" else f"{line[side]:,.0f} {line['unit']}" for side in "ab")
        out.append(f"| {line['name']} | {line['first']} | {a} | {line['second']} | {b} | **{line['ratio']:.2f}** | {line['note']} |")
    return "\n".join([*out, ""])
