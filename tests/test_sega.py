"""Semantic guidance: the paper's algorithm, diffusers' pipeline, and what is left out because it cannot matter."""
import functools
import itertools
import warnings

import comfy.samplers
import pytest
import torch
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.semantic_concept import SemanticConcept
from comfyui_ledits.samplers.guider import LeditsGuider
from comfyui_ledits.samplers.methods.sega import Concept, Sega
from oracles import diffusion
from support import runs, tiny
from support.runs import model

pytestmark = pytest.mark.usefixtures("inference_mode")


def concept(**changes):
    """Settings of a concept with the symbols of the paper."""
    symbols = {"sign": 1, "s_e": 5.0, "lambda": 0.9, "delta": 2, "s_m": 0.3, "beta_m": 0.6, "g": 1.0, "cooldown": None}
    return {**symbols, **changes}


def ours(c, conditioning=None):
    return Concept(
        conditioning=conditioning, direction=c["sign"], scale=c["s_e"], threshold=c["lambda"], warmup=c["delta"],
        cooldown=c["cooldown"], momentum_scale=c["s_m"], momentum_beta=c["beta_m"], weight=c["g"],
    )


def run(concepts, unconditional, conditional):
    """gamma of every step by the class under test, which is given only the predictions it asks for."""
    sega, out = Sega([ours(c) for c in concepts]), []
    for k, (u, e) in enumerate(zip(unconditional, conditional)):
        wanted = sega.needed(k)
        gamma = sega(k, u if wanted else None, {i: e[i] for i in wanted})
        out.append(torch.zeros_like(u) if gamma is None else gamma)
    return torch.stack(out)


def predictions(concepts, steps=9, shape=(2, 4, 5, 7)):
    """Noise predictions of a run: [steps, B, C, H, W], and [steps, concepts, B, C, H, W]."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(steps, *shape, generator=generator),
            torch.randn(steps, len(concepts), *shape, generator=generator))


# --- the algorithm --------------------------------------------------------------------------------------------------

ALGORITHM = {
    "one": [concept()],
    "one without momentum": [concept(s_m=0.0)],
    "acts from the start": [concept(delta=0)],
    "two that oppose": [concept(), concept(sign=-1, s_e=8.0)],
    "two with momenta of their own": [concept(s_m=0.5, beta_m=0.2), concept(s_m=0.1, beta_m=0.9, sign=-1)],
    "weights": [concept(g=0.25), concept(g=2.0)],
    "part still warms up: weighted mean": [concept(delta=1, g=0.5), concept(delta=3), concept(delta=6, g=3.0)],
    "cool-down leaves the momentum": [concept(cooldown=5), concept(delta=3)],
    "cool-down before another's warm-up ends": [concept(delta=1, cooldown=3), concept(delta=5), concept(delta=2)],
    "cool-down of all": [concept(cooldown=4), concept(cooldown=6, sign=-1)],
    "cool-down before the warm-up": [concept(delta=4, cooldown=2)],
    "weight 0 beside another": [concept(g=0.0), concept(delta=4)],
    "scale 0 beside another": [concept(s_e=0.0), concept(delta=4)],
    "beta 0 and 1": [concept(beta_m=0.0), concept(beta_m=1.0)],
    "warm-up past the end": [concept(delta=99), concept(delta=1)],
    "thresholds": [concept(**{"lambda": 0.0}), concept(**{"lambda": 0.5}), concept(**{"lambda": 0.99})],
}


@pytest.mark.parametrize("concepts", ALGORITHM.values(), ids=ALGORITHM.keys())
def test_a_whole_run_is_the_paper_step_by_step(concepts):
    unconditional, conditional = predictions(concepts)
    oracle = diffusion.Sega(concepts)
    expected = torch.stack([oracle(k, u, e) for k, (u, e) in enumerate(zip(unconditional, conditional))])
    torch.testing.assert_close(run(concepts, unconditional, conditional), expected.float(), rtol=1e-5, atol=1e-5)


def test_ties_at_the_threshold_are_kept_and_scaling_comes_first():
    difference = torch.tensor([0.0, 1.0, -2.0, 2.0, 3.0]).view(1, 1, 1, 5)
    gamma = run([concept(delta=0, s_m=0.0, s_e=10.0, **{"lambda": 0.5})], torch.zeros(1, 1, 1, 1, 5), difference[None, None])
    assert gamma.flatten().tolist() == [0, 0, -20, 20, 30]


def test_each_picture_and_channel_has_its_own_threshold():
    concepts = [concept(delta=0, s_m=0.0)]
    unconditional, conditional = predictions(concepts)
    louder = torch.tensor([1.0, 100.0]).view(2, 1, 1, 1) * torch.tensor([1.0, 7.0, 30.0, 2.0]).view(4, 1, 1)
    plain = run(concepts, 0 * unconditional, conditional)
    torch.testing.assert_close(run(concepts, 0 * unconditional, conditional * louder), plain * louder, rtol=1e-5, atol=1e-5)
    assert ((plain != 0).flatten(3).sum(3) == 4).all()  # a tenth of 35, and what is interpolated


def test_momentum_moves_once_where_a_step_is_evaluated_twice():
    concepts = [concept(delta=0), concept(sign=-1, delta=1)]
    unconditional, conditional = predictions(concepts)
    once = run(concepts, unconditional, conditional)
    sega = Sega([ours(c) for c in concepts])
    for k in range(9):
        for repeat in (2.0, 1.0):  # the first evaluation, at other values, leaves nothing behind
            gamma = sega(k, unconditional[k] * repeat, dict(enumerate(conditional[k] * repeat)))
        torch.testing.assert_close(gamma, once[k])


SETTINGS = list(itertools.product([0, 2, 99], [None, 1, 3], [0.0, 1.0]))


@pytest.mark.parametrize(("delta", "cooldown", "g"), SETTINGS)
def test_no_combination_of_warmup_cooldown_and_weight_gives_nan(delta, cooldown, g):
    for other in SETTINGS:
        concepts = [concept(delta=d, cooldown=c, g=w) for d, c, w in ((delta, cooldown, g), other)]
        gamma = run(concepts, *predictions(concepts, steps=5, shape=(1, 2, 3, 3)))
        assert torch.isfinite(gamma).all(), concepts


# --- diffusers' released pipeline -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pipeline():
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = {word: i for i, word in enumerate(["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"])}
    letters |= {f"{letter}</w>": i + len(letters) for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    tokenizer = CLIPTokenizer(vocab=letters, merges=[], model_max_length=20)
    text = CLIPTextConfig(hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
                          vocab_size=len(letters), max_position_embeddings=20, bos_token_id=0, eos_token_id=1)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4)
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = diffusers.SemanticStableDiffusionPipeline(
            vae, CLIPTextModel(text), tokenizer, unet, scheduler, None, None, requires_safety_checker=False
        )
    made.set_progress_bar_config(disable=True)
    return made


# One momentum for all concepts, and no NaN: diffusers has no more.
RELEASED = {
    "one": [concept()],
    "two that oppose": [concept(), concept(sign=-1, s_e=8.0, g=0.5)],
    "part still warms up": [concept(delta=1, g=0.5), concept(delta=3), concept(delta=5, sign=-1)],
    "cool-down": [concept(cooldown=4), concept(delta=3)],
    "thresholds": [concept(**{"lambda": 0.5, "delta": 0}), concept(**{"lambda": 0.99, "delta": 0})],
}


@pytest.mark.parametrize("concepts", RELEASED.values(), ids=RELEASED.keys())
@pytest.mark.parametrize("batch", [1, 2])
def test_a_whole_run_is_that_of_the_released_pipeline(pipeline, concepts, batch):
    def each(symbol):
        return [c[symbol] for c in concepts]

    pipeline(
        ["a dog", "a tree"][:batch], height=8, width=8, num_inference_steps=7, guidance_scale=4.0, output_type="latent",
        generator=torch.Generator().manual_seed(1), editing_prompt=["red", "old", "snow"][: len(concepts)],
        reverse_editing_direction=[sign < 0 for sign in each("sign")], edit_guidance_scale=each("s_e"),
        edit_warmup_steps=each("delta"), edit_cooldown_steps=[99 if c is None else c for c in each("cooldown")],
        edit_threshold=each("lambda"), edit_weights=each("g"), edit_momentum_scale=0.3, edit_mom_beta=0.6,
    )
    gamma = run(concepts, pipeline.uncond_estimates[:7], pipeline.edit_estimates[:7])
    assert gamma.abs().max() > 0.1
    torch.testing.assert_close(gamma, pipeline.sem_guidance[:7], rtol=1e-5, atol=1e-6)


# --- in an edit: the same as with everything evaluated, and nothing evaluated in vain -------------------------------

SOURCE, EMPTY, TARGET, RED, OLD = (tiny.conditioning(seed=seed) for seed in range(1, 6))
STEPS, SKIP = 10, 2
RUN, TIMESTEPS = STEPS - SKIP, diffusion.ddim_uniform(STEPS)


@functools.cache
def inverted(kind, batch):
    latent = tiny.latent(kind, batch)
    inversion = runs.invert(EditFriendlyInversion, kind, latent, cfg=3.5, steps=STEPS)[0]
    return latent, inversion


@functools.cache
def inverted_by_the_reference(kind, batch):
    x_0 = inverted(kind, batch)[0]["samples"].double() * tiny.scale(kind)
    noise = torch.stack([diffusion.noise(seed, STEPS, (4, 8, 8)) for seed in range(batch)], dim=1)
    return diffusion.invert(diffusion.guided(model(kind), SOURCE, EMPTY, 3.5), x_0, TIMESTEPS, noise)


def with_everything_evaluated(kind, batch, positive, negative, cfg, concepts):
    """The same edit by the reference, where every prediction is made at every step."""
    x, rest = inverted_by_the_reference(kind, batch)
    sega = diffusion.Sega([c for c, _ in concepts])

    def predict(x, t):
        k = TIMESTEPS.index(t) - SKIP
        e = diffusion.eps(model(kind), negative, x, t)
        gamma = sega(k, e, [diffusion.eps(model(kind), words, x, t) for _, words in concepts]) if concepts else 0
        return e + cfg * (diffusion.eps(model(kind), positive, x, t) - e) + gamma

    return (diffusion.edit(predict, x[SKIP], rest[SKIP:], TIMESTEPS[SKIP:]) / tiny.scale(kind)).float()


PLAIN = {"s_m": 0.0, "delta": 3}
# name: positive, negative, cfg, concepts, U-Net rows a picture (positive, negative, concepts)
EDITS = {
    "cfg 1 without concepts: no negative": (TARGET, EMPTY, 1.0, [], (RUN, 0, 0)),
    "cfg 0: no positive": (TARGET, EMPTY, 0.0, [], (0, RUN, 0)),
    "equal prompts: one for both": (EMPTY, EMPTY, 7.5, [], (RUN, 0, 0)),
    "equal prompts, another object": (EMPTY, tiny.conditioning(seed=2), 7.5, [(concept(), RED)], (RUN, 0, RUN)),
    "momentum: from the start": (TARGET, EMPTY, 3.0, [(concept(), RED)], (RUN, RUN, RUN)),
    "no momentum: not while warming up": (TARGET, EMPTY, 3.0, [(concept(**PLAIN), RED)], (RUN, RUN, RUN - 3)),
    "cfg 1: negative where a concept acts": (TARGET, EMPTY, 1.0, [(concept(**PLAIN), RED)], (RUN, RUN - 3, RUN - 3)),
    "cfg below 1": (TARGET, EMPTY, 0.5, [(concept(), RED)], (RUN, RUN, RUN)),
    "cfg 0 with a concept": (TARGET, EMPTY, 0.0, [(concept(), RED)], (0, RUN, RUN)),
    "cool-down": (TARGET, EMPTY, 3.0, [(concept(cooldown=5), RED)], (RUN, RUN, 5)),
    "weight 0": (TARGET, EMPTY, 3.0, [(concept(g=0.0), RED), (concept(delta=4), OLD)], (RUN, RUN, RUN)),
    "weight 0 alone at cfg 1": (TARGET, EMPTY, 1.0, [(concept(g=0.0), RED)], (RUN, 0, 0)),
    "scale 0": (TARGET, EMPTY, 3.0, [(concept(s_e=0.0), RED)], (RUN, RUN, 0)),
    "two that oppose": (TARGET, EMPTY, 3.0, [(concept(), RED), (concept(sign=-1, delta=4), OLD)], (RUN, RUN, 2 * RUN)),
}


@pytest.mark.parametrize(("kind", "batch"), [("sd1", 2), ("sd2", 1)])
@pytest.mark.parametrize(("positive", "negative", "cfg", "concepts", "rows"), EDITS.values(), ids=EDITS.keys())
def test_an_edit_is_the_reference_and_evaluates_only_what_matters(kind, batch, positive, negative, cfg, concepts, rows):
    chain = tuple(ours(c, words) for c, words in concepts)
    _, inversion = inverted(kind, batch)
    with tiny.Calls(model(kind)) as calls:
        output = runs.edit_node(kind, inversion, pair=(positive, negative), cfg=cfg, skip=SKIP, concepts=chain)
    shown = [0 if prompt is None else len(calls.rows_of(prompt)) for prompt in (positive, None if rows[1] == 0 else negative)]
    assert shown + [calls.rows - sum(shown)] == [batch * n for n in rows]
    assert output.ui["ledits"] == [{"steps": RUN, "unet_rows": calls.rows}]
    expected = with_everything_evaluated(kind, batch, positive, negative, cfg, concepts)
    torch.testing.assert_close(output[0]["samples"], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cfg", [0.0, 0.5, 1.0])
def test_concepts_guide_at_a_low_cfg(cfg):
    _, inversion = inverted("sd1", 1)
    plain, guided = (
        runs.edit("sd1", inversion, pair=(TARGET, EMPTY), cfg=cfg, skip=SKIP, concepts=chain)
        for chain in (None, (ours(concept(), RED),))
    )
    assert (plain - guided).abs().max() > 0.1


def test_the_concept_node_makes_what_its_widgets_say():
    first = SemanticConcept.execute(prompt="", direction="away", scale=7.0, threshold=0.95, warmup=2, cooldown=0,
        momentum_scale=0.3, momentum_beta=0.6, weight=1.0, conditioning=RED)[0]
    both = SemanticConcept.execute(prompt="", direction="towards", scale=5.0, threshold=0.5, warmup=1, cooldown=8,
        momentum_scale=0.0, momentum_beta=0.0, weight=2.0, conditioning=OLD, concepts=first)[0]
    assert both == (
        Concept(conditioning=RED, direction=-1, scale=7.0, threshold=0.95, warmup=2, cooldown=None, momentum_scale=0.3,
                momentum_beta=0.6, weight=1.0),
        Concept(conditioning=OLD, direction=1, scale=5.0, threshold=0.5, warmup=1, cooldown=8, momentum_scale=0.0,
                momentum_beta=0.0, weight=2.0),
    )


# --- with stock samplers --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde"])
def test_warmup_counts_the_steps_of_the_schedule_whatever_the_sampler_evaluates(name):
    sampling = model("sd1").get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 6)
    guider = LeditsGuider(model("sd1"), TARGET, EMPTY, 3.0, [ours(concept(delta=2, s_m=0.0, cooldown=4), RED)])
    latent = tiny.latent()["samples"]
    with tiny.Calls(model("sd1")) as calls:
        guider.sample(torch.randn(latent.shape, generator=torch.Generator().manual_seed(0)), latent,
                      comfy.samplers.sampler_object(name), sigmas, disable_pbar=True, seed=0)
    evaluated = calls.rows_of(TARGET)
    assert len(evaluated) >= (6 if name == "euler" else 11)
    levels = [float(sampling.timestep(s)) for s in sigmas[:-1]]
    acting = [t for t in evaluated if levels[4] < t <= levels[2]]
    assert calls.rows_of(RED) == acting
    assert 0 < len(acting) < len(evaluated)


def test_heun_with_momentum_is_heun_on_the_reference():
    """y' = y + (s' - s) * (d(y, s) + d(y + (s' - s) * d(y, s), s')) / 2, where both evaluations know the step they are in."""
    timesteps = [901, 701, 501, 301, 101]
    sigmas = torch.stack([diffusion.sigma(t) for t in [*timesteps, -1]])
    settings, noise = concept(delta=1), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sega, nu_before = diffusion.Sega([settings]), {}

    def slope(y, k):
        t = timesteps[k]
        sega.nu = list(nu_before.setdefault(k, sega.nu))
        x = y * diffusion.abar(t).sqrt()
        e = diffusion.eps(model("sd1"), EMPTY, x, t)
        return e + sega(k, e, [diffusion.eps(model("sd1"), RED, x, t)])

    y = noise.double() * sigmas[0]
    for k in range(5):
        h = sigmas[k + 1] - sigmas[k]
        d = slope(y, k)
        y = y + h * (d if k == 4 else (d + slope(y + h * d, k + 1)) / 2)

    guider = LeditsGuider(model("sd1"), EMPTY, EMPTY, 1.0, [ours(settings, RED)])
    out = guider.sample(noise, torch.zeros(1, 4, 8, 8), comfy.samplers.sampler_object("heun"), sigmas.float(),
                        disable_pbar=True, seed=0)
    torch.testing.assert_close(out, (y / tiny.scale("sd1")).float(), rtol=1e-3, atol=1e-3)
