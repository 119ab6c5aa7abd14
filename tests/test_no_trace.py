"""After any control, inversion or capture, however it ended, a plain KSampler on the MODEL gives the same picture to the bit.

The edit without attention control and its inversion are in `test_traces`.
"""

import dataclasses
import functools

import comfy.model_management
import pytest
import torch
from comfyui_ledits.nodes.capture_attention import CaptureAttention
from comfyui_ledits.nodes.ddim_inversions import DDIMInversion, DirectInversion, NegativePromptInversion
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.learned_inversions import NullTextInversion, StyleDiffusionInversion
from support import runs, tiny
from support.chain_parts import CONTROLS, SIDE, STEPS, attention, empty, plain, words
from test_traces import INTERRUPTED, act_at, fail, state

import nodes

pytestmark = pytest.mark.usefixtures("inference_mode")
LATENT = tiny.latent(height=SIDE, width=SIDE)
RESIMULATED = {"path": "re-simulated", "edit_cfg": 4.0}


@functools.cache
def path():
    return plain().path


def prompts():
    return words().source, empty()


def edit(name):
    return lambda model: plain(model).edit(name, start=0)


def capture(name):
    return lambda model: CaptureAttention.execute(model=model, negative=empty(), inversion=path(),
        attention=tuple(attention(name)), skip=0)


def inverting(node, **inputs):
    return lambda model: runs.invert(node, latent=LATENT, pair=prompts(), on=model, steps=STEPS, **inputs)


null_text = inverting(NullTextInversion, cfg=5.0, inner_steps=2, early_stop=0.0)
style_diffusion = inverting(StyleDiffusionInversion, cfg=5.0, first_steps=2, tau_v=0.5, early_stop=0.0)


def on_the_learned(inversion):
    """An edit in which the inversion prescribes embeddings, with a control."""
    def run(model):
        made = learned(inversion)
        parts = dataclasses.replace(plain(model), path=made)
        return parts.edit("masactrl", start=0)

    return run


@functools.cache
def learned(inversion):
    return inversion(tiny.model())[0]


RUNS = {
    **{name: edit(name) for name in CONTROLS},
    "capture": capture("masactrl"),
    "capture features": capture("pnp"),
    "edit-friendly": inverting(EditFriendlyInversion, cfg=3.5, steps_at_once=1),
    "ddim": inverting(DDIMInversion, refinements=1, path=RESIMULATED),
    "direct": inverting(DirectInversion, refinements=1),
    "direct, target side": inverting(DirectInversion, refinements=1,
                                     ablation={"ablation": "target side", "edit_cfg": 4.0}),
    "negative-prompt": inverting(NegativePromptInversion, refinements=1, path=RESIMULATED, interpolation=0.2),
    "null-text": null_text,
    "null-text edit": on_the_learned(null_text),
    "StyleDiffusion": style_diffusion,
    "StyleDiffusion edit": on_the_learned(style_diffusion),
}


def sample(model):
    latent = {"samples": LATENT["samples"]}
    return nodes.common_ksampler(model, 5, 2, 4.0, "dpmpp_2m", "karras", *prompts(), latent)[0]["samples"]


def everything(model):
    """`state`, with all that a run may leave on modules and parameters."""
    found, network = state(model), model.model.diffusion_model
    del found["weights"]  # what they do is compared by the picture
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return found | {
        "hooks": {name: [len(getattr(m, kind)) for kind in hooks] for name, m in network.named_modules()},
        "functions": {name: [len(getattr(m, kind, ())) for kind in ("weight_function", "bias_function")]
                      for name, m in network.named_modules()},
        "gradients": [name for name, p in network.named_parameters() if p.requires_grad or p.grad is not None],
        "backups": [sorted(model.backup), sorted(model.object_patches_backup)],
        "current": model.model.current_patcher is None,
    }


def user_s_model():
    """A MODEL with weights as core's loaders leave them, and with patches of the user and other packs."""
    made = tiny.model().clone()
    weight = made.model.diffusion_model.out[2].weight
    made.add_patches({"diffusion_model.out.2.weight": ("diff", (torch.full_like(weight, 0.01),))})
    made.set_model_attn1_patch(lambda n, context, value, extra: (n, context, value * 1.1))
    made.set_model_output_block_patch(lambda h, skip, options: (h * 1.01, skip))
    return made


@pytest.mark.parametrize("run", RUNS)
def test_a_plain_ksampler_is_bit_identical_after_every_end(run):
    model = user_s_model()
    expected, before = sample(model), everything(model)

    def check(end):
        now = everything(model)
        for name, value in before.items():
            assert now[name] == value, (end, name)
        assert torch.equal(sample(model), expected), end

    with tiny.Calls(model) as seen:
        RUNS[run](model)
    check("well")
    middle = len(seen.calls) // 2
    assert middle > 0
    interrupt = comfy.model_management.interrupt_current_processing
    for error, act in ((INTERRUPTED, interrupt), (RuntimeError, fail)):
        with tiny.Calls(model, act_at(middle, act)) as seen, pytest.raises(error):
            RUNS[run](model)
        assert len(seen.calls) in (middle, middle + 1)
        check(f"{error.__name__} in the middle")
        assert not comfy.model_management.processing_interrupted()


@pytest.mark.parametrize("run", ["null-text", "StyleDiffusion", "pix2pix"])
def test_an_error_in_the_middle_of_the_network_leaves_nothing(run):
    """Where gradients run, inside a block: its methods and weights are others then."""
    model = user_s_model()
    expected, before = sample(model), everything(model)
    for act, error in ((fail, RuntimeError), (comfy.model_management.interrupt_current_processing, INTERRUPTED)):
        count = [0]

        def at(module, args, count=count, act=act):
            count[0] += 1
            if torch.is_grad_enabled() and count[0] > 10:
                count[0] = -10**6
                act()

        handle = model.model.diffusion_model.output_blocks[1][1].register_forward_pre_hook(at)
        try:
            with pytest.raises(error):
                RUNS[run](model)
        finally:
            handle.remove()
        assert everything(model) == before
        assert torch.equal(sample(model), expected)
