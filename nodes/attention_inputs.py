"""Shared by nodes of attention control: inputs, and a chain as output."""

from comfy_api.latest import io

from ..attention_hooks.blocks import HELP, preset_help
from ..attention_hooks.edits import Control
from . import sockets

CATEGORY = "LEDITS/attention"


def prompts_input(optional=False, more=""):
    return sockets.Prompts.Input("prompts", optional=optional, tooltip="Source and target, from Edit Prompts." + more)


def chain_input():
    return sockets.Attention.Input("attention", optional=True, tooltip="Controls before this one.")


def source_input():
    return io.Conditioning.Input("source", optional=True,
                                 tooltip="What the picture shows, as encoded for the inversion. Without it, and "
                                 "without prompts, the edit's negative.")


def fraction_input(name, default, tooltip, advanced=False):
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip,
                          **({"optional": True, "advanced": True} if advanced else {}))


def window(start: float, end: float, names: tuple[str, str]) -> tuple[float, float]:
    """The window of two fractions of the steps.

    Raises:
        ValueError: it begins where it has ended already, so that nothing would happen; an end of 0 switches it off.
    """
    if start >= end > 0:
        raise ValueError(
            f"{names[0]} is {start:g} and {names[1]} {end:g}: the window ends before it begins, so nothing would happen. "
            f"Choose a {names[0]} below {names[1]}, or 0 for {names[1]} to switch it off."
        )
    return start, end


def blocks_input(name, default, what):
    return io.String.Input(name, default=default, optional=True, advanced=True,
                           tooltip=f"{what} {preset_help(default) if default != 'all' else ''} {HELP}")


def attention_output():
    return [sockets.Attention.Output(display_name="attention", tooltip="For a LEDITS sampler, or the next control.")]


def chained(attention, control: Control):
    """The node's output: the controls before, or None, and this one."""
    return io.NodeOutput((*(attention or ()), control))
