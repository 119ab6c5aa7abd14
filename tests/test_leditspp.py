"""LEDITS++'s masks: against diffusers' pipeline on the demo model's weights, and the formulas typed slowly."""
import comfy.samplers
import pytest
import torch
from comfyui_ledits.demo import loader, scenes
from comfyui_ledits.nodes.semantic_concept import SemanticConcept
from comfyui_ledits.samplers import models
from comfyui_ledits.samplers.guider import LeditsGuider
from comfyui_ledits.samplers.ledits import LeditsSampler
from comfyui_ledits.samplers.methods import edit_friendly
from comfyui_ledits.samplers.methods.families import FAMILIES
from comfyui_ledits.samplers.methods.record import Inversion
from comfyui_ledits.samplers.methods.sega import ATTENTION, BOTH, MASKS, NOISE, SEGA, Concept, guidance
from comfyui_ledits.tools.benchmarks import speed_peers
from support import flow_editing, tiny, tiny_flow

STEPS, SCALE, THRESHOLD = 12, 5.0, 0.8
TOWARDS = {"direction": "towards", "scale": SCALE, "threshold": THRESHOLD, "warmup": 0, "cooldown": 0, "momentum_scale": 0.0,
           "momentum_beta": 0.0, "weight": 1.0}


class Lengths:
    """The pipeline's tokenizer, whose `length` counts the words, start and end (with transformers 5 it is 77 for all)."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **kwargs):
        out = self.tokenizer(*args, **kwargs)
        if "length" in out:
            out["length"] = out.attention_mask.sum(-1)
        return out


@pytest.fixture(scope="module")
def theirs():
    """diffusers' pipeline after its inversion of a picture, and the noise of its path, noisiest level first."""
    pytest.importorskip("diffusers")
    pipe = speed_peers.leditspp("cpu")
    pipe.tokenizer = Lengths(pipe.tokenizer)
    picture = torch.from_numpy(scenes.render(scenes.random_scene(3))[0])[None]
    with torch.no_grad():
        pipe.invert(picture.movedim(-1, 1), source_prompt="", num_inversion_steps=STEPS, skip=0.4,
                    generator=torch.Generator().manual_seed(0))
    assert int(pipe.scheduler.timesteps[-STEPS]) <= 800  # above, the pipeline's intersection leaves M2 out
    g, shape = torch.Generator().manual_seed(0), pipe.init_latents.shape
    noise = torch.stack([torch.randn(shape, generator=g) for _ in range(STEPS)]).flip(0)
    return pipe, picture, noise


@pytest.fixture(scope="module")
def ours(theirs):
    """The same inversion as a record, without the last residual, which diffusers leaves out."""
    pipe, picture, noise = theirs
    with torch.inference_mode():
        model, clip, vae = loader.load()
        y0 = model.model.process_latent_in(vae.encode(picture))
        sigmas = pipe.scheduler.sigmas[-STEPS - 1 :].float()
        latents = torch.cat([y0 + sigmas[:-1].view(-1, 1, 1, 1, 1) * noise, y0[None]])
        empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
        kind = FAMILIES["ve"]
        inner, conds, _ = comfy.sampler_helpers.prepare_sampling(
            model, y0.shape, {"empty": comfy.sampler_helpers.convert_cond(empty)}, model.model_options)
        model.pre_run()
        conds = comfy.samplers.process_conds(inner, y0, conds, y0.device)

        def denoise(y, sigma, i):
            return comfy.samplers.calc_cond_batch(inner, [conds["empty"]], y, sigma, model.model_options)[0]

        residuals = edit_friendly.residuals(latents, sigmas, torch.ones(STEPS), denoise, family=kind)
        residuals[-1] = 0
        path = Inversion(sigmas=sigmas, latents=latents, etas=torch.ones(STEPS), residuals=residuals, family="ve",
                         model=models.describe(model), method="by hand", latent_format=model.model.latent_format)
    return model, clip, empty, path


WAYS = {NOISE: {"use_intersect_mask": False}, ATTENTION: {"use_intersect_mask": False, "use_cross_attn_mask": True},
        BOTH: {"use_intersect_mask": True}}


@pytest.mark.parametrize("words", ["star", "a big red star"])
@pytest.mark.parametrize("masking", WAYS)
def test_the_edit_is_diffusers(theirs, ours, masking, words):
    pipe, (model, clip, empty, path) = theirs[0], ours
    with torch.no_grad():
        expected = pipe(editing_prompt=[words], edit_guidance_scale=SCALE, edit_threshold=THRESHOLD, edit_warmup_steps=0,
                        output_type="latent", **WAYS[masking]).images
    with torch.inference_mode():
        concepts = SemanticConcept.execute(prompt=words, clip=clip, masking=masking, **TOWARDS)[0]
        guider = LeditsGuider(model, empty, empty, 1.0, concepts)
        picture = path.latent_format.process_out(path.latents[-1])
        out = guider.sample(torch.zeros_like(picture), picture, LeditsSampler(path, solver="dpmpp_2m_sde"), path.sigmas,
                            disable_pbar=True)
    moved = (expected - path.latents[-1]).abs().max()
    assert moved > 0.3 and (path.latent_format.process_in(out) - expected).abs().max() < 2e-3 * moved


# --- the formulas ---------------------------------------------------------------------------------------------------------

def slow(d, threshold, masking, attention=None):
    """One picture [C, h, w] and one map, place by place."""
    def quantile(values):
        at = sorted(float(v) for v in values)
        place = threshold * (len(at) - 1)
        low = int(place)
        return at[low] + (place - low) * (at[min(low + 1, len(at) - 1)] - at[low])

    keep = torch.ones_like(d, dtype=torch.bool)
    if masking in (NOISE, BOTH):
        total = d.abs().sum(0)
        keep &= total >= quantile(total.flatten()) - 1e-6
    if masking in (ATTENTION, BOTH):
        w = torch.tensor([0.2119, 0.5761, 0.2119])
        smooth = torch.zeros_like(attention)
        h, width = attention.shape
        for y in range(h):
            for x in range(width):
                for i in range(3):
                    for j in range(3):
                        a, b = y + i - 1, x + j - 1
                        a, b = (1 if a < 0 else h - 2 if a == h else a), (1 if b < 0 else width - 2 if b == width else b)
                        smooth[y, x] += w[i] * w[j] * attention[a, b]
        here = smooth >= quantile(smooth.flatten()) - 1e-6
        keep &= here.repeat_interleave(d.shape[1] // h, 0).repeat_interleave(d.shape[2] // width, 1)
    return torch.where(keep, d, torch.zeros_like(d))


@pytest.mark.parametrize("masking", [NOISE, ATTENTION, BOTH])
@pytest.mark.parametrize("video", [False, True])
def test_masks_place_by_place(masking, video):
    g = torch.Generator().manual_seed(0)
    u, e, maps = torch.randn(2, 4, 16, 16, generator=g), torch.randn(2, 4, 16, 16, generator=g), torch.rand(2, 4, 4, generator=g)
    concept = Concept(conditioning=None, scale=3.0, direction=-1, threshold=0.7, mask=masking)
    expected = torch.stack([slow(-3 * (e - u)[b], 0.7, masking, maps[b]) for b in range(2)])
    if video:
        u, e, expected = u[:, :, None], e[:, :, None], expected[:, :, None]
    torch.testing.assert_close(guidance(e, u, concept, maps), expected)


def test_an_area_is_applied_last():
    """Zeros of a mask do not enter the quantile: outside of it nothing is pushed, inside as much as without it."""
    g = torch.Generator().manual_seed(0)
    u, e = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 4, 8, 8, generator=g)
    area = torch.zeros(1, 8, 8)
    area[..., :4] = 1
    for masking in (SEGA, NOISE):
        whole = guidance(e, u, Concept(conditioning=None, mask=masking))
        part = guidance(e, u, Concept(conditioning=None, mask=masking, area=area))
        assert torch.equal(part[..., :4], whole[..., :4]) and not part[..., 4:].any() and whole[..., 4:].any()


def test_a_start_is_a_share_of_the_steps():
    assert Concept(conditioning=None, warmup=2, start=0.25).started(20).warmup == 5
    assert Concept(conditioning=None, warmup=7, start=0.25).started(20).warmup == 7


@pytest.mark.parametrize("kind", ["flux", "sd3", "qwen", "zimage", "hidream"])
def test_attention_is_seen_in_joint_attention_too(kind):
    """As shares of the row of the joint softmax in the blocks of the preset."""
    model, count = tiny_flow.model(kind), 24 if kind == "hidream" else 12
    words = torch.zeros(count)
    words[3:6] = 1
    concept = Concept(conditioning=tiny_flow.conditioning(kind, 5), threshold=0.8, warmup=0, mask=BOTH, words=words)
    path = flow_editing.path(kind, 2)

    def run(*concepts):
        guider = LeditsGuider(model, tiny_flow.conditioning(kind, 1), tiny_flow.conditioning(kind, 3), 1.0, concepts)
        picture = path.latent_format.process_out(path.latents[-1])
        with torch.inference_mode():
            return guider.sample(torch.zeros_like(picture), picture, LeditsSampler(path), path.sigmas, disable_pbar=True)

    both, none = run(concept), run()
    assert torch.isfinite(both).all() and (both - none).abs().max() > 1e-4


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="needs the concept's words"):
        SemanticConcept.execute(prompt="", conditioning=tiny.conditioning(), masking=ATTENTION, **TOWARDS)
    with pytest.raises(ValueError, match="NaN"):
        SemanticConcept.execute(prompt="", conditioning=tiny.conditioning(), mask=torch.full((1, 8, 8), float("nan")), **TOWARDS)
    concept = Concept(conditioning=tiny.conditioning(), mask=ATTENTION, words=torch.ones(12), warmup=0)
    guider = LeditsGuider(tiny.model(), tiny.conditioning(), tiny.conditioning(), 1.0, [concept])
    with pytest.raises(ValueError, match="77 tokens, its words 12"):
        guider.sample(torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8), comfy.samplers.sampler_object("euler"),
                      torch.tensor([1.0, 0.5]), disable_pbar=True)
    assert set(WAYS) | {SEGA} == set(MASKS)
