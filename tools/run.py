"""Runs a tool of the pack in the Python that runs ComfyUI: `python tools/run.py benchmarks.speed --quick`.

The pack's folder may have any name; its modules are `comfyui_ledits.*` here, as in the tests, so that no file is ever
loaded twice under two names.
"""

import importlib
import sys
import types
from pathlib import Path

# Outside `main`, so that worker processes, which load this file and do not run it, know the pack too.
pack = sys.modules.setdefault("comfyui_ledits", types.ModuleType("comfyui_ledits"))
pack.__path__ = [str(Path(__file__).resolve().parents[1])]


def main(name, arguments):
    """Call `main(arguments)` of comfyui_ledits.tools.<name>; its exit code. What fails is one sentence."""
    from comfyui_ledits.tools.api.client import ComfyError
    from comfyui_ledits.tools.benchmarks.piebench import Problem

    try:
        return importlib.import_module(f"comfyui_ledits.tools.{name}").main(arguments)
    except (ComfyError, Problem, OSError) as error:
        print(f"{name.rpartition('.')[2].removesuffix('_run')}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; the same command starts again.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a name or a prompt may hold what the terminal's encoding lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main(sys.argv[1], sys.argv[2:]))
