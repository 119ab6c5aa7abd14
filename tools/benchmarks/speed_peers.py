"""Other people's code on the demo model's weights, beside which the benchmark measures.

diffusers' pipelines are released code for LEDITS++ and SEGA. Of the methods that diffusers does not have, the authors' code
is measured where the person brings it (`--reference FOLDER`, a checkout of theirs); nothing of it is part of this pack.
"""

import contextlib
import io
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def _calls(network, run):
    """What a diffusers U-Net is given while `run()` runs: [(args, kwargs)]."""
    import torch

    calls = []
    hook = network.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        run()
    hook.remove()
    return calls


def count(network, run):
    """Rows that a diffusers U-Net is given while `run()` runs."""
    return sum(len(args[0]) for args, _ in _calls(network, run))


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


def _old_attention(unet):
    """Put attention modules in place as the authors' code knows them from the diffusers of its time."""
    import torch
    from diffusers.models.attention_processor import Attention

    class CrossAttention(torch.nn.Module):
        def __init__(self, now):
            super().__init__()
            self.to_q, self.to_k, self.to_v, self.to_out = now.to_q, now.to_k, now.to_v, now.to_out
            self.heads, self.scale = now.heads, now.scale
            self.reshape_heads_to_batch_dim, self.reshape_batch_dim_to_heads = now.head_to_batch_dim, now.batch_to_head_dim

        def __call__(self, x, encoder_hidden_states=None, **_):
            return self.forward(x, context=encoder_hidden_states)

    for parent in list(unet.modules()):
        for name, child in parent.named_children():
            if type(child) is Attention:
                setattr(parent, name, CrossAttention(child))


# Packages that the checkouts import and what is measured does not use, with the names that they take from them.
STAND_INS = {
    "matplotlib": (), "matplotlib.pyplot": (), "matplotlib.backends": (), "matplotlib.backends.backend_agg": ("FigureCanvasAgg",),
    "cv2": (), "IPython": (), "IPython.display": ("display",), "pytorch_lightning": ("seed_everything",),
}

PACKAGES = ("utils", "models", "masactrl", "ddm_inversion", "prompt_to_prompt")  # of the checkouts


@contextlib.contextmanager
def imported(folder):
    """The checkout first on the path, stand-ins for packages that are not installed."""
    before = set(sys.modules)
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in ("utils", "models")}
    sys.path.insert(0, str(folder))
    for name in ("utils", "models"):  # ComfyUI has packages of these names
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(Path(folder, name))]
    for name, attributes in STAND_INS.items():
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__spec__, sys.modules[name].is_stand_in = ModuleSpec(name, None), True
            for attribute in attributes:
                setattr(sys.modules[name], attribute, None)
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "is_stand_in", False) or name.split(".")[0] in PACKAGES:
                del sys.modules[name]
        sys.modules.update(hidden)


def commit(folder):
    """The commit of a checkout, or what is known instead."""
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()[:12] or "no commit known"


def direct_p2p(folder, device, steps):
    """PnPInversion's runner of Direct Inversion with Prompt-to-Prompt: `run(picture uint8, source, target)`, and its U-Net."""
    import numpy as np
    from models import p2p_editor
    from models.p2p.attention_control import AttentionReplace
    from models.p2p.scheduler_dev import DDIMSchedulerDev

    vae, unet, text, tokenizer = parts(device)
    _old_attention(unet)
    unet.in_channels = unet.config.in_channels
    p2p_editor.txt_draw = lambda text: np.zeros((512, 512, 3), np.uint8)  # a caption, which needs matplotlib
    AttentionReplace.__init__.__defaults__ = (*AttentionReplace.__init__.__defaults__[:-1], device)  # of theirs, always "cuda"
    editor = object.__new__(p2p_editor.P2PEditor)
    scheduler = DDIMSchedulerDev(**BETAS, prediction_type="epsilon", clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(steps)
    editor.device, editor.num_ddim_steps = device, steps
    editor.ldm_stable = SimpleNamespace(
        vae=vae, unet=unet, text_encoder=text, tokenizer=tokenizer, scheduler=scheduler, device=device)

    def run(picture, source, target):
        return editor.edit_image_directinversion(picture, source, target, is_replace_controller=True)

    return run, unet


def masactrl(folder, device, steps):
    """MasaCtrl's playground on a real picture: DDIM inversion of the source, then both prompts with mutual attention."""
    import torch
    from diffusers import DDIMScheduler
    from masactrl import masactrl_utils
    from masactrl.diffuser_utils import MasaCtrlPipeline
    from masactrl.masactrl import MutualSelfAttentionControl

    vae, unet, text, tokenizer = parts(device)
    unet.in_channels = unet.config.in_channels
    scheduler = DDIMScheduler(**BETAS, prediction_type="epsilon", clip_sample=False, set_alpha_to_one=False)
    pipe = MasaCtrlPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    layers = sum(type(module).__name__ == "Attention" for module in unet.modules()) // 2

    def run(picture, source, target):
        masactrl_utils.regiter_attention_editor_diffusers(pipe, masactrl_utils.AttentionBase())
        image = torch.from_numpy(picture).float().movedim(-1, 0)[None].to(device) / 127.5 - 1
        start, _ = pipe.invert(image, source, guidance_scale=1.0, num_inference_steps=steps, return_intermediates=True)
        control = MutualSelfAttentionControl(min(4, steps - 1), layers // 2, total_steps=steps)
        control.layer_idx = list(range(layers // 2, layers))
        masactrl_utils.regiter_attention_editor_diffusers(pipe, control)
        return pipe([source, target], latents=start.expand(2, -1, -1, -1), guidance_scale=7.5, num_inference_steps=steps)

    return run, unet


def edit_friendly(folder, device, steps):
    """DDPM_inversion's own main job: inversion at a scale of 3.5, edit at 15 after a skip of 36 %."""
    import torch
    from ddm_inversion.inversion_utils import inversion_forward_process, inversion_reverse_process
    from diffusers import DDIMScheduler

    vae, unet, text, tokenizer = parts(device)
    called = SimpleNamespace(forward=lambda *args, **kwargs: unet(*args, **kwargs), in_channels=4, sample_size=64)
    scheduler = DDIMScheduler(**BETAS, prediction_type="epsilon", clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(steps)
    model = SimpleNamespace(unet=called, text_encoder=text, tokenizer=tokenizer, scheduler=scheduler, device=device)
    skip = round(0.36 * steps)

    def run(picture, source, target):
        image = torch.from_numpy(picture).float().movedim(-1, 0)[None].to(device) / 127.5 - 1
        latents = vae.encode(image).latent_dist.mode() * 0.18215
        _, noise, path = inversion_forward_process(
            model, latents, etas=1, prompt=source, cfg_scale=3.5, num_inference_steps=steps)
        edited, _ = inversion_reverse_process(
            model, xT=path[steps - skip], etas=1, prompts=[target], cfg_scales=[15], zs=noise[: steps - skip])
        return vae.decode(edited / 0.18215).sample

    return run, unet


# A file that tells a checkout, and what is measured of it.
REFERENCES = {
    "PnPInversion": ("models/p2p_editor.py", direct_p2p),
    "MasaCtrl": ("masactrl/masactrl_utils.py", masactrl),
    "DDPM_inversion": ("ddm_inversion/inversion_utils.py", edit_friendly),
}


def known(folder):
    """Name of the checkout in `folder`.

    Raises:
        SystemExit: it is none of `REFERENCES`.
    """
    for name, (file, _) in REFERENCES.items():
        if (Path(folder) / file).is_file():
            return name
    raise SystemExit(f"{folder} is no checkout of {', '.join(REFERENCES)}.")


def quiet(run):
    """`run`, without what it prints."""
    import torch

    def silently(*arguments):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            return run(*arguments)

    return silently
