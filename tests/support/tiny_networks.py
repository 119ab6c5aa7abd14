"""For tests of the metrics: their networks, tiny or with random weights, and pictures to measure."""
import pathlib

import comfy.sd1_clip
import numpy as np
import safetensors.torch
import torch
import torchvision
import transformers
from comfyui_ledits.evaluation.metrics import Metrics
from PIL import Image

MODES = ("pie-bench", "plain")
SIDE = 32  # of the pictures that the tiny CLIPs see
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 20, "bos_token_id": 49406, "eos_token_id": 49407}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": SIDE, "patch_size": 8}


def write(folder):
    """Writes all of `evaluation.networks.NETWORKS` with random weights of seed 0 into a folder."""
    folder = pathlib.Path(folder)
    with torch.random.fork_rng(), torch.inference_mode(False):
        torch.manual_seed(0)
        dino = transformers.ViTConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3,
                                      image_size=SIDE, patch_size=32, initializer_range=0.3)
        transformers.ViTModel(dino, add_pooling_layer=False).save_pretrained(folder / "dino-vitb8")
        for name in ("clip-vit-large-patch14", "clip-vit-base-patch32"):
            clip = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)
            transformers.CLIPModel(clip).save_pretrained(folder / name)
            words = pathlib.Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer"  # CLIP's own, which ComfyUI ships
            transformers.CLIPTokenizer.from_pretrained(words).save_pretrained(folder / name)
            pictures = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
            pictures.save_pretrained(folder / name)
        for name in ("squeezenet1_1", "alexnet"):
            state = getattr(torchvision.models, name)(weights=None).state_dict()
            (folder / name).mkdir()
            safetensors.torch.save_file({k: v for k, v in state.items() if k.startswith("features")},
                                        folder / name / "model.safetensors")
    return folder


def pictures(side=64, seed=0):
    """Two unlike smooth 8-bit pictures as floats, and a mask of a square in them."""
    rng = np.random.default_rng(seed)
    made = [Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), np.uint8)).resize((side, side)) for _ in "ab"]
    mask = np.zeros((side, side), np.float32)
    mask[side // 8 : side // 8 + side // 2, side // 4 : side // 4 + side // 2] = 1
    return *(np.asarray(p, np.float32) / 255 for p in made), mask


def measure(mode, name, source, edited, mask, networks=None, prompt="a cat", **options):
    """One metric of one pair; the prompt is that of both."""
    tool = Metrics(mode, networks, names=(name,), **options)
    value = tool.measure(source, edited, mask, prompt, prompt)[name]
    assert value is not None, tool.missing
    return value
