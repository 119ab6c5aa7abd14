"""Nodes that were renamed, as ComfyUI is told of them: workflows saved with the old id still open and run."""

from dataclasses import dataclass, field

from comfy_api.latest import ComfyAPI, io

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


@dataclass(frozen=True)
class Rename:
    """A node's old id, and the node that took its place.

    Attributes:
        old: the id that saved workflows hold.
        new: the node class.
        inputs: for inputs that were renamed too, the old id by the new one. Nothing else may have changed: the
            order of inputs and outputs is the same.
    """

    old: str
    new: type
    inputs: dict = field(default_factory=dict)


RENAMES = ()


def replacement(rename: Rename):
    """The `io.NodeReplace` of a rename.

    Every input is mapped, because ComfyUI drops the others. ComfyUI 0.30 refuses an API prompt that leaves out a mapped
    input; workflows that are opened in the browser do not have that problem.
    """
    ids, widgets = [], []
    info = rename.new.GET_NODE_INFO_V1()
    for kind in ("required", "optional"):
        for new, (of_type, *options) in info["input"].get(kind, {}).items():
            old = rename.inputs.get(new, new)
            ids.append({"new_id": new, "old_id": old})
            if of_type in WIDGETS:
                widgets.append(old)
                if options and options[0].get("control_after_generate"):
                    widgets.append("control_after_generate")  # saved workflows hold it as a widget of its own
    outputs = [{"new_idx": index, "old_idx": index} for index in range(len(info["output"]))]
    return io.NodeReplace(
        new_node_id=info["name"],
        old_node_id=rename.old,
        old_widget_ids=widgets,
        input_mapping=ids,
        output_mapping=outputs,
    )


async def register(renames=RENAMES):
    """Tell ComfyUI, where it is new enough to be told."""
    if hasattr(io, "NodeReplace"):
        for rename in renames:
            await ComfyAPI().node_replacement.register(replacement(rename))
