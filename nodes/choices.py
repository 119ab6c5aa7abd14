"""Values of combos that are none of the choices, refused: a script may send any over the API, and a link may bring any."""

from comfy_api.latest import io
from comfy_execution.utils import get_executing_context

HIDDEN = [io.Hidden.dynprompt]
"""What a node needs for `chosen`."""


def known(node: type[io.ComfyNode], **values: str):
    """Refuse values of combos that are none of their choices. ComfyUI looks at those only that no link brings.

    Raises:
        ValueError: names the input and its choices.
    """
    schema = node.define_schema()
    for item in schema.inputs:
        if item.id in values and values[item.id] not in item.options:
            raise _refusal(schema, item.id, values[item.id], item.options)


def chosen(node: type[io.ComfyNode], name: str, value: dict | None) -> dict | None:
    """The value of a choice with inputs of its own (`io.DynamicCombo`); None where an optional one was not given.

    ComfyUI leaves the input out where it does not know the choice.

    Raises:
        ValueError: it was left out so, or is required.
    """
    schema = node.define_schema()
    combo = next(item for item in schema.inputs if item.id == name)
    keys = [option.key for option in combo.options]
    if value is not None and value.get(name) in keys:
        return value
    given = _given(node, name) if value is None else value.get(name)
    if given is None and value is None and combo.optional:
        return None
    raise _refusal(schema, name, given, keys)


def _refusal(schema, name, given, choices):
    what = "is missing" if given is None else f"is {str(given)[:80]!r}, which is no choice"
    return ValueError(f"{name} of {schema.display_name} {what}: choose one of {', '.join(choices)}.")


def _given(node, name):
    """What the workflow holds for an input of the node that is being executed."""
    context, workflow = get_executing_context(), getattr(node.hidden, "dynprompt", None)
    if context is None or workflow is None or not workflow.has_node(context.node_id):
        return None
    return workflow.get_node(context.node_id)["inputs"].get(name)
