"""Run Demo-Bench: the demo model, pictures whose true edits are known, every inversion by every editor.

    python dev.py demobench [--pictures 8] [--methods all] [--steps 50] [--model flow]

The pictures are made once (200, in output/demobench-data). The same command goes on with a run that was stopped.
Guidance is alike for all methods, and lower than the papers' 7.5, which is for Stable Diffusion.
"""

from pathlib import Path

from . import demobench, flow_methods, runner


def main(arguments):
    defaults = {"methods": "all", "pictures": 8, "mode": "plain", "output": Path("output/demobench"),
                "cfg": 3.0, "concept_scale": 3.0, "xa_guidance": 0.01}
    parser = runner.parser_of(__doc__, defaults)
    parser.add_argument("--model", choices=("U-Net", "flow"), default="U-Net", help="network of the demo model; the flow network "
                        "has methods of its own, and 28 steps where --steps is left out")
    parser.add_argument("--data", type=Path, default=Path("output/demobench-data"), help="folder of the pictures")
    parser.add_argument("--each", type=int, default=demobench.EACH, help="pictures to make of every type of edit")
    parser.add_argument("--data-seed", type=int, default=0, help="another one makes other pictures")
    options = parser.parse_args(arguments)
    if options.model == "flow":
        if options.steps == parser.get_default("steps"):
            options.steps = flow_methods.STEPS
        if options.output == defaults["output"]:
            options.output = defaults["output"].with_name("demobench-flow")
    with runner.progress() as bar:
        def made(done, of):
            bar.total = of
            bar.update()

        demobench.ready(options.data, options.each, options.data_seed, made)
    return runner.run(options, options.data)
