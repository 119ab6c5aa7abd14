"""Attention control under core's other GUIDERs: what is positive is known by its conditioning, not by its number."""
import comfy_extras.nodes_custom_sampler as custom
import pytest
from comfyui_ledits.nodes.sampling import LeditsSamplerNode
from support import chain_parts, runs

pytestmark = pytest.mark.usefixtures("inference_mode")
CFG = 3.0


def plain(scene):
    return custom.CFGGuider.execute(model=scene.model, positive=scene.positive, negative=scene.negative, cfg=CFG)[0]


def dual_cfg(scene, style="regular"):
    """`neg + cfg2 (middle - neg) + cfg1 (pos - middle)` with the negative as middle: plain guidance at cfg1."""
    return custom.DualCFGGuider.execute(model=scene.model, cond1=scene.positive, cond2=scene.negative, negative=scene.negative,
                                        cfg_conds=CFG, cfg_cond2_negative=2.0, style=style)[0]


def dual_model(scene):
    return custom.DualModelGuider.execute(model=scene.model, model_negative=scene.model.clone(), positive=scene.positive,
                                          negative=scene.negative, cfg=CFG)[0]


GUIDERS = {"dual cfg": dual_cfg, "dual model": dual_model}


def edited(scene, guider, control):
    more = chain_parts.inputs(control)
    sampler, sigmas = LeditsSamplerNode.execute(inversion=scene.path, skip=1, **more).result
    latent = {"samples": scene.path.latent_format.process_out(scene.path.latents[0])}
    return runs.in_parts(guider, sampler, sigmas, latent)


@pytest.mark.parametrize("control", ["plain", *chain_parts.CONTROLS])
@pytest.mark.parametrize("guider", GUIDERS)
def test_an_edit_is_that_of_the_plain_guider(guider, control):
    if guider == "dual model" and not hasattr(custom, "DualModelGuider"):
        pytest.skip("this ComfyUI has no DualModelGuider")
    scene = chain_parts.scene()
    wanted = edited(scene, plain(scene), control)
    found = edited(scene, GUIDERS[guider](scene), control)
    assert float((found - wanted).abs().max()) < 1e-4
    if control != "plain":
        assert float((wanted - edited(scene, plain(scene), "plain")).abs().max()) > 1e-3
