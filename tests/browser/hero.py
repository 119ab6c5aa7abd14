"""Make the picture at README's top, web/images/edit.jpg, of workflow 49 as it comes and with the other words of its note.

    python dev.py serve --port 8188                                  # in one terminal
    .venv/bin/python tests/browser/hero.py http://127.0.0.1:8188     # in another

Nothing is chosen but the workflow: picture, words and values are its own. Two nodes are added, one that makes the picture
again without an edit and one that gives out the mask that the words make.
"""
import io
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import run as _the_pack  # noqa: F401  # knows it as comfyui_ledits
from comfyui_ledits.tools.api import workflow
from comfyui_ledits.tools.api.client import ComfyClient

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "example_workflows" / "49 Edit a picture (demo model).json"
CELL, GAP, LINE = 380, 15, 24  # pixels
PAPER, INK, EDGE = (255, 255, 255), (20, 20, 20), (255, 255, 255)


def other_words():
    """The target that the workflow's note proposes."""
    (note,) = (node["widgets_values"][0] for node in workflow.read(FILE)["nodes"] if node["type"] == "MarkdownNote")
    return re.search("Try `([^`]+)`", note).group(1)


def prompt_of(info, target=None):
    """The workflow's prompt with a reconstruction and the mask; {title: node's number} of its nodes."""
    prompt = workflow.to_prompt(workflow.read(FILE), info)
    at = {node["_meta"]["title"]: key for key, node in prompt.items()}
    kinds = {node["class_type"]: key for key, node in prompt.items()}
    if target:
        prompt[kinds["LEDITS_EditPrompts"]]["inputs"]["target"] = target
    edit = prompt[at["Edit"]]["inputs"]
    plain = {key: value for key, value in edit.items() if key != "attention"}

    def add(title, kind, **inputs):
        prompt[title] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
        return title

    again = add("again", "LEDITS_KSampler", **plain | {"positive": [kinds["LEDITS_EditPrompts"], 0], "skip": 0, "cfg": 1.0})
    decoded = add("decoded", "VAEDecode", samples=[again, 0], vae=prompt[at["Decode"]]["inputs"]["vae"])
    seen = add("seen", "LEDITS_PreviewAttention", latent=[at["Edit"], 0], image=[at["Source picture"], 0], words="",
               view="average")
    add("made again", "PreviewImage", images=[decoded, 0])
    add("mask", "PreviewImage", images=[add("mask as picture", "MaskToImage", mask=[seen, 1]), 0])
    return prompt


def pictures(client, prompt):
    """{title of a node: its picture}."""
    outputs = client.run(prompt)["outputs"]
    return {prompt[key]["_meta"]["title"]: Image.open(io.BytesIO(client.fetch(shown["images"][0]))).convert("RGB")
            for key, shown in outputs.items() if shown.get("images") and prompt[key]["class_type"] in ("PreviewImage", "SaveImage")}


def outlined(picture, mask):
    """The picture, dim where the mask is not, with the mask's edge drawn."""
    inside = np.asarray(mask.convert("L").resize((CELL, CELL), Image.Resampling.BILINEAR)) >= 128
    drawn = np.asarray(large(picture), np.float32) * np.where(inside, 1, 0.45)[..., None]
    near = np.pad(inside, 2)
    grown = np.any([near[y:y + CELL, x:x + CELL] for y in range(5) for x in range(5)], axis=0)
    drawn[grown & ~inside] = EDGE
    return Image.fromarray(drawn.round().astype(np.uint8))


def large(picture):
    return picture.resize((CELL, CELL), Image.Resampling.LANCZOS)


def sheet(cells, columns):
    """The picture: cells (words, picture) in rows of so many."""
    rows = -(-len(cells) // columns)
    page = Image.new("RGB", (columns * (CELL + GAP) + GAP, rows * (CELL + LINE + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(page)
    for k, (words, picture) in enumerate(cells):
        x, y = GAP + k % columns * (CELL + GAP), GAP + k // columns * (CELL + LINE + GAP)
        page.paste(picture, (x, y))
        pen.text((x + CELL / 2, y + CELL + 4), words, INK, ImageFont.load_default(size=18), anchor="ma")
    return page


def main(url, path=ROOT / "web" / "images" / "edit.jpg"):
    client = ComfyClient(url)
    info, cells = client.object_info(), []
    for target in (None, other_words()):
        prompt = prompt_of(info, target)
        found = pictures(client, prompt)
        (said,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "LEDITS_EditPrompts")
        cells += [(f'the picture: "{said["source"]}"', large(found["Source"])) if target is None else
                  ("made again, without an edit", large(found["made again"])),
                  (f'where "{said["target"]}" may change it', outlined(found["Source"], found["mask"])),
                  (f'the edit: "{said["target"]}"', large(found["Save edit"]))]
    sheet(cells, 3).save(path, quality=88)


if __name__ == "__main__":
    main(*sys.argv[1:])
