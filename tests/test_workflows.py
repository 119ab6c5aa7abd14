"""Every example workflow and subgraph blueprint: the nodes know all that is in it, it can be read, and it runs."""

import io
import itertools
import json
import re
from urllib.parse import quote

import pytest
from comfyui_ledits.tools.api import workflow
from PIL import Image

import dev

WORKFLOWS = sorted((dev.ROOT / "example_workflows").glob("*.json"))
BLUEPRINTS = sorted((dev.ROOT / "subgraphs").glob("*.json"))
DEMO = [path for path in WORKFLOWS if "(demo model)" in path.stem]
FILES = {"CheckpointLoaderSimple", "UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader", "LoraLoader",
         "ControlNetLoader", "LoadImage", "LoadVideo", "LEDITS_LoadInversion",
         "LEDITS_LoadAttentionStore"}  # they name files of the user's
MODELS = r"demo model|SD 1\.5|SDXL|Flux\.1-dev|SD3\.5|Qwen-Image|Z-Image|Wan"
NOTE, TITLE = "MarkdownNote", 30  # height of a title bar
# The frontend opens a template at the zoom 0.75 * window / (nodes + 20 units) and draws no words below 8 / 14: what a window
# of 1366 x 768 may show. Folded nodes count unfolded, as the frontend's "nodes 2.0" count them.
WIDEST, HIGHEST = (0.75 * side / (8 / 14) - 20 for side in (1366, 768))
# what makes runs short: inputs of any node that has them
SHORT = {"steps": 4, "skip": 1, "inner_steps": 1, "first_steps": 1}


def named(path):
    return path.stem


def described(info):
    """{input: (type, options)} of a node; what dynamic inputs bring along is under names with a dot."""
    found = {}

    def add(inputs, prefix=""):
        for group in ("required", "optional"):
            for name, (kind, *options) in inputs.get(group, {}).items():
                options = options[0] if options else {}
                found[prefix + name] = kind, options
                for choice in options.get("options", ()) if kind == "COMFY_DYNAMICCOMBO_V3" else ():
                    add(choice["inputs"], f"{prefix}{name}.")
                if kind == "COMFY_AUTOGROW_V3":
                    template = options["template"]
                    ((_, (own, *more)),) = template["input"]["required"].items()
                    names = template.get("names") or [f"{template['prefix']}{k}" for k in range(template["max"])]
                    found.update({f"{prefix}{name}.{n}": (own, more[0] if more else {}) for n in names})

    add(info["input"])
    return found


def graphs(file):
    """The nodes and links (as the list [id, origin, slot, target, slot, type]) of a file, and those of its subgraphs."""
    parts = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    yield file["nodes"], file["links"]
    for inner in file.get("definitions", {}).get("subgraphs", []):
        yield inner["nodes"], [[link[part] for part in parts] for link in inner["links"]]


def test_the_template_browser_reads_like_a_course():
    assert [int(path.stem[:2]) for path in WORKFLOWS] == list(range(1, len(WORKFLOWS) + 1))
    assert all(re.fullmatch(rf"\d\d [\w. ,-]+ \(({MODELS})\)", path.stem) for path in WORKFLOWS)
    for path in WORKFLOWS:
        file = workflow.read(path)
        assert [n["title"] for n in file["nodes"] if n["type"] == NOTE][:1] == ["Start here"]


def test_every_method_has_a_workflow(object_info):
    """Of the demo model, which everyone can run."""
    used = {node["type"] for path in DEMO for node in workflow.read(path)["nodes"]}
    ours = {name for name, info in object_info.items() if name.startswith("LEDITS_")}
    assert ours - used <= {"LEDITS_PackInversion"}  # a tool for other packs' nodes, which has nothing to show


def test_workflows_name_only_workflows_that_exist():
    stems = {path.stem for path in WORKFLOWS}
    for path in WORKFLOWS:
        text = " ".join(node["widgets_values"][0] for node in workflow.read(path)["nodes"] if node["type"] == NOTE)
        assert set(re.findall(rf"\d\d [^*\n]+ \((?:{MODELS})\)", text)) <= stems


@pytest.mark.parametrize("path", [*WORKFLOWS, *BLUEPRINTS], ids=named)
def test_links_and_values_fit_the_nodes(path, object_info):
    for nodes, links in graphs(workflow.read(path)):
        by_id = {node["id"]: node for node in nodes}
        kinds = {node["id"]: node["type"] for node in nodes if node["type"] in object_info}
        assert {node["type"] for node in nodes} - set(object_info) <= {NOTE, *subgraphs(path)}
        for number, origin, out, target, into, wire in links:
            if origin in kinds:
                info = object_info[kinds[origin]]
                assert by_id[origin]["outputs"][out]["name"] == info["output_name"][out]
                assert info["output"][out] == wire and number in by_id[origin]["outputs"][out]["links"]
            if target in kinds:
                slot = by_id[target]["inputs"][into]
                takes = described(object_info[kinds[target]])[slot["name"]][0]
                assert slot["link"] == number and wire in ("*", takes) or "*" in str(takes)
        numbers = [link[0] for link in links]
        assert len(set(numbers)) == len(numbers)
        shown = {slot["link"] for node in nodes for slot in node.get("inputs", [])} - {None}
        assert shown <= set(numbers)


def subgraphs(path):
    return {graph["id"] for graph in workflow.read(path).get("definitions", {}).get("subgraphs", [])}


@pytest.mark.parametrize("path", WORKFLOWS, ids=named)
def test_the_prompt_is_what_the_file_says(path, object_info):
    file = workflow.read(path)
    prompt = workflow.to_prompt(file, object_info)
    by_id = {str(n["id"]): n for n in file["nodes"]}
    assert set(prompt) == {key for key, n in by_id.items() if n.get("mode", 0) == 0 and n["type"] != NOTE}
    for key, made in prompt.items():
        inputs, slots = described(object_info[made["class_type"]]), by_id[key].get("inputs", [])
        # the editor itself writes the names of widgets beside their values, and the links
        shown = [i["name"] for i in slots if "widget" in i and i["name"] != "upload"]
        values = dict(zip(shown, (v for v in by_id[key].get("widgets_values", []) if v not in ("fixed", "randomize", "image")),
                          strict=True))
        wires = {link[0]: link for link in file["links"]}
        linked = {i["name"]: [str(wires[i["link"]][1]), wires[i["link"]][2]] for i in slots if i["link"] is not None}
        told = values | linked
        assert {name: made["inputs"][name] for name in told} == told
        for name in made["inputs"].keys() - told.keys():  # widgets that the node gained since the file was saved
            options = inputs[name][1]
            assert made["inputs"][name] == (options["default"] if "default" in options else options["options"][0]["key"])


@pytest.mark.parametrize("path", [*WORKFLOWS, *BLUEPRINTS], ids=named)
def test_the_values_are_allowed(path, object_info):
    prompt = workflow.to_prompt(workflow.read(path), object_info)
    for made in prompt.values():
        inputs, info = described(object_info[made["class_type"]]), object_info[made["class_type"]]
        assert made["inputs"].keys() <= inputs.keys()
        if path in WORKFLOWS:  # a blueprint's own sockets are for the user to connect
            growing = {name for name, (kind, _) in inputs.items() if kind == "COMFY_AUTOGROW_V3"}
            assert set(info["input"].get("required", {})) - growing <= made["inputs"].keys()
        for name, value in made["inputs"].items():
            kind, options = inputs[name]
            if isinstance(value, list) or made["class_type"] in FILES:
                continue
            if isinstance(kind, list) or kind == "COMBO":
                assert value in (kind if isinstance(kind, list) else options["options"]), name
            elif kind == "COMFY_DYNAMICCOMBO_V3":
                assert value in [choice["key"] for choice in options["options"]], name
            else:
                assert isinstance(value, {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}[kind]), name
                assert kind not in ("INT", "FLOAT") or options.get("min", value) <= value <= options.get("max", value), name


def frame(node, height):
    """Left, top, right and bottom of a node with its title bar."""
    (x, y), width = node["pos"], node["size"][0]
    return x, y - TITLE, x + width, y + height


@pytest.mark.parametrize("path", WORKFLOWS, ids=named)
def test_the_words_of_a_template_can_be_read_on_a_laptop(path):
    file = workflow.read(path)
    lefts, tops, rights, bottoms = zip(*(frame(node, node["size"][1]) for node in file["nodes"]), strict=True)
    assert max(rights) - min(lefts) <= WIDEST and max(bottoms) - min(tops) <= HIGHEST
    for x, y, width, height in (group["bounding"] for group in file["groups"]):  # they add no more than their frame
        assert min(lefts) - 20 <= x and x + width <= max(rights) + 20 and width <= 1790
        assert min(tops) - 20 <= y and y + height <= max(bottoms) + 80  # words that nodes gain when they have run


@pytest.mark.parametrize("path", [*WORKFLOWS, *BLUEPRINTS], ids=named)
def test_files_hold_every_widget_of_our_nodes(path, object_info):
    """The frontend writes them all: a file that has fewer was saved before the node gained one."""
    for nodes, _ in graphs(workflow.read(path)):
        for node in (n for n in nodes if n["type"].startswith("LEDITS_")):
            widgets = {name for group in object_info[node["type"]]["input"].values() if isinstance(group, dict)
                       for name, (kind, *_) in group.items()
                       if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")}
            assert widgets <= {slot["name"] for slot in node["inputs"] if "widget" in slot}, node["type"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=named)
def test_the_layout_is_tidy(path):
    """Sizes are those of the editor's canvas when the file was saved."""
    file = workflow.read(path)
    boxes = {n["id"]: frame(n, 0 if n["flags"].get("collapsed") else n["size"][1]) for n in file["nodes"]}
    for a, b in itertools.combinations(boxes.values(), 2):
        assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])
    groups = [(x, y, x + w, y + h) for x, y, w, h in (group["bounding"] for group in file["groups"])]
    for a, b in itertools.combinations(groups, 2):
        assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])
    notes = {n["id"] for n in file["nodes"] if n["type"] == NOTE}
    for number, box in boxes.items():
        inside = [g for g in groups if g[0] <= box[0] and g[1] <= box[1] and box[2] <= g[2] and box[3] <= g[3]]
        assert len(inside) == (0 if number in notes else 1)


def shortened(prompt):
    """A prompt whose nodes do as little as they can."""
    for node in prompt.values():
        values = {name: value for name, value in SHORT.items() if not isinstance(node["inputs"].get(name), (list, type(None)))}
        if node["class_type"] in ("LEDITS_KSampler", "LEDITS_Sampler", "LEDITS_CaptureAttention"):
            given = node["inputs"]["skip"]  # or linked to what chooses it
            values["skip"] = given if isinstance(given, list) else min(1, given)
        node["inputs"] |= values
    return prompt


def run(client, path, object_info):
    """The history entry of a short run, and its prompt. What it loads has been made by an earlier workflow."""
    prompt = shortened(workflow.to_prompt(workflow.read(path), object_info))
    for node in prompt.values():
        for name in ("file", "store") if "Load" in node["class_type"] else ():
            wanted = node["inputs"].get(name)
            if isinstance(wanted, str) and not there(client, wanted):
                saved = next(p for p in DEMO if p < path and wanted.rpartition("_00001_")[0] in p.read_text("utf-8"))
                run(client, saved, object_info)
    return client.run(prompt), prompt


def there(client, name):
    """Whether the output folder has a file that a picker names "folder/name [output]"."""
    folder, _, file = name.removesuffix(" [output]").rpartition("/")
    try:
        return bool(client.fetch({"filename": file, "subfolder": folder, "type": "output"}))
    except Exception as error:
        assert "404" in str(error)
        return False


@pytest.mark.parametrize("path", DEMO, ids=named)
def test_demo_workflows_run_to_the_end(path, client, object_info):
    entry, prompt = run(client, path, object_info)
    showing = {"SaveImage", "PreviewImage", "LEDITS_InspectInversion", "LEDITS_PreviewAttention", "LEDITS_EditMetrics"}
    shown = [key for key, node in prompt.items() if node["class_type"] in showing]
    assert shown
    for key in shown:
        assert entry["outputs"][key]["images"]
        for file in entry["outputs"][key]["images"]:
            Image.open(io.BytesIO(client.fetch(file))).verify()


@pytest.mark.parametrize("path", BLUEPRINTS, ids=named)
def test_blueprints_do_the_job_in_one_node(path, client, object_info):
    """As a user wires them: the demo model and a picture in, a picture out."""
    file = workflow.read(path)
    (node,) = file["nodes"]
    sources = [("LEDITS_LoadDemoModel", []), ("LEDITS_LoadDemoPicture", ["red_star"])]
    for number, (kind, values) in enumerate(sources, 101):
        outputs = [{"name": name, "type": wire} for name, wire in
                   zip(object_info[kind]["output_name"], object_info[kind]["output"])]
        file["nodes"].append({"id": number, "type": kind, "inputs": [], "outputs": outputs, "widgets_values": values})
    file["nodes"].append({"id": 103, "type": "SaveImage", "inputs": [{"name": "images", "type": "IMAGE", "link": 5}],
                          "widgets_values": ["blueprint"]})
    places = {"model": (101, 0), "clip": (101, 1), "vae": (101, 2), "image": (102, 0)}
    file["links"] = [[5, node["id"], 0, 103, 0, "IMAGE"]]
    for number, slot in enumerate(node["inputs"][:4], 1):
        slot["link"] = number
        file["links"].append([number, *places[slot["name"]], node["id"], number - 1, slot["type"]])
    words = {"source": "a red star", "target": "a green star", "concept": "a green star", "steps": 4, "skip": 1}
    shown = [slot["name"] for slot in node["inputs"] if "widget" in slot]
    prompt = workflow.to_prompt(file, object_info)
    defaults = [prompt[f"{node['id']}:{inner}"]["inputs"][name] for inner, name in node["properties"]["proxyWidgets"]]
    node["widgets_values"] = [words.get(name, value) for name, value in zip(shown, defaults, strict=True)]
    prompt = workflow.to_prompt(file, object_info)
    entry = client.run(prompt)
    (picture,) = entry["outputs"]["103"]["images"]
    assert Image.open(io.BytesIO(client.fetch(picture))).size == (128, 128)
    nodes = {key: made for key, made in prompt.items() if key.startswith(f"{node['id']}:")}
    # the words went to the nodes inside
    said = json.dumps([made["inputs"] for made in nodes.values()])
    assert all(json.dumps(words[name]) in said for name in shown if name in words)


def test_the_server_offers_them(client):
    listed = client.ask_json("/global_subgraphs")
    ours = {key: entry for key, entry in listed.items() if entry["info"]["node_pack"].endswith(dev.PACK)}
    assert sorted(entry["name"] for entry in ours.values()) == [path.stem for path in BLUEPRINTS]
    for key, entry in ours.items():
        found = client.ask_json(f"/global_subgraphs/{key}")
        assert json.loads(found["data"])["nodes"][0]["title"] == entry["name"]
    assert sorted(client.ask_json("/workflow_templates")[dev.PACK]) == [path.stem for path in WORKFLOWS]
    for path in WORKFLOWS:
        assert client.ask_json(f"/api/workflow_templates/{dev.PACK}/{quote(path.name)}") == json.loads(path.read_text("utf-8"))


def test_demo_pictures_come_with_their_caption_and_mask(inference_mode):
    from comfyui_ledits.nodes.demo import ENTRIES, LoadDemoPicture

    for name, entry in ENTRIES.items():
        picture, mask, caption = LoadDemoPicture.execute(picture=name).result
        assert picture.shape == (1, entry["height"], entry["width"], 3) and mask.shape == picture.shape[:3]
        assert caption == entry["caption"] and 0 <= float(picture.min()) < float(picture.max()) <= 1
        first = entry["scene"]["things"][0]
        # the middle of the mask is where the scene has its first thing, in units of half the longer side
        ys, xs = (axis.float() for axis in (mask[0] > 0.5).nonzero(as_tuple=True))
        side = max(entry["width"], entry["height"]) / 2
        x, y = xs.mean() / side - entry["width"] / (2 * side), ys.mean() / side - entry["height"] / (2 * side)
        assert abs(x - first["x"]) < 0.25 and abs(y - first["y"]) < 0.25
