"""The demo model as ComfyUI's own MODEL, CLIP and VAE. Nothing is registered with ComfyUI."""

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils

from . import nets


class DemoLatent(comfy.latent_formats.LatentFormat):
    """Latents of the demo VAE: unit variance, no scaling. The preview factors are read from the weights."""

    def __init__(self, factors=None):
        if factors is not None:
            self.latent_rgb_factors = factors[:-1].tolist()
            self.latent_rgb_factors_bias = factors[-1].tolist()


class DemoConfig(comfy.supported_models.SD15):
    unet_config = {}
    unet_extra_config = {}
    latent_format = DemoLatent


class DemoTextModel(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):
        super().__init__(device=device, dtype=dtype, return_projected_pooled=False, model_options=model_options,
                         textmodel_json_config=dict(nets.TEXT_CONFIG))


class DemoClipModel(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}, **kwargs):
        super().__init__(device, dtype, model_options, clip_model=DemoTextModel, **kwargs)


class DemoTokens(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data={}):
        super().__init__(embedding_directory=embedding_directory, embedding_size=nets.CONTEXT,
                         tokenizer_data=tokenizer_data)


class DemoTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data={}):
        super().__init__(embedding_directory, tokenizer_data, tokenizer=DemoTokens)


def load(path=nets.WEIGHTS):
    """MODEL, CLIP and VAE from the stored weights.

    Raises:
        FileNotFoundError: the weights are not there.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"The demo model's weights are missing ({path.name} in the pack's demo folder). "
            "Install the pack again, or train them with tools/training/train.py of the repository."
        )
    state = comfy.utils.load_torch_file(str(path), safe_load=True)
    model = _model(state)
    model.cached_patcher_init = (load_model, (path,))
    return model, _clip(state), _vae(state)


def load_model(path=nets.WEIGHTS, disable_dynamic=False):
    """MODEL alone; ComfyUI calls this where it needs a second one, without dynamic VRAM."""
    return _model(comfy.utils.load_torch_file(str(path), safe_load=True), disable_dynamic)


def _model(state, disable_dynamic=False):
    management = comfy.model_management
    device = management.get_torch_device()
    prefix = "model.diffusion_model."
    config = DemoConfig(nets.UNET_CONFIG)
    factors = state.get("latent_rgb_factors")  # only previews need them
    config.latent_format = DemoLatent(None if factors is None else factors.float())
    parameters = comfy.utils.calculate_parameters(state, prefix)
    dtype = management.unet_dtype(model_params=parameters, supported_dtypes=config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, config.supported_inference_dtypes))
    start = management.unet_inital_load_device(parameters, dtype)
    model = comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType.V_PREDICTION, device=start)
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=device, offload_device=management.unet_offload_device())
    model.load_model_weights(dict(state), prefix, assign=patcher.is_dynamic())
    return patcher


def _clip(state):
    prefix = "cond_stage_model."
    text = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    rows, ids = "transformer.text_model.embeddings.token_embedding.weight", text.pop("token_ids").long()
    table = text[rows].mean(0).repeat(nets.TEXT_CONFIG["vocab_size"], 1)  # words it never saw get the mean embedding
    table[ids] = text[rows]
    text = {f"clip_l.{k}": v for k, v in (text | {rows: table}).items()}
    target = comfy.supported_models_base.ClipTarget(DemoTokenizer, DemoClipModel)
    clip = comfy.sd.CLIP(target, parameters=sum(v.numel() for v in text.values()), model_options={})
    clip.load_sd(text, full_model=True)
    return clip


def _vae(state):
    prefix = "first_stage_model."
    return comfy.sd.VAE(sd={k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
