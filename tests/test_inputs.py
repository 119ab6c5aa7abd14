"""Unusual and wrong inputs: a right result, or a sentence before the model has run."""
import functools

import comfy.model_sampling
import pytest
import torch
from comfy_extras.nodes_custom_sampler import FlipSigmas
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.sampling import LeditsGuiderNode, LeditsSamplerNode
from comfyui_ledits.nodes.semantic_concept import SemanticConcept
from comfyui_ledits.nodes.unpack_pack import PackInversion, UnpackInversion
from comfyui_ledits.samplers.guider import LeditsGuider
from comfyui_ledits.samplers.ledits import LeditsSampler
from comfyui_ledits.samplers.methods.sega import Concept
from support import runs, tiny
from support.runs import EMPTY, SOURCE, TARGET, model, prompts

import nodes

pytestmark = pytest.mark.usefixtures("inference_mode")
invert = functools.partial(runs.invert, EditFriendlyInversion, "sd1", cfg=3.5, steps=8)


def edit(inversion, cfg=3.5, **inputs):
    return runs.edit("sd1", inversion, cfg=cfg, **inputs)


def edit_in_parts(inversion, latent, sigmas=None, skip=0):
    """The edit by SamplerCustomAdvanced, where every part can be a wrong one."""
    target, empty = prompts("sd1", TARGET, EMPTY)
    guider = LeditsGuiderNode.execute(model=model("sd1"), positive=target, negative=empty, cfg=3.5)[0]
    sampler, own = LeditsSamplerNode.execute(inversion=inversion, skip=skip).result
    return runs.in_parts(guider, sampler, own if sigmas is None else sigmas, latent)


@pytest.fixture
def refused():
    """Asserts that a call is refused with a short sentence that holds the words, before any model has run."""

    def check(call, *words, on=None):
        with tiny.Calls(on or model("sd1")) as calls, pytest.raises(ValueError) as error:
            call()
        assert calls.calls == []
        for word in words:
            assert word in str(error.value)
        assert len(str(error.value)) < 400

    return check


@pytest.fixture(scope="module")
def latent():
    return tiny.latent()


@pytest.fixture(scope="module")
def inverted(latent):
    with torch.inference_mode():
        return invert(latent=latent)[0]


# --- refused --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["sdxl", "sd2_wide"])
def test_an_inversion_of_another_model_is_refused(refused, inverted, kind):
    other = tiny.model("sdxl") if kind == "sdxl" else tiny.model("sd2", model_channels=64)
    pair = prompts(kind, TARGET, EMPTY)
    refused(lambda: edit(inverted, pair=pair, on=other), "another kind of model", "Invert the picture again", on=other)


def test_a_latent_of_another_size_is_refused(refused, inverted):
    refused(lambda: edit_in_parts(inverted, tiny.latent(height=16)), "[1, 4, 16, 8]", "[1, 4, 8, 8]", "x_T")


def test_a_batch_that_does_not_fit_is_refused(refused, inverted):
    refused(lambda: edit_in_parts(inverted, tiny.latent(batch=2)), "[2, 4, 8, 8]", "[1, 4, 8, 8]")


@pytest.mark.parametrize("change", ["other steps", "other levels", "flipped", "one level", "skips one", "beyond the end"])
def test_sigmas_that_are_not_the_inversions_are_refused(refused, inverted, latent, change):
    own = inverted.sigmas
    sigmas = {
        "other steps": invert(latent=latent, steps=9)[0].sigmas,
        "other levels": own * 1.01,
        "flipped": FlipSigmas().get_sigmas(own)[0],
        "one level": own[:1],
        "skips one": torch.cat([own[:2], own[3:]]),
        "beyond the end": torch.cat([own, own[-1:]]),
    }[change]
    refused(lambda: edit_in_parts(inverted, latent, sigmas), "not the inversion's own", "invert again")


@pytest.mark.parametrize("skip", [8, 999])
def test_skipping_every_step_is_refused(refused, inverted, skip):
    refused(lambda: edit(inverted, skip=skip), f"skip is {skip}", "8 steps", "0 to 7")
    refused(lambda: edit_in_parts(inverted, None, skip=skip), "0 to 7")


@pytest.mark.parametrize(
    ("sigmas", "words"),
    [
        ([0.0, 0.5, 2.0], ("must fall", "FlipSigmas")),
        ([2.0, 2.0, 0.0], ("must fall", "Repeated")),
        ([2.0], ("at least two",)),
        ([], ("at least two",)),
        ([2.0, float("nan")], ("finite",)),
        ([2.0, -1.0], ("negative",)),
    ],
)
def test_inverting_on_impossible_sigmas_is_refused(refused, sigmas, words):
    refused(lambda: invert(sigmas=torch.tensor(sigmas)), *words)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_with_nan_is_refused(refused, value):
    samples = tiny.latent()["samples"]
    samples[0, 1, 2, 3] = value
    refused(lambda: invert(latent={"samples": samples}), "NaN or infinite", "VAE")


def test_an_empty_latent_batch_is_refused(refused):
    refused(lambda: invert(latent={"samples": torch.zeros(0, 4, 8, 8)}), "empty")


@pytest.mark.parametrize("shape", [(1, 16, 8, 8), (1, 4, 3, 8, 8), (1, 4, 8)])
def test_a_latent_of_another_kind_of_vae_is_refused(refused, shape):
    refused(lambda: invert(latent={"samples": torch.ones(shape)}), "LATENT", str(list(shape)), "VAE")


def test_an_empty_mask_is_refused(refused, inverted):
    refused(lambda: edit(inverted, mask=torch.zeros(1, 64, 64)), "mask is empty", "disconnect")


def test_an_inversion_of_a_diffusion_model_is_refused_where_the_same_network_samples_as_a_flow(refused, inverted):
    flow = tiny.model("flow")
    refused(lambda: edit(inverted, on=flow), "a flow model", "a diffusion model", "ModelSampling", on=flow)
    with torch.inference_mode():
        other = invert(on=flow)[0]
    refused(lambda: edit(other), "a flow model", "a diffusion model", "ModelSampling")


def test_noise_levels_of_another_kind_of_model_are_refused(refused):
    flow = tiny.model("flow")
    refused(lambda: invert(on=flow, sigmas=torch.tensor([14.6, 3.0, 0.0])), "begin at 14.6", "up to 1", on=flow)


def test_a_model_that_turns_pictures_into_pictures_is_refused(refused):
    for of in (comfy.model_sampling.IMG_TO_IMG, comfy.model_sampling.IMG_TO_IMG_FLOW):
        other = tiny.model().clone()
        sampling = type("Sampling", (comfy.model_sampling.ModelSamplingDiscreteFlow, of), {})()
        other.add_object_patch("model_sampling", sampling)
        refused(lambda other=other: invert(on=other), "makes one picture from another", on=other)


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_a_concept_without_words_is_refused(refused, prompt):
    settings = {"direction": "towards", "scale": 7.0, "threshold": 0.95, "warmup": 2, "cooldown": 0,
                "momentum_scale": 0.3, "momentum_beta": 0.6, "weight": 1.0}
    refused(lambda: SemanticConcept.execute(prompt=prompt, **settings), "empty", "conditioning")
    refused(lambda: SemanticConcept.execute(prompt="red", **settings), "CLIP")


def test_parts_that_do_not_fit_are_not_packed(refused, inverted):
    path, maps, sigmas = UnpackInversion.execute(inversion=inverted).result
    refused(lambda: PackInversion.execute(inversion=inverted, path=maps), "path", "[9, 4, 8, 8]",
        "9 levels of 1 picture")
    refused(lambda: PackInversion.execute(inversion=inverted, noise_maps=path), "noise_maps", "[8, 4, 8, 8]")
    refused(lambda: PackInversion.execute(inversion=inverted, sigmas=sigmas[1:]), "8 levels", "has 9")
    refused(lambda: PackInversion.execute(inversion=inverted, path={"samples": path["samples"] * float("nan")}), "NaN")


# --- unusual, and right ---------------------------------------------------------------------------------------------

def test_no_concepts_in_the_chain_are_as_none_connected(inverted):
    assert torch.equal(edit(inverted, prompt=TARGET, concepts=()), edit(inverted, prompt=TARGET))


@pytest.mark.parametrize("cfg", [0.0, 0.5, 1.0, 30.0])
def test_any_cfg_inverts_and_a_low_one_gives_the_picture_back(latent, cfg):
    inversion = invert(latent=latent, cfg=cfg)[0]
    samples = edit(inversion, cfg=cfg)
    assert torch.isfinite(samples).all()
    if cfg <= 1:
        torch.testing.assert_close(samples, latent["samples"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("sigmas", [None, [14.6, 0.0], [3.0, 1.0]])
def test_one_step(latent, sigmas):
    inversion = invert(latent=latent, steps=1, sigmas=None if sigmas is None else torch.tensor(sigmas))[0]
    assert inversion.steps == 1
    torch.testing.assert_close(edit(inversion), latent["samples"], rtol=0, atol=1e-4)
    torch.testing.assert_close(edit(inversion, solver="dpmpp_2m_sde"), latent["samples"], rtol=0, atol=1e-4)
    assert not torch.allclose(edit(inversion, prompt=TARGET), latent["samples"], atol=1e-2)


def test_a_thousand_steps():
    minimal, latent = tiny.model(**tiny.NO_ATTENTION), tiny.latent(height=2, width=2)
    inversion = invert(latent=latent, cfg=1.0, steps=1000, on=minimal)[0]
    assert inversion.steps == 999  # what the schedule has between its ends
    for skip in (0, 900):
        samples = edit(inversion, cfg=1.0, skip=skip, on=minimal)
        torch.testing.assert_close(samples, latent["samples"], rtol=0, atol=1e-4)


def test_an_empty_latent_image_is_a_picture_too():
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    torch.testing.assert_close(edit(invert(latent=latent)[0]), latent["samples"], rtol=0, atol=1e-4)


def test_a_lora_or_another_checkpoint_of_the_kind_may_edit(inverted):
    assert torch.isfinite(edit(inverted, on=tiny.model("sd1", seed=9))).all()


# --- conditioning that depends on the level -------------------------------------------------------------------------

def one_by_one(calls):
    return all(len(set(timesteps.tolist())) == 1 for timesteps, _ in calls.calls)


def test_prompts_with_a_range_are_evaluated_one_by_one_in_their_range(latent):
    early, late, empty = prompts("sd1", SOURCE, TARGET, EMPTY)
    early = nodes.ConditioningSetTimestepRange().set_range(early, 0.0, 0.5)[0]
    late = nodes.ConditioningSetTimestepRange().set_range(late, 0.5, 1.0)[0]
    pair = [early + late, empty]
    with tiny.Calls(model("sd1")) as calls:
        output = invert(latent=latent, pair=pair)
        torch.testing.assert_close(edit(output[0], pair=pair), latent["samples"], rtol=0, atol=1e-4)
    assert one_by_one(calls)
    assert all(t >= 500 for t in calls.rows_of(early))
    assert all(t <= 500 for t in calls.rows_of(late))
    assert len(calls.rows_of(early)) + len(calls.rows_of(late)) == 16
    assert output.ui["ledits"][0]["unet_rows"] == calls.rows / 2


@pytest.mark.parametrize("end", [1.0, 0.4])
def test_a_control_net_is_evaluated_one_by_one(latent, end):
    control, image = tiny.control_net(), torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    plain = prompts("sd1", SOURCE, EMPTY)
    pair = nodes.ControlNetApplyAdvanced().apply_controlnet(*plain, control, image, 0.1, 0.0, end)
    with tiny.Calls(model("sd1")) as calls:
        inversion = invert(latent=latent, pair=pair)[0]
    assert one_by_one(calls)
    assert (inversion.residuals - invert(latent=latent)[0].residuals).abs().amax((1, 2, 3, 4)).gt(1e-2).any()
    torch.testing.assert_close(edit(inversion, pair=pair), latent["samples"], rtol=0, atol=1e-4)
    assert not torch.allclose(edit(inversion), latent["samples"], atol=1e-2)


# --- masks ----------------------------------------------------------------------------------------------------------

def half(*size):
    mask = torch.zeros(size)
    mask[..., size[-1] // 2 :] = 1
    return mask


@pytest.mark.parametrize("size", [(1, 64, 64), (64, 64), (2, 8, 8), (1, 40, 24)])
@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m_sde"])
def test_outside_the_mask_the_picture_stays_exactly(size, solver):
    inversion = invert(latent=tiny.latent(batch=2))[0]
    picture = inversion.latent_format.process_out(inversion.latents[-1])
    samples = edit(inversion, prompt=TARGET, mask=half(*size), solver=solver)
    assert torch.equal(samples[..., :4], picture[..., :4])
    assert (samples - picture)[..., 4:].abs().amax((1, 2, 3)).gt(0.1).all()


def test_outside_the_mask_every_step_stays_on_the_path(inverted):
    seen = {}
    guider = LeditsGuider(model("sd1"), *prompts("sd1", TARGET, EMPTY), 3.5)
    guider.sample(
        torch.zeros(1, 4, 8, 8), inverted.latents[-1] / tiny.scale(), LeditsSampler(inverted), inverted.sigmas[2:],
        denoise_mask=half(8, 8),
        callback=lambda step, x0, x, steps: seen.update({step: (x, steps)}), disable_pbar=True,
    )
    assert list(seen) == list(range(6))
    for step, (x, steps) in seen.items():
        assert steps == 6
        assert torch.equal(x[..., :4], inverted.latents[2 + step][..., :4])
        assert torch.equal(x[..., 4:], inverted.latents[2 + step][..., 4:]) == (step == 0)


def test_a_mask_of_everything_is_no_mask(inverted):
    assert torch.equal(edit(inverted, prompt=TARGET, mask=torch.ones(1, 64, 64)), edit(inverted, prompt=TARGET))


def test_the_mask_of_a_latent_is_the_mask_of_the_node(inverted):
    x_T = {"samples": inverted.latents[0] / tiny.scale(), "noise_mask": half(1, 64, 64)}
    masked = edit(inverted, prompt=TARGET, mask=half(1, 64, 64))
    assert torch.equal(edit_in_parts(inverted, x_T), masked)


def test_a_concept_acts_inside_the_mask_alone(inverted):
    concept = (Concept(conditioning=tiny.conditioning(seed=5), warmup=0),)
    plain, pushed = (edit(inverted, concepts=chain, mask=half(8, 8)) for chain in (None, concept))
    assert torch.equal(plain[..., :4], pushed[..., :4])
    assert not torch.equal(plain[..., 4:], pushed[..., 4:])
