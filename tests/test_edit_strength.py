"""One strength for an edit: skip and guidance on the diagonal of figure 5 of LEDITS."""
import dataclasses

import pytest
import torch
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.edit_strength import EditStrength
from support import runs

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def path():
    """{kind: (MODEL, a path of 50 steps)}, where the record alone counts."""
    def longer(kind, steps=50):
        made = runs.invert(EditFriendlyInversion, kind, steps=2)[0]
        sigmas = torch.linspace(float(made.sigmas[0]), 0, steps + 1)
        return dataclasses.replace(made, sigmas=sigmas, latents=made.latents[:1].expand(steps + 1, *made.latents.shape[1:]),
                                   residuals=None, etas=torch.zeros(steps))
    with torch.inference_mode():
        return {kind: (runs.model(kind), longer(kind)) for kind in ("sd1", "sdxl", "sd3", "flux", "schnell")}


def chosen(path, kind, strength):
    model, inversion = path[kind]
    return tuple(EditStrength.execute(model=model, inversion=inversion, strength=strength).args)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_in_the_middle_is_what_ledits_begins_with(path, kind):
    assert chosen(path, kind, 0.5) == (18, 7.5)  # 36 % of 50 steps


@pytest.mark.parametrize(("kind", "strength", "skip", "cfg"), [
    ("sd1", 0.0, 36, 3.75), ("sd1", 1.0, 0, 15.0), ("sd3", 0.5, 7, 3.5), ("sd3", 0.0, 14, 1.75), ("sd3", 1.0, 0, 7.0),
    ("flux", 0.5, 7, 1.0), ("flux", 1.0, 0, 1.0), ("schnell", 0.5, 7, 1.0)])
def test_both_ends(path, kind, strength, skip, cfg):
    """skip = 2 (1 - s) middle, cfg = middle * 2^(2 s - 1); a guidance-distilled model takes no cfg."""
    assert chosen(path, kind, strength) == (skip, cfg)


@pytest.mark.parametrize("kind", ["sd1", "sd3"])
def test_more_strength_skips_less_and_guides_more(path, kind):
    pairs = [chosen(path, kind, n / 10) for n in range(11)]
    for (skip, cfg), (later, more) in zip(pairs, pairs[1:]):
        assert later < skip and more > cfg


def test_the_words_on_the_node_say_what_was_chosen(path):
    model, inversion = path["sd1"]
    made = EditStrength.execute(model=model, inversion=inversion, strength=0.5)
    assert made.ui["ledits_words"] == ["skip 18 of 50 steps, cfg 7.5"]


def test_a_path_of_another_model_is_refused(path):
    with pytest.raises(ValueError, match="model"):
        EditStrength.execute(model=path["sdxl"][0], inversion=path["sd1"][1], strength=0.5)


def test_some_step_is_always_left(path):
    model, _ = path["sd1"]
    short = runs.invert(EditFriendlyInversion, "sd1", steps=1)[0]
    assert EditStrength.execute(model=model, inversion=short, strength=0.0)[0] == 0
