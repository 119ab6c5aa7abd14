"""Structure distance and CLIP similarities, by transformers and torchmetrics.

"pie-bench" (the published evaluation's matrics_calculator.py, read at cure-lab/PnPInversion@07f97f4):
- DINO gets values 0..255: they are normalised as if they were 0..1. The picture is brought to 224 px without
  anti-aliasing (torchvision's way with tensors before 0.17; the paper is older). A part of the picture is the picture
  with zeros elsewhere.
- CLIP's "edited part" is the edit with black outside the mask, uncropped.
"plain": DINO gets 0..1, anti-aliased; of a part, only the tokens that lie in it are compared, weighted by their share
of it, and the CLS token is left out. CLIP's edited part is the square around the mask.
"""

import torch
from einops import rearrange

SIDE, LONGEST = 224, 480  # of the picture that DINO sees
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
CLIPSCORE_WEIGHT, CLIPSCORE_PREFIX = 2.5, "A photo depicts "  # arXiv 2104.08718, section 3 and its code


def structure_distance(source, edited, part, plain, dino):
    """MSE between the self-similarities of two pictures (arXiv 2201.00424, its structure loss).

    Args:
        source, edited: float [3, H, W] in 0..1.
        part: float [H, W], 1 where it counts, or None for the whole picture.
        dino: from `networks.Networks.dino`.

    Returns:
        float; nan where the part holds no token.
    """
    masked = part is not None and not plain
    inputs = [_for_dino(x * part if masked else x, plain) for x in (source, edited)]
    a, b = (self_similarity(dino(x)) for x in inputs)
    difference = (a - b).square()
    if part is None or not plain:
        return float(difference.mean())
    height, width = (n // dino.patch for n in inputs[0].shape[-2:])
    resized = torch.nn.functional.interpolate((part > 0.5).float()[None, None], (height, width), mode="area")
    resized = rearrange(resized, "1 1 h w -> (h w)")
    weight = torch.cat([torch.zeros_like(resized[:1]), resized])  # CLS first
    weight = weight[:, None] * weight
    return float((difference * weight).sum() / weight.sum())


def _for_dino(picture, plain):
    from torchvision.transforms import functional

    picture = picture if plain else picture * 255
    return functional.normalize(functional.resize(picture[None], SIDE, max_size=LONGEST, antialias=plain), MEAN, STD)


def self_similarity(keys):
    """Cosine similarities [N, N] of keys [N, C] (all heads of a token side by side)."""
    norms = keys.norm(dim=1, keepdim=True)
    return keys @ keys.T / (norms @ norms.T).clamp(min=1e-8)


def clip_similarity(picture, words, clip):
    """max(100 cos, 0) of a picture, uint8 [3, H, W], and words; `clip` from `networks.Networks.clip`."""
    from torchmetrics.functional.multimodal import clip_score

    return float(clip_score(picture, words, lambda: clip))


def clip_score(picture, words, clip):
    """CLIPScore (arXiv 2104.08718): max(2.5 cos, 0) with the words after its prefix; arguments as `clip_similarity`.

    StyleDiffusion names CLIPScore but publishes no script for it; this is CLIPScore's own definition.
    """
    return CLIPSCORE_WEIGHT / 100 * clip_similarity(picture, CLIPSCORE_PREFIX + words, clip)


def edited_part(picture, mask, plain):
    """The edited part as CLIP sees it.

    Args:
        picture: uint8 [3, H, W].
        mask: float [H, W], with a 1 in it.
    """
    if not plain:
        return (picture * mask).byte()
    rows, columns = (torch.nonzero((mask > 0.5).any(dim)).flatten() for dim in (1, 0))
    side = int(max(rows[-1] - rows[0], columns[-1] - columns[0])) + 1
    cut = []
    for places, size in ((rows, mask.shape[0]), (columns, mask.shape[1])):
        middle, length = int(places[0] + places[-1] + 1) // 2, min(side, size)
        start = min(max(middle - length // 2, 0), size - length)
        cut.append(slice(start, start + length))
    return picture[:, cut[0], cut[1]]
