"""The networks of the metrics, from local folders or the user's Hugging Face cache. Nothing is ever downloaded.

Weights are read from safetensors files alone: the usual .pth and .bin files are pickles, which can run code.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

FOLDER = "ledits_metrics"  # below ComfyUI's models folder
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Missing(Exception):
    """A metric cannot be measured. Its text says why, and what to do."""


@dataclass(frozen=True)
class Known:
    """A network that a metric needs.

    Attributes:
        repo: on Hugging Face, or None.
        files: what its folder has to hold; of a tuple, one of them is enough.
        make: Python that makes the folder {0} once, over the network, where no safetensors file is published.
    """

    repo: str | None
    files: tuple
    make: str = ""


def _clip(repo, make=""):
    return Known(repo, (CONFIG, WEIGHTS, ("tokenizer.json", "vocab.json")), make)


def _torchvision(name):
    return Known(None, (WEIGHTS,), "import os, torchvision.models as m, safetensors.torch as s; f = r'{0}'; "
                 "os.makedirs(f, exist_ok=True); "
                 f"s.save_file(m.{name}(weights='DEFAULT').state_dict(), os.path.join(f, '{WEIGHTS}'))")


NETWORKS = {
    "dino-vitb8": Known("facebook/dino-vitb8", (CONFIG, WEIGHTS)),
    "clip-vit-large-patch14": _clip("openai/clip-vit-large-patch14"),
    "clip-vit-base-patch32": _clip(  # which is there as a pickle only
        "openai/clip-vit-base-patch32", "import transformers as t; n, f = 'openai/clip-vit-base-patch32', r'{0}'; "
        "t.CLIPModel.from_pretrained(n).save_pretrained(f); t.CLIPProcessor.from_pretrained(n).save_pretrained(f)"),
    "squeezenet1_1": _torchvision("squeezenet1_1"),
    "alexnet": _torchvision("alexnet"),
}
LPIPS = {"squeeze": "squeezenet1_1", "alex": "alexnet"}


class Networks:
    """Finds the networks, and loads each when it is first used.

    Args:
        folders: folders that hold a folder for each of NETWORKS; the first is where a missing one is asked for.
        place: moves a module to where it runs, and says where that is; by default it runs on the device asked for.
        cache: also look into the Hugging Face cache, and for LPIPS into torch's.
    """

    def __init__(self, folders=(), place=None, cache=True):
        self.folders, self.place, self.cache = [Path(f) for f in folders], place, cache
        self._loaded = {}

    def where(self, name):
        """The folder of a network, or None."""
        known = NETWORKS[name]
        for folder in self._candidates(name, known):
            choices = [[file] if isinstance(file, str) else file for file in known.files]
            if all(any((folder / file).is_file() for file in files) for files in choices):
                return folder
        return None

    def _candidates(self, name, known):
        yield from (folder / name for folder in self.folders)
        if not self.cache:
            return
        if known.repo is None:
            yield Path(torch.hub.get_dir()) / "checkpoints" / name
        elif importlib.util.find_spec("huggingface_hub"):
            from huggingface_hub import try_to_load_from_cache

            config = try_to_load_from_cache(known.repo, CONFIG)
            if isinstance(config, str):
                yield Path(config).parent

    def reason(self, name):
        """Why a network cannot be used, a sentence; None where it is in place."""
        absent = [p for p in ("torchmetrics", "transformers", "torchvision") if not importlib.util.find_spec(p)]
        if absent:
            return f"Install {' and '.join(absent)} into ComfyUI's Python (pip install {' '.join(absent)})."
        if self.where(name):
            return None
        known = NETWORKS[name]
        folder = (self.folders[0] if self.folders else Path("models") / FOLDER) / name
        files = ", ".join(" or ".join(f) if isinstance(f, tuple) else f for f in known.files)
        origin = f"{known.repo} from Hugging Face" if known.repo else f"torchvision's {name} as safetensors"
        make = known.make and f', or make it: python -c "{known.make.format(folder)}"'
        return f"The network {name} is not here. Put {origin} into {folder} ({files}){make}."

    def dino(self, device):
        """`Keys` of DINO ViT-B/8; `device` says where the pictures have to be: (Keys, device)."""
        return self._get("dino-vitb8", device, lambda folder, _: Keys(_vit(folder)))

    def clip(self, name, device):
        """((model, processor) as torchmetrics takes them, device) of a CLIP."""
        model, device = self._get(name, device, _load_clip)
        return (model, model.processor), device

    def lpips(self, name, device):
        """(LPIPS of a backbone "squeeze" or "alex", device)."""
        return self._get(LPIPS[name], device, lambda folder, device: Lpips(name, folder, device))

    def _get(self, name, device, load):
        if name not in self._loaded:
            reason, folder = self.reason(name), self.where(name)
            if reason is None:
                try:
                    module = load(folder, torch.device("cpu") if self.place else torch.device(device))
                    if self.place is None and torch.device(device).type != "cpu":
                        state = {key: value.to(device) for key, value in module.state_dict().items()}
                        module.load_state_dict(state, assign=True)
                    self._loaded[name] = module.eval()
                except Exception as error:  # whatever a library makes of a damaged or foreign file
                    why = str(error)[:300]
                    reason = f"The network {name} in {folder} could not be loaded ({why}): put it there anew."
            if reason is not None:
                self._loaded[name] = Missing(reason)
        network = self._loaded[name]
        if isinstance(network, Missing):
            raise network
        return network, self.place(network) if self.place else torch.device(device)


class Keys(torch.nn.Module):
    """The keys of the last attention of a transformers ViT: pixels [1, 3, H, W] to [1 + tokens, C], CLS first.

    Attributes:
        patch: side of a token, in pixels.
    """

    def __init__(self, vit):
        super().__init__()
        self.vit, self.patch = vit, vit.config.patch_size
        keys = ("key", "k_proj")  # by transformers' version
        self.layer = [name for name, _ in vit.named_modules() if name.rpartition(".")[2] in keys][-1]

    def forward(self, pixels):
        kept = []
        handle = self.vit.get_submodule(self.layer).register_forward_hook(lambda _, __, out: kept.append(out))
        try:
            self.vit(pixel_values=pixels, interpolate_pos_encoding=True)
        finally:
            handle.remove()
        return kept[0][0]


def _vit(folder):
    from transformers import ViTModel

    return ViTModel.from_pretrained(folder, add_pooling_layer=False, use_safetensors=True, local_files_only=True)


class Clip(torch.nn.Module):
    """A transformers CLIP whose features are tensors in every version of transformers, as torchmetrics expects."""

    def __init__(self, model, processor):
        super().__init__()
        self.model, self.processor, self.config = model, processor, model.config

    def get_image_features(self, pixels):
        return _tensor(self.model.get_image_features(pixel_values=pixels))

    def get_text_features(self, ids, attention):
        return _tensor(self.model.get_text_features(input_ids=ids, attention_mask=attention))


def _tensor(features):
    return features if isinstance(features, torch.Tensor) else features.pooler_output


class Processor:
    """CLIP's preparation of pictures, by PIL as in the published evaluation, and of words, cut where too long."""

    def __init__(self, pictures, words, longest):
        self.pictures, self.words, self.longest = pictures, words, longest

    def __call__(self, images=None, text=None, **_):
        if images is not None:
            return self.pictures([i.numpy() for i in images], return_tensors="pt", input_data_format="channels_first")
        return self.words(text, return_tensors="pt", padding=True, truncation=True, max_length=self.longest)


def _load_clip(folder, _):
    import transformers

    local = {"local_files_only": True}
    model = transformers.CLIPModel.from_pretrained(folder, use_safetensors=True, **local)
    by_pil = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    pictures = by_pil.from_pretrained(folder, **local) if (folder / "preprocessor_config.json").is_file() else by_pil()
    words = transformers.AutoTokenizer.from_pretrained(folder, **local)
    return Clip(model, Processor(pictures, words, model.config.text_config.max_position_embeddings))


class Lpips(torch.nn.Module):
    """torchmetrics' LPIPS with a backbone from a file; its linear layers come with torchmetrics.

    torchmetrics' public class has torchvision download the backbone. `pnet_rand` is its way to leave that out.
    """

    def __init__(self, name, folder, device):
        super().__init__()
        from safetensors.torch import load_file
        from torchmetrics.functional.image import lpips

        with device:
            self.net = lpips._LPIPS(pretrained=True, net=name, pnet_rand=True)
        state, wanted = load_file(folder / WEIGHTS), self.net.net.state_dict()
        # "features.3.squeeze.weight" of torchvision is "slices.1.3.squeeze.weight" here
        names = {key: key.split(".", 2 if key.startswith("slices.") else 1)[-1] for key in wanted}
        given = {key: state.get(f"features.{name}") for key, name in names.items()}
        absent = [key for key, value in given.items() if value is None or value.shape != wanted[key].shape]
        if absent:
            raise ValueError(f"it is not torchvision's {LPIPS[name]}: {absent[0]} is missing or of another shape")
        self.net.net.load_state_dict(given)

    def forward(self, a, b, spatial=False):
        """Distance of pictures [1, 3, H, W] in -1..1; with `spatial`, of every pixel: [1, 1, H, W]."""
        self.net.spatial = spatial
        return self.net(a, b)
