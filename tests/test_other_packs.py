"""Patches and functions of other packs: they see what core's guider shows them, and a model that does not repeat is told."""
import dataclasses
import functools

import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import CFGGuider, KSamplerSelect, RandomNoise
from comfy_extras.nodes_freelunch import FreeU_V2
from comfy_extras.nodes_nag import NAGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_tomesd import TomePatchModel
from comfyui_ledits.nodes.ddim_inversions import DDIMInversion, DirectInversion
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.flowedit import FlowEditSource
from comfyui_ledits.nodes.learned_inversions import NullTextInversion, StyleDiffusionInversion
from comfyui_ledits.samplers.guider import LeditsGuider
from comfyui_ledits.samplers.methods.sega import Concept
from support import chain_parts, runs, tiny
from support.runs import EMPTY, SOURCE, TARGET, model, prompts

pytestmark = pytest.mark.usefixtures("inference_mode")
SIGMAS = torch.tensor([10.0, 3.0, 1.0, 0.0])


# --- patches that look at rows ----------------------------------------------------------------------------------------

def factors(which, like):
    """1.5 for the positive's rows, 1 for the negative's, as IP-Adapter finds them: there are only two."""
    rows = torch.tensor([(1.5, 1.0)[i] for i in which])
    return rows.repeat_interleave(len(like) // len(which)).view(-1, *[1] * (like.ndim - 1)).to(like)


def by_row(own, kind, seen):
    """A MODEL with a patch of a kind that does one thing to the positive's rows and another to the negative's."""
    patched = own.clone()
    inner = patched.model_options["transformer_options"]

    def change(out, which):
        seen.append(list(which))
        return out * factors(which, out)

    def wrapper(executor, *args, **kwargs):
        options = kwargs.get("transformer_options") or next(a for a in args[::-1] if isinstance(a, dict))
        return change(executor(*args, **kwargs), options["cond_or_uncond"])

    def replace(q, k, v, extra):
        return change(torch.nn.functional.scaled_dot_product_attention(q, k, v), extra["cond_or_uncond"])

    def batch(args):
        cond, uncond = args["conds"]  # two, as of core's guider
        seen.append([int(uncond is not None and cond is None)])
        out = comfy.samplers.calc_cond_batch(args["model"], [cond, uncond], args["input"], args["sigma"], args["model_options"])
        return [out[0] * 1.5, out[1]]

    if kind.endswith("output_patch"):
        getattr(patched, f"set_model_{kind}")(lambda out, extra: change(out, extra["cond_or_uncond"]))
    elif kind.endswith("_patch"):
        getattr(patched, f"set_model_{kind}")(lambda n, k, v, extra: (n, k, change(v, extra["cond_or_uncond"])))
    elif kind.endswith("replace"):
        getattr(patched, f"set_model_{kind}")(replace, "output", 1)
    elif kind == "input_block":
        patched.set_model_input_block_patch(lambda h, options: change(h, options["cond_or_uncond"]))
    elif kind == "override":
        inner["optimized_attention_override"] = lambda function, *a, **k: change(
            function(*a, **k), k["transformer_options"]["cond_or_uncond"])
    elif kind == "function":
        patched.set_model_unet_function_wrapper(
            lambda apply, args: change(apply(args["input"], args["timestep"], **args["c"]), args["cond_or_uncond"]))
    elif kind == "batch":
        patched.set_model_sampler_calc_cond_batch_function(batch)
    else:
        patched.add_wrapper_with_key(kind, "other", wrapper)
    return patched


KINDS = ("attn1_patch", "attn2_patch", "attn1_output_patch", "attn2_output_patch", "attn1_replace", "attn2_replace",
         "input_block", "override", "function", "batch", WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)


def sampled(guider):
    """By core's Euler sampler."""
    sampler = KSamplerSelect.execute("euler")[0]
    return runs.in_parts(guider, sampler, SIGMAS, tiny.latent("sd1", 2), RandomNoise.execute(1)[0])


@pytest.mark.parametrize("cfg", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("pair", [(TARGET, EMPTY), (SOURCE, SOURCE)])
@pytest.mark.parametrize("kind", KINDS)
def test_patches_that_tell_positive_from_negative_do_with_our_guider_what_they_do_with_cores(kind, pair, cfg):
    positive, negative = prompts("sd1", *pair)
    own = by_row(model(), kind, [])
    core = CFGGuider.execute(model=own, positive=positive, negative=negative, cfg=cfg)[0]
    expected = sampled(core)
    assert torch.allclose(sampled(LeditsGuider(own, positive, negative, cfg)), expected, atol=1e-4)
    plain = CFGGuider.execute(model=model(), positive=positive, negative=negative, cfg=cfg)[0]
    assert cfg == 0 or not torch.allclose(expected, sampled(plain), atol=1e-3)


def concepts(scale, number=2):
    return tuple(Concept(conditioning=tiny.conditioning(seed=5 + k), warmup=0, scale=scale, threshold=0.5) for k in range(number))


@pytest.mark.parametrize("kind", KINDS)
def test_patches_see_concepts_in_calls_of_their_own(kind):
    positive, negative = prompts("sd1", TARGET, EMPTY)
    seen, alone = [], []
    own = by_row(model(), kind, seen)
    without = sampled(LeditsGuider(own, positive, negative, 5.0))
    alone[:], seen[:] = seen, []
    guider = LeditsGuider(own, positive, negative, 5.0, concepts(1e-9))
    assert torch.allclose(sampled(guider), without, atol=1e-4)
    assert guider.rows == 2 * 3 * (2 + 2)
    assert sorted(map(sorted, seen)) == sorted([*map(sorted, alone), *[[1]] * (2 * len(alone))])
    pushed = sampled(LeditsGuider(own, positive, negative, 5.0, concepts(5.0)))
    assert not torch.allclose(pushed, without, atol=1e-3)


def test_a_concept_is_compared_with_a_negative_that_was_patched_alike():
    """A concept that is the negative pushes nowhere, whatever a patch does to the negative's rows."""
    positive, negative = prompts("sd1", TARGET, EMPTY)
    same = Concept(conditioning=negative, warmup=0, scale=5.0, threshold=0.0)
    for kind in KINDS:
        own = by_row(model(), kind, [])
        pushed = sampled(LeditsGuider(own, positive, negative, 5.0, (same,)))
        assert torch.allclose(pushed, sampled(LeditsGuider(own, positive, negative, 5.0)), atol=1e-4), kind


STOCK = {
    "NAG": lambda own: NAGuidance.execute(own, 5.0, 0.5, 1.5)[0],
    "SAG": lambda own: SelfAttentionGuidance.execute(own, 0.5, 2.0)[0],
}


@pytest.mark.parametrize("edit", ["plain", "masactrl", "masactrl words", "p2p"])
@pytest.mark.parametrize("name", STOCK)
def test_stock_attention_patches_go_with_concepts(name, edit):
    """A concept of next to no weight changes nothing of what they do."""
    parts = chain_parts.scene()
    own = dataclasses.replace(parts, model=STOCK[name](parts.model))
    more = chain_parts.inputs(edit)

    def run(on, scale):
        with torch.inference_mode():
            return runs.edit("sd1", on.path, pair=(on.positive, on.negative), on=on.model, cfg=5.0, skip=1,
                             **more, **({"concepts": concepts(scale)} if scale else {}))

    without = run(own, 0.0)
    assert torch.allclose(run(own, 1e-9), without, atol=1e-4)
    assert not torch.allclose(run(own, 5.0), without, atol=1e-3)
    assert not torch.allclose(run(parts, 0.0), without, atol=1e-3)


# --- what functions are given ---------------------------------------------------------------------------------------

def listening(own, seen):
    """A MODEL with a function of every kind, which notes by what names it is given what."""
    patched = own.clone()

    def note(kind, args, out):
        seen.setdefault(kind, set()).add(frozenset((key, type(value)) for key, value in args.items()))
        return out

    def batch(args):
        out = comfy.samplers.calc_cond_batch(args["model"], args["conds"], args["input"], args["sigma"], args["model_options"])
        return note("batch", args, out)

    patched.set_model_sampler_cfg_function(lambda a: note(
        "cfg", a, a["uncond"] + (a["cond"] - a["uncond"]) * a["cond_scale"]), disable_cfg1_optimization=True)
    patched.set_model_sampler_pre_cfg_function(lambda a: note("pre", a, a["conds_out"]))
    patched.set_model_sampler_post_cfg_function(lambda a: note("post", a, a["denoised"]))
    patched.set_model_sampler_calc_cond_batch_function(batch)
    patched.set_model_unet_function_wrapper(lambda f, a: note("wrapper", a, f(a["input"], a["timestep"], **a["c"])))
    patched.set_model_attn1_patch(lambda n, k, v, extra: note("attn1", extra, (n, k, v)))
    patched.set_model_attn2_patch(lambda n, k, v, extra: note("attn2", extra, (n, k, v)))
    patched.set_model_attn1_output_patch(lambda out, extra: note("attn1 out", extra, out))
    patched.set_model_attn1_replace(lambda q, k, v, extra: note("replace", extra, v), "middle", 0)
    return patched


@functools.cache
def from_core():
    seen = {}
    own = listening(model(), seen)
    source, empty = prompts("sd1")
    sampled(CFGGuider.execute(model=own, positive=source, negative=empty, cfg=5.0)[0])
    return seen


@pytest.mark.parametrize("node", [EditFriendlyInversion, DDIMInversion, NullTextInversion, StyleDiffusionInversion])
def test_functions_are_given_what_core_gives_them(node):
    """By name and type: inversions, their learning, and edits."""
    seen = {}
    own = listening(model(), seen)
    path = runs.invert(node, "sd1", on=own, cfg=5.0, steps=2)[0]
    runs.edit("sd1", path, cfg=5.0, on=own, concepts=concepts(5.0, 1))
    assert seen.keys() == from_core().keys()
    for kind, given in from_core().items():
        (core,) = given
        for args in seen[kind]:
            missing = {key for key, _ in core} - {key for key, _ in args}
            assert not missing, kind
            if kind not in ("attn1", "attn2", "attn1 out", "replace"):  # whose options hold numbers of the call's place
                assert core == args, kind


def test_functions_before_guidance_act_while_learning_too():
    """Proximal guidance, TCFG and their like: guidance is scaled by 0.5 before it is applied, or cfg is halved."""
    source, empty = prompts("sd1")

    def halved(args):
        positive, negative = args["conds_out"]
        return [negative + 0.5 * (positive - negative), negative]

    own = model().clone()
    own.set_model_sampler_pre_cfg_function(halved)
    found = runs.invert(NullTextInversion, "sd1", on=own, cfg=8.0, steps=3)[0].overrides["negative"]
    expected = runs.invert(NullTextInversion, "sd1", cfg=4.0, steps=3)[0].overrides["negative"]
    assert torch.allclose(found, expected, atol=1e-3)
    assert not torch.allclose(found, runs.invert(NullTextInversion, "sd1", cfg=8.0, steps=3)[0].overrides["negative"], atol=1e-3)


# --- models that do not repeat themselves ------------------------------------------------------------------------------

def tome(own):
    return TomePatchModel.execute(own, 0.5)[0]


def noisy_attention(own):
    patched = own.clone()
    patched.set_model_attn1_output_patch(lambda out, extra: out + 0.1 * torch.randn_like(out))
    return patched


def noisy_function(own):
    patched = own.clone()
    patched.set_model_sampler_post_cfg_function(lambda a: a["denoised"] + 0.05 * a["sigma"][0] * torch.randn_like(a["denoised"]))
    return patched


def momentum(own):
    """APG's and its like: what was seen last goes into the next."""
    patched, last = own.clone(), []

    def remember(args):
        d = args["denoised"]
        out = d if not last else d + 0.1 * (last[-1] - d)
        last[:] = [d]
        return out

    patched.set_model_sampler_post_cfg_function(remember)
    return patched


EXACT = {
    "edit-friendly": (EditFriendlyInversion, {"cfg": 3.5}),
    "noise maps": (DDIMInversion, {"path": runs.INVERTED, "replay": "noise maps"}),
    "input shift": (DDIMInversion, {"path": runs.INVERTED, "replay": "input shift"}),
    "target side": (DirectInversion, {"ablation": {"ablation": "target side", "edit_cfg": 3.5}}),
}


def invert(name, own):
    """(note, rows) of an inversion whose replay is exact."""
    latent = tiny.latent("sd1", 1, 16, 16)
    if name == "FlowEdit":
        out = FlowEditSource.execute(model=own, positive=prompts()[0], negative=prompts()[1], latent=latent,
                                     settings={"settings": "own", "steps": 8, "cfg": 3.5}, scheduler="simple", seed=0)
    else:
        node, inputs = EXACT[name]
        out = runs.invert(node, "sd1", latent, on=own, steps=10, **inputs)
    (costs,) = out.ui["ledits"]
    return costs.get("note", ""), costs["unet_rows"]


@pytest.mark.parametrize("patch", [tome, noisy_attention, noisy_function, momentum])
@pytest.mark.parametrize("name", [*EXACT, "FlowEdit"])
def test_an_inversion_says_that_its_model_does_not_repeat(name, patch):
    torch.manual_seed(0)
    note, _ = invert(name, patch(model()))
    assert "random numbers" in note and "exactly" in note


@pytest.mark.parametrize("name", [*EXACT, "FlowEdit"])
def test_a_model_that_repeats_is_not_spoken_of(name):
    """...and only where other packs have something on it, one level is evaluated again."""
    quiet, rows = invert(name, model())
    note, more = invert(name, FreeU_V2.execute(model(), 1.3, 1.4, 0.9, 0.2)[0])
    assert quiet == note == ""
    assert more - rows == (1 if name in ("noise maps", "input shift") else 2)


def test_what_a_patch_remembers_is_left_to_the_edit():
    """Momentum from step to step is the same in an edit of all steps, which comes back."""
    latent = tiny.latent()
    path = runs.invert(EditFriendlyInversion, "sd1", latent, on=momentum(model()), cfg=3.5, steps=8)[0]
    assert runs.error("sd1", runs.edit("sd1", path, cfg=3.5, on=momentum(model())), latent) < 1e-3
    assert runs.error("sd1", runs.edit("sd1", path, cfg=3.5), latent) > 1e-2


@pytest.mark.parametrize("patch", [tome, noisy_attention, noisy_function, momentum])
@pytest.mark.parametrize("node", [NullTextInversion, StyleDiffusionInversion])
def test_learning_from_a_model_that_does_not_repeat_is_refused(node, patch):
    torch.manual_seed(0)
    own = patch(model())
    with tiny.Calls(model()) as calls, pytest.raises(ValueError, match="random numbers.*remove it"):
        runs.invert(node, "sd1", tiny.latent("sd1", 1, 16, 16), on=own, cfg=7.5, steps=4)
    assert len(calls.calls) == 6  # both prompts, at a level, another and the first again
