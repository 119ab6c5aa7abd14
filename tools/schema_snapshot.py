"""What saved workflows rely on, in tests/schema.json: `python dev.py schema` brings it up to date.

A saved workflow holds widget values by their place and links by slot number; an API prompt holds inputs by name. So
ids, names, types and defaults stay, and what is new comes last. The script refuses to write anything else unless it is
called with --breaking, which is for nodes that no release has had yet.
"""
import asyncio
import json
from pathlib import Path

from . import inside_comfyui

FILE = Path(__file__).resolve().parents[1] / "tests" / "schema.json"
REFRESH = "python dev.py schema"
WORDS = ("tooltip", "display_name", "placeholder")


def node_infos():
    """All nodes as ComfyUI describes them to the browser, by id."""
    from ..nodes.extension import LeditsExtension
    infos = [node.GET_NODE_INFO_V1() for node in asyncio.run(LeditsExtension().get_node_list())]
    return {info["name"]: info for info in infos}


def inputs_of(groups):
    """(id, type, options, whether optional) in the order that saved workflows have: the required ones first."""
    for group in ("required", "optional"):
        for name, (of_type, *options) in groups.get(group, {}).items():
            yield name, of_type, options[0] if options else {}, group == "optional"


def described(groups):
    """Inputs as the snapshot keeps them."""
    import comfy.samplers
    inputs = []
    for name, of_type, options, optional in inputs_of(groups):
        entry = {"id": name, "type": of_type}
        if optional:
            entry["optional"] = True
        choices = options.get("options")
        if of_type == "COMFY_DYNAMICCOMBO_V3":
            entry["choices"] = {choice["key"]: described(choice["inputs"]) for choice in choices}
            choices = list(entry["choices"])
        elif choices == list(comfy.samplers.SCHEDULER_NAMES):
            choices = None  # ComfyUI's, and not the same in all versions
        elif choices:
            entry["choices"] = choices
        if "template" in options:
            entry["template"] = without_words(options["template"])
        default = options.get("default", choices[0] if choices else None)
        if default is not None:
            entry["default"] = default
        inputs.append(entry)
    return inputs


def without_words(value):
    if isinstance(value, dict):
        return {key: without_words(part) for key, part in value.items() if key not in WORDS}
    return [without_words(part) for part in value] if isinstance(value, list | tuple) else value


def current():
    """The snapshot as it would be written now."""
    nodes = {
        name: {"inputs": described(info["input"]), "outputs": info["output"]} for name, info in node_infos().items()
    }
    return json.loads(json.dumps(nodes))


def compare(old, new, renamed=()):
    """What breaks saved workflows, and what is merely new: two lists of sentences.

    Args:
        renamed: ids of nodes that have a replacement.
    """
    breaks, additions = [], []
    for name, before in old.items():
        after = new.get(name)
        if after is None and name in renamed:
            additions.append(f"{name}: replaced")
            continue
        if after is None:
            breaks.append(f"{name}: the node is gone")
            continue
        compare_inputs(name, before["inputs"], after["inputs"], breaks, additions)
        kept = after["outputs"][:len(before["outputs"])]
        if kept != before["outputs"]:
            breaks.append(f"{name}: outputs were {before['outputs']} and are {after['outputs']}")
        elif len(after["outputs"]) > len(kept):
            additions.append(f"{name}: outputs {after['outputs'][len(kept):]}")
    additions += [f"{name}: a new node" for name in new if name not in old]
    return breaks, additions


def compare_inputs(node, old, new, breaks, additions):
    now = {entry["id"]: entry for entry in new}
    for index, before in enumerate(old):
        name = f"{node}: input {before['id']}"
        place = new[index]["id"] if index < len(new) else "nothing"
        if before["id"] not in now:
            breaks.append(f"{name} is gone or renamed")
            continue
        if place != before["id"]:
            breaks.append(
                f"{name} has lost its place, number {index + 1}, to {place}; new inputs go to the end, optional")
        after = now[before["id"]]
        for key in ("type", "default", "template"):
            if before.get(key) != after.get(key) and not (key == "default" and listed_at_run_time(before)):
                breaks.append(f"{name}: its {key} was {before.get(key)!r} and is {after.get(key)!r}")
        if before.get("optional") and not after.get("optional"):
            breaks.append(f"{name} was optional and is required")
        compare_choices(name, before.get("choices") or {}, after.get("choices") or {}, breaks, additions)
    known = {entry["id"] for entry in old}
    for entry in new:
        if entry["id"] not in known:
            (additions if entry.get("optional") else breaks).append(
                f"{node}: input {entry['id']} is new" + ("" if entry.get("optional") else " and must be optional"))


def listed_at_run_time(entry):
    """A combo that has nothing to choose from here: it lists files."""
    return entry["type"] == "COMBO" and "choices" not in entry and "default" not in entry


def compare_choices(name, old, new, breaks, additions):
    breaks += [f"{name}: the choice {choice!r} is gone" for choice in old if choice not in new]
    if old:
        additions += [f"{name}: the choice {choice!r} is new" for choice in new if choice not in old]
    if isinstance(old, dict) and isinstance(new, dict):
        for choice in old.keys() & new.keys():
            compare_inputs(f"{name} = {choice}", old[choice], new[choice], breaks, additions)


def written(nodes):
    """As JSON with a line for each input."""
    lines = []
    for name, about in sorted(nodes.items()):
        inputs = ",\n".join(f"      {json.dumps(entry)}" for entry in about["inputs"])
        inputs = f"[\n{inputs}\n    ]" if inputs else "[]"
        lines.append(f'  "{name}": {{\n    "inputs": {inputs},\n    "outputs": {json.dumps(about["outputs"])}\n  }}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def changes():
    """`compare` of the snapshot with the nodes as they are."""
    from ..nodes.replacements import RENAMES
    return compare(json.loads(FILE.read_text("utf-8")), current(), [rename.old for rename in RENAMES])


def main(arguments):
    inside_comfyui.prepare(cpu=True)
    breaks, additions = changes()
    for line in breaks + additions:
        print(line)
    if breaks and "--breaking" not in arguments:
        print("Nothing is written: the above would break saved workflows. See CONTRIBUTING.md, 'What never changes'.")
        return 1
    with open(FILE, "w", encoding="utf-8", newline="\n") as file:
        file.write(written(current()))
    return 0
