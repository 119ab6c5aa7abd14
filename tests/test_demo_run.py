"""`dev.py demo`: workflow files become prompts that a real server runs, and failures become sentences."""

import io
import re
import subprocess
import sys

import numpy as np
import pytest
from comfyui_ledits.demo import pictures
from comfyui_ledits.tools import contact_sheet
from comfyui_ledits.tools.api import client as http
from comfyui_ledits.tools.api import workflow
from comfyui_ledits.tools.api.client import ComfyClient, ComfyError
from PIL import Image

import dev

FILES = sorted((pictures.FOLDER.parent.parent / "example_workflows").glob("*.json"))
DEMO = [path for path in FILES if path.stem[:2] in ("01", "02", "05")]  # test_workflows.py runs all


# what a server says of nodes, cut down: a loader, a sampler with a seed, an image loader, a saver
NODES = {
    "Loader": {"input": {"required": {}}, "display_name": "Load"},
    "Sampler": {
        "input": {
            "required": {
                "model": ["MODEL", {}],
                "seed": ["INT", {"default": 0}],
                "steps": ["INT", {"default": 20}],
                "mode": [["a", "b"], {}],
            },
            "optional": {"own": ["INT", {"forceInput": True}], "late": ["FLOAT", {"default": 0.25}]},
        },
        "input_order": {"required": ["model", "seed", "steps", "mode"], "optional": ["own", "late"]},
        "display_name": "Sample",
    },
    "LoadImage": {"input": {"required": {"image": ["COMBO", {"image_upload": True}]}}},
    "Change": {"input": {"required": {"strength": ["FLOAT", {"default": 1.0}], "model": ["MODEL"]}}},
}


def node(number, kind, values=(), links=(), **more):
    """A node of a workflow file; links: (input, type, link)."""
    inputs = [{"name": name, "type": wire, "link": link} for name, wire, link in links]
    return {"id": number, "type": kind, "widgets_values": list(values), "inputs": inputs, "mode": 0, **more}


def test_widget_values_go_to_their_names():
    file = {
        "nodes": [
            node(1, "Loader"),
            node(2, "Sampler", [7, "randomize", 30, "b"], [("model", "MODEL", 1)], title="Mine"),
            node(3, "LoadImage", ["a.png", "image"]),
            node(4, "MarkdownNote", ["words"]),
        ],
        "links": [[1, 1, 0, 2, 0, "MODEL"]],
    }
    assert workflow.to_prompt(file, NODES) == {
        "1": {"class_type": "Loader", "inputs": {}, "_meta": {"title": "Load"}},
        "2": {
            "class_type": "Sampler",
            "inputs": {"model": ["1", 0], "seed": 7, "steps": 30, "mode": "b", "late": 0.25},
            "_meta": {"title": "Mine"},
        },
        "3": {"class_type": "LoadImage", "inputs": {"image": "a.png"}, "_meta": {"title": "LoadImage"}},
    }


def test_a_linked_widget_keeps_its_place_in_the_values():
    file = {
        "nodes": [node(1, "Loader"), node(2, "Sampler", [7, "fixed", 30, "a", 0.5], [("steps", "INT", 4)])],
        "links": [[4, 1, 2, 2, 1, "INT"]],
    }
    inputs = workflow.to_prompt(file, NODES)["2"]["inputs"]
    assert inputs == {"seed": 7, "steps": ["1", 2], "mode": "a", "late": 0.5}


def test_muted_nodes_go_and_bypassed_ones_pass_through():
    def prompt(mode):
        file = {
            "nodes": [
                node(1, "Loader"),
                node(2, "Change", [0.5], [("model", "MODEL", 1)], mode=mode),
                node(5, "Reroute", [], [("", "*", 2)]),
                node(3, "Sampler", [0, "fixed", 1, "a"], [("model", "MODEL", 3)]),
            ],
            "links": [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 5, 0, "MODEL"], [3, 5, 0, 3, 0, "MODEL"]],
        }
        return workflow.to_prompt(file, NODES)

    assert prompt(0)["3"]["inputs"]["model"] == ["2", 0]
    assert prompt(4)["3"]["inputs"]["model"] == ["1", 0] and "2" not in prompt(4)
    assert "model" not in prompt(2)["3"]["inputs"] and "2" not in prompt(2)


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(ComfyError, match="no node 'Missing'"):
        workflow.to_prompt({"nodes": [node(1, "Missing")], "links": []}, NODES)
    with pytest.raises(ComfyError, match="6 values for 5 widgets"):
        workflow.to_prompt({"nodes": [node(1, "Sampler", [1, "fixed", 2, "a", 0.5, 9])], "links": []}, NODES)


def test_inputs_are_set_by_title_or_class():
    prompt = workflow.to_prompt({"nodes": [node(1, "Loader"), node(2, "Sampler", [7, "fixed", 3, "b"])], "links": []},
                                NODES)
    changed = workflow.with_inputs(prompt, {"Sample": {"seed": 1}, "Loader": {}})
    assert changed["2"]["inputs"]["seed"] == 1 and prompt["2"]["inputs"]["seed"] == 7
    with pytest.raises(ComfyError, match="no node 'Gone'"):
        workflow.with_inputs(prompt, {"Gone": {"seed": 1}})
    with pytest.raises(ComfyError, match="no input cfg"):
        workflow.with_inputs(prompt, {"Sample": {"cfg": 1}})


@pytest.mark.parametrize("path", DEMO, ids=lambda path: path.stem)
def test_demo_workflows_run(path, client, object_info):
    prompt = workflow.to_prompt(workflow.read(path), object_info)
    skip = {n["_meta"]["title"]: {"skip": 1} for n in prompt.values() if "skip" in n["inputs"]}
    # a seed of its own: a cached inversion reports nothing
    changes = {"Inversion": {"steps": 4, "seed": DEMO.index(path)}}
    entry = client.run(workflow.with_inputs(prompt, changes | skip))
    (saved,) = (entry["outputs"][key]["images"] for key in workflow.find(prompt, title="Save edit"))
    assert Image.open(io.BytesIO(client.fetch(saved[0]))).size == (128, 128)
    (report,) = entry["outputs"][workflow.find(prompt, title="Inversion")[0]]["ledits"]
    assert report == {"steps": 4, "unet_rows": 4}
    assert http.seconds_of(entry) > 0


def test_upload_keeps_the_picture(client):
    name = client.upload(pictures.FOLDER / "blue_moon.png", "some folder")
    assert name == "some folder/blue_moon.png"
    stored = client.fetch({"filename": "blue_moon.png", "subfolder": "some folder", "type": "input"})
    assert stored == (pictures.FOLDER / "blue_moon.png").read_bytes()


def test_failures_are_sentences(client, object_info):
    prompt = workflow.to_prompt(workflow.read(DEMO[0]), object_info)
    with pytest.raises(ComfyError, match=r"^ComfyUI refused the workflow: node 2 \(LEDITS_LoadDemoPicture\)"):
        client.run(workflow.with_inputs(prompt, {"Source picture": {"picture": "nowhere"}}))
    with pytest.raises(ComfyError, match=r"^The workflow failed at node \d+ \(LEDITS_KSampler\): skip is 9"):
        client.run(workflow.with_inputs(prompt, {"Inversion": {"steps": 3}, "Edit": {"skip": 9}}))
    with pytest.raises(ComfyError, match="error 404"):
        client.fetch({"filename": "nothing.png", "subfolder": "", "type": "output"})
    with pytest.raises(ComfyError, match="does not answer at http://127.0.0.1:9"):
        ComfyClient("http://127.0.0.1:9").object_info()


def run_demo(*arguments):
    script = dev.ROOT / "tools" / "run.py"
    return subprocess.run([sys.executable, str(script), "demo_run", *map(str, arguments)], capture_output=True, text=True)


def test_the_demo_runs(server_url, tmp_path):
    done = run_demo("--server", server_url, "--output", tmp_path / "out", "red_star", "wide_green_circle_and_red_star")
    assert done.returncode == 0, done.stdout + done.stderr
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(written) == 2 * 6 + 1 and "contact sheet.png" in written
    assert Image.open(tmp_path / "out" / "wide_green_circle_and_red_star - prompt.png").size == (192, 128)
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r"red_star +(concept|prompt)", line)]
    edit, other = ([int(row[column]) for row in rows] for column in (-3, -2))
    # 50 steps: inverted and reconstructed once for each source prompt, then edits from steps 15 and 16 on; a concept
    # is one more prediction
    assert edit == [70, 70, 68, 102] and other == [100, 0, 100, 0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--server", "http://127.0.0.1:9"], "does not answer"),
        (["--server", "http://127.0.0.1:9", "a_cat"], "There is no demo picture a_cat"),
    ],
)
def test_the_demo_fails_with_a_sentence(arguments, words, tmp_path):
    done = run_demo(*arguments, "--output", tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("demo: ") and words in done.stderr
    assert "Traceback" not in done.stderr


def test_the_contact_sheet_holds_every_picture():
    red, blue = (np.broadcast_to(np.float32(c), (128, 128, 3)) for c in ((1, 0, 0), (0, 0, 1)))
    wide = np.broadcast_to(np.float32((0, 1, 0)), (128, 192, 3))
    page = np.asarray(contact_sheet.draw(["one", "two"], [[("words", red), ("more " * 20, blue)], [("w", wide)]]))
    seen = {colour: int((np.abs(page - np.array(colour)).sum(-1) < 30).sum()) for colour in
            ((255, 0, 0), (0, 0, 255), (0, 255, 0))}
    side = contact_sheet.CELL
    assert seen[255, 0, 0] == seen[0, 0, 255] == side * side
    assert seen[0, 255, 0] == side * round(128 * side / 192)
