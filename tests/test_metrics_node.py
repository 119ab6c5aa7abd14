"""Edit Metrics: the node by itself, and in a real server."""
import csv
import io
import json
import math
import os
import re
import types

import comfy.sd
import folder_paths
import numpy as np
import pytest
import torch
from comfyui_ledits.evaluation import table
from comfyui_ledits.evaluation.metrics import METRICS
from comfyui_ledits.nodes.edit_metrics import OUTPUTS, EditMetrics
from comfyui_ledits.tools.api.client import ComfyClient
from PIL import Image
from support import tiny_networks

NAMES = [name for _, name, _ in OUTPUTS]


@pytest.fixture
def networks(inference_mode):
    """The networks in ComfyUI's own folder for them."""
    folder = folder_paths.get_folder_paths("ledits_metrics")[0]
    assert folder == os.path.join(folder_paths.models_dir, "ledits_metrics")
    if not os.path.isdir(os.path.join(folder, "alexnet")):
        tiny_networks.write(folder)


def edits(batch=1, side=64):
    """Grey sources, edits that are off by 0.2 outside of a mask over the upper half, and the mask."""
    source = torch.full((batch, side, side, 3), 102 / 255)
    mask = torch.zeros(1, side, side)
    mask[:, : side // 2] = 1
    return source, torch.where(mask[..., None] > 0, 1.0, source + 0.2), mask


def execute(source, edited, mask=None, mode="plain", target="a cat", **more):
    result = EditMetrics.execute(source=source, edited=edited, mode=mode, source_prompt="a dog",
        target_prompt=target, mask=mask, **more)
    return dict(zip([*NAMES, "table"], result.result)), result.ui


def test_values_table_and_picture(networks):
    values, shown = execute(*edits())
    assert values["psnr"] == pytest.approx(-20 * math.log10(0.2), abs=1e-3)
    assert values["mse"] == pytest.approx(0.04, rel=1e-4)
    assert all(math.isfinite(values[name]) for name in NAMES)
    assert re.search(r"^PSNR unedited +13\.98$", values["table"], re.M)
    assert "Not measured" not in values["table"] and shown["text"] == [values["table"]]
    path = os.path.join(folder_paths.get_temp_directory(), shown["images"][0]["filename"])
    assert len(np.unique(np.asarray(Image.open(path)))) > 20


@pytest.mark.usefixtures("inference_mode")
def test_one_source_for_many_edits_and_a_mask_of_another_size():
    source, edited, mask = edits(batch=3)
    values, shown = execute(source[:1], edited, mask[:, ::2, ::2])
    assert values["psnr"] == pytest.approx(13.979, abs=1e-3) and len(shown["images"]) == 3
    values, _ = execute(source, source + torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1, 1))
    assert values["mse"] == pytest.approx((0.01 + 0.04 + 0.09) / 3, rel=1e-4)  # no mask: all of it, mean of the batch
    assert math.isnan(values["clip_edited"])


@pytest.mark.usefixtures("inference_mode")
@pytest.mark.parametrize("height, width, scale", [(134, 130, 8), (128, 135, 8), (71, 64, 8), (140, 143, 16), (150, 100, 32)])
def test_a_source_that_vae_encode_crops_is_cropped_alike(height, width, scale):
    source = 0.8 * torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(0))
    vae = types.SimpleNamespace(crop_input=True, spacial_compression_encode=lambda: scale, output_channels=3,
                                downscale_ratio=scale)
    cropped = comfy.sd.VAE.vae_encode_crop_pixels(vae, source)
    mask = (source[..., 0] > 0.4).float()
    edited = torch.where(comfy.sd.VAE.vae_encode_crop_pixels(vae, mask[..., None].expand(-1, -1, -1, 3)) > 0, 1.0, cropped)
    values, _ = execute(source, edited, mask)
    assert values["mse"] == 0
    height, width = cropped.shape[1:3]
    assert f"was cropped to {width} x {height} in the middle" in values["table"].splitlines()[0]
    assert "cropped" not in execute(cropped, edited)[0]["table"]
    assert execute(source, edited + 0.1, mask)[0]["mse"] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.usefixtures("inference_mode")
@pytest.mark.parametrize("size, edited", [((200, 128), (128, 128)), ((128, 128), (134, 130)), ((130, 128), (125, 128)),
                                          ((256, 256), (128, 128)), ((140, 140), (136, 128))])
def test_pictures_of_other_sizes_are_refused(size, edited):
    with pytest.raises(ValueError, match="scale or crop the source"):
        execute(torch.zeros(1, *size, 3), torch.zeros(1, *edited, 3))


@pytest.mark.usefixtures("inference_mode")
def test_rows_are_added_to_the_csv_file():
    for label in ("a, b", 'c "d"'):
        execute(*edits(batch=2), mode="pie-bench", csv="tables/edits", label=label)
    with open(os.path.join(folder_paths.get_output_directory(), "tables", "edits.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["a, b", "a, b", 'c "d"', 'c "d"']
    assert list(rows[0])[5:] == list(METRICS) and rows[0]["mode"] == "pie-bench"
    assert float(rows[3]["psnr_unedit_part"]) == pytest.approx(13.979 + 3.0103, abs=1e-3)


@pytest.mark.usefixtures("inference_mode")
def test_a_csv_file_outside_or_of_something_else_is_refused(tmp_path):
    output = folder_paths.get_output_directory()
    os.makedirs(output, exist_ok=True)
    link = os.path.join(output, "link")
    os.path.lexists(link) or os.symlink(tmp_path, link)
    for name in ("../x", "/tmp/x", "a/../../x", "C:\\x", "link/x"):
        with pytest.raises(ValueError, match="ComfyUI's"):
            execute(*edits(), csv=name)
    assert not list(tmp_path.iterdir())
    with open(os.path.join(output, "other.csv"), "w") as file:
        file.write("some,thing\n1,2\n")
    with pytest.raises(ValueError, match="other columns.*choose another name"):
        execute(*edits(), csv="other.csv")


@pytest.mark.usefixtures("inference_mode")
def test_sizes_that_do_not_fit_are_refused():
    source, edited, mask = edits(batch=3)
    with pytest.raises(ValueError, match="source is 64 x 32 and the edit 64 x 64 pixels: scale or crop"):
        execute(source[:, :32], edited, mask)
    with pytest.raises(ValueError, match="2 sources for 3 edits"):
        execute(source[:2], edited, mask)


def test_the_mean_leaves_out_what_was_not_measured():
    rows = [{"psnr": 1.0, "ssim": math.nan, "mse": None, "lpips": math.nan}, {"psnr": 2.0, "ssim": 3.0, "mse": None, "lpips": None}]
    means = table.mean(rows)
    assert means["psnr"] == 1.5 and means["ssim"] == 3.0 and means["mse"] is None and math.isnan(means["lpips"])
    words = table.text(means, {"mse": "Do this.", "lpips": "Do this."})
    assert re.search(r"^LPIPS x10\^3 +no area$", words, re.M) and re.search(r"^SSIM x10\^2 +300\.00$", words, re.M)
    assert words.count("Do this.") == 1


def test_in_a_server(server_url):
    server = ComfyClient(server_url)
    graph = {name: {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": colour}}
             for name, colour in (("source", 0x333333), ("edited", 0x666666))}
    graph["mask"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 64, "height": 64}}
    graph["metrics"] = {"class_type": "LEDITS_EditMetrics", "inputs": {
        "source": ["source", 0], "edited": ["edited", 0], "mask": ["mask", 0], "mode": "pie-bench", "source_prompt": "",
        "target_prompt": "", "csv": "server", "label": "mine"}}
    entry = server.run(graph)["outputs"]["metrics"]
    assert "PSNR unedited" in entry["text"][0] and "13.98" in entry["text"][0] and "NaN" not in json.dumps(entry)
    assert Image.open(io.BytesIO(server.fetch(entry["images"][0]))).width > 1000
    rows = list(csv.DictReader(io.StringIO(server.fetch({"filename": "server.csv", "subfolder": "", "type": "output"}).decode())))
    assert len(rows) == 1 and rows[0]["label"] == "mine"
    assert float(rows[0]["psnr"]) == pytest.approx(-20 * math.log10(0.2), abs=1e-3)
    assert "ledits_metrics" in server.ask_json("/models")
