"""Set up and run ComfyUI-LEDITS from a clone; `python dev.py` alone lists the commands. Standard library only.

What is missing is set up first, all of it inside this folder: packages in .venv; in .dev a ComfyUI, its user data
(.dev/base: models, input, output, custom_nodes with a link to this pack) and the logs. Later runs find it ready and
need no network.

COMFYUI_PATH     use this ComfyUI as it is instead of unpacking one; its models, settings and outputs are left alone
COMFYUI_PYTHON   with COMFYUI_PATH: the Python that runs it, used as it is instead of a .venv
COMFYUI_VERSION  which ComfyUI to unpack
COMFYUI_FRONTEND with `test`: the folder of a frontend's files (static/ of the package comfyui-frontend-package) to serve
LEDITS_TEST_DEVICE with `test`: cuda puts ComfyUI on the GPU, which --gpu does by itself
CHROMIUM         the browser for `test --browser`, where it is not on the PATH
"""
import errno
import os
import re
import signal
import subprocess
import sys

from tools.long_commands import DEV, ROOT, Stop, disk_full, say
from tools.server import free_port, port_asked_for, run_inside, start_server, tail
from tools.setup import (  # noqa: F401  # tests reach some of these through this file
    COMFYUI_SOURCES,
    COMFYUI_VERSION,
    PACK,
    REQUIREMENTS,
    Home,
    chromium,
    install_chromium,
    link_pack,
    only_one_setup,
    set_up,
    unpack,
)

# Runs a tool of this pack in the set-up.
RUN = "tools/run.py"

# A pattern and not the file's name, as pytest drops a file that is named beside its folder.
BROWSER_TESTS = ("tests/browser", "-o", "python_files=test_*.py check_*.py")
# Those marked gpu alone, and why one was skipped.
GPU_TESTS = ("-m", "gpu", "-rs")


def demo(arguments):
    """edit the demo pictures in a real ComfyUI server; the results go to output/"""
    home, log = set_up(), DEV / "demo-server.log"
    say("Starting ComfyUI ...")
    with start_server(home, log=log) as (url, process):
        code = run_inside(home, RUN, "demo_run", "--server", url, "--output", ROOT / "output", *arguments)
        if process.poll() is not None:
            raise Stop(f"ComfyUI ended during the demo (exit code {process.returncode})" + tail(log))
    if code:
        say(f"The server's log is {log}.")
    return code


def test(arguments):
    """run the tests, with --browser also those in a real browser, with --gpu those on a CUDA GPU alone; more goes to pytest"""
    home = set_up()
    browser, gpu = "--browser" in arguments, "--gpu" in arguments
    if gpu:  # the tests put ComfyUI on the CPU otherwise
        os.environ.setdefault("LEDITS_TEST_DEVICE", "cuda")
    if browser and not chromium():
        install_chromium()
    if os.environ.get("COMFYUI_PYTHON") and subprocess.call([str(home.python), "-c", "import pytest"]):
        raise Stop(f"The tests need pytest: install it with `{home.python} -m pip install pytest`, or unset "
                   "COMFYUI_PYTHON to have an environment made here.")
    arguments = [argument for argument in arguments if argument not in ("--browser", "--gpu")]
    chosen = any(argument.startswith("tests/") for argument in arguments)
    return run_inside(home, "-m", "pytest", "-c", "tests/pytest.ini", *([] if chosen else ["tests"]),
                      *(BROWSER_TESTS if browser else []), *(GPU_TESTS if gpu else []), *arguments)


def serve(arguments):
    """start ComfyUI with the pack to click in; more arguments go to ComfyUI"""
    home = set_up()
    asked = re.findall(r"--port[= ](\S+)", " ".join(arguments))
    port = port_asked_for(asked[-1]) if asked else free_port(8188)
    say("Starting ComfyUI ...")
    with start_server(home, *arguments, port=port) as (url, process):
        say(f"\nComfyUI is running: open {url} in a browser. Ctrl-C stops it.\n")
        return process.wait()


def scheduler(arguments):
    """start a Dask scheduler for benchmarks; more arguments go to it"""
    # It unpacks the tasks, so it must find the pack, which the preloaded file sees to.
    return run_inside(set_up(), "-m", "dask", "scheduler", "--preload", RUN, *arguments)


def tool(name):
    """A command that runs a tool of this pack in the set-up."""
    return lambda arguments: run_inside(set_up(), RUN, name, *arguments)


def beside_server(name):
    """A command that runs a tool of this pack beside a ComfyUI server, which is started unless one is given."""
    def run(arguments):
        home, log = set_up(), DEV / f"{name.rpartition('.')[2].removesuffix('_run')}-server.log"
        given = {argument.split("=")[0] for argument in arguments}
        if given & {"--server", "--scheduler", "-h", "--help"}:
            return run_inside(home, RUN, name, *arguments)
        say("Starting ComfyUI ...")
        with start_server(home, log=log) as (url, process):
            code = run_inside(home, RUN, name, *arguments, "--server", url)
            if process.poll() is not None:
                raise Stop(f"ComfyUI ended meanwhile (exit code {process.returncode})" + tail(log))
        return code
    return run


COMMANDS = {
    "demo": (demo, demo.__doc__),
    "test": (test, test.__doc__),
    "serve": (serve, serve.__doc__),
    "bench": (tool("benchmarks.speed"), "print the benchmark"),
    "demobench": (beside_server("benchmarks.demobench_run"), "compare the methods on the demo model's pictures"),
    "piebench": (beside_server("benchmarks.piebench_run"), "compare the methods on PIE-Bench; --data FOLDER"),
    "benchscheduler": (scheduler, scheduler.__doc__),
    "benchworker": (beside_server("benchmarks.runner_dask"), "take a share of a benchmark on a Dask cluster"),
    "hashes": (beside_server("workflow_hashes"), "print hashes of what the example workflows make"),
    "schema": (tool("schema_snapshot"), "write down the nodes that saved workflows rely on"),
    "translations": (tool("translations"), "bring locales/ up to date"),
}


def main(arguments):
    if not arguments or arguments[0] not in COMMANDS:
        say("usage: python dev.py COMMAND [arguments]\n")
        for name, (_, what) in COMMANDS.items():
            say(f"  {name:14} {what}")
        say("\n" + __doc__.split("\n\n", 1)[1].strip())
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    try:
        return COMMANDS[arguments[0]][0](arguments[1:])
    except Stop as stop:
        problem = str(stop)
    except KeyboardInterrupt:
        print("\nStopped; the same command starts again.", file=sys.stderr)
        return 130
    except OSError as error:
        problem = f"A file could not be used: {error}."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = str(disk_full())
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            problem = (f"{error.filename or ROOT} cannot be used ({error.strerror}): dev.py writes into {ROOT}, so copy this "
                       "folder to where you may write, or give yourself the right to.")
    print(f"dev.py: {problem}", file=sys.stderr)
    return 1


def leave_when_asked():
    """A stopped CI job sends SIGTERM, a terminal that is closed SIGHUP: leave through the same doors as Ctrl-C, so that no
    server stays behind. (nohup has SIGHUP ignored, which stays so.)"""
    asked = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    asked = [number for number in asked if signal.getsignal(number) is not signal.SIG_IGN]

    def leave(number, _):
        for each in asked:
            signal.signal(each, signal.SIG_IGN)  # a second one must not stop the tidying up
        sys.exit(128 + number)

    for number in asked:
        signal.signal(number, leave)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # pip's lines may hold what the terminal's encoding lacks
        sys.stdout.reconfigure(errors="replace")
    leave_when_asked()
    sys.exit(main(sys.argv[1:]))
