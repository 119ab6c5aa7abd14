"""Networks with random weights, and text for them: to measure what a network costs, not what it draws."""

# A two-level U-Net, so fast that every overhead shows; and what SD 1.5 has instead.
TINY = {
    "image_size": 16, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2],
    "num_res_blocks": [1, 1], "transformer_depth": [1, 1], "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 4, "context_dim": 32, "num_heads": 2, "num_head_channels": -1,
    "use_spatial_transformer": True, "use_linear_in_transformer": False, "adm_in_channels": None,
    "use_temporal_attention": False, "legacy": False,
}
SD15 = TINY | {
    "image_size": 32, "model_channels": 320, "channel_mult": [1, 2, 4, 4], "num_res_blocks": [2] * 4,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1] * 9 + [0] * 3, "context_dim": 768,
    "num_heads": 8,
}
SMALL = SD15 | {"model_channels": 64, "context_dim": 128}  # its levels and blocks, at a fifth of the width


def random_model(unet):
    """A Stable Diffusion U-Net with random weights, float32."""
    import comfy.model_base
    import comfy.supported_models

    return _random(comfy.model_base.BaseModel(comfy.supported_models.SD15({**unet, "dtype": _float32()})))


def diffusers_unet(model):
    """The same U-Net, of `SMALL`, in diffusers' class."""
    import comfy.utils
    from diffusers import UNet2DConditionModel

    widths, cross = [SMALL["model_channels"] * m for m in SMALL["channel_mult"]], ("CrossAttnDownBlock2D",) * 3
    unet = UNet2DConditionModel(
        block_out_channels=widths, layers_per_block=2, attention_head_dim=SMALL["num_heads"],
        cross_attention_dim=SMALL["context_dim"], down_block_types=(*cross, "DownBlock2D"),
        up_block_types=("UpBlock2D", *(name.replace("Down", "Up") for name in cross)))
    own, stored = unet.state_dict(), model.model.diffusion_model.state_dict()
    unet.load_state_dict({to: stored[key] for to, key in comfy.utils.unet_to_diffusers(dict(SMALL)).items() if to in own})
    return unet.eval()


def _float32():
    import torch

    return torch.float32


def _random(model):
    import comfy.model_management
    import comfy.model_patcher
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.diffusion_model.parameters():  # ComfyUI's layers come without weights
            p.normal_().mul_(p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    management = comfy.model_management
    return comfy.model_patcher.ModelPatcher(model, management.get_torch_device(), management.unet_offload_device())


# Flux.1's blocks at full width, 2 of 19 double and 4 of 38 single ones.
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096,
    "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 2, "depth_single_blocks": 4, "axes_dim": [16, 56, 56],
    "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": [],
}


def random_flux():
    """Some of Flux.1-schnell's blocks with random weights, float32."""
    import comfy.model_base
    import comfy.supported_models

    config = comfy.supported_models.FluxSchnell({**FLUX, "dtype": _float32()})
    return _random(comfy.model_base.Flux(config, model_type=comfy.model_base.ModelType.FLOW))


class RandomText:
    """CLIP's tokens with random vectors for them: text for a model that has no encoder."""

    def __init__(self, width, pooled=0):
        import comfy.sd1_clip

        self.tokenizer, self.width, self.pooled = comfy.sd1_clip.SD1Tokenizer(), width, pooled

    def tokenize(self, text, return_word_ids=False):
        return self.tokenizer.tokenize_with_weights(text, return_word_ids)

    def encode_from_tokens_scheduled(self, tokens):
        import torch

        ids = [int(token[0]) for chunk in tokens["l"] for token in chunk]
        generator = torch.Generator().manual_seed(sum(ids))
        words, pooled = (torch.randn(1, *shape, generator=generator) for shape in ((len(ids), self.width), (self.pooled,)))
        return [[words, {"pooled_output": pooled} if self.pooled else {}]]
