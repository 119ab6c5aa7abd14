"""Prompts as a server's API takes them: {name: node(...)}."""


def node(kind, /, **inputs):
    """A node; an input is a value, or [name, output] of another node."""
    return {"class_type": kind, "inputs": inputs}
