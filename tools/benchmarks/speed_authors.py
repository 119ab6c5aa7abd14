"""The authors' code, called as its own scripts call it, on weights that this pack runs on; imported from a checkout.

Each function is given the benchmark and returns `run(picture uint8 [512, 512, 3], source, target)` and its network.
"""

import tempfile
from pathlib import Path
from types import SimpleNamespace

from .speed_peers import BETAS, parts


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


def direct_p2p(bench):
    """PnPInversion's runner of Direct Inversion with Prompt-to-Prompt: `run(picture uint8, source, target)`, and its U-Net."""
    import numpy as np
    from models import p2p_editor
    from models.p2p.attention_control import AttentionReplace
    from models.p2p.scheduler_dev import DDIMSchedulerDev

    vae, unet, text, tokenizer = parts(bench.device)
    _old_attention(unet)
    unet.in_channels = unet.config.in_channels
    p2p_editor.txt_draw = lambda text: np.zeros((512, 512, 3), np.uint8)  # a caption, which needs matplotlib
    AttentionReplace.__init__.__defaults__ = (*AttentionReplace.__init__.__defaults__[:-1], bench.device)  # of theirs, always "cuda"
    editor = object.__new__(p2p_editor.P2PEditor)
    scheduler = DDIMSchedulerDev(**BETAS, prediction_type="epsilon", clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(bench.steps)
    editor.device, editor.num_ddim_steps = bench.device, bench.steps
    editor.ldm_stable = SimpleNamespace(
        vae=vae, unet=unet, text_encoder=text, tokenizer=tokenizer, scheduler=scheduler, device=bench.device)

    def run(picture, source, target):
        return editor.edit_image_directinversion(picture, source, target, is_replace_controller=True)

    return run, unet


def masactrl(bench):
    """MasaCtrl's playground on a real picture: DDIM inversion of the source, then both prompts with mutual attention."""
    import torch
    from diffusers import DDIMScheduler
    from masactrl import masactrl_utils
    from masactrl.diffuser_utils import MasaCtrlPipeline
    from masactrl.masactrl import MutualSelfAttentionControl

    vae, unet, text, tokenizer = parts(bench.device)
    unet.in_channels = unet.config.in_channels
    scheduler = DDIMScheduler(**BETAS, prediction_type="epsilon", clip_sample=False, set_alpha_to_one=False)
    pipe = MasaCtrlPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    layers = sum(type(module).__name__ == "Attention" for module in unet.modules()) // 2

    def run(picture, source, target):
        masactrl_utils.regiter_attention_editor_diffusers(pipe, masactrl_utils.AttentionBase())
        image = torch.from_numpy(picture).float().movedim(-1, 0)[None].to(bench.device) / 127.5 - 1
        start, _ = pipe.invert(image, source, guidance_scale=1.0, num_inference_steps=bench.steps, return_intermediates=True)
        control = MutualSelfAttentionControl(min(4, bench.steps - 1), layers // 2, total_steps=bench.steps)
        control.layer_idx = list(range(layers // 2, layers))
        masactrl_utils.regiter_attention_editor_diffusers(pipe, control)
        return pipe([source, target], latents=start.expand(2, -1, -1, -1), guidance_scale=7.5, num_inference_steps=bench.steps)

    return run, unet


def edit_friendly(bench):
    """DDPM_inversion's own main job: inversion at a scale of 3.5, edit at 15 after a skip of 36 %."""
    import torch
    from ddm_inversion.inversion_utils import inversion_forward_process, inversion_reverse_process
    from diffusers import DDIMScheduler

    vae, unet, text, tokenizer = parts(bench.device)
    called = SimpleNamespace(forward=lambda *args, **kwargs: unet(*args, **kwargs), in_channels=4, sample_size=64)
    scheduler = DDIMScheduler(**BETAS, prediction_type="epsilon", clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(bench.steps)
    model = SimpleNamespace(unet=called, text_encoder=text, tokenizer=tokenizer, scheduler=scheduler, device=bench.device)
    skip = round(0.36 * bench.steps)

    def run(picture, source, target):
        image = torch.from_numpy(picture).float().movedim(-1, 0)[None].to(bench.device) / 127.5 - 1
        latents = vae.encode(image).latent_dist.mode() * 0.18215
        _, noise, path = inversion_forward_process(
            model, latents, etas=1, prompt=source, cfg_scale=3.5, num_inference_steps=bench.steps)
        edited, _ = inversion_reverse_process(
            model, xT=path[bench.steps - skip], etas=1, prompts=[target], cfg_scales=[15], zs=noise[: bench.steps - skip])
        return vae.decode(edited / 0.18215).sample

    return run, unet


def plug_and_play(bench):
    """pnp-diffusers: DDIM inversion that keeps every latent as a file, then the edit that reads them; its reconstruction left out."""
    import torch
    from diffusers import DDIMScheduler
    from PIL import Image
    from pnp import PNP
    from preprocess import Preprocess

    from .speed_models import diffusers_unet

    vae, unet = parts(bench.device)[0], diffusers_unet(bench.model).to(bench.device)
    scheduler = DDIMScheduler(**BETAS, prediction_type="epsilon", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(bench.steps)
    home = tempfile.TemporaryDirectory(prefix="ledits-bench-")
    Path(home.name, "picture").mkdir()

    def words(text):
        return bench.cond(text)[0][0].to(bench.device)

    def made(kind):
        """One of its objects, without loading anything."""
        made = object.__new__(kind)
        torch.nn.Module.__init__(made)
        made.device, made.vae, made.unet, made.scheduler = bench.device, vae, unet, scheduler
        return made

    def run(picture, source, target):
        Image.fromarray(picture).save(Path(home.name, "picture.png"))
        before = made(Preprocess)
        latents = before.encode_imgs(torch.from_numpy(picture).float().movedim(-1, 0)[None].to(bench.device) / 255)
        before.ddim_inversion(words(source), latents, str(Path(home.name, "picture")))
        edit = made(PNP)
        edit.config = {
            "image_path": str(Path(home.name, "picture.png")), "latents_path": home.name, "output_path": home.name,
            "n_timesteps": bench.steps, "pnp_f_t": 0.8, "pnp_attn_t": 0.5, "guidance_scale": 7.5, "prompt": "edit",
        }
        edit.image, edit.eps = edit.get_data()
        edit.text_embeds, edit.pnp_guidance_embeds = torch.cat([words(""), words(target)]), words("")
        edit.run_pnp()
        return home  # the folder lives as long as this function does

    return run, unet


def flowedit(bench):
    """FlowEdit's function for Flux, with its own settings: 24 of 28 steps."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from FlowEdit_utils import FlowEditFLUX

    from ...demo import flow_net, nets
    from ...samplers import published

    vae = parts(bench.device)[0]
    _, _, text, tokens = nets.load_diffusers()
    transformer = flow_net.load_diffusers().to(bench.device)
    text.to(bench.device)

    most = bench.steps - published.FLUX.skip(bench.steps)

    def encode_prompt(prompt, **_):
        words, pooled = flow_net.encode(text, tokens, [prompt])
        return words, pooled, torch.zeros(words.shape[1], 3, device=bench.device)

    def prepare_latents(latents, **_):
        h, w = (side // 2 for side in latents.shape[-2:])
        return latents, FluxPipeline._prepare_latent_image_ids(1, h, w, bench.device, latents.dtype)

    # The pipeline as it was in its time, when a token's side counted as one of the autoencoder's.
    pipe = SimpleNamespace(
        vae_scale_factor=16, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        check_inputs=lambda **_: None, prepare_latents=prepare_latents, encode_prompt=encode_prompt,
        _pack_latents=FluxPipeline._pack_latents,
        _unpack_latents=lambda out, h, w, factor: FluxPipeline._unpack_latents(out, h, w, factor // 2))

    def run(picture, source, target):
        image = torch.from_numpy(picture).float().movedim(-1, 0)[None].to(bench.device) / 127.5 - 1
        latents = vae.encode(image).latent_dist.mode()
        edited = FlowEditFLUX(pipe, pipe.scheduler, latents, source, target, "", bench.steps, n_max=most)
        return vae.decode(edited).sample

    return run, transformer
