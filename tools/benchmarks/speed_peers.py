"""diffusers' pipelines, which are released code for LEDITS++ and SEGA, on the demo model's weights."""

import contextlib
import io
import os
from types import SimpleNamespace

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def _calls(network, run):
    """What a diffusers network is given while `run()` runs: [(args, kwargs)]."""
    import torch

    calls = []
    hook = network.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        run()
    hook.remove()
    return calls


def count(network, run):
    """Rows that a diffusers network is given while `run()` runs."""
    return sum(len(args[0] if args else kwargs["hidden_states"]) for args, kwargs in _calls(network, run))


def bare(network, run):
    """A function that repeats the network's calls of `run()` and does nothing else."""
    calls = _calls(network, run)

    def again():
        for args, kwargs in calls:
            network(*args, **kwargs)

    return again


def parts(device):
    """The demo model as diffusers' classes: autoencoder (with a distribution, as pipelines expect it), U-Net, text, tokenizer."""
    import comfy
    from diffusers.utils import logging as diffusers_logging
    from transformers import CLIPTokenizer

    from ...demo import nets

    diffusers_logging.set_verbosity_error()
    vae, unet, short, tokens = nets.load_diffusers()
    state, key = short.state_dict(), next(k for k in short.state_dict() if k.endswith("token_embedding.weight"))
    text = nets.build_text(nets.TEXT_CONFIG["vocab_size"])
    table = state[key].mean(0).repeat(nets.TEXT_CONFIG["vocab_size"], 1)
    table[tokens.ids] = state[key]
    text.load_state_dict(state | {key: table})
    encode = vae.encode

    def encoded(x):
        latents = encode(x).latents
        return _Fields(latent_dist=SimpleNamespace(mode=lambda: latents, mean=latents))

    vae.encode = encoded
    vae.register_to_config(sample_size=nets.SIDE)
    tokenizer = CLIPTokenizer.from_pretrained(
        os.path.join(list(comfy.__path__)[0], "sd1_tokenizer"), model_max_length=nets.TOKENS)
    return vae.to(device), unet.to(device), text.eval().to(device), tokenizer


class _Fields(dict):
    """A dictionary whose entries are attributes too, as diffusers' outputs are."""

    __getattr__ = dict.__getitem__


def leditspp(device):
    """diffusers' LEDITS++ pipeline."""
    from diffusers import DPMSolverMultistepScheduler, LEditsPPPipelineStableDiffusion

    vae, unet, text, tokenizer = parts(device)
    scheduler = DPMSolverMultistepScheduler(
        **BETAS, prediction_type="v_prediction", algorithm_type="sde-dpmsolver++", solver_order=2, steps_offset=1)
    pipe = LEditsPPPipelineStableDiffusion(vae, text, tokenizer, unet, scheduler, None, None, False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sega(device):
    """diffusers' SEGA pipeline."""
    from diffusers import DDIMScheduler, SemanticStableDiffusionPipeline

    vae, unet, text, tokenizer = parts(device)
    scheduler = DDIMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = SemanticStableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def quiet(run):
    """`run`, without what it prints."""
    import torch

    def silently(*arguments):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            return run(*arguments)

    return silently
