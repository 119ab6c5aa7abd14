"""What editing costs: seconds and memory of this pack beside the bare network, plain sampling, and other people's code.

    python dev.py bench [CASE ...] [--model demo|demo-flow|tiny|small|sd15|flux|CHECKPOINT] [--steps 50] [--repeat 5] [--quick]
                        [--reference FOLDER ...] [--json FILE] [--pytorch-attention] [--report [FILE]] [--only MODEL]

The two sides of a ratio are measured in one process, in turns (A B A B ...), and given as medians; nothing is asserted.
Memory is measured in a fresh process for each side. A new comparison is one function in `speed_cases.CASES`. --report
measures what docs/performance.md holds, model by model, and writes it.
"""

import argparse
import json
from pathlib import Path

from . import speed_report, workbench
from .speed_cases import CASES
from .speed_lines import say
from .speed_memory import MEMORY, measure


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="; ".join(f"{c.__name__}: {c.__doc__}" for c in CASES))
    parser.add_argument("--model", help="demo (default), demo-flow, a checkpoint file, or random weights: tiny, small, sd15, flux")
    parser.add_argument("--size", type=int, help="height and width of the latents, instead of the model's own")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--repeat", type=int, help="how often each side is measured")
    parser.add_argument("--pytorch-attention", action="store_true", help="ComfyUI as with --use-pytorch-cross-attention")
    parser.add_argument("--quick", action="store_true", help="6 steps, once: shows that everything runs")
    parser.add_argument("--reference", type=Path, action="append", help="a checkout of the authors' code, to measure beside")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--report", type=Path, nargs="?", const=speed_report.PAGE, help="write docs/performance.md, or FILE")
    parser.add_argument("--only", action="append", metavar="MODEL",
                        help="with --report: the parts of this model, or with this in their title, alone")
    parser.add_argument("--measure", choices=MEMORY, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    of_a_part = [name for name in ("model", "size", "steps", "repeat", "pytorch_attention") if getattr(options, name)]
    if options.report and of_a_part:
        parser.error(f"with --report every part has its own --{of_a_part[0].replace('_', '-')}: leave it out, and choose parts "
                     "with --only")
    options.model = options.model or "demo"
    options.steps = options.steps or (6 if options.quick else 50)
    options.repeat = options.repeat or (1 if options.quick else 5)
    if unknown := set(options.cases) - {c.__name__ for c in CASES}:
        parser.error(f"no case {', '.join(sorted(unknown))}: choose of {', '.join(c.__name__ for c in CASES)}")
    return options


def machine():
    """The device and the libraries in words."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{device}, torch {torch.__version__}"


def run(options):
    """Lines of the chosen cases, see `speed_lines.row`, with "case"; they are printed as they come."""
    with workbench.pytorch_attention(options.pytorch_attention):
        return _run(options)


def _run(options):
    found, bench = [], workbench.Bench(options)
    say(f"{options.model} model, {options.steps} steps, {options.repeat} repetitions; {machine()}")
    for case in CASES:
        if options.cases and case.__name__ not in options.cases:
            continue
        say(f"\n{case.__doc__}")
        for r in case(bench):
            found.append(r | {"case": case.__name__, "title": case.__doc__})
            say(f"  {r['name']:50} {r['first']:>20} {r['a']:9.3f} {r['unit']:2}  {r['second']:>10} {r['b']:9.3f} "
                f"{r['unit']:2}  ratio {r['ratio']:.3f}  {r['note']}")
    return found


def main(arguments):
    options = parse(arguments)
    workbench.prepare()
    import torch

    with torch.inference_mode():  # as ComfyUI runs nodes
        if options.measure:
            with workbench.pytorch_attention(options.pytorch_attention):
                return measure(workbench.Bench(options), options.measure)
        if options.report:
            return speed_report.write(options, run, machine())
        found = run(options)
    if options.json:
        settings = {"machine": machine(), "model": options.model, "steps": options.steps, "repeat": options.repeat}
        options.json.write_text(json.dumps(settings | {"rows": found}, indent=1) + "\n", "utf-8")
