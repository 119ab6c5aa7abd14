"""Nothing stays behind on the user's MODEL, CONDITIONING or inversion, however a run ends."""
import comfy.model_management
import comfy.utils
import pytest
import torch
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.sampling import LeditsGuiderNode, LeditsSamplerNode
from comfyui_ledits.samplers.methods.sega import Concept
from support import runs, tiny

import nodes

pytestmark = pytest.mark.usefixtures("inference_mode")
SOURCE, EMPTY, TARGET, RED = (tiny.conditioning(seed=seed) for seed in range(1, 5))
LATENT = tiny.latent(batch=2)
CONCEPTS = (Concept(conditioning=RED, warmup=1), Concept(conditioning=SOURCE, direction=-1, warmup=3, momentum_scale=0.0))
INTERRUPTED = comfy.model_management.InterruptProcessingException


def invert(model, **more):
    return runs.invert(EditFriendlyInversion, latent=LATENT, pair=(SOURCE, EMPTY), on=model, cfg=3.5, steps=5,
                       **more)[0]


def edit(model, inversion, concepts=CONCEPTS, mask=None):
    return runs.edit("sd1", inversion, pair=(TARGET, EMPTY), on=model, cfg=4.0, skip=1, concepts=concepts, mask=mask)


def plain(model):
    latent = {"samples": LATENT["samples"]}
    return nodes.common_ksampler(model, 5, 3, 4.0, "dpmpp_2m", "karras", SOURCE, EMPTY, latent)[0]["samples"]


def snapshot(thing):
    """The containers of a thing, copied, with its leaves named by identity."""
    if isinstance(thing, dict):
        return {key: snapshot(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [snapshot(value) for value in thing]
    return id(thing)


def state(model):
    """All that others can set on a MODEL and its network."""
    names = ("model_options", "patches", "object_patches", "wrappers", "callbacks", "injections", "attachments",
             "additional_models", "hook_patches", "weight_wrapper_patches", "hook_mode")
    network = model.model.diffusion_model
    return {
        "patcher": {name: snapshot(getattr(model, name)) for name in names},
        "forwards": {name: [type(module), sorted(vars(module))] for name, module in network.named_modules()},
        "weights": {name: value.clone() for name, value in network.state_dict().items()},
        "sampling": id(model.get_model_object("model_sampling")),
    }


def act_at(call, act):
    def at(count):
        if count == call:
            act()

    return at


def fail():
    raise RuntimeError("the model fails")


# how a run ends: exception, what the U-Net does at a call, which call
ENDS = {
    "well": (None, None, None),
    "interrupted at once": (INTERRUPTED, comfy.model_management.interrupt_current_processing, 0),
    "interrupted in the middle": (INTERRUPTED, comfy.model_management.interrupt_current_processing, 3),
    "failing at once": (RuntimeError, fail, 0),
    "failing in the middle": (RuntimeError, fail, 3),
}


@pytest.fixture(params=["sd1", "patched"])
def model(request):
    """A MODEL as it comes, or one with patches of the user and other packs."""
    made = tiny.model("sd1")
    if request.param == "patched":
        made = made.clone()
        made.add_patches({"diffusion_model.out.2.weight": (torch.full((4, 32, 3, 3), 0.01),)})
        made.set_model_attn1_patch(lambda q, k, v, extra: (q, k, v * 1.1))
        made.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.99)
    return made


@pytest.mark.parametrize(("error", "act", "call"), ENDS.values(), ids=ENDS.keys())
def test_a_plain_ksampler_is_bit_identical_before_and_after(model, error, act, call):
    inversion = invert(tiny.model("sd1"))
    expected, before = plain(model), state(model)
    for run in (lambda: edit(model, inversion, mask=torch.ones(8, 8)), lambda: invert(model, steps_at_once=1)):
        if error is None:
            run()
        else:
            with tiny.Calls(model, act_at(call, act)) as calls, pytest.raises(error):
                run()
            assert call <= len(calls.calls) <= call + 1
        after = state(model)
        for name in ("patcher", "forwards", "sampling"):
            assert after[name] == before[name], name
        assert all(torch.equal(value, after["weights"][name]) for name, value in before["weights"].items())
        assert torch.equal(plain(model), expected)


def test_cancelling_between_two_steps_leaves_nothing(monkeypatch):
    """ComfyUI's server raises in the progress callback of a step."""
    model = tiny.model()
    inversion, expected, before = invert(model), plain(model), state(model)["patcher"]

    def hook(*_, **__):
        raise INTERRUPTED()

    for run in (lambda: edit(model, inversion), lambda: invert(model, steps_at_once=1)):
        monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
        with pytest.raises(INTERRUPTED):
            run()
        monkeypatch.undo()
        assert state(model)["patcher"] == before
        assert torch.equal(plain(model), expected)


def test_a_refused_run_leaves_nothing(model):
    inversion, expected, before = invert(tiny.model("sd1")), plain(model), state(model)["patcher"]
    with pytest.raises(ValueError, match="mask is empty"):
        edit(model, inversion, mask=torch.zeros(8, 8))
    assert state(model)["patcher"] == before
    assert torch.equal(plain(model), expected)


def test_an_edit_does_not_change_what_it_is_given():
    model = tiny.model()
    inversion = invert(model)
    parts = [inversion.sigmas, inversion.latents, inversion.residuals, inversion.etas, LATENT["samples"]]
    words = [SOURCE, EMPTY, TARGET, RED]
    copies, dictionaries = [part.clone() for part in parts], [snapshot(prompt) for prompt in words]
    edit(model, inversion, mask=torch.ones(8, 8))
    edit(model, inversion)
    assert all(torch.equal(part, copy) for part, copy in zip(parts, copies))
    assert [snapshot(prompt) for prompt in words] == dictionaries


@pytest.mark.parametrize("act", [fail, comfy.model_management.interrupt_current_processing])
def test_a_guider_and_sampler_work_again_after_a_run_that_broke_off(act):
    model = tiny.model()
    inversion = invert(model)
    expected = edit(model, inversion)
    guider = LeditsGuiderNode.execute(model=model, positive=TARGET, negative=EMPTY, cfg=4.0, concepts=CONCEPTS)[0]
    sampler, sigmas = LeditsSamplerNode.execute(inversion=inversion, skip=1).result

    def run():
        zeros = torch.zeros(2, 4, 8, 8)
        return guider.sample(zeros, zeros, sampler, sigmas, disable_pbar=True)

    with tiny.Calls(model, act_at(3, act)), pytest.raises((RuntimeError, INTERRUPTED)):
        run()
    assert torch.equal(run(), expected)
    assert torch.equal(run(), expected)
