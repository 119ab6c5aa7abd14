"""Workflow files of ComfyUI's editor (UI format) as prompts for its API, and their inputs set by node title."""

import copy
import json
from pathlib import Path

from .client import ComfyError

NEVER, BYPASS = 2, 4  # modes of a node that does not run
NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"  # a combo whose choices bring widgets of their own
BORDER, INSIDE = "-10", "*border of a subgraph*"  # the editor's id of a subgraph's input side; our name for both sides


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

    Muted nodes and notes are left out, bypassed nodes and reroutes are passed through, subgraphs are taken apart: their
    nodes have ids such as "7:3".

    Args:
        workflow: UI format, version 0.4.
        object_info: the server's description of its nodes.

    Raises:
        ComfyError: a node that the server lacks, or widget values that do not fit a node's description.
    """
    nodes, links = _flat(workflow, {graph["id"]: graph for graph in _subgraphs(workflow)})
    prompt = {}
    for key, node in nodes.items():
        kind, mode = node["type"], node.get("mode", 0)
        if mode in (NEVER, BYPASS) or kind in (*NOTES, "Reroute", INSIDE):
            continue
        if kind not in object_info:
            raise ComfyError(f"The server has no node '{kind}', which the workflow needs: update or install its pack.")
        inputs = _widget_values(node, object_info[kind])
        for slot in node.get("inputs", []):
            source = _source(slot.get("link"), nodes, links)
            if source is not None:
                inputs[slot["name"]] = source
        title = node.get("title") or object_info[kind].get("display_name") or kind
        prompt[key] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
    return prompt


def _subgraphs(workflow):
    return (workflow.get("definitions") or {}).get("subgraphs") or []


def _flat(graph, subgraphs, prefix="", outer=()):
    """Nodes {id: node} and links {id: (origin, slot, type)} of a graph and of the subgraphs in it, ids as text.

    Where a link crosses the border of a subgraph stands a node of type INSIDE, whose "through" names for every slot the
    link that goes on.
    """
    nodes, links = {prefix + BORDER: {"type": INSIDE, "through": outer}}, {}

    def full(link):
        return None if link is None else f"{prefix}{link}"

    for link in graph["links"]:
        if isinstance(link, dict):  # in subgraphs
            link = [link[part] for part in ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")]
        number, origin, slot, _, _, wire = link[:6]
        links[full(number)] = full(origin), slot, wire
    for node in graph["nodes"]:
        key, inner = full(node["id"]), subgraphs.get(node["type"])
        node = node | {"inputs": [slot | {"link": full(slot.get("link"))} for slot in node.get("inputs") or []]}
        nodes[key] = node
        if inner is None or node.get("mode", 0) in (NEVER, BYPASS):
            continue
        entering = {slot["name"]: slot["link"] for slot in node["inputs"]}
        outer_links = [entering.get(i["name"]) for i in inner["inputs"]]
        more = _flat(_with_values(inner, node), subgraphs, f"{key}:", outer_links)
        nodes |= more[0]
        links |= more[1]
        leaving = [f"{key}:{slot['linkIds'][0]}" if slot["linkIds"] else None for slot in inner["outputs"]]
        nodes[key] = {"type": INSIDE, "through": leaving}
    return nodes, links


def _with_values(inner, node):
    """A subgraph with the values that the node which stands for it holds of its widgets, if it holds any."""
    shown = [slot["name"] for slot in node["inputs"] if "widget" in slot]
    held = dict(zip(shown, node.get("widgets_values") or []))
    inner = copy.deepcopy(inner)
    into = {slot["name"]: slot["linkIds"] for slot in inner["inputs"]}
    links = {link["id"]: link for link in inner["links"]}
    nodes = {n["id"]: n for n in inner["nodes"]}
    for name, value in held.items():
        for link in (links[number] for number in into[name]):
            target = nodes[link["target_id"]]
            target.setdefault("held", {})[target["inputs"][link["target_slot"]]["name"]] = value
    return inner


def _source(link_id, nodes, links):
    """[node, output] that a link really comes from, or None."""
    while link_id is not None and link_id in links:
        origin, slot, wire = links[link_id]
        node = nodes[origin]
        if node.get("mode", 0) == NEVER:
            return None
        if node["type"] == INSIDE:
            link_id = node["through"][slot]
            continue
        if node["type"] != "Reroute" and node.get("mode", 0) != BYPASS:
            return [origin, slot]
        inputs = [i for i in node.get("inputs", []) if node["type"] == "Reroute" or i.get("type") == wire]
        # the editor prefers the input at the output's own position
        same = [i for i in node.get("inputs", [])[slot : slot + 1] if i in inputs]
        link_id = next((i.get("link") for i in same + inputs), None)
    return None


def _widgets(described, values, prefix=""):
    """(name, value) of a node's widgets in the editor's order, taken from the iterator `values` and then from defaults.

    What a choice of a dynamic combo adds follows it, with names such as "path.edit_cfg".
    """
    inputs, order = described["input"], described.get("input_order") or {}
    for group in ("required", "optional"):
        for name in order.get(group) or inputs.get(group) or {}:
            kind, options = (*inputs[group][name], {})[:2]
            if options.get("forceInput") or not (isinstance(kind, list) or kind in (*WIDGETS, DYNAMIC)):
                continue
            choices = options.get("options") if kind == DYNAMIC else None
            value = next(values, choices[0]["key"] if choices else options.get("default"))
            if value is not None:
                yield prefix + name, value
            for choice in choices or ():
                if choice["key"] == value:
                    yield from _widgets({"input": choice["inputs"]}, values, f"{prefix}{name}.")
            # "fixed", "randomize", ...: the editor adds it to every seed
            if options.get("control_after_generate") or (kind == "INT" and name in ("seed", "noise_seed")):
                next(values, None)
            if options.get("image_upload") or options.get("video_upload"):  # the upload button
                next(values, None)


def _widget_values(node, info):
    values = node.get("widgets_values") or []
    if isinstance(values, dict):
        return dict(_widgets(info, iter(()))) | values
    rest = iter(values)
    found = dict(_widgets(info, rest))
    left = len(list(rest))
    if left:
        raise ComfyError(
            f"Node {node['id']} ({node['type']}) of the workflow has {len(values)} values for {len(values) - left} "
            "widgets: it was saved with another version of the node; save it again."
        )
    return found | node.get("held", {})


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
