"""Prompts, paths and runs of an edit on the tiny models."""
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models_base
import torch
from comfyui_ledits.attention_hooks.text.prompts import edit_prompts
from comfyui_ledits.samplers import models
from comfyui_ledits.samplers.capture_sampler import CaptureSampler
from comfyui_ledits.samplers.guider import LeditsGuider
from comfyui_ledits.samplers.ledits import LeditsSampler
from comfyui_ledits.samplers.methods.record import Inversion

from support import tiny


def clip(kind="sd1", embeddings=None):
    """CLIP of ComfyUI's own classes, with random weights and the widths of the tiny models."""
    def config(width):
        return {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3, "num_attention_heads": 2}

    both = kind.startswith("sdxl")
    own = comfy.sdxl_clip if both else comfy.sd1_clip
    target = comfy.supported_models_base.ClipTarget(
        own.SDXLTokenizer if both else own.SD1Tokenizer, own.SDXLClipModel if both else own.SD1ClipModel)
    options = {"clip_l_model_config": config(tiny.CONTEXT - tiny.POOLED if both else tiny.CONTEXT),
               "clip_g_model_config": config(tiny.POOLED), "dtype": torch.float32}
    out = comfy.sd.CLIP(target, embedding_directory=embeddings, model_options=options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in out.cond_stage_model.named_parameters():
            if "norm" in name or p.ndim == 0:
                p.fill_(1 if name.endswith("weight") else 0)
            else:
                p.normal_(generator=generator).mul_(0.5 if "embedding" in name else p.shape[-1] ** -0.5)
    return out


def prompts(kind, source, target, mapping="auto"):
    return edit_prompts(clip(kind), source, target, mapping)


def negative(kind, text=""):
    encoder = clip(kind)
    return encoder.encode_from_tokens_scheduled(encoder.tokenize(text))


def timesteps(steps):
    """Timesteps of the path's levels, noisiest first, from 901 on."""
    return torch.linspace(901, 1, steps + 1).round().long()


def path(model, steps=10, batch=1, height=16, width=16, seed=7):
    """A path by hand: the picture with noise of its own at every level, and no residuals (as Direct Inversion's)."""
    generator = torch.Generator().manual_seed(seed)
    sampling = model.get_model_object("model_sampling")
    sigmas = sampling.sigmas[timesteps(steps)].clone()
    picture = torch.randn(batch, 4, height, width, generator=generator)
    noise = torch.randn(batch, 4, height, width, generator=generator)
    latents = torch.stack([picture + s * noise for s in sigmas])
    return Inversion(sigmas=sigmas, latents=latents, etas=torch.zeros(steps), family="ve", model=models.describe(model),
                     method="by hand", latent_format=model.model.latent_format)


def run(model, inversion, positive, negative, cfg, attention=(), start=0, **kwargs):
    """What the LEDITS sampler makes of it, as latents in the model's own space; and the guider."""
    concepts = kwargs.pop("concepts", ())
    guider = LeditsGuider(model, positive, negative, cfg, concepts)
    sampler = LeditsSampler(inversion, attention=attention, **kwargs)
    picture = inversion.latent_format.process_out(inversion.latents[-1])
    with torch.inference_mode():  # as ComfyUI runs its nodes
        out = guider.sample(torch.zeros_like(picture), picture, sampler, inversion.sigmas[start:], disable_pbar=True)
    return inversion.latent_format.process_in(out), guider


def capture(model, inversion, negative, attention, start=0, **kwargs):
    """A store of what the controls read of the source, and how many U-Net rows it took."""
    sampler = CaptureSampler(inversion, attention, **kwargs)
    guider = LeditsGuider(model, negative, negative, 1.0)
    picture = inversion.latent_format.process_out(inversion.latents[-1])
    with torch.inference_mode():
        guider.sample(torch.zeros_like(picture), picture, sampler, inversion.sigmas[start:], disable_pbar=True)
    return sampler.store, guider.rows


def split(model):
    """Make ComfyUI believe that only one prediction at a time fits into memory."""
    model.model.memory_required = lambda *args, **kwargs: float("inf")
    return model


def own_path(model, path, positive, negative):
    """A path that is the source's own, from the noise of another: y_next = y + (sigma_next - sigma) * eps at every step."""
    latents = [path.latents[0]]

    class Trace(LeditsSampler):
        def sample(self, model_wrap, sigmas, extra_args, *args, **kwargs):
            for i in range(len(sigmas) - 1):
                y = latents[-1]
                d = model_wrap(y, sigmas[i].expand(1), **extra_args)
                latents.append(y + (sigmas[i + 1] - sigmas[i]) * (y - d) / sigmas[i])
            return latents[-1]

    with torch.inference_mode():
        guider = LeditsGuider(model, positive, negative, 1.0)
        guider.sample(torch.zeros_like(latents[0]), latents[0], Trace(path), path.sigmas, disable_pbar=True)
    return path.with_parts(torch.stack([y.clone() for y in latents]))
