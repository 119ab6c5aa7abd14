"""U-Nets with random weights, and text for them: to measure what a network costs, not what it draws."""

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


def random_model(unet):
    """A Stable Diffusion U-Net with random weights, float32."""
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    config = comfy.supported_models.SD15({**unet, "dtype": torch.float32})
    model = comfy.model_base.BaseModel(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.diffusion_model.parameters():  # ComfyUI's layers come without weights
            p.normal_().mul_(p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    management = comfy.model_management
    return comfy.model_patcher.ModelPatcher(model, management.get_torch_device(), management.unet_offload_device())


class RandomText:
    """CLIP's tokens with random vectors for them: text for a model that has no encoder."""

    def __init__(self, width):
        import comfy.sd1_clip

        self.tokenizer, self.width = comfy.sd1_clip.SD1Tokenizer(), width

    def tokenize(self, text, return_word_ids=False):
        return self.tokenizer.tokenize_with_weights(text, return_word_ids)

    def encode_from_tokens_scheduled(self, tokens):
        import torch

        ids = [int(token[0]) for chunk in tokens["l"] for token in chunk]
        generator = torch.Generator().manual_seed(sum(ids))
        return [[torch.randn(1, len(ids), self.width, generator=generator), {}]]
