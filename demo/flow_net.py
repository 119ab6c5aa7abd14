"""The demo flow model's transformer, in the layout of Flux, and its weights as ComfyUI reads them.

Trained with diffusers' class; stored with the keys of ComfyUI's own (`comfy.ldm.flux.model.Flux`). Text encoder and
autoencoder are those of the demo model (`nets`).
"""

from pathlib import Path

import torch

from . import nets

WEIGHTS = Path(__file__).parent / "flow.safetensors"
WORDS = 24  # tokens of a prompt, padded with the end token
PATCH, DOUBLE, SINGLE, HEADS, HEAD_WIDTH, AXES = 2, 3, 6, 3, 48, (8, 20, 20)
WIDTH = HEADS * HEAD_WIDTH

# The network in the words of ComfyUI's Flux.
CONFIG = {
    "image_model": "flux", "in_channels": nets.LATENT_CHANNELS, "out_channels": nets.LATENT_CHANNELS,
    "vec_in_dim": nets.CONTEXT, "context_in_dim": nets.CONTEXT, "hidden_size": WIDTH, "mlp_ratio": 4.0,
    "num_heads": HEADS, "depth": DOUBLE, "depth_single_blocks": SINGLE, "axes_dim": list(AXES), "theta": 10000,
    "patch_size": PATCH, "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": [],
}


def build():
    """The transformer, to train."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=nets.LATENT_CHANNELS * PATCH**2, num_layers=DOUBLE, num_single_layers=SINGLE,
        attention_head_dim=HEAD_WIDTH, num_attention_heads=HEADS, joint_attention_dim=nets.CONTEXT,
        pooled_projection_dim=nets.CONTEXT, guidance_embeds=False, axes_dims_rope=AXES,
    )


class Velocity(torch.nn.Module):
    """`(x [B, 4, h, w], s [B], words [B, 24, 128], pooled [B, 128]) -> v [B, 4, h, w]` of a transformer."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer

    def forward(self, x, s, words, pooled):
        from einops import rearrange

        h, w = (side // PATCH for side in x.shape[-2:])
        ids = torch.zeros(h, w, 3, device=x.device)
        ids[..., 1], ids[..., 2] = torch.arange(h)[:, None], torch.arange(w)
        tokens = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH)
        out = self.transformer(
            hidden_states=tokens, encoder_hidden_states=words, pooled_projections=pooled, timestep=s,
            img_ids=ids.flatten(0, 1), txt_ids=torch.zeros(words.shape[1], 3, device=x.device), return_dict=False,
        )[0]
        return rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=PATCH, q=PATCH)


def encode(text, tokens, prompts):
    """Words [B, 24, 128] and pooled [B, 128] of prompts, as ComfyUI's text encoder gives them."""
    rows = tokens(prompts)[:, :WORDS]
    rows[:, -1] = tokens.row[nets.EOS]
    states = text(rows.to(next(text.parameters()).device)).last_hidden_state
    ends = (rows == tokens.row[nets.EOS]).int().argmax(1)
    return states, states[torch.arange(len(rows)), ends]


def _slices():
    """(diffusers key, stored key, place in the stored tensor or None, change or None) of every tensor."""
    import comfy.utils

    for key, to in comfy.utils.flux_to_diffusers(dict(CONFIG)).items():
        stored, place, change = (*to, None, None)[:3] if isinstance(to, tuple) else (to, None, None)
        yield key, stored, place, change


def state(transformer):
    """The transformer's weights as contiguous float16 tensors with the keys of ComfyUI's Flux."""
    own, parts, out = transformer.state_dict(), {}, {}
    for key, stored, place, change in _slices():
        if key in own:
            value = own[key].detach().float().cpu()
            parts.setdefault(stored, {})[place[1] if place else 0] = value if change is None else change(value)
    for stored, pieces in parts.items():
        out[stored] = torch.cat([pieces[k] for k in sorted(pieces)]).half().contiguous()
    return out


def load_diffusers(path=WEIGHTS):
    """The stored transformer in diffusers' class, float32."""
    from safetensors.torch import load_file

    stored, transformer = load_file(path), build()
    own = transformer.state_dict()
    for key, name, place, change in _slices():
        if key in own:
            value = stored[name].float()
            value = value if place is None else value.narrow(*place)
            own[key] = value if change is None else change(value)  # swapping two halves is its own inverse
    transformer.load_state_dict(own)
    return transformer.eval()
