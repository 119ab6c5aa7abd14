"""Exact at strong guidance, which enlarges rounding from step to step; and no edit is taken for rounding."""

import pytest
import torch
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.sampling import LeditsKSampler
from support import runs
from support.demo_nodes import DemoNodes, draw, held_out

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def demo():
    """The demo model, whose U-Net enlarges rounding as real ones do: a picture, its prompt and the empty one."""
    with torch.inference_mode():
        nodes = DemoNodes()
        picture = draw(held_out(1)[0])[0]
        return nodes, nodes.encode([picture]), nodes.prompts(["a red star on a grey ground"]), nodes.prompts([""])


@pytest.mark.parametrize("cfg, exact", [(7.5, 1e-4), (15.0, 1e-2)])
@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m_sde"])
def test_strong_guidance_gives_the_picture_back(demo, solver, cfg, exact):
    """Guidance enlarges rounding from step to step: by 3.5 in all at cfg 15, before pictures were put back on their path."""
    nodes, latent, source, empty = demo
    common = {"model": nodes.model, "positive": source, "negative": empty, "cfg": cfg}
    inversion = EditFriendlyInversion.execute(**common, latent=latent, steps=20, scheduler="ddim_uniform", eta=1.0, seed=0)[0]
    for skip in (0, 5, 10, 19):
        out = LeditsKSampler.execute(**common, inversion=inversion, skip=skip, solver=solver)[0]
        assert float((out["samples"] - latent["samples"]).abs().max()) < exact, f"skip {skip}"


@pytest.mark.parametrize("steps", [20, 200])
@pytest.mark.parametrize("kind", ["sd1", "flux"])
def test_a_weak_edit_is_not_taken_for_rounding(kind, steps):
    """A hundredth of the guidance is a hundredth of the edit."""
    latent = runs.parts_of(kind).latent(kind)
    inversion = runs.invert(EditFriendlyInversion, kind, latent, cfg=1.0, steps=steps, scheduler="simple")[0]
    sizes = []
    for more in (0.1, 0.01):
        moved = runs.edit(kind, inversion, cfg=1 + more) - latent["samples"]
        sizes.append(float(moved.square().mean().sqrt()))
    assert sizes[1] > 1e-4 and 7 < sizes[0] / sizes[1] < 13
