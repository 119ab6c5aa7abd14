"""Null-text inversion: it learns what the paper's loop learns, under ComfyUI's inference mode, and leaves nothing."""
import functools

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import pytest
import torch
from comfyui_ledits.nodes.learned_inversions import ON_INTERRUPT, NullTextInversion
from comfyui_ledits.samplers import gradients
from comfyui_ledits.samplers.gradient_inverters import NullTextInverter
from comfyui_ledits.samplers.guider import LeditsGuider
from comfyui_ledits.samplers.methods import fit
from comfyui_ledits.samplers.methods.families import FAMILIES
from oracles import diffusion, learning
from support import runs, tiny
from support.listening import listen
from support.runs import EMPTY, model, prompts

pytestmark = pytest.mark.usefixtures("inference_mode")
CFG = 7.5
invert = functools.partial(runs.invert, NullTextInversion, cfg=CFG, steps=4)


# --- what is learned ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, batch", [("sd1", 2), ("sd2", 1), ("sdxl", 1)])
def test_it_learns_what_the_papers_loop_learns(kind, batch):
    inversion = invert(kind, batch=batch, steps=3)[0]
    learned = inversion.overrides["negative"].double()
    latent = tiny.latent(kind, batch)["samples"]
    with torch.inference_mode(False):
        network = learning.Network(kind)
        pictures = tiny.KINDS[kind][0].latent_format().process_in(latent.clone()).double()
        (words, null), vectors = ((c[0][0].double() for c in prompts(kind)), [network.vector(c, latent) for c in prompts(kind)])
        timesteps = diffusion.ddim_uniform(3)
        for b in range(batch):
            expected, losses = learning.null_text(network, pictures[b : b + 1], timesteps, words, null, CFG, 3, vectors)
            change = (expected[:, 0] - null[0]).abs().mean()
            assert change > 0.01
            # Adam's first steps are the sign of the gradient: an element whose gradient is 0 but for rounding may differ
            assert (learned[:, b] - expected[:, 0]).abs().mean() < 0.01 * change
        if batch == 1:
            assert inversion.settings["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-3)


@pytest.mark.parametrize("kind, batch", [("sd1", 2), ("sd2", 1), ("sdxl", 1)])
def test_the_source_may_be_sampled_anew_with_what_was_learned(kind, batch):
    """As the papers' code does, by its own loop: the path is then what the learned embeddings lead to."""
    held, resampled = (invert(kind, batch=batch, steps=3, path=path)[0] for path in ("inverted", "re-simulated"))
    assert torch.equal(held.overrides["negative"], resampled.overrides["negative"])
    assert torch.equal(held.latents[0], resampled.latents[0]) and resampled.method == "null-text, re-simulated"
    assert held.settings == resampled.settings
    timesteps = diffusion.ddim_uniform(3)
    with torch.inference_mode(False):
        network, pair = learning.Network(kind), prompts(kind)
        vectors = [network.vector(c, tiny.latent(kind, batch)["samples"]) for c in pair]
        for b in range(batch):
            x = held.latents[0, b : b + 1].double() * diffusion.abar(timesteps[0]).sqrt()
            for i, (t, p) in enumerate(zip(timesteps, timesteps[1:])):
                words = pair[0][0][0].double(), held.overrides["negative"][i, b : b + 1].double()
                e_c, e_u = (network.as_eps(network.eps(x, t, w, y), x, t) for w, y in zip(words, vectors))
                x = diffusion.step(x, e_u + CFG * (e_c - e_u), t, p, eta=0.0)[0]
                found = resampled.latents[i + 1, b : b + 1].double() * diffusion.abar(p).sqrt()
                assert (found - x).abs().max() < 2e-3
    assert (held.latents[-1] - resampled.latents[-1]).abs().max() > 1e-2


def test_the_rows_of_a_source_that_is_sampled_anew_are_counted():
    (held,), (resampled,) = (invert(path=path).ui["ledits"] for path in ("inverted", "re-simulated"))
    assert resampled["unet_rows"] - held["unet_rows"] == 2 * 4


def test_gradients_are_those_of_the_network():
    """Of every picture, exactly: no optimiser hides an error of scale."""
    found = {}

    class Probe(NullTextInverter):
        def steps(self, predict, latents, sigmas, step):
            words = self.start(predict, latents).requires_grad_()
            with torch.enable_grad():
                d = predict("negative", latents[1], sigmas[1], words)
                found["gradient"], = torch.autograd.grad((d**2).sum(), words)
            found["y"] = latents[1]
            return iter(())

    with gradients.differentiable(model()) as own:
        guider = LeditsGuider(own, *prompts(), CFG)
        sigmas = torch.tensor([diffusion.sigma(t) for t in diffusion.ddim_uniform(3)])
        latent = tiny.latent("sd1", 2)["samples"]
        guider.sample(torch.zeros_like(latent), latent, Probe(), sigmas, disable_pbar=True)
    with torch.inference_mode(False):
        network, t = learning.Network("sd1"), diffusion.ddim_uniform(3)[1]
        words = tiny.conditioning("sd1", EMPTY)[0][0].double().requires_grad_()
        for y, gradient in zip(found["y"].double(), found["gradient"]):
            x = y[None] * diffusion.abar(t).sqrt()
            d = y[None] - diffusion.sigma(t) * network.eps(x, t, words)
            expected, = torch.autograd.grad((d**2).sum(), words)
            assert (gradient - expected[0]).norm() < 1e-4 * expected.norm()


def test_more_learning_means_a_smaller_loss_and_a_better_picture_at_the_guidance():
    latent = tiny.latent()["samples"]

    def outcome(inner_steps):
        inversion = invert(inner_steps=inner_steps, steps=5)[0]
        edited = runs.edit("sd1", inversion, cfg=CFG)
        return inversion.settings.get("loss"), float((edited - latent).pow(2).mean())

    nothing, little, much = outcome(0), outcome(1), outcome(10)
    assert nothing[0] is None and much[0] < 0.7 * little[0]
    assert much[1] < 0.5 * nothing[1]


def test_a_float16_model_learns_too():
    half = tiny.model()
    half.model.diffusion_model.half().dtype = torch.float16
    inversion = invert(on=half)[0]
    exact = invert()[0]
    assert inversion.settings["loss"] == pytest.approx(exact.settings["loss"], rel=0.1)
    apart = (inversion.overrides["negative"] - exact.overrides["negative"]).abs().mean()
    assert apart < 0.2 * (exact.overrides["negative"] - prompts()[1][0][0]).abs().mean()


# --- the loop, on its own -------------------------------------------------------------------------------------------

def test_a_picture_that_is_good_enough_rests_while_others_go_on():
    with torch.inference_mode(False):
        target = torch.tensor([0.0, 1.0], dtype=torch.float64)
        leaves = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in target]
        last = fit.fit([[p] for p in leaves], lambda: (torch.cat(leaves) - target) ** 2, 0.1, steps=5, enough=1e-3)
    assert last[0] == 0 and leaves[0].item() == 0
    assert leaves[1].item() == pytest.approx(0.5, abs=0.05)  # five steps of about the learning rate
    assert last[1] == pytest.approx(0.36, abs=0.05)  # the loss before the fifth


def test_it_stops_after_the_step_that_was_good_enough():
    calls = []
    with torch.inference_mode(False):
        p = torch.ones(1, dtype=torch.float64, requires_grad=True)

        def losses():
            calls.append(p.item())
            return p**2

        fit.fit([[p]], losses, 0.1, steps=50, enough=0.7)
    assert calls == pytest.approx([1.0, 0.9, 0.8], abs=1e-2) and p.item() == pytest.approx(0.7, abs=1e-2)


def test_rate_and_threshold_follow_the_papers_code():
    assert [fit.learning_rate(i) for i in (0, 25, 49)] == pytest.approx([0.01, 0.0075, 0.0051])
    assert fit.learning_rate(500) > 0
    assert [fit.loss_to_leave_at(i) for i in (0, 49)] == pytest.approx([1e-5, 99e-5])


def test_the_error_is_that_of_variance_preserving_latents():
    y, target, sigma = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), 7.0
    scale = (1 / (1 + sigma**2)) ** 0.5
    expected = torch.stack([torch.nn.functional.mse_loss(a * scale, b * scale) for a, b in zip(y, target)])
    assert torch.allclose(fit.mse_vp(y, target, sigma, FAMILIES["ve"]), expected)


# --- a good citizen -------------------------------------------------------------------------------------------------

def state(patcher):
    inner = patcher.model
    return {
        "functions": [n for n, m in inner.named_modules() if getattr(m, "weight_function", None) or getattr(m, "bias_function", None)],
        "methods": [n for n, m in inner.named_modules() if "forward" in vars(m)],
        "gradients": [n for n, p in inner.named_parameters() if p.requires_grad],
        "options": repr(patcher.model_options), "patched": repr(patcher.object_patches_backup),
        "wrappers": repr(patcher.wrappers), "modules": [n for n, _ in inner.named_modules()],
    }


def plain_sample(patched=None):
    latent = tiny.latent()["samples"]
    noise = comfy.sample.prepare_noise(latent, 0)
    return comfy.sample.sample(patched or model(), noise, 3, 4.0, "euler", "normal", *prompts(), latent, disable_pbar=True)


@pytest.mark.parametrize("end", ["finished", "with a patch", "failed"])
def test_nothing_is_left_on_the_model(end):
    patched, key = model().clone(), "diffusion_model.out.2.weight"
    weight = model().model.diffusion_model.out[2].weight
    patched.add_patches({key: ("diff", (torch.full_like(weight, 0.1),))})
    plain_sample(patched)  # ComfyUI 0.18 itself leaves a weight that was patched once without its gradient flag
    before, was = plain_sample(), state(model())
    if end == "finished":
        invert(steps=2)
    elif end == "with a patch":
        ours = [invert(steps=2, on=m)[0].overrides["negative"] for m in (patched, model())]
        assert not torch.allclose(*ours, atol=1e-3)
    else:
        def fail(calls):
            if calls == 4:
                raise RuntimeError("on purpose")

        with pytest.raises(RuntimeError, match="on purpose"), tiny.Calls(model(), fail):
            invert(steps=2)
    now = state(model())
    assert now == was and not was["functions"] and not was["methods"]
    assert torch.equal(plain_sample(), before)


@pytest.mark.parametrize("after", [0, 2])
def test_an_interruption_keeps_or_discards(after, monkeypatch):
    def interrupted(keep):
        inverter = NullTextInverter(2, keep=keep)
        with gradients.differentiable(model()) as own:
            guider = LeditsGuider(own, *prompts(), CFG)
            latent = tiny.latent()["samples"]
            sigmas = torch.tensor([diffusion.sigma(t) for t in diffusion.ddim_uniform(4)])

            def callback(step, d, y, total):
                if step == 3 + 2 * after:  # the path is 4 predictions; a step takes 2 tries
                    comfy.model_management.interrupt_current_processing()

            guider.sample(torch.zeros_like(latent), latent, inverter, sigmas, callback=callback, disable_pbar=True)
        return inverter.inversion

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        interrupted(keep=False)
    assert not comfy.model_management.processing_interrupted()
    kept = interrupted(keep=True)
    words = kept.overrides["negative"]
    assert kept.settings["learned_steps"] == after and len(words) == 4
    whole = invert(inner_steps=2)[0].overrides["negative"]
    empty = tiny.conditioning("sd1", EMPTY)[0][0]
    assert torch.equal(words[:after], whole[:after])
    assert torch.equal(words[after:], (whole[after - 1] if after else empty).expand(4 - after, -1, -1, -1))


def test_rows_count_forward_and_backward():
    with tiny.Calls(model()) as calls:
        ui = invert(steps=2, inner_steps=3, early_stop=0.0).ui
    # path; then for each step the positive, three times forward and backward, and the step itself
    assert ui["ledits"][0]["unet_rows"] == 2 + 2 * (1 + 3 * 2 + 1)
    assert calls.rows == 2 + 2 * (1 + 3 + 1)


def test_models_and_prompts_that_cannot_be_learned_with_are_refused():
    with pytest.raises(ValueError, match="flow models are not"):
        invert("sd1", on=tiny.model("flow"))
    other = tiny.model()
    other.add_object_patch("diffusion_model", torch.nn.Identity())
    with pytest.raises(ValueError, match="not a U-Net"):
        invert("sd1", on=other)
    positive, negative = prompts()
    for bad in (negative + negative, tiny.conditioning(mask=torch.ones(1, 8, 8)), tiny.conditioning(control=object())):
        with pytest.raises(ValueError, match="plain words as the negative prompt"):
            invert(steps=2, inner_steps=1, pair=(positive, bad))
        with pytest.raises(ValueError, match="plain words as the positive prompt"):
            invert(steps=2, inner_steps=1, pair=(bad, negative))


class OnDemand(comfy.model_patcher.ModelPatcher):
    """A MODEL as under dynamic VRAM, as far as it can be had without a GPU: it must not be run for gradients itself."""

    non_dynamic_delegate_model = None
    get_non_dynamic_delegate = comfy.model_patcher.ModelPatcherDynamic.get_non_dynamic_delegate

    def is_dynamic(self):
        return True

    def load(self, *args, **kwargs):
        raise AssertionError("loaded for gradients")


def test_under_dynamic_vram_a_second_model_is_loaded_and_unloaded():
    cpu, loaded = torch.device("cpu"), []
    dynamic = OnDemand(model().model, cpu, cpu)
    with pytest.raises(ValueError, match="--disable-dynamic-vram"):
        invert(on=dynamic)

    def load_again(kind, disable_dynamic=False):
        assert disable_dynamic
        loaded.append(tiny.model(kind))
        return loaded[-1]

    dynamic.cached_patcher_init = (load_again, ("sd1",))
    was = state(dynamic)
    learned = invert(on=dynamic)[0].overrides["negative"]
    assert torch.equal(learned, invert()[0].overrides["negative"])
    assert len(loaded) == 1 and state(dynamic) == was and dynamic.non_dynamic_delegate_model is None
    assert not any(m.model is not None and m.model.model is loaded[0].model for m in comfy.model_management.current_loaded_models)


# --- in a server ----------------------------------------------------------------------------------------------------

def test_both_nodes_run_in_a_server_and_show_their_loss(client):
    common = {"model": ["demo", 0], "positive": ["source", 0], "negative": ["empty", 0], "latent": ["picture", 0],
              "cfg": CFG, "steps": 2, "scheduler": "ddim_uniform", "learning_rate": 0.01, "early_stop": 1e-5,
              "on_interrupt": ON_INTERRUPT[0]}
    graph = {
        "demo": {"class_type": "LEDITS_LoadDemoModel", "inputs": {}},
        "source": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["demo", 1], "text": "a red circle"}},
        "empty": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["demo", 1], "text": ""}},
        "picture": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "null": {"class_type": "LEDITS_NullTextInversion", "inputs": {**common, "inner_steps": 2}},
        "style": {"class_type": "LEDITS_StyleDiffusionInversion",
                  "inputs": {**common, "first_steps": 2, "attention_loss": 1.0, "tau_v": 0.5}},
    }
    for name in ("null", "style"):
        inputs = {key: common[key] for key in ("model", "positive", "negative", "cfg")}
        graph[f"{name} edit"] = {
            "class_type": "LEDITS_KSampler", "inputs": {**inputs, "inversion": [name, 0], "skip": 0}
        }
        graph[f"{name} out"] = {"class_type": "SaveLatent", "inputs": {"samples": [f"{name} edit", 0], "filename_prefix": name}}
    ((entry, seen),) = listen(client, graph)
    for name in ("null", "style"):
        assert entry["outputs"][name]["ledits"][0]["loss"] > 0
        assert any("step 2/2, loss" in text for text in seen.texts[name])
