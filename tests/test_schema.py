"""Saved workflows keep opening; every node and socket is explained, also in the help pages."""
import asyncio
import copy
import json
import logging
import re
import subprocess
import sys
from types import SimpleNamespace

import comfyui_version
import pytest
from comfy_api.latest import io
from comfyui_ledits import OLDEST_COMFYUI
from comfyui_ledits.nodes import replacements
from comfyui_ledits.nodes.extension import LeditsExtension
from comfyui_ledits.nodes.sampling import LeditsKSampler
from comfyui_ledits.tools import schema_snapshot

import dev
import nodes

OLD = json.loads(schema_snapshot.FILE.read_text("utf-8"))
NODES = schema_snapshot.node_infos()
DOCS = dev.ROOT / "web" / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
KSAMPLER = "LEDITS_KSampler"


# --- the snapshot ---------------------------------------------------------------------------------------------------

def test_nothing_that_saved_workflows_rely_on_has_changed():
    breaks, _ = schema_snapshot.changes()
    assert not breaks, "\n".join(["Saved workflows would break; see CONTRIBUTING.md, 'What never changes':", *breaks])


def test_the_snapshot_holds_all_nodes_and_inputs():
    _, additions = schema_snapshot.changes()
    assert not additions, "\n".join([f"New. Write them down with `{schema_snapshot.REFRESH}`:", *additions])
    assert schema_snapshot.written(OLD) == schema_snapshot.FILE.read_text("utf-8")


def changed(name, change):
    new = copy.deepcopy(OLD)
    change(new[name]["inputs"], new[name], new)
    return schema_snapshot.compare(OLD, new)


CONCEPT, DDIM = "LEDITS_SemanticConcept", "LEDITS_DDIMInversion"
BREAKS = {
    "node": (CONCEPT, lambda inputs, node, all: all.pop(CONCEPT), "SemanticConcept: the node is gone"),
    "name": (CONCEPT, lambda inputs, node, all: inputs[2].update(id="size"), "scale is gone or renamed"),
    "order": (CONCEPT, lambda inputs, node, all: inputs.insert(4, inputs.pop(3)), "threshold has lost its place, number 4"),
    "inserted": (CONCEPT, lambda inputs, node, all: inputs.insert(2, {"id": "new", "type": "INT", "optional": True}),
                 "scale has lost its place, number 3, to new"),
    "type": (CONCEPT, lambda inputs, node, all: inputs[2].update(type="INT"), "type was 'FLOAT' and is 'INT'"),
    "default": (CONCEPT, lambda inputs, node, all: inputs[2].update(default=8.0), "default was 7.0 and is 8.0"),
    "first choice": (CONCEPT, lambda inputs, node, all: inputs[1].update(default="away"), "default was 'towards'"),
    "choice": (CONCEPT, lambda inputs, node, all: inputs[1]["choices"].remove("away"), "choice 'away' is gone"),
    "required": (CONCEPT, lambda inputs, node, all: inputs[-1].pop("optional"), "was optional and is required"),
    "a new one required": (CONCEPT, lambda inputs, node, all: inputs.append({"id": "new", "type": "INT"}), "must be optional"),
    "inside a choice": (DDIM, lambda inputs, node, all: inputs[10]["choices"]["re-simulated"][0].update(default=1.0),
                        "path = re-simulated: input edit_cfg: its default was 7.5"),
    "output type": (DDIM, lambda inputs, node, all: node["outputs"].__setitem__(1, "IMAGE"), "outputs were"),
    "output order": (DDIM, lambda inputs, node, all: node["outputs"].reverse(), "outputs were"),
    "output gone": (DDIM, lambda inputs, node, all: node["outputs"].pop(), "outputs were"),
}
ADDITIONS = {
    "node": (CONCEPT, lambda inputs, node, all: all.update(LEDITS_New=node), "LEDITS_New: a new node"),
    "input": (CONCEPT, lambda inputs, node, all: inputs.append({"id": "new", "type": "INT", "optional": True}), "input new is new"),
    "choice": (CONCEPT, lambda inputs, node, all: inputs[1]["choices"].append("around"), "choice 'around' is new"),
    "output": (DDIM, lambda inputs, node, all: node["outputs"].append("IMAGE"), "outputs ['IMAGE']"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_change_that_breaks_workflows_is_found(case):
    *change, words = BREAKS[case]
    breaks, _ = changed(*change)
    assert words in breaks[0], breaks


@pytest.mark.parametrize("case", ADDITIONS)
def test_what_is_new_at_the_end_breaks_nothing_and_is_reported(case):
    *change, words = ADDITIONS[case]
    breaks, additions = changed(*change)
    assert not breaks
    assert len(additions) == 1 and words in additions[0]


def test_lists_of_files_may_differ():
    name = "LEDITS_LoadInversion"
    assert changed(name, lambda inputs, node, all: inputs[0].update(choices=["a"], default="a")) == ([], [])


# --- words ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NODES)
def test_every_node_and_socket_is_described(name):
    info = NODES[name]
    assert info["description"] and info["display_name"]
    silent = [f"input {key}" for key, options in widgets(info["input"]) if not options.get("tooltip")]
    tips = info["output_tooltips"] or [None] * len(info["output"])
    silent += [f"output {key}" for key, tip in zip(info["output_name"], tips, strict=True) if not tip]
    assert not silent


def widgets(groups):
    """(id, options) of all inputs, also of those that a choice brings."""
    for name, of_type, options, _ in schema_snapshot.inputs_of(groups):
        yield name, options
        for choice in options["options"] if of_type == "COMFY_DYNAMICCOMBO_V3" else ():
            yield from widgets(choice["inputs"])


@pytest.mark.parametrize("name", NODES)
def test_every_node_has_a_help_page(name):
    assert f"{name}.md" in PAGES, f"Write web/docs/{name}.md: it is the English page and serves all other languages."


@pytest.mark.parametrize("page", PAGES)
def test_help_pages_belong_to_a_node_and_name_its_inputs(page):
    """In the first column of a table, whatever the language of the page."""
    name = page.split("/")[0].removesuffix(".md")
    assert name in NODES
    text = (DOCS / page).read_text("utf-8")
    first = " ".join(re.findall(r"^\|([^|]*)\|", text, re.MULTILINE))
    named = set(re.findall(r"\w+", first, re.ASCII))
    inputs = {key for key, _ in widgets(NODES[name]["input"])}
    deeper = inputs - {key for key, *_ in schema_snapshot.inputs_of(NODES[name]["input"])}
    assert not inputs - deeper - named, f"{page} does not explain {sorted(inputs - deeper - named)}"
    unexplained = [key for key in deeper if not re.search(rf"\b{key}\b", text, re.ASCII)]
    assert not unexplained, f"{page} does not mention {unexplained}"


def test_pictures_in_help_pages_exist():
    for page in PAGES:  # relative to web/docs, also for a page in a folder: so the browser resolves them
        for link in re.findall(r"!\[[^]]*\]\(([^)\s]+)", (DOCS / page).read_text("utf-8")):
            assert (DOCS / link).is_file(), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_help_pages_show_the_workflow_to_start_from(page):
    text = (DOCS / page).read_text("utf-8")
    first = re.search(r"\*\*(\d\d) [^*]+\*\*", text).group(1)
    assert re.findall(r"!\[[^]]+\]\(([^)\s]+)", text) == [f"images/{first}.jpg"]


def test_workflows_that_help_pages_name_exist():
    workflows = {file.stem for file in (dev.ROOT / "example_workflows").glob("*.json")}
    for page in PAGES:
        for name in re.findall(r"\*\*(\d\d [^*]+)\*\*", (DOCS / page).read_text("utf-8")):
            assert name in workflows, f"{page}: {name}"


# --- renames --------------------------------------------------------------------------------------------------------

class Replacements:
    """ComfyUI's own list of replacements, for the time of a test."""

    def __init__(self, monkeypatch):
        import server
        from app.node_replace_manager import NodeReplaceManager
        self.manager = NodeReplaceManager()
        monkeypatch.setattr(server.PromptServer, "instance", SimpleNamespace(node_replace_manager=self.manager), raising=False)
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, KSAMPLER, LeditsKSampler)

    def register(self, *renames):
        asyncio.run(replacements.register(renames))
        return self.manager


@pytest.mark.skipif(not hasattr(io, "NodeReplace"), reason="this ComfyUI has no replacements")
def test_a_prompt_with_a_renamed_node_runs_the_new_one(monkeypatch):
    info = NODES[KSAMPLER]["input"]
    manager = Replacements(monkeypatch).register(
        replacements.Rename("LEDITS_Edit", LeditsKSampler, {"skip": "skip_steps", "mask": "where"}))
    inputs = {name: ["1", 0] for name, *_ in schema_snapshot.inputs_of(info)} | {"cfg": 3.0, "skip": 5}
    old = {{"skip": "skip_steps", "mask": "where"}.get(name, name): value for name, value in inputs.items()}
    prompt = {
        "2": {"class_type": "LEDITS_Edit", "inputs": old, "_meta": {"title": "edit"}},
        "3": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["1", 2]}, "_meta": {"title": "d"}},
    }
    manager.apply_replacements(prompt)
    assert prompt["2"]["class_type"] == KSAMPLER
    assert prompt["2"]["inputs"] == inputs
    assert prompt["3"]["inputs"]["samples"] == ["2", 0]


@pytest.mark.skipif(not hasattr(io, "NodeReplace"), reason="this ComfyUI has no replacements")
def test_a_replacement_lists_widgets_as_saved_workflows_do(monkeypatch):
    from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
    manager = Replacements(monkeypatch).register(replacements.Rename("LEDITS_Old", EditFriendlyInversion))
    listed = manager.as_dict()["LEDITS_Old"][0]["old_widget_ids"]
    saved = json.loads(next((dev.ROOT / "example_workflows").glob("01 *.json")).read_text("utf-8"))
    node = next(node for node in saved["nodes"] if node["type"] == "LEDITS_EditFriendlyInversion")
    assert len(listed) == len(node["widgets_values"])
    by_name = dict(zip(listed, node["widgets_values"], strict=True))
    assert by_name["scheduler"] == "ddim_uniform"
    assert by_name["control_after_generate"] in ("fixed", "randomize", "increment", "decrement")


def test_an_older_comfyui_is_not_told_of_renames(monkeypatch):
    monkeypatch.delattr(io, "NodeReplace", raising=False)
    asyncio.run(replacements.register([replacements.Rename("LEDITS_Edit", LeditsKSampler)]))
    asyncio.run(LeditsExtension().on_load())


def test_renamed_nodes_are_really_gone():
    assert not {rename.old for rename in replacements.RENAMES} & NODES.keys()
    assert {rename.new.GET_SCHEMA().node_id for rename in replacements.RENAMES} <= NODES.keys()


# --- the oldest ComfyUI ---------------------------------------------------------------------------------------------

def loaded(monkeypatch, caplog):
    """What ComfyUI's own loader makes of the pack: the new nodes, and the log."""
    for mapping in (nodes.NODE_CLASS_MAPPINGS, nodes.NODE_DISPLAY_NAME_MAPPINGS, nodes.EXTENSION_WEB_DIRS):
        for name in [name for name in mapping if name.startswith("LEDITS_")]:
            monkeypatch.delitem(mapping, name)
    before = set(nodes.NODE_CLASS_MAPPINGS)
    with caplog.at_level(logging.INFO):
        done = asyncio.run(nodes.load_custom_node(str(dev.ROOT)))
    new = set(nodes.NODE_CLASS_MAPPINGS) - before
    for name in new:
        nodes.NODE_CLASS_MAPPINGS.pop(name)
        nodes.NODE_DISPLAY_NAME_MAPPINGS.pop(name, None)
    return done, new, caplog.text


@pytest.mark.parametrize("version", ["0.18.1", "0.3.75", "0.17.99"])
def test_an_older_comfyui_hears_what_it_needs(monkeypatch, caplog, version):
    monkeypatch.setattr(comfyui_version, "__version__", version)
    done, new, log = loaded(monkeypatch, caplog)
    assert done and not new
    assert [record.message for record in caplog.records] == [
        f"ComfyUI-LEDITS needs ComfyUI 0.18.2 or newer; this is {version}. Update ComfyUI, and the nodes will be there."
    ]
    assert "Traceback" not in log


@pytest.mark.parametrize("version", ["0.18.2", "0.30.0", "1.0.0", "0.100.0-nightly", "unknown"])
def test_a_newer_comfyui_loads_the_pack_without_a_word(monkeypatch, caplog, version):
    monkeypatch.setattr(comfyui_version, "__version__", version)
    done, new, _ = loaded(monkeypatch, caplog)
    assert done and new == NODES.keys()
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_a_comfyui_from_before_these_nodes_hears_it_too(tmp_path):
    """Where neither comfy_api nor a version can be imported."""
    load = ("import importlib.util as u\n"
            f"spec = u.spec_from_file_location('pack', {str(dev.ROOT / '__init__.py')!r})\n"
            "pack = u.module_from_spec(spec)\nspec.loader.exec_module(pack)\n"
            "assert pack.NODE_CLASS_MAPPINGS == {} and not hasattr(pack, 'comfy_entrypoint')\n")
    run = subprocess.run([sys.executable, "-I", "-c", load], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.splitlines() == [
        "ERROR:root:ComfyUI-LEDITS needs ComfyUI 0.18.2 or newer. Update ComfyUI, and the nodes will be there."
    ]


def test_the_registry_is_told_the_same_version():
    line = 'requires-comfyui = ">={}.{}.{}"'.format(*OLDEST_COMFYUI)
    assert line in (dev.ROOT / "pyproject.toml").read_text("utf-8").splitlines()


@pytest.mark.parametrize("page", [page for page in PAGES if re.match(
    r"LEDITS_(EditFriendlyInversion|KSampler|SemanticConcept|PromptToPrompt|ProximalGuidance|NullTextInversion|"
    r"StyleDiffusionInversion|Pix2PixZero|FlowEditSource|FlowEdit|RFInversion)\b", page)])
def test_help_pages_lead_to_what_differs_from_the_released_code(page):
    (link,) = re.findall(r"\]\((https://github\.com/[^)]*differences\.md)\)", (DOCS / page).read_text("utf-8"))
    repository = re.search(r'^Repository = "(.*)"', (dev.ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)[1]
    assert link.startswith(f"{repository}/blob/")
    assert (dev.ROOT / link.split("/main/")[1]).is_file()
