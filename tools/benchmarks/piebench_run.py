"""Run PIE-Bench (arXiv 2310.01506) on this pack's methods, and write the paper's table with the published rows.

    python dev.py piebench --data FOLDER --checkpoint NAME [--methods paper] [--pictures 40]

FOLDER is PIE-Bench's own: mapping_file.json and annotation_images. The same command goes on with a stopped run.
For the published numbers leave --mode at pie-bench, give --jpeg, and an SD 1.4 checkpoint.
"""

from pathlib import Path

from . import runner

DEMO = "demo"


def main(arguments):
    defaults = {"methods": "paper", "pictures": 0, "mode": "pie-bench", "output": Path("output/piebench")}
    parser = runner.parser_of(__doc__, defaults)
    parser.add_argument("--data", type=Path, required=True, help="folder of PIE-Bench")
    parser.add_argument("--checkpoint", required=True, metavar="NAME",
                        help=f"as in Load Checkpoint; '{DEMO}' is the pack's own small model")
    options = parser.parse_args(arguments)
    return runner.run(options, options.data, "" if options.checkpoint == DEMO else options.checkpoint)
