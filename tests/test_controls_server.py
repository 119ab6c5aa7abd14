"""Attention controls in a real ComfyUI server: queued, chained with stock nodes, and interrupted."""


import pytest
import torch
from support.graphs import node
from test_server import Plain, Server, base, cached

STEPS = 8
WORDS = {"source": "a blue square on a grey ground", "target": "a red star on a grey ground"}
# Inputs of every attention control; what it reads of the graph is connected in `edit`.
CONTROLS = {
    "LEDITS_PromptToPrompt": dict(cross_replace_steps=0.8, self_replace_steps=0.4, blend_words="square, star"),
    "LEDITS_P2Plus": dict(cross_replace_steps=0.8, self_replace_steps=0.4, uncond_self_replace_steps=0.5),
    "LEDITS_MasaCtrl": dict(start_step=0.08, source_words="square", target_words="star"),
    "LEDITS_PlugAndPlay": dict(pnp_f_t=0.8, pnp_attn_t=0.5),
    "LEDITS_CopyAttention": dict(rows="look (k, v)", end_step=0.5, region="outside the mask"),
    "LEDITS_Pix2PixZero": dict(xa_guidance=1.0),
}
LOOKING = {"LEDITS_RecordAttention"}  # changes nothing


@pytest.fixture(scope="module")
def server(server_url):
    return Server(server_url)


@pytest.fixture(scope="module")
def plain_picture(server):
    sampler = Plain(server)
    return sampler, sampler.sample()


def edit(control, steps=STEPS, skip=0, **more):
    """Prompts, inversion, control, edit, saved latent."""
    graph = base() | {
        "words": node("LEDITS_EditPrompts", clip=["model", 1], **WORDS),
        "inversion": node("LEDITS_DirectInversion", model=["model", 0], positive=["words", 0], negative=["empty", 0],
                          latent=["encoded", 0], cfg=1.0, steps=steps, scheduler="ddim_uniform", refinements=0,
                          tolerance=0.0, convention="A", ablation="none"),
        "control": node(control, prompts=["words", 2], **CONTROLS.get(control, {})),
        "edit": node("LEDITS_KSampler", model=["model", 0], positive=["words", 1], negative=["empty", 0],
                     inversion=["inversion", 0], attention=["control", 0], cfg=5.0, skip=skip),
        "saved": node("SaveLatent", samples=["edit", 0], filename_prefix="control"),
    }
    return graph | more


def without(graph):
    """The same edit without attention control."""
    inputs = {k: v for k, v in graph["edit"]["inputs"].items() if k != "attention"}
    return {k: v for k, v in graph.items() if k != "control"} | {"edit": node("LEDITS_KSampler", **inputs)}


def controls_of(server):
    return {name for name, about in server.object_info().items()
            if name.startswith("LEDITS_") and "LEDITS_ATTENTION" in about["output"]}


def test_every_attention_control_edits_in_a_queued_workflow(server, plain_picture):
    sampler, before = plain_picture
    names = controls_of(server)
    assert names >= {"LEDITS_PromptToPrompt", "LEDITS_P2Plus", "LEDITS_MasaCtrl", "LEDITS_PlugAndPlay"}
    assert names <= set(CONTROLS) | LOOKING
    pictures = {None: server.latent(server.run(without(edit("LEDITS_P2Plus"))), "saved")}
    for name in sorted(names):
        entry = server.run(edit(name))
        pictures[name] = picture = server.latent(entry, "saved")
        assert torch.isfinite(picture).all() and picture.shape == (1, 4, 16, 16)
        assert entry["outputs"]["edit"]["ledits"][0]["unet_rows"] > 2 * STEPS  # target and source
        if "inversion" in cached(entry):
            assert "edit" not in cached(entry)
    for name in names & LOOKING:
        assert (pictures.pop(name) - pictures[None]).abs().max() < 1e-3
    every = list(pictures.values())
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(every) for b in every[:i])
    assert torch.equal(sampler.sample(), before)


def test_stock_nodes_on_model_and_prompts_together(server, plain_picture):
    """FreeU, PerturbedAttentionGuidance and DifferentialDiffusion on the model, a mask and an area on the prompt."""
    sampler, before = plain_picture
    control = {
        "freeu": node("FreeU", model=["model", 0], b1=1.1, b2=1.2, s1=0.9, s2=0.2),
        "pag": node("PerturbedAttentionGuidance", model=["freeu", 0], scale=1.0),
        "differential": node("DifferentialDiffusion", model=["pag", 0]),
        "all": node("SolidMask", value=1.0, width=128, height=128),
        "masked": node("ConditioningSetMask", conditioning=["words", 1], mask=["all", 0], strength=1.0,
                       set_cond_area="default"),
        "area": node("ConditioningSetArea", conditioning=["target", 0], width=64, height=128, x=64, y=0, strength=1.0),
        "both": node("ConditioningCombine", conditioning_1=["masked", 0], conditioning_2=["area", 0]),
        "half": node("SolidMask", value=0.6, width=128, height=128),
        "guider": node("LEDITS_Guider", model=["differential", 0], positive=["both", 0], negative=["empty", 0], cfg=5.0),
        "sampler": node("LEDITS_Sampler", inversion=["inversion", 0], skip=0, attention=["control", 0]),
        "start": node("SetLatentNoiseMask", samples=["inversion", 1], mask=["half", 0]),
        "noise": node("DisableNoise"),
    }
    graph = edit("LEDITS_P2Plus", **control)
    whole = server.latent(server.run(graph), "saved")
    graph["edit"] = node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["sampler", 0],
                         sigmas=["sampler", 1], latent_image=["start", 0])
    chained = server.latent(server.run(graph), "saved")
    assert torch.isfinite(chained).all() and (chained - whole).abs().max() > 1e-2
    graph["guider"]["inputs"]["positive"] = ["area", 0]
    error = server.messages(server.queue(graph))["execution_error"]
    assert error["node_id"] == "edit" and "limited to an area" in error["exception_message"]
    assert torch.equal(sampler.sample(), before)


@pytest.mark.parametrize("control", ["LEDITS_PromptToPrompt", "LEDITS_PlugAndPlay"])
def test_an_interrupted_edit_leaves_the_model_as_it_was(server, plain_picture, control):
    sampler, before = plain_picture
    many = 100
    quick = edit(control, many, many - 1)
    expected = server.latent(server.run(quick), "saved")  # only the edit is left to run in the next prompt
    slow = edit(control, many)
    assert server.interrupt(slow)["node_type"] == "LEDITS_KSampler"
    assert torch.equal(sampler.sample(), before)
    again = server.run(quick)
    assert torch.equal(server.latent(again, "saved"), expected)
