"""The published package, which lacks what .comfyignore names, alone in a ComfyUI."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_ledits.tools.api import workflow
from comfyui_ledits.tools.api.client import ComfyClient
from conftest import COMFYUI

import dev


def listed(*arguments):
    """Files of the clone that are to be committed, as `git ls-files` with the arguments lists them."""
    process = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", *arguments], check=False, cwd=dev.ROOT,
                             capture_output=True, text=True)
    if process.returncode:
        pytest.skip("not a git clone")
    return {path for path in process.stdout.split("\0") if path and (dev.ROOT / path).is_file()}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package as the registry unpacks it: under another name, in a folder of user data of its own."""
    folder = tmp_path_factory.mktemp("base") / "custom_nodes" / "ledits"
    left_out = listed("--ignored", "--exclude-from=.comfyignore")
    assert {"dev.py", "tests/conftest.py"} < left_out
    for path in listed("--exclude-standard") - left_out:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(dev.ROOT / path, folder / path)
    return folder


def test_the_package_alone_runs_the_first_workflow(package):
    base = package.parents[1]
    home = dev.Home(Path(sys.executable), COMFYUI, base)
    with dev.start_server(home, "--cpu", log=base / "server.log") as (url, _):
        client = ComfyClient(url, timeout=600)
        (first, *_), info = sorted((package / "example_workflows").glob("*.json")), client.object_info()
        assert first.stem in client.ask_json("/api/workflow_templates")["ledits"]
        prompt = workflow.with_inputs(workflow.to_prompt(workflow.read(first), info), {"Inversion": {"steps": 4},
                                                                                       "Edit": {"skip": 1}})
        outputs = client.run(prompt)["outputs"]
    saved = workflow.find(prompt, "SaveImage")
    assert saved
    assert all(outputs[key]["images"] for key in saved)
