"""Workflow files of ComfyUI's editor (UI format) as prompts for its API, and their inputs set by node title."""

import copy
import json
from pathlib import Path

from .client import ComfyError

NEVER, BYPASS = 2, 4  # modes of a node that does not run
NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def read(path):
    """A workflow file as a dict.

    Raises:
        ComfyError: not there, or not a workflow of the editor.
    """
    try:
        workflow = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ComfyError(f"The workflow {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ComfyError(f"The workflow {path} is not JSON: {error}.") from None
    if not isinstance(workflow, dict) or "nodes" not in workflow or "links" not in workflow:
        raise ComfyError(f"{path} is not a workflow saved by ComfyUI's editor (it has no nodes or no links).")
    return workflow


def to_prompt(workflow, object_info):
    """A workflow of the editor as an API prompt {id: {"class_type", "inputs", "_meta": {"title"}}}.

    Muted nodes and notes are left out, bypassed nodes and reroutes are passed through.

    Args:
        workflow: UI format, version 0.4.
        object_info: the server's description of its nodes.

    Raises:
        ComfyError: a node that the server lacks, or widget values that do not fit a node's description.
    """
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    prompt = {}
    for node in nodes.values():
        kind, mode = node["type"], node.get("mode", 0)
        if mode in (NEVER, BYPASS) or kind in (*NOTES, "Reroute"):
            continue
        if kind not in object_info:
            raise ComfyError(f"The server has no node '{kind}', which the workflow needs: update or install its pack.")
        inputs = _widget_values(node, object_info[kind])
        for slot in node.get("inputs", []):
            source = _source(slot.get("link"), nodes, links)
            if source is not None:
                inputs[slot["name"]] = source
        title = node.get("title") or object_info[kind].get("display_name") or kind
        prompt[str(node["id"])] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
    return prompt


def _source(link_id, nodes, links):
    """[node, output] that a link really comes from, or None."""
    while link_id is not None and link_id in links:
        _, origin, slot, _, _, wire = links[link_id][:6]
        node = nodes[origin]
        if node.get("mode", 0) == NEVER:
            return None
        if node["type"] != "Reroute" and node.get("mode", 0) != BYPASS:
            return [str(origin), slot]
        inputs = [i for i in node.get("inputs", []) if node["type"] == "Reroute" or i.get("type") == wire]
        # the editor prefers the input at the output's own position
        same = [i for i in node.get("inputs", [])[slot : slot + 1] if i in inputs]
        link_id = next((i.get("link") for i in same + inputs), None)
    return None


def _widgets(info):
    """(name, options) of a node's widgets in the editor's order; the name is None for a value that only it stores."""
    inputs, order = info["input"], info.get("input_order") or {}
    for group in ("required", "optional"):
        for name in order.get(group) or inputs.get(group) or {}:
            kind, options = (*inputs[group][name], {})[:2]
            if options.get("forceInput") or not (isinstance(kind, list) or kind in WIDGETS):
                continue
            yield name, options
            # "fixed", "randomize", ...: the editor adds it to every seed
            if options.get("control_after_generate") or (kind == "INT" and name in ("seed", "noise_seed")):
                yield None, {}
            if options.get("image_upload"):  # the upload button
                yield None, {}


def _widget_values(node, info):
    values, widgets = node.get("widgets_values") or [], list(_widgets(info))
    if isinstance(values, list):
        if len(values) > len(widgets):
            raise ComfyError(
                f"Node {node['id']} ({node['type']}) of the workflow has {len(values)} values for {len(widgets)} "
                "widgets: it was saved with another version of the node; save it again."
            )
        values = {name: value for (name, _), value in zip(widgets, values)}
    # widgets that a node gained since the file was saved
    defaults = {name: options["default"] for name, options in widgets if "default" in options}
    return {name: value for name, value in (defaults | values).items() if name is not None}


def find(prompt, class_type=None, title=None):
    """Ids of the nodes of a class, or with a title, or both, in the order of their ids."""
    return [
        key
        for key in sorted(prompt, key=lambda k: (len(k), k))
        if class_type in (None, prompt[key]["class_type"]) and title in (None, prompt[key]["_meta"]["title"])
    ]


def with_inputs(prompt, changes):
    """A copy of a prompt with inputs changed.

    Args:
        changes: {title or class of a node: {input: value}}.

    Raises:
        ComfyError: no such node, or it has no such input.
    """
    prompt = copy.deepcopy(prompt)
    for name, inputs in changes.items():
        keys = find(prompt, title=name) or find(prompt, class_type=name)
        if not keys:
            raise ComfyError(f"The workflow has no node '{name}' any more.")
        for key in keys:
            unknown = inputs.keys() - prompt[key]["inputs"].keys()
            if unknown:
                raise ComfyError(f"Node '{name}' of the workflow has no input {', '.join(sorted(unknown))}.")
            prompt[key]["inputs"].update(inputs)
    return prompt
