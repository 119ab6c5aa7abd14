"""The demo model's networks, and its weights in the layout that ComfyUI reads.

Trained with diffusers and transformers classes; stored as one Stable Diffusion 1 style checkpoint:
`model.diffusion_model.*` (LDM U-Net), `first_stage_model.taesd_*` (TAESD autoencoder, factor 8, 4 channels) and
`cond_stage_model.transformer.text_model.*` (CLIP text encoder). CLIP's own BPE vocabulary is kept, but only the rows
of the token embedding that captions use are stored, with their token ids in `cond_stage_model.token_ids`.
"""

import os
from pathlib import Path

import torch

from . import captions

WEIGHTS = Path(__file__).parent / "weights.safetensors"
CONTEXT, TEXT_LAYERS, TEXT_HEADS, TOKENS = 128, 2, 4, 77
CHANNELS, HEADS = (64, 128, 192), 4
LATENT_CHANNELS, FACTOR, SIDE = 4, 8, 128
BOS, EOS = 49406, 49407

# The same U-Net in the words of ComfyUI's UNetModel.
UNET_CONFIG = {
    "image_size": SIDE // FACTOR, "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS,
    "model_channels": CHANNELS[0], "channel_mult": [c // CHANNELS[0] for c in CHANNELS],
    "num_res_blocks": [1] * 3, "transformer_depth": [1] * 3, "transformer_depth_output": [1] * 6,
    "transformer_depth_middle": 1, "context_dim": CONTEXT, "num_heads": HEADS, "num_head_channels": -1,
    "use_spatial_transformer": True, "use_linear_in_transformer": False, "adm_in_channels": None,
    "use_temporal_attention": False, "legacy": False,
}
TEXT_CONFIG = {
    "hidden_size": CONTEXT, "intermediate_size": 4 * CONTEXT, "num_hidden_layers": TEXT_LAYERS,
    "num_attention_heads": TEXT_HEADS, "max_position_embeddings": TOKENS, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": 1, "vocab_size": 49408,
}


def alphas_cumprod():
    """The Stable Diffusion noise schedule: scaled-linear betas 0.00085..0.012, 1,000 steps."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def build_vae():
    """A TAESD autoencoder, initialised for depth: He weights, residual branches that start small.

    (With torch's default weights it spends its first thousand steps on a flat picture.)
    """
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(latent_channels=LATENT_CHANNELS, scaling_factor=1.0)
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
            if name.endswith(".conv.4"):
                module.weight.data.mul_(0.25)
    for ends in (vae.encoder.layers[-1], vae.decoder.layers[-1]):
        ends.weight.data.mul_(0.3)
    return vae


def build_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIDE // FACTOR, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        block_out_channels=CHANNELS, layers_per_block=1, attention_head_dim=HEADS, cross_attention_dim=CONTEXT,
        down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
    )


def build_text(rows):
    """A CLIP text encoder with `rows` token embeddings."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG | {"vocab_size": rows, "eos_token_id": rows - 1}))


class Tokens:
    """CLIP's BPE, with the tokens in use numbered from 0 (`ids[row]` is the CLIP token of a row; the last is EOS)."""

    def __init__(self, ids=None):
        import comfy
        from transformers import CLIPTokenizer

        self.bpe = CLIPTokenizer.from_pretrained(os.path.join(list(comfy.__path__)[0], "sd1_tokenizer"))
        if ids is None:
            used = {t for text in captions.vocabulary() for t in self.bpe(text)["input_ids"]}
            ids = sorted(used - {BOS, EOS}) + [BOS, EOS]
        self.ids = ids
        self.row = {token: row for row, token in enumerate(ids)}

    def __call__(self, texts):
        """Rows of the tokens, int64 [len(texts), 77], padded with EOS as ComfyUI's SD1 tokenizer does."""
        out = torch.full((len(texts), TOKENS), self.row[EOS])
        for line, text in zip(out, texts):
            rows = [self.row[t] for t in self.bpe(text)["input_ids"]][:TOKENS]
            line[: len(rows)] = torch.tensor(rows)
        return out


def _vae_key(key):
    """diffusers' AutoencoderTiny key to TAESD's: the decoder's layers are shifted by the clamp in front."""
    side, _, number, *rest = key.split(".")
    return ".".join([f"taesd_{side}", str(int(number) + (side == "decoder")), *rest])


def vae_state(vae):
    return {f"first_stage_model.{_vae_key(k)}": v for k, v in vae.state_dict().items()}


def _unet_keys():
    """(LDM key, diffusers key) pairs."""
    import comfy.utils

    return [(ldm, diffusers) for diffusers, ldm in comfy.utils.unet_to_diffusers(dict(UNET_CONFIG)).items()]


def checkpoint(vae, unet, text, ids, factors):
    """All weights as one dict of contiguous float16 tensors in the stored layout (token ids int32)."""
    state = vae_state(vae)
    unet_state = unet.state_dict()
    state |= {f"model.diffusion_model.{ldm}": unet_state[key] for ldm, key in _unet_keys() if key in unet_state}
    prefix = "cond_stage_model.transformer."
    for key, value in text.state_dict().items():
        state[prefix + ("" if key.startswith("text_model.") else "text_model.") + key] = value
    state = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in state.items() if v.is_floating_point()}
    ids = torch.tensor(ids, dtype=torch.int32)
    return state | {"cond_stage_model.token_ids": ids, "latent_rgb_factors": factors.float().contiguous()}


def load_diffusers(path=WEIGHTS):
    """The stored weights in diffusers' and transformers' classes, float32, for evaluation and comparison.

    Returns:
        vae, unet, text, tokens.
    """
    from safetensors.torch import load_file

    state = load_file(path)
    tokens = Tokens(state.pop("cond_stage_model.token_ids").tolist())
    vae, unet, text = build_vae(), build_unet(), build_text(len(tokens.ids))
    vae.load_state_dict({k: state[f"first_stage_model.{_vae_key(k)}"].float() for k in vae.state_dict()})
    wanted = unet.state_dict()
    keys = [(ldm, key) for ldm, key in _unet_keys() if key in wanted]
    unet.load_state_dict({key: state[f"model.diffusion_model.{ldm}"].float() for ldm, key in keys})
    prefix = "cond_stage_model.transformer."
    text.load_state_dict({
        k: state[prefix + ("" if k.startswith("text_model.") else "text_model.") + k].float()
        if v.is_floating_point() else v for k, v in text.state_dict().items()
    })
    return vae.eval(), unet.eval(), text.eval(), tokens
