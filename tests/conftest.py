"""For every test: ComfyUI and the pack can be imported, on the CPU unless LEDITS_TEST_DEVICE=cuda and there is a CUDA GPU.

Tests write `from comfyui_ledits.samplers.methods.sega import ...`; the folder the pack lies in may have any name.
"""
import importlib.util
import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

import dev


def comfyui_folder():
    folder = Path(os.environ.get("COMFYUI_PATH") or dev.DEV / f"ComfyUI-{dev.COMFYUI_VERSION}").resolve()
    if not (folder / "main.py").is_file():
        pytest.exit(f"There is no ComfyUI in {folder}: run the tests with `python dev.py test`.", returncode=1)
    return folder


def import_pack():
    spec = importlib.util.spec_from_file_location("comfyui_ledits", dev.ROOT / "__init__.py",
                                                  submodule_search_locations=[str(dev.ROOT)])
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


pytest_plugins = ["support.clones"]
COMFYUI = comfyui_folder()
sys.path.insert(0, str(COMFYUI))  # first in line: ComfyUI's nodes.py and the pack's nodes/ have one name
import_pack()

from comfyui_ledits.tools import inside_comfyui  # noqa: E402


def why_no_gpu():
    """Why the tests marked gpu cannot run; "" where they can."""
    import torch
    if not torch.cuda.is_available():
        return "no CUDA GPU: torch.cuda.is_available() is False"
    if os.environ.get("LEDITS_TEST_DEVICE") != "cuda":
        return "ComfyUI runs on the CPU here: start these tests with `python dev.py test --gpu`"
    return ""


inside_comfyui.prepare(COMFYUI, cpu=os.environ.get("LEDITS_TEST_DEVICE") != "cuda" or bool(why_no_gpu()))


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := why_no_gpu()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def inference_mode():
    """The mode in which ComfyUI executes nodes."""
    import torch
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def server_base(tmp_path_factory):
    """The server's folder of user data, with the pack in it."""
    base = tmp_path_factory.mktemp("base")
    dev.link_pack(base)
    return base


@pytest.fixture(scope="session")
def server_log(server_base):
    """The file of all that the server prints. (Its /internal/logs keeps the last lines only.)"""
    return server_base / "server.log"


@pytest.fixture(scope="session")
def server_url(server_base, server_log):
    """A real ComfyUI server with the pack and user data of its own."""
    arguments = [] if os.environ.get("LEDITS_TEST_DEVICE") == "cuda" else ["--cpu"]
    if frontend := os.environ.get("COMFYUI_FRONTEND"):
        arguments += ["--front-end-root", str(Path(frontend).resolve())]
    home = dev.Home(Path(sys.executable), COMFYUI, server_base)
    with dev.start_server(home, *arguments, log=server_log) as (url, _):
        yield url


@pytest.fixture
def folders(tmp_path):
    """ComfyUI's output and input folders, empty."""
    import folder_paths
    before = folder_paths.get_output_directory(), folder_paths.get_input_directory()
    made = [tmp_path / "out", tmp_path / "in"]
    for folder in made:
        folder.mkdir()
    folder_paths.set_output_directory(str(made[0]))
    folder_paths.set_input_directory(str(made[1]))
    yield made
    folder_paths.set_output_directory(before[0])
    folder_paths.set_input_directory(before[1])


@pytest.fixture(scope="session")
def client(server_url):
    from comfyui_ledits.tools.api.client import ComfyClient
    return ComfyClient(server_url)


@pytest.fixture(scope="session")
def object_info(client):
    """What the server tells of all nodes."""
    return client.object_info()


@pytest.fixture
def unsettled(monkeypatch):
    """The LEDITS sampler without putting pictures back on their path: what comes back comes back by the formulas alone."""
    from comfyui_ledits.samplers import ledits
    monkeypatch.setattr(ledits, "_ROUNDING", 0.0)


@pytest.fixture
def full_precision():
    """On a GPU, float32 in full: cuDNN takes TF32 for convolutions by itself, which rounds to 1e-3."""
    import torch
    places = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    yield
    for place, was in zip(places, before):
        place.allow_tf32 = was
