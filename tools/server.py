"""Runs things in what `setup.py` made: Python, and a ComfyUI server. Standard library only; dev.py alone imports it."""
import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request

from .long_commands import ROOT, Stop, log_since, say, stop_process


def run_inside(home, *command):
    """Run Python inside the set-up, with the screen as it is; its exit code."""
    environment = dict(os.environ, COMFYUI_PATH=str(home.comfyui), PYTHONUNBUFFERED="1")
    process = subprocess.Popen([str(part) for part in (home.python, *command)], cwd=ROOT, env=environment)
    try:
        return process.wait()
    except BaseException as why:  # it may have a server of its own to stop
        if isinstance(why, KeyboardInterrupt):  # which a terminal sends to it too
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
        if os.name != "nt" and process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=15)
        stop_process(process)
        raise


def free_port(wanted=0):
    with socket.socket() as probe:
        _reuse(probe)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            return free_port()
        return probe.getsockname()[1]


def port_asked_for(text):
    """The port that the user wants.

    Raises:
        Stop: it cannot be had.
    """
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 9 else -1
    if not 1 <= number <= 65535:
        raise Stop(f"--port is {text[:40]}: choose a number from 1 to 65535, or leave --port out.")
    try:
        with socket.socket() as probe:
            _reuse(probe)
            probe.bind(("127.0.0.1", number))
    except PermissionError:
        raise Stop(f"Port {number} needs the rights of an administrator: choose one above 1023, or leave --port out.") from None
    except OSError:
        raise Stop(f"Port {number} is taken by another program: choose another one, or leave --port out.") from None
    return number


def _reuse(probe):
    if os.name != "nt":  # a server that has just ended must not count as there; on Windows this means another thing
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def has_gpu(python):
    ask = ("import torch; print(torch.cuda.is_available() or torch.backends.mps.is_available()"
           " or hasattr(torch, 'xpu') and torch.xpu.is_available())")
    answer = subprocess.run([str(python), "-c", ask], check=False, capture_output=True, text=True)
    return answer.stdout.strip() == "True"


@contextlib.contextmanager
def start_server(home, *arguments, port=None, log=None):
    """A ComfyUI server with the pack, while the `with` block runs: (url, process). Output goes to `log`, or the screen.

    The database stays in memory and each server has a temporary folder of its own, so that several can run.
    """
    port = port or free_port()
    if "--cpu" not in arguments and not has_gpu(home.python):
        say("torch finds no GPU here that it can use: ComfyUI runs on the CPU.")
        arguments = ("--cpu", *arguments)
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="ledits-", ignore_cleanup_errors=True))
        output = stack.enter_context(open(log, "wb")) if log else None
        process = subprocess.Popen(
            [str(home.python), "-u", "main.py", "--base-directory", str(home.base), "--temp-directory", scratch,
             "--database-url", "sqlite:///:memory:", "--port", str(port), *arguments],
            cwd=home.comfyui, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT if log else None)
        stack.callback(stop_process, process)
        url = f"http://127.0.0.1:{port}"
        wait_for(url, process, log)
        yield url, process


def wait_for(url, process, log, seconds=600):
    """Until the server answers. A proxy of the environment must not come between."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise Stop(f"ComfyUI ended while starting (exit code {process.returncode})" + tail(log))
        try:
            with opener.open(url + "/system_stats", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise Stop(f"ComfyUI did not answer at {url} within {seconds} seconds" + tail(log))


def tail(log):
    if not log:
        return "; its last words are above."
    return f"; the end of {log}:\n" + "\n".join(log_since(0, log).splitlines()[-15:])
