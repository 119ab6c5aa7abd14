"""The demo models as ComfyUI's own MODEL, CLIP and VAE. Nothing is registered with ComfyUI."""

import functools

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils

from . import flow_net, nets


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


class DemoFlowConfig(comfy.supported_models.FluxSchnell):
    unet_config = {}
    unet_extra_config = {}
    latent_format = DemoLatent
    sampling_settings = {"multiplier": 1.0, "shift": 1.0}


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


class DemoFlowClipModel(DemoClipModel):
    """The same text encoder, whose padding ends where the flow model's does."""

    def encode_token_weights(self, token_weight_pairs):
        words, *more = super().encode_token_weights(token_weight_pairs)
        chunks = token_weight_pairs[self.clip_name]
        if len(chunks) == 1:
            ids = [token for token, *_ in chunks[0]]
            words = words[:, : max(flow_net.WORDS, ids.index(nets.EOS) + 1)]
        return words, *more


def load(path=nets.WEIGHTS):
    """MODEL, CLIP and VAE of the U-Net from the stored weights.

    Raises:
        FileNotFoundError: the weights are not there.
    """
    state = _stored(path)
    model = _model(state)
    model.cached_patcher_init = (load_model, (path,))
    return model, _clip(state, DemoClipModel), _vae(state)


def load_flow(path=flow_net.WEIGHTS, shared=nets.WEIGHTS):
    """MODEL, CLIP and VAE of the flow model; text encoder and autoencoder are those of the U-Net.

    Raises:
        FileNotFoundError: the weights are not there.
    """
    state = _stored(shared)
    model = load_flow_model(path, shared)
    model.cached_patcher_init = (load_flow_model, (path, shared))
    return model, _clip(state, DemoFlowClipModel), _vae(state)


def _stored(path):
    if not path.is_file():
        raise FileNotFoundError(
            f"The demo model's weights are missing ({path.name} in the pack's demo folder). "
            "Install the pack again, or train them with tools/training of the repository."
        )
    return comfy.utils.load_torch_file(str(path), safe_load=True)


def load_model(path=nets.WEIGHTS, disable_dynamic=False):
    """MODEL alone; ComfyUI calls this where it needs a second one, without dynamic VRAM."""
    return _model(comfy.utils.load_torch_file(str(path), safe_load=True), disable_dynamic)


def load_flow_model(path=flow_net.WEIGHTS, shared=nets.WEIGHTS, disable_dynamic=False):
    """As `load_model`, of the flow model."""
    state = {f"model.diffusion_model.{key}": value for key, value in _stored(path).items()}
    factors = comfy.utils.load_torch_file(str(shared), safe_load=True).get("latent_rgb_factors")
    kind = functools.partial(comfy.model_base.Flux, model_type=comfy.model_base.ModelType.FLOW)
    return _patcher(state, DemoFlowConfig(dict(flow_net.CONFIG)), kind, factors, disable_dynamic)


def _model(state, disable_dynamic=False):
    kind = functools.partial(comfy.model_base.BaseModel, model_type=comfy.model_base.ModelType.V_PREDICTION)
    return _patcher(state, DemoConfig(nets.UNET_CONFIG), kind, state.get("latent_rgb_factors"), disable_dynamic)


def _patcher(state, config, kind, factors, disable_dynamic):
    """A MODEL; only previews need the factors."""
    management = comfy.model_management
    device = management.get_torch_device()
    prefix = "model.diffusion_model."
    config.latent_format = DemoLatent(None if factors is None else factors.float())
    parameters = comfy.utils.calculate_parameters(state, prefix)
    dtype = management.unet_dtype(model_params=parameters, supported_dtypes=config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, config.supported_inference_dtypes))
    start = management.unet_inital_load_device(parameters, dtype)
    model = kind(config, device=start)
    of = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = of(model, load_device=device, offload_device=management.unet_offload_device())
    model.load_model_weights(dict(state), prefix, assign=patcher.is_dynamic())
    return patcher


def _clip(state, text_model):
    prefix = "cond_stage_model."
    text = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    rows, ids = "transformer.text_model.embeddings.token_embedding.weight", text.pop("token_ids").long()
    table = text[rows].mean(0).repeat(nets.TEXT_CONFIG["vocab_size"], 1)  # words it never saw get the mean embedding
    table[ids] = text[rows]
    text = {f"clip_l.{k}": v for k, v in (text | {rows: table}).items()}
    target = comfy.supported_models_base.ClipTarget(DemoTokenizer, text_model)
    clip = comfy.sd.CLIP(target, parameters=sum(v.numel() for v in text.values()), model_options={})
    clip.load_sd(text, full_model=True)
    return clip


def _vae(state):
    prefix = "first_stage_model."
    return comfy.sd.VAE(sd={k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
