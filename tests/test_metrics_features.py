"""Structure distance and CLIP similarities against transformers' raw features, and the quirks of PIE-Bench in them."""
import numpy as np
import pytest
import torch
import transformers
from comfyui_ledits.evaluation.metrics import Metrics
from comfyui_ledits.evaluation.networks import Networks
from PIL import Image
from support import tiny_networks
from support.tiny_networks import MODES, measure, pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_networks.write(tmp_path_factory.mktemp("networks"))


@pytest.fixture(scope="module")
def networks(folder):
    return Networks([folder], cache=False)


# --- DINO -------------------------------------------------------------------------------------------------------------

def similarities(folder, picture, antialias):
    """Self-similarity [N, N] of a picture [3, H, W] by hand: keys from the hidden states before the last layer."""
    vit = transformers.ViTModel.from_pretrained(folder / "dino-vitb8", add_pooling_layer=False).eval()
    x = torch.nn.functional.interpolate(picture[None], (224, 224), mode="bilinear", antialias=antialias)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    modules = dict(vit.named_modules())
    norm, key = (modules[[n for n in modules if n.rpartition(".")[2] in ends][-1]]
                 for ends in (("layernorm_before",), ("key", "k_proj")))
    with torch.no_grad():
        hidden = vit((x - mean) / std, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-2][0]
        keys = (norm(hidden) @ key.weight.T + key.bias).double().numpy()
    lengths = np.sqrt((keys**2).sum(1))
    return keys @ keys.T / np.outer(lengths, lengths)


def test_structure_distance_is_the_mse_of_the_similarities(folder, networks):
    source, edited, mask = pictures(448)
    a, b = (similarities(folder, torch.from_numpy(x).movedim(-1, 0), True) for x in (source, edited))
    expected = ((a - b) ** 2).mean()
    assert a.shape == (50, 50) and expected > 1e-5
    assert measure("plain", "structure_distance", source, edited, mask, networks) == pytest.approx(expected, rel=1e-2)


def test_quirk_dino_sees_0_to_255_without_anti_aliasing(folder, networks):
    source, edited, mask = pictures(448)
    value = measure("pie-bench", "structure_distance", source, edited, mask, networks)
    a, b = (similarities(folder, torch.from_numpy(x * 255).movedim(-1, 0), False) for x in (source, edited))
    assert value == pytest.approx(((a - b) ** 2).mean(), rel=1e-2)
    for scale, antialias in ((1, False), (255, True)):  # each quirk matters
        a, b = (similarities(folder, torch.from_numpy(x * scale).movedim(-1, 0), antialias) for x in (source, edited))
        assert abs(((a - b) ** 2).mean() / value - 1) > 0.02


def test_structure_of_a_part_in_plain_mode_compares_its_tokens(folder, networks):
    source, edited, mask = pictures(448)
    a, b = (similarities(folder, torch.from_numpy(x).movedim(-1, 0), True) for x in (source, edited))
    keep = np.concatenate([[0], (1 - mask).reshape(7, 64, 7, 64).mean((1, 3)).ravel()])
    total = sum(keep[i] * keep[j] * (a[i, j] - b[i, j]) ** 2 for i in range(50) for j in range(50))
    value = measure("plain", "structure_distance_unedit_part", source, edited, mask, networks)
    assert value == pytest.approx(total / keep.sum() ** 2, rel=1e-2)


def test_quirk_structure_of_a_part_is_of_the_blackened_picture(folder, networks):
    source, edited, mask = pictures(448)
    keep = 255 * (1 - mask[..., None])
    a, b = (similarities(folder, torch.from_numpy(x * keep).movedim(-1, 0), False) for x in (source, edited))
    value = measure("pie-bench", "structure_distance_unedit_part", source, edited, mask, networks)
    assert value == pytest.approx(((a - b) ** 2).mean(), rel=1e-2)


# --- CLIP -------------------------------------------------------------------------------------------------------------

def cosine(folder, name, picture, words):
    """Cosine of transformers' raw features of a picture [h, w, 3] in 0..255, scaled by PIL, and words."""
    small = np.asarray(Image.fromarray(picture.astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC), np.float64) / 255
    small = (small - (0.48145466, 0.4578275, 0.40821073)) / (0.26862954, 0.26130258, 0.27577711)
    clip = transformers.CLIPModel.from_pretrained(folder / name).eval()
    ids = transformers.CLIPTokenizer.from_pretrained(folder / name)(words, return_tensors="pt").input_ids
    with torch.no_grad():
        seen = clip.vision_model(torch.from_numpy(small).float().movedim(-1, 0)[None]).pooler_output @ clip.visual_projection.weight.T
        said = clip.text_model(ids).pooler_output @ clip.text_projection.weight.T
    return float((seen * said).sum() / seen.norm() / said.norm())


def fitting(folder, name, picture, prefix=""):
    """A prompt with a positive cosine to the picture, for a random network."""
    return next(w for w in ("a cat", "a red dog", "two trees", "snow", "a ship at sea", "old paint", "seven") if
                cosine(folder, name, picture, prefix + w) > 0.02)


def test_clip_similarity_is_the_cosine(folder, networks):
    source, edited, mask = pictures()
    for name, picture in (("clip_similarity_source_image", source), ("clip_similarity_target_image", edited)):
        words = fitting(folder, "clip-vit-large-patch14", picture * 255)
        expected = 100 * cosine(folder, "clip-vit-large-patch14", picture * 255, words)
        for mode in MODES:
            assert measure(mode, name, source, edited, mask, networks, words) == pytest.approx(expected, abs=1e-2)


def test_quirk_clip_sees_black_around_the_edited_part_and_plain_mode_crops(folder, networks):
    source, edited, mask = pictures()
    name, part = "clip_similarity_target_image_edit_part", "clip-vit-large-patch14"
    black, cut = edited * 255 * mask[..., None], edited[8:40, 16:48] * 255
    words = fitting(folder, part, black)
    value = measure("pie-bench", name, source, edited, mask, networks, words)
    assert value == pytest.approx(100 * cosine(folder, part, black, words), abs=1e-2)
    words = fitting(folder, part, cut)
    plain = measure("plain", name, source, edited, mask, networks, words)
    assert plain == pytest.approx(100 * cosine(folder, part, cut, words), abs=1e-2)
    assert abs(plain - measure("pie-bench", name, source, edited, mask, networks, words)) > 0.1


def test_clip_score_is_2_5_cosines_after_a_photo_depicts(folder, networks):
    source, edited, mask = pictures()
    words = fitting(folder, "clip-vit-base-patch32", edited * 255, "A photo depicts ")
    expected = 2.5 * cosine(folder, "clip-vit-base-patch32", edited * 255, "A photo depicts " + words)
    assert measure("plain", "clip_score", source, edited, mask, networks, words) == pytest.approx(expected, abs=1e-3)


def test_a_cosine_below_0_counts_as_0_and_a_long_prompt_is_cut(folder, networks):
    source, edited, mask = pictures()
    words = "a cat on a mat " * 30
    tool = Metrics("plain", networks, names=("clip_similarity_target_image",))
    assert tool.measure(source, edited, mask, "", words)["clip_similarity_target_image"] >= 0
    assert tool.measure(source, edited, mask, "", " ")["clip_similarity_target_image"] is None
