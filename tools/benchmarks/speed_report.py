"""docs/performance.md: what the benchmark measures, model by model, as tables."""

import copy
import datetime
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from .speed_lines import say
from .speed_references import REFERENCES, known

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the page: what `speed.parse` names, and the cases."""

    title: str
    cases: tuple
    model: str
    size: int | None = None
    steps: int = 30
    repeat: int = 3
    pytorch_attention: bool = False


# Full width is slow on a CPU: few steps, few repetitions.
PLAN = (
    Part(title="Demo size, Stable Diffusion", model="demo", repeat=9, cases=(
        "inversion", "batches", "methods", "overhead", "attention", "second_edits", "growth", "attention_kinds", "memory", "start",
        "records")),
    Part(title="Demo size, flow model", model="demo-flow", repeat=9, cases=("inversion", "overhead", "attention", "second_edits")),
    Part(title="Beside diffusers, demo weights", model="demo", repeat=9, cases=("leditspp", "sega")),
    *(Part(title=f"Beside {name}, same weights", model=r.model, steps=r.steps, repeat=r.repeat, cases=(name,))
      for name, r in REFERENCES.items()),
    Part(title="SD 1.5's full width, random weights, latents 64 x 64", model="sd15", size=64, steps=2, repeat=1,
         cases=("inversion", "overhead", "attention", "attention_kinds", "store_memory")),
    *(Part(title=f"SD 1.5's full width, random weights, latents {side} x {side}, PyTorch's attention", model="sd15", size=side,
           steps=2, repeat=repeat, cases=cases, pytorch_attention=True)
      for side, repeat, cases in ((64, 3, ("inversion", "overhead", "attention")), (96, 1, ("overhead",)))),
    Part(title="Flux.1's blocks at full width (2 double, 4 single), random weights, latents 32 x 32", model="flux", size=32, steps=4,
         repeat=1, cases=("inversion", "overhead", "attention", "joint_memory")),
)
HEAD = """# Performance

Written by `python dev.py bench --report`: a part for each model, with the day and the machine it was measured on.

The two sides of a line are measured in one process, in turns, and given as medians; memory is that of a fresh process for each side.
A ratio tells more than its seconds: it is of one machine and one run. "Rows" are pictures x predictions that the network is given.

On a CPU ComfyUI computes attention in slices and asks for the free memory before each call of it; that belongs to its bare network, and is
told apart where another library's network stands beside it. Lines "with PyTorch's attention" are of ComfyUI as it is on an NVIDIA card, and
on a CPU when it is started with `--use-pytorch-cross-attention`. A record is read whole: its checksum is tested before any of its numbers
are used.
"""


def write(options, run, machine):
    """Measure PLAN with `run(options)` and write the page to `options.report`; parts that are not measured stay as they are.

    With --quick everything is measured once, with few steps, at demo size; with cases named, only the parts that have them.
    """
    parts, brought = _parts(options.report), {known(folder): folder for folder in options.reference or ()}
    for part in PLAN:
        own, cases, title = copy.copy(options), part.cases, part.title
        if cases[0] in REFERENCES:
            if cases[0] not in brought:
                continue
            own.reference, cases = [brought[cases[0]]], ("references",)
        cases = [case for case in cases if not options.cases or case in options.cases]
        if not cases or options.quick and part.model in ("sd15", "flux") or not _wanted(part, options.only):
            continue
        say(f"\n== {title}")
        own.model, own.size, own.cases, own.pytorch_attention = part.model, part.size, cases, part.pytorch_attention
        own.steps, own.repeat = (2, 1) if options.quick else (part.steps, part.repeat)
        parts[title] = section(title, own, run(own), machine)
        kept = [parts[p.title] for p in PLAN if p.title in parts]  # those of an earlier plan go
        options.report.write_text("\n".join([HEAD, *kept]), "utf-8")
    say(f"\nwrote {options.report}")


def _wanted(part, only):
    return not only or any(name == part.model or name in part.title for name in only)


def _parts(page):
    """{title: text} of the parts that the page has."""
    text = page.read_text("utf-8") if page.is_file() else ""
    return {part.split("\n", 1)[0]: f"## {part.rstrip()}\n" for part in text.split("\n## ")[1:]}


def section(title, options, lines, machine):
    """One part of the page."""
    import comfyui_version

    times = "once" if options.repeat == 1 else f"medians of {options.repeat}"
    made = f"{datetime.date.today()}, {machine}, ComfyUI {comfyui_version.__version__}, "
    made += f"diffusers {importlib.metadata.version('diffusers')}"
    out = [f"## {title}", "", f"{options.steps} steps, {times}; {made}."]
    shown = None
    for line in lines:
        if line["title"] != shown:
            shown = line["title"]
            out += ["", f"**{line['case']}**: {shown}", "", "| what | A | | B | | A / B | |", "|---|---|---:|---|---:|---:|---|"]
        a, b = (f"{line[side]:.3g} {line['unit']}" if line["unit"] == "s" else f"{line[side]:,.0f} {line['unit']}" for side in "ab")
        out.append(f"| {line['name']} | {line['first']} | {a} | {line['second']} | {b} | **{line['ratio']:.2f}** | {line['note']} |")
    return "\n".join([*out, ""])
