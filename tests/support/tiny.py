"""Tiny models of ComfyUI's own classes with random weights, on the CPU, and inputs that fit them.

They know no pictures, but the identities of an inversion hold for any network, and a prediction takes milliseconds.

    model = tiny.model("sdxl")                      # MODEL
    positive = tiny.conditioning("sdxl", seed=1)    # CONDITIONING
    latent = tiny.latent("sdxl", batch=3)           # LATENT
    with tiny.Calls(model) as calls:                # what the U-Net is asked for
        ...
    assert calls.rows == 12
"""
import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import torch

CONTEXT, POOLED = 32, 24
UNET = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2],
    "num_res_blocks": [1, 1], "transformer_depth": [1, 1], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1], "context_dim": CONTEXT, "num_heads": 2, "num_head_channels": -1,
    "use_spatial_transformer": True, "use_linear_in_transformer": False, "adm_in_channels": None,
    "use_temporal_attention": False, "legacy": False, "dtype": torch.float32,
}
# SD 1 has attention at every level but the last. SD 2 has linear projections, and heads by width. SDXL has no attention
# at the first level, two layers of it below, and a vector of pooled text and sizes.
SD2 = {"num_heads": -1, "num_head_channels": 16, "use_linear_in_transformer": True}
SDXL = {**SD2, "transformer_depth": [0, 2], "transformer_depth_middle": 2, "transformer_depth_output": [2, 2, 0, 0],
        "num_classes": "sequential", "adm_in_channels": POOLED + 6 * 256}
NO_ATTENTION = {"channel_mult": [1], "num_res_blocks": [1], "transformer_depth": [0], "transformer_depth_output": [0, 0],
                "transformer_depth_middle": -2}
TYPES = comfy.model_base.ModelType
# kind: (checkpoint family, model class, type of prediction, changes to UNET)
KINDS = {
    "sd1": (comfy.supported_models.SD15, comfy.model_base.BaseModel, TYPES.EPS, {}),
    "sd2": (comfy.supported_models.SD20, comfy.model_base.BaseModel, TYPES.V_PREDICTION, SD2),
    "sdxl": (comfy.supported_models.SDXL, comfy.model_base.SDXL, TYPES.EPS, SDXL),
    "sdxl_v": (comfy.supported_models.SDXL, comfy.model_base.SDXL, TYPES.V_PREDICTION, SDXL),
    "flow": (comfy.supported_models.SD15, comfy.model_base.BaseModel, TYPES.FLOW, {}),
}


def model(kind="sd1", seed=0, gain=0.2, **unet):
    """A MODEL of one of the KINDS, float32.

    Args:
        gain: size of the random part of a prediction. With more, a random network is chaotic: it amplifies rounding.
        unet: changes to UNET.
    """
    family, base, prediction, own = KINDS[kind]
    config = family({})
    config.unet_config |= {**UNET, **own, **unet}
    inner = base(config, model_type=prediction)
    fill(inner.diffusion_model, seed)
    inner.diffusion_model.out[-1].weight.data.mul_(gain)
    if prediction is TYPES.EPS:
        _pass_through(inner.diffusion_model)
    return comfy.model_patcher.ModelPatcher(inner, torch.device("cpu"), torch.device("cpu"))


def frozen(kind="sd1", **unet):
    """A MODEL with weights that are inference tensors, as core's loaders make them."""
    with torch.inference_mode():
        made = model(kind, **unet)
    assert all(p.is_inference() for p in made.model.diffusion_model.parameters())
    return made


def fill(network, seed):
    """Random weights that keep the size of what passes through. (ComfyUI's layers are made without any.)"""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.ndim > 1:
                p.normal_(generator=generator).mul_(p[0].numel() ** -0.5)
                if "attn2.to_out" in name:  # the prompt matters about as much as the picture
                    p.mul_(3)
            elif name.endswith("weight"):
                p.fill_(1)
            else:
                p.normal_(generator=generator).mul_(0.1)


def _pass_through(network):
    """Add the normalised input to the output, which is most of eps where there is much noise.

    It goes through the long skip connection as pairs of channels +x and -x: silu(x) - silu(-x) is x.
    """
    pairs = 2 * network.out_channels
    signs = torch.cat([torch.eye(network.out_channels), -torch.eye(network.out_channels)])
    first, last = network.input_blocks[0][0], network.output_blocks[-1]
    with torch.no_grad():
        for layer in [first, last[0].skip_connection, last[0].out_layers[-1], *(block.proj_out for block in last[1:])]:
            layer.weight[:pairs] = 0
            layer.bias[:pairs] = 0
        first.weight[:pairs, :, 1, 1] = signs
        from_first = last[0].skip_connection.weight[:, -network.model_channels :, 0, 0]
        from_first[:pairs, :pairs] = torch.eye(pairs)
        network.out[-1].weight[:, :pairs] = 0
        network.out[-1].weight[:, :pairs, 1, 1] = signs.T


def control_net():
    """A CONTROL_NET for the "sd1" models that changes their predictions."""
    same = {k: v for k, v in UNET.items() if k not in ("out_channels", "transformer_depth_output")}
    network = comfy.cldm.cldm.ControlNet(**same, hint_channels=3)
    fill(network, seed=3)
    return comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))


def conditioning(kind="sd1", seed=1, tokens=77, batch=1, **extra):
    """A prompt: CONDITIONING with one entry, words [batch, tokens, CONTEXT]; `extra` goes into its dictionary."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randn(batch, tokens, CONTEXT, generator=generator)
    pooled = {"pooled_output": torch.randn(batch, POOLED, generator=generator)} if kind.startswith("sdxl") else {}
    return [[words, {**pooled, **extra}]]


def scale(kind="sd1"):
    """What a LATENT is multiplied by in the model's own space (`process_latent_in`)."""
    return KINDS[kind][0].latent_format().scale_factor


def latent(kind="sd1", batch=1, height=8, width=8, seed=100):
    """A LATENT as from VAE Encode, of unit variance in the model's own space; a seed gives the same first pictures."""
    picture = torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))
    return {"samples": picture / scale(kind)}


class Calls:
    """Watches the U-Net of a MODEL: `with tiny.Calls(model) as calls` counts what it is asked for.

    Unlike a wrapper on the MODEL it is invisible to the nodes, which evaluate less at once where they see wrappers.

    Attributes:
        calls: (timesteps, words) of every call: float32 [rows], and [rows, tokens, CONTEXT].

    Args:
        act: called with the number of calls so far before each of them, for instance to interrupt or to fail.
    """

    def __init__(self, model, act=None):
        self.network, self.act, self.calls = model.model.diffusion_model, act, []

    def __enter__(self):
        self.handle = self.network.register_forward_pre_hook(self._watch, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.handle.remove()

    def _watch(self, _, args, kwargs):
        if self.act is not None:
            self.act(len(self.calls))
        self.calls.append((args[1].clone(), kwargs["context"].clone()))

    @property
    def rows(self):
        """U-Net rows in all."""
        return sum(len(timesteps) for timesteps, _ in self.calls)

    def rows_of(self, conditioning):
        """Timesteps of the rows that were evaluated for a CONDITIONING, a list."""
        words = conditioning[0][0][0]
        return [float(t) for call in self.calls for t, c in zip(*call) if torch.equal(c, words)]
