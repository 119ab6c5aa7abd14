"""PIE-Bench on a Dask cluster of which a part dies half-way: every picture is scored once.

Two ComfyUI servers; a Dask worker beside the first, two beside the second. Half-way the second server and one of its
workers are killed. Dask gives the dead worker's picture to another; the worker that is left without a server leaves.
"""

import contextlib
import csv
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from comfyui_ledits.tools.api.client import ComfyClient, ComfyError
from comfyui_ledits.tools.benchmarks import piebench_run
from conftest import COMFYUI
from support.piebench_data import write_folder

import dev

pytest.importorskip("distributed")

PICTURES, METHOD, HALF_WAY = 20, "direct+ledits", 6


@contextlib.contextmanager
def running(log, *command):
    """A process of this pack's Python, while the block runs; killed at its end."""
    with open(log, "wb") as file:
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=dev.ROOT, stdin=subprocess.DEVNULL,
                                   stdout=file, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def eventually(find, what, seconds=300):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := find():
            return found
        time.sleep(0.2)
    raise TimeoutError(f"{what} did not happen within {seconds} s")


def scheduler_address(folder):
    """The address that a scheduler writes into its file, once it is whole."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / "scheduler.json").read_text())["address"]


def lines(output):
    path = output / "results.csv"
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def workers(address):
    import distributed

    with distributed.Client(address, set_as_default=False) as client:
        return len(client.scheduler_info()["workers"])


def test_a_lost_worker_and_server_lose_nothing(server_url, tmp_path, capsys):
    write_folder(tmp_path / "data", PICTURES)
    base, output = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    dev.link_pack(base)
    device = [] if os.environ.get("LEDITS_TEST_DEVICE") == "cuda" else ["--cpu"]
    home = dev.Home(Path(sys.executable), COMFYUI, base)
    with contextlib.ExitStack() as stack:
        second, server = stack.enter_context(dev.start_server(home, *device, log=tmp_path / "server.log"))
        stack.enter_context(running(tmp_path / "scheduler.log", "-m", "dask", "scheduler", "--preload", "tools/run.py",
                                    "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
                                    "--scheduler-file", tmp_path / "scheduler.json"))
        address = eventually(lambda: scheduler_address(tmp_path), "the scheduler's start")
        _, killed, left = (
            stack.enter_context(running(tmp_path / f"worker{number}.log", "tools/run.py", "benchmarks.runner_dask", address,
                                        "--server", url))
            for number, url in enumerate((server_url, second, second))
        )
        eventually(lambda: workers(address) == 3, "the workers' start")
        seen = {}

        def kill():
            """Half-way, when both servers have done some of the work."""
            done = eventually(lambda: len(lines(output)) >= HALF_WAY and ComfyClient(second).ask_json("/history"),
                              "half of the work")
            killed.kill()
            server.kill()
            seen.update(done=len(lines(output)), by_second=len(done))

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        code = piebench_run.main(["--data", str(tmp_path / "data"), "--output", str(output), "--checkpoint", "demo",
                                  "--scheduler", address, "--methods", METHOD, "--steps", "2"])
        killer.join()
        assert seen["done"] < PICTURES - 2 and seen["by_second"] > 0
        assert code == 0, capsys.readouterr().out
        found = lines(output)
        assert sorted(row["key"] for row in found) == [f"{number:012d}" for number in range(PICTURES)]
        assert all(row["method"] == METHOD and not row["error"] and float(row["mse_unedit_part"]) > 0 for row in found)
        assert len(list((output / "edits" / METHOD).glob("*.png"))) == PICTURES
        assert f"| {METHOD} | ours | {PICTURES} |" in (output / "table.md").read_text()
        assert left.wait(timeout=120) == 0 and workers(address) == 1
        assert "has gone: leaving the cluster" in (tmp_path / "worker2.log").read_text()


def test_no_scheduler_is_a_sentence(tmp_path):
    write_folder(tmp_path / "data", 1, 64)
    with pytest.raises(ComfyError, match="No Dask scheduler answers at tcp://127.0.0.1:9 .*python dev.py benchscheduler"):
        piebench_run.main(["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--checkpoint", "demo",
                           "--scheduler", "tcp://127.0.0.1:9", "--methods", METHOD])
