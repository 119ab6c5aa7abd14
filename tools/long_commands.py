"""The long commands of a set-up: run with signs of life, and why one failed in a sentence. Standard library only."""
import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEV = ROOT / ".dev"
LOG = DEV / "setup.log"

# PyPI's torch for Linux brings the CUDA libraries along.
INSTALL_GB, NEEDED_GB = (6, 9) if sys.platform == "linux" else (2, 4)

NETWORK_SIGNS = ("connection broken by", "Failed to establish a new connection", "name resolution", "Max retries",
                 "getaddrinfo failed", "timed out", "Could not fetch URL", "(from versions: none)")
DISK_SIGNS = ("No space left on device", "Errno 28", "Disk quota exceeded", "not enough space on the disk")


class Stop(Exception):
    """Ends the run. Its text is the one sentence the user reads, so it says what to do."""


def say(text):
    print(text, flush=True)


def disk_full():
    return Stop(f"The disk is full: free about {NEEDED_GB} GB for {ROOT} and the temporary folder, then run the same "
                "command again.")


def run_logged(command, doing):
    """Run a long command, its output in the log and signs of life on the screen; (exit code, its output)."""
    say(doing)
    start = shown = time.monotonic()
    with open(LOG, "ab") as log:
        begin = log.seek(0, os.SEEK_END)
        process = subprocess.Popen([str(part) for part in command], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log,
                                   stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
                if time.monotonic() - shown >= (1 if sys.stdout.isatty() else 20):
                    shown = time.monotonic()
                    show_progress(f"  {shown - start:.0f} s  {last_line(log_since(begin))}")
        finally:
            stop_process(process)
            if sys.stdout.isatty():
                show_progress("")
    return process.returncode, log_since(begin)


def show_progress(text):
    """On a terminal one line that changes, in a log line after line."""
    width = shutil.get_terminal_size().columns - 1
    text = text[:width]
    if sys.stdout.isatty():
        print("\r" + text.ljust(width) + "\r", end="", flush=True)
    else:
        say(text)


def log_since(begin, log=None):
    with open(log or LOG, "rb") as file:
        file.seek(begin)
        return file.read().decode("utf-8", "replace")


def sentence(output, otherwise):
    """Why a pip or venv run failed, in one sentence."""
    if any(sign in output for sign in DISK_SIGNS):
        return str(disk_full())
    if any(sign in output for sign in NETWORK_SIGNS):
        return ("The package index cannot be reached, and the set-up needs it: connect to the network (or point pip at "
                "a mirror with PIP_INDEX_URL), then run the same command again.")
    return f"{otherwise}: {last_line(output, 'error') or last_line(output)}; the whole output is in {LOG}."


def last_line(output, start=""):
    lines = [line.strip() for line in output.splitlines() if line.strip().lower().startswith(start)]
    return next((line for line in reversed(lines) if line), "")


def stop_process(process):
    """Ask it to end, then end it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
