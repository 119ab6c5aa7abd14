"""The metrics against closed forms, plain numpy, and the libraries' raw features; each quirk of PIE-Bench by itself."""
import io
import math
import socket

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from comfyui_ledits.evaluation.metrics import METRICS, PUBLISHED, Metrics
from comfyui_ledits.evaluation.networks import NETWORKS, Networks
from PIL import Image
from support import tiny_networks
from support.tiny_networks import MODES, measure, pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_networks.write(tmp_path_factory.mktemp("networks"))


@pytest.fixture(scope="module")
def networks(folder):
    return Networks([folder], cache=False)


# --- pixels -----------------------------------------------------------------------------------------------------------

def half(step=51 / 255):
    """An edit that is off by `step` outside of a mask over half of it, and by much inside."""
    source = np.full((32, 32, 3), 102 / 255, np.float32)
    mask = np.zeros((32, 32), np.float32)
    mask[:16] = 1
    return source, np.where(mask[..., None] > 0, 1, source + step).astype(np.float32), mask


def test_psnr_and_mse_outside_the_mask_are_the_closed_form_in_plain_mode():
    assert measure("plain", "psnr_unedit_part", *half()) == pytest.approx(-20 * math.log10(0.2), abs=1e-4)
    assert measure("plain", "mse_unedit_part", *half()) == pytest.approx(0.04, rel=1e-5)
    assert measure("plain", "mse_edit_part", *half()) == pytest.approx(0.36, rel=1e-5)
    assert measure("plain", "mse", *half()) == pytest.approx(0.2, rel=1e-5)


@pytest.mark.parametrize("rows", [8, 16, 28])
def test_quirk_pixels_left_out_count_as_equal(rows):
    """PSNR is 10 log10(1/f) dB more, 3.01 at a mask over half, and MSE f times that over the part alone."""
    source, edited, mask = half()
    mask[:] = 0
    mask[:rows] = 1
    edited = source + np.float32(0.2)
    share = 1 - rows / 32
    more = measure("pie-bench", "psnr_unedit_part", source, edited, mask) - measure("plain", "psnr_unedit_part", source, edited, mask)
    assert more == pytest.approx(10 * math.log10(1 / share), abs=1e-3)
    if rows == 16:
        assert more == pytest.approx(3.0103, abs=1e-3)
    assert measure("pie-bench", "mse_unedit_part", source, edited, mask) == pytest.approx(0.04 * share, rel=1e-4)


def test_quirk_a_soft_mask_multiplies():
    source, edited, mask = half()
    soft = np.full_like(mask, 0.25)
    edited = source + np.float32(0.2)
    assert measure("pie-bench", "mse_unedit_part", source, edited, soft) == pytest.approx(0.04 * 0.75**2, rel=1e-4)
    assert measure("plain", "mse_unedit_part", source, edited, soft) == pytest.approx(0.04, rel=1e-4)


def test_quirk_pictures_are_8_bit_files():
    source, edited, mask = half(step=0.3 / 255)
    assert measure("pie-bench", "mse_unedit_part", source, edited, mask) == 0
    assert measure("plain", "mse_unedit_part", source, edited, mask) == pytest.approx((0.3 / 255) ** 2, rel=1e-2)


@pytest.mark.parametrize("mode", MODES)
def test_the_jpeg_is_pils(mode):
    source, edited, mask = pictures()
    file = io.BytesIO()
    Image.fromarray((edited * 255).round().astype(np.uint8)).save(file, "JPEG")
    lossy = np.asarray(Image.open(file), np.float32) / 255
    through = measure(mode, "mse", source, edited, mask, jpeg=True)
    assert through == pytest.approx(measure(mode, "mse", source, lossy, mask), rel=1e-6)
    assert through != measure(mode, "mse", source, edited, mask)


def ssim_map(a, b):
    """SSIM of every pixel by a loop (Wang et al. 2004): Gaussian window of 11, sigma 1.5, reflected at the border."""
    x = np.arange(-5, 6)
    window = np.exp(-(x[:, None] ** 2 + x**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = 0.01**2, 0.03**2
    a, b = (np.pad(p.astype(np.float64), ((5, 5), (5, 5), (0, 0)), "reflect") for p in (a, b))
    out = np.zeros((a.shape[0] - 10, a.shape[1] - 10, 3))
    for i, j, c in np.ndindex(*out.shape):
        p, q = a[i : i + 11, j : j + 11, c], b[i : i + 11, j : j + 11, c]
        mp, mq = (window * p).sum(), (window * q).sum()
        vp, vq, both = ((window * s).sum() for s in ((p - mp) ** 2, (q - mq) ** 2, (p - mp) * (q - mq)))
        out[i, j, c] = (2 * mp * mq + c1) * (2 * both + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
    return out


def test_ssim_is_the_loop():
    source, edited, mask = pictures(24)
    keep = 1 - mask[..., None]
    assert measure("plain", "ssim", source, edited, mask) == pytest.approx(ssim_map(source, edited).mean(), abs=1e-5)
    # only changes in the part matter, and only its pixels are averaged
    full = ssim_map(source, np.where(keep > 0, edited, source))
    assert measure("plain", "ssim_unedit_part", source, edited, mask) == pytest.approx(full[mask == 0].mean(), abs=1e-5)


def test_quirk_ssim_of_the_whole_frame_without_its_border():
    """The published numbers are older than torchmetrics 1.5, which still left out 5 pixels along the border."""
    source, edited, mask = pictures(24)
    keep = 1 - mask[..., None]
    full = ssim_map(source * keep, edited * keep)
    value = measure("pie-bench", "ssim_unedit_part", source, edited, mask)
    assert value == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-5)
    assert abs(value - full.mean()) > 1e-3
    assert abs(value - measure("plain", "ssim_unedit_part", source, edited, mask)) > 1e-3


# --- LPIPS ------------------------------------------------------------------------------------------------------------

TAPS = {"squeeze": ("squeezenet1_1", (1, 4, 7, 9, 10, 11, 12)), "alex": ("alexnet", (1, 4, 7, 9, 11))}


def lpips_maps(folder, networks, kind, a, b):
    """LPIPS (arXiv 1801.03924, equation 1) of pictures [3, H, W] in -1..1: the map of every layer, on torchvision's net."""
    name, taps = TAPS[kind]
    net = getattr(torchvision.models, name)(weights=None).eval().features
    state = safetensors.torch.load_file(folder / name / "model.safetensors")
    net.load_state_dict({k.removeprefix("features."): v for k, v in state.items()})
    weights = {k: v for k, v in networks.lpips(kind, "cpu")[0].state_dict().items() if ".lin" in k and ".lins." not in k}
    shift, scale = (torch.tensor(v)[:, None, None] for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    maps, a, b = [], ((a - shift) / scale)[None], ((b - shift) / scale)[None]
    with torch.no_grad():
        for i, layer in enumerate(net):
            a, b = layer(a), layer(b)
            if i in taps:
                w = next(v for k, v in weights.items() if f"lin{len(maps)}." in k)
                difference = a / a.square().sum(1, True).add(1e-8).sqrt() - b / b.square().sum(1, True).add(1e-8).sqrt()
                maps.append((difference.square() * w).sum(1, True))
    return maps


def test_lpips_is_the_formula(folder, networks):
    source, edited, mask = pictures()
    a, b = (torch.from_numpy(x * 2 - 1).movedim(-1, 0) for x in (source, edited))
    expected = sum(float(m.mean()) for m in lpips_maps(folder, networks, "squeeze", a, b))
    assert expected > 1e-3
    for mode in MODES:
        assert measure(mode, "lpips", source, edited, mask, networks) == pytest.approx(expected, rel=1e-4)


def test_lpips_outside_the_mask_is_the_mean_of_its_map_there(folder, networks):
    source, edited, mask = pictures()
    kept = np.where(mask[..., None] > 0, source, edited)
    a, b = (torch.from_numpy(x * 2 - 1).movedim(-1, 0) for x in (source, kept))
    maps = lpips_maps(folder, networks, "squeeze", a, b)
    full = sum(torch.nn.functional.interpolate(m, (64, 64), mode="bilinear") for m in maps)[0, 0].numpy()
    value = measure("plain", "lpips_unedit_part", source, edited, mask, networks)
    assert value == pytest.approx(full[mask == 0].mean(), rel=1e-4)


def test_quirk_lpips_sees_black_in_the_mask_and_averages_over_the_frame(folder, networks):
    source, edited, mask = pictures()
    a, b = (torch.from_numpy(x * (1 - mask[..., None]) * 2 - 1).movedim(-1, 0) for x in (source, edited))
    expected = sum(float(m.mean()) for m in lpips_maps(folder, networks, "squeeze", a, b))
    value = measure("pie-bench", "lpips_unedit_part", source, edited, mask, networks)
    assert value == pytest.approx(expected, rel=1e-4)
    assert abs(value / measure("plain", "lpips_unedit_part", source, edited, mask, networks) - 1) > 0.05


def test_quirks_of_ns_lpips(folder, networks):
    """AlexNet, 256 x 256 by PIL, a mask soft at its edges, values 0..1 where -1..1 are expected."""
    source, edited, mask = pictures(96)

    def small(x):
        values = Image.fromarray((x * 255).round().astype(np.uint8)).resize((256, 256), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(values, np.float32) / 255)

    keep = small(1 - mask)
    assert ((keep > 0) & (keep < 1)).any()
    a, b = ((small(x) * keep[..., None]).movedim(-1, 0) for x in (source, edited))
    expected = sum(float(m.mean()) for m in lpips_maps(folder, networks, "alex", a, b))
    value = measure("pie-bench", "ns_lpips", source, edited, mask, networks)
    assert value == pytest.approx(expected, rel=1e-4)
    assert abs(value / measure("plain", "ns_lpips", source, edited, mask, networks) - 1) > 0.05


# --- all of them ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", MODES)
def test_an_edit_that_changes_nothing(mode, networks):
    source, _, mask = pictures()
    values = Metrics(mode, networks).measure(source, torch.from_numpy(source), mask, "a cat", "a cat")
    assert tuple(values) == tuple(METRICS) and set(PUBLISHED) <= set(values)
    for name, value in values.items():
        if name.startswith(("structure", "lpips", "mse", "ns_")):
            assert value == pytest.approx(0, abs=1e-8), name
        if name.startswith("psnr"):
            assert value == math.inf
        if name.startswith("ssim"):
            assert value == pytest.approx(1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fill", [0, 1])
def test_an_empty_part_is_nan(mode, fill, networks):
    source, edited, mask = pictures()
    values = Metrics(mode, networks).measure(source, edited, np.full_like(mask, fill), "a", "b")
    empty = "_unedit_part" if fill else "_edit_part"
    assert {n for n, v in values.items() if math.isnan(v)} == {n for n in METRICS if n.endswith(empty)} | ({"ns_lpips"} if fill else set())


def test_what_is_missing_is_named_and_the_rest_is_measured(tmp_path, folder):
    (tmp_path / "clip-vit-large-patch14").symlink_to(folder / "clip-vit-large-patch14")
    (tmp_path / "dino-vitb8").mkdir()
    for file, text in (("config.json", "{}"), ("pytorch_model.bin", "a pickle")):
        (tmp_path / "dino-vitb8" / file).write_text(text)
    (tmp_path / "alexnet").mkdir()
    (tmp_path / "alexnet" / "model.safetensors").write_bytes(b"damaged")
    tool = Metrics("pie-bench", Networks([tmp_path], cache=False))
    before = tool.missing
    assert str(tmp_path / "dino-vitb8") in before["structure_distance"] and "model.safetensors" in before["structure_distance"]
    assert "squeezenet1_1" in before["lpips_unedit_part"] and "python -c" in before["lpips_unedit_part"]
    values = tool.measure(*pictures(), "a cat", "a dog")
    absent = {n for n in METRICS if n.startswith("structure") or "lpips" in n} | {"clip_score"}
    assert {n for n, v in values.items() if v is None} == absent == set(tool.missing)
    assert "could not be loaded" in tool.missing["ns_lpips"]


def test_a_picture_too_small_for_a_metric_does_not_keep_others_from_it(networks):
    tool = Metrics("pie-bench", networks, names=("ssim", "lpips", "mse"))
    values = tool.measure(*pictures(8))
    assert values["ssim"] is None and values["lpips"] is None and values["mse"] > 0
    assert "at least 32 x 32" in tool.missing["lpips"]
    assert None not in tool.measure(*pictures(32)).values() and not tool.missing


def test_without_networks_the_others_are_measured():
    tool = Metrics("plain")
    values = tool.measure(*pictures())
    assert {n for n, v in values.items() if v is not None} == {n for n in METRICS if n.startswith(("psnr", "ssim", "mse"))}
    assert set(tool.missing) == {n for n, v in values.items() if v is None}


def test_nothing_is_downloaded(folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    values = Metrics("pie-bench", Networks([folder])).measure(*pictures(), "a cat", "a dog")
    assert None not in values.values()
    assert all(NETWORKS[name].files for name in NETWORKS)


def test_what_does_not_fit_is_refused():
    source, edited, mask = pictures()
    with pytest.raises(ValueError, match="no mode 'Plain': choose pie-bench or plain"):
        Metrics("Plain")
    with pytest.raises(ValueError, match="no metric 'fid'"):
        Metrics(names=("fid",))
    with pytest.raises(ValueError, match=r"\[64, 64, 3\].*\[32, 64, 3\].*of one size"):
        Metrics().measure(source, edited[:32], mask)
