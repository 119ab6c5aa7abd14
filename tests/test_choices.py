"""A value of a combo that is none of its choices, from a script or through a link, is refused in a sentence."""
import asyncio
import inspect

import pytest
from comfy_api.latest import io
from comfyui_ledits.nodes.extension import LeditsExtension
from comfyui_ledits.nodes.sampling import LeditsKSampler
from comfyui_ledits.tools.api.client import ComfyError
from support.graphs import node

CLASSES = {cls.GET_SCHEMA().node_id: cls for cls in asyncio.run(LeditsExtension().get_node_list())}
COMBOS = [(name, item.id) for name, cls in CLASSES.items() for item in cls.GET_SCHEMA().inputs
          if isinstance(item, (io.Combo.Input, io.DynamicCombo.Input)) and item.id != "file"]  # see test_files.py


class Untouched:
    """Any other input: nothing may be done with it before the choice is looked at."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} was asked for")


def first(item):
    """A choice that there is, or anything."""
    if isinstance(item, io.DynamicCombo.Input):
        return {item.id: item.options[0].key}
    return item.options[0] if isinstance(item, io.Combo.Input) else Untouched()


@pytest.mark.parametrize(("name", "combo"), COMBOS)
def test_it_is_refused_before_anything_is_done(name, combo):
    cls = CLASSES[name]
    taken = inspect.signature(cls.execute).parameters
    inputs = {item.id: first(item) for item in cls.GET_SCHEMA().inputs}
    assert inputs.keys() <= taken.keys()
    for wrong in ("no such thing", "", None, 5):
        given = {combo: wrong} if isinstance(inputs[combo], dict) else wrong
        with pytest.raises(ValueError) as error:
            cls.execute(**inputs | {combo: given})
        said = str(error.value)
        assert said.startswith(f"{combo} of {cls.GET_SCHEMA().display_name} is") and "choose one of " in said
        assert wrong is None or repr(str(wrong)) in said


def test_there_are_many():
    """The list is made from the schemas: it is there, with choices of both kinds."""
    assert len(COMBOS) > 30 and {"ablation", "noise_regularisation", "solver", "settings"} <= {combo for _, combo in COMBOS}
    assert "solver" in inspect.signature(LeditsKSampler.execute).parameters


def graph(**inversion):
    return {
        "model": node("LEDITS_LoadDemoModel"),
        "words": node("CLIPTextEncode", text="", clip=["model", 1]),
        "picture": node("EmptyImage", width=128, height=128, batch_size=1, color=0x3070C0),
        "encoded": node("VAEEncode", pixels=["picture", 0], vae=["model", 2]),
        "inversion": node(inversion.pop("of"), model=["model", 0], positive=["words", 0], negative=["words", 0],
                          latent=["encoded", 0], scheduler="simple", **inversion),
        "kept": node("SaveLatent", samples=["inversion", 1], filename_prefix="choices"),
    }


DDIM = {"cfg": 1.0, "steps": 2, "refinements": 0, "tolerance": 0.0, "convention": "A"}
ASKED = {  # input: (node, inputs of the node)
    "ablation": ("LEDITS_DirectInversion", {**DDIM, "ablation": "half of it"}),
    "path": ("LEDITS_DDIMInversion", {**DDIM, "path": "straight"}),
    "noise_regularisation": ("LEDITS_DDIMInversion", {**DDIM, "path": "inverted", "noise_regularisation": "pix2pix"}),
    "settings": ("LEDITS_FlowEditSource", {"settings": "mine", "seed": 0}),
}


@pytest.mark.parametrize("name", ASKED)
def test_through_the_api_of_a_server(client, name):
    """ComfyUI itself leaves out a choice with inputs of its own that it does not know."""
    of, inputs = ASKED[name]
    with pytest.raises(ComfyError) as error:
        client.run(graph(of=of, **inputs))
    assert f"{name} of " in str(error.value) and f"is '{inputs[name]}', which is no choice: choose one of" in str(error.value)


def test_a_choice_that_is_not_made_at_all(client):
    with pytest.raises(ComfyError, match="ablation of Direct Inversion is missing: choose one of none, "):
        client.run(graph(of="LEDITS_DirectInversion", **DDIM))
    client.run(graph(of="LEDITS_DDIMInversion", path="inverted", **DDIM))  # the optional one may be left out


def test_an_unknown_plain_choice_through_the_api_is_comfyuis_to_refuse(client):
    with pytest.raises(ComfyError, match="convention"):
        client.run(graph(of="LEDITS_DirectInversion", ablation="none", **DDIM | {"convention": "C"}))
