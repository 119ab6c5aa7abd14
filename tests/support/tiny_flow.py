"""Tiny flow models of ComfyUI's own classes with random weights, on the CPU, and inputs that fit them; as `tiny`.

    model = tiny_flow.model("flux")                     # MODEL
    positive = tiny_flow.conditioning("flux", seed=1)   # CONDITIONING
    latent = tiny_flow.latent("flux", batch=3)          # LATENT
"""
import functools

import comfy.model_base as base
import comfy.model_patcher
import comfy.supported_models as checkpoints
import torch

TEXT, POOLED = 32, 24
FLUX = dict(in_channels=16, out_channels=16, vec_in_dim=POOLED, context_in_dim=TEXT, hidden_size=64, mlp_ratio=2.0,
            num_heads=2, depth=2, depth_single_blocks=2, axes_dim=[8, 12, 12], theta=10000, patch_size=2, qkv_bias=True,
            guidance_embed=True, txt_ids_dims=[])
LUMINA = dict(image_model="lumina2", patch_size=2, in_channels=16, cap_feat_dim=TEXT, n_layers=3, n_refiner_layers=1,
              qk_norm=True, axes_lens=[64, 64, 64], multiple_of=32)
# kind: (checkpoint family, model class, type of prediction or None for the class's own, settings of the network)
KINDS = {
    "flux": (checkpoints.Flux, base.Flux, None, dict(image_model="flux", **FLUX)),
    "schnell": (checkpoints.FluxSchnell, base.Flux, base.ModelType.FLOW,
                dict(image_model="flux", **{**FLUX, "guidance_embed": False})),
    "flux2": (checkpoints.Flux2, base.Flux2, None, dict(
        image_model="flux2", in_channels=128, out_channels=128, vec_in_dim=None, context_in_dim=TEXT, hidden_size=64,
        mlp_ratio=2.0, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=[8, 8, 8, 8], theta=2000, patch_size=1,
        qkv_bias=False, guidance_embed=True, txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True, ops_bias=False,
        default_ref_method="index", ref_index_scale=10.0)),
    "sd3": (checkpoints.SD3, base.SD3, None, dict(
        in_channels=16, patch_size=2, out_channels=16, depth=1, num_blocks=3, input_size=None, adm_in_channels=POOLED,
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": TEXT, "out_features": 64}},
        num_patches=32 * 32, pos_embed_max_size=32, pos_embed_scaling_factor=None, qk_norm="rms",
        x_block_self_attn_layers=[0])),
    "qwen": (checkpoints.QwenImage, base.QwenImage, None, dict(
        image_model="qwen_image", in_channels=64, out_channels=16, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=TEXT, axes_dims_rope=(4, 6, 6))),
    "zimage": (checkpoints.ZImage, base.Lumina2, None, dict(
        LUMINA, dim=256, n_heads=4, n_kv_heads=4, axes_dims=[16, 24, 24], rope_theta=256.0, ffn_dim_multiplier=1.0,
        z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32)),
    "lumina2": (checkpoints.Lumina2, base.Lumina2, None, dict(
        LUMINA, dim=64, n_heads=2, n_kv_heads=1, axes_dims=[8, 12, 12], rope_theta=10000.0, ffn_dim_multiplier=2.0)),
    "chroma": (checkpoints.Chroma, base.Chroma, None, dict(
        image_model="chroma", in_channels=64, out_channels=64, context_in_dim=TEXT, hidden_size=64, mlp_ratio=2.0,
        num_heads=2, depth=2, depth_single_blocks=2, axes_dim=[8, 12, 12], theta=10000, patch_size=2, qkv_bias=True,
        in_dim=64, out_dim=64, hidden_dim=64, n_layers=2, txt_ids_dims=[], vec_in_dim=None)),
    "wan": (checkpoints.WAN21_T2V, base.WAN21, None, dict(
        image_model="wan2.1", model_type="t2v", patch_size=(1, 2, 2), in_dim=16, dim=48, ffn_dim=64, freq_dim=64,
        text_dim=TEXT, out_dim=16, num_heads=2, num_layers=2, window_size=(-1, -1), qk_norm=True, cross_attn_norm=True,
        eps=1e-6)),
    "hunyuan": (checkpoints.HunyuanVideo, base.HunyuanVideo, None, dict(
        image_model="hunyuan_video", in_channels=16, patch_size=[1, 2, 2], out_channels=16, vec_in_dim=POOLED,
        axes_dim=[8, 12, 12], meanflow=False, context_in_dim=TEXT, hidden_size=64, mlp_ratio=2.0, num_heads=2, depth=2,
        depth_single_blocks=2, theta=256, qkv_bias=True, byt5=False, guidance_embed=True, use_cond_type_embedding=False,
        vision_in_dim=None, meanflow_sum=False)),
    "hidream": (checkpoints.HiDream, base.HiDream, None, dict(
        image_model="hidream", attention_head_dim=32, axes_dims_rope=[8, 12, 12], caption_channels=[TEXT, TEXT],
        max_resolution=[32, 32], in_channels=16, llama_layers=[0, 1, 1], num_attention_heads=2, num_routed_experts=2,
        num_activated_experts=2, num_layers=2, num_single_layers=1, out_channels=16, patch_size=2, text_emb_dim=POOLED)),
    "aura": (checkpoints.AuraFlow, base.AuraFlow, None, dict(
        max_seq=16 * 16, cond_seq_dim=TEXT, n_double_layers=2, n_layers=4, dim=64, n_heads=2, global_conddim=64)),
}
POOLED_KINDS = ("flux", "schnell", "sd3", "hunyuan", "hidream")
VIDEO = ("qwen", "wan", "hunyuan")  # latents [B, C, T, H, W]
SMALL = ("flux", "sd3", "qwen", "zimage", "wan")  # one of each build


def made(kind="flux", seed=0, gain=0.2, **network):
    """A MODEL of one of the KINDS, float32.

    Args:
        gain: size of the velocity. With more, a random network is chaotic: it amplifies rounding.
        network: changes to its settings.
    """
    family, of, prediction, own = KINDS[kind]
    config = family({**own, **network, "dtype": torch.float32})
    inner = of(config) if prediction is None else of(config, model_type=prediction)
    fill(inner.diffusion_model, seed)
    _last(inner.diffusion_model).weight.data.mul_(gain)
    return comfy.model_patcher.ModelPatcher(inner, torch.device("cpu"), torch.device("cpu"))


@functools.cache
def model(kind="flux"):
    """The MODEL of a kind, one for all tests, with weights as core's loaders make them."""
    with torch.inference_mode():
        return made(kind)


def _last(network):
    for path in ("final_layer.linear", "proj_out", "head.head", "final_linear"):
        at = network
        for part in path.split("."):
            at = getattr(at, part, None)
        if at is not None:
            return at
    raise AssertionError(type(network).__name__)


def fill(network, seed):
    """Random weights that keep the size of what passes through. (ComfyUI's layers are made without any.)"""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in [*network.named_parameters(), *network.named_buffers()]:
            if p is None or not p.numel() or not p.is_floating_point() or "inv_freq" in name:
                continue
            if p.ndim > 1:
                p.normal_(generator=generator).mul_(p[0].numel() ** -0.5)
            elif name.endswith(("weight", "scale")):
                p.fill_(1)
            else:
                p.normal_(generator=generator).mul_(0.1)


def conditioning(kind="flux", seed=1, tokens=12, batch=1, **extra):
    """A prompt: CONDITIONING with one entry, words [batch, tokens, TEXT]; `extra` goes into its dictionary."""
    g = torch.Generator().manual_seed(seed)
    words = torch.randn(batch, tokens, TEXT, generator=g)
    pooled = torch.randn(batch, POOLED, generator=g) if kind in POOLED_KINDS else None
    more = {"pooled_output": pooled}
    if kind == "hidream":
        more["conditioning_llama3"] = torch.randn(batch, 2, tokens, TEXT, generator=g)
    return [[words, {**more, **extra}]]


def latent(kind="flux", batch=1, height=8, width=8, frames=None, seed=100):
    """A LATENT as from VAE Encode, of unit variance in the model's own space; a seed gives the same first pictures."""
    latent_format = KINDS[kind][0].latent_format()
    frames = frames or (1 if kind == "qwen" else 3)
    space = (frames, height, width) if kind in VIDEO else (height, width)
    picture = torch.randn(batch, latent_format.latent_channels, *space, generator=torch.Generator().manual_seed(seed))
    return {"samples": latent_format.process_out(picture)}
