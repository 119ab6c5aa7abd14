"""PSNR, MSE, SSIM and LPIPS over a part of a picture, by torchmetrics.

"pie-bench" (the published evaluation's matrics_calculator.py, read at cure-lab/PnPInversion@07f97f4):
- pictures are 8-bit files;
- both pictures are multiplied by the part's mask and compared as whole frames: the pixels left out are equal and count.
  With a share f of the picture measured, MSE is f times, and PSNR 10 log10(1/f) dB more than over the part alone
  (3.01 dB at a half); in LPIPS they are -1, which is black;
- SSIM's mean leaves out 5 pixels along the border, as torchmetrics did before 1.5 (its pull request 2721).
"plain": PSNR and MSE over the part's pixels alone. For SSIM and LPIPS, which look at neighbourhoods, the edit is set to
the source outside of the part, and their maps are averaged over the part.
"""

import io

import numpy
import torch

JPEG_QUALITY = 75  # PIL's own, which the published editors saved with
SSIM_BORDER = 5  # half of the window of 11
SMALLEST = {"ssim": 11, "lpips": 32, "ns_lpips": 32}  # side of a picture: the window, what the networks take
NS_SIDE = 256  # NS-LPIPS' side


def to_bytes(picture):
    """A picture as files keep it: float [H, W, 3] in 0..1 to uint8 numpy [H, W, 3]."""
    return (picture.clamp(0, 1) * 255).round().byte().cpu().numpy()


def through_jpeg(values):
    """uint8 [H, W, 3] as a JPEG of PIL's default quality gives it back.

    The published editors save a strip of four pictures, whose blocks of 16 px fall on the picture's own, so that only
    its first column of pixels can differ (through the neighbour's colours), and that is in every mask of PIE-Bench.
    """
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(values).save(file, "JPEG", quality=JPEG_QUALITY)
    return numpy.asarray(Image.open(file).convert("RGB"))


def psnr(source, edited, part, plain):
    """PSNR in dB. Pictures float [3, H, W] in 0..1; part float [H, W], 1 where it counts, or None for all of it."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(*_counted(edited, source, part, plain), data_range=1.0))


def mse(source, edited, part, plain):
    """Mean squared error; arguments as `psnr`."""
    from torchmetrics.functional.regression import mean_squared_error

    return float(mean_squared_error(*_counted(edited, source, part, plain)))


def ssim(source, edited, part, plain):
    """Structural similarity; arguments as `psnr`."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = _kept(edited, source, part, plain)
    _, full = structural_similarity_index_measure(a[None], b[None], data_range=1.0, return_full_image=True)
    full = full[0]
    if not plain:
        return float(full[:, SSIM_BORDER:-SSIM_BORDER, SSIM_BORDER:-SSIM_BORDER].mean())
    return float(full.mean() if part is None else full[:, part > 0.5].mean())


def lpips(source, edited, part, plain, network):
    """LPIPS with a network of `networks.Networks.lpips`; other arguments as `psnr`."""
    a, b = (x[None] * 2 - 1 for x in _kept(edited, source, part, plain))
    if not plain or part is None:
        return float(network(a, b))
    return float(network(a, b, spatial=True)[0, 0][part > 0.5].mean())


def ns_lpips(source, edited, mask, plain, network):
    """StyleDiffusion's NS-LPIPS: LPIPS outside the mask.

    Its script (eval_metrics/ns_lpips.py, sen-mao/StyleDiffusion@07b388a) brings pictures and mask to 256 x 256 with
    PIL, multiplies with a mask that is soft at its edges (the binary one is overwritten), and gives LPIPS values in
    0..1 where it expects -1..1. "plain" is `lpips`. Arguments as `psnr`; mask float [H, W], 1 where the edit may
    change.
    """
    if plain:
        return lpips(source, edited, 1 - mask, plain=True, network=network)
    a, b, keep = (_resized(x).to(source.device) for x in (edited, source, 1 - mask[None]))
    return float(network((a * keep)[None], (b * keep)[None]))


def _resized(x):
    """float [C, H, W] in 0..1 as torchvision's Resize and ToTensor make it of a file: float [C, 256, 256]."""
    from PIL import Image

    values = to_bytes(x.movedim(0, -1))
    small = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
    small = numpy.array(small.resize((NS_SIDE, NS_SIDE), Image.Resampling.BILINEAR), dtype=numpy.float32) / 255
    return torch.from_numpy(small if small.ndim == 3 else small[..., None]).movedim(-1, 0)


def _counted(a, b, part, plain):
    """The values to compare: whole frames with zeros outside the part, or the part's pixels alone."""
    if part is None:
        return a, b
    return (a[:, part > 0.5], b[:, part > 0.5]) if plain else (a * part, b * part)


def _kept(edited, source, part, plain):
    """As `_counted`, for metrics that need whole frames."""
    if part is None:
        return edited, source
    return (torch.where(part > 0.5, edited, source), source) if plain else (edited * part, source * part)
