"""Make the thumbnails of the example workflows and the help pages' pictures, by really running them.

    python dev.py serve --port 8188                                       # in one terminal
    .venv/bin/python tests/browser/thumbnails.py http://127.0.0.1:8188    # in another; numbers of workflows may follow

Workflows of the demo model are run, and their source and edit shown side by side. Those that need a checkpoint are
shown as the frontend draws them, which needs a Chromium (see chromium.py).
"""
import io
import json
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import chromium
import run as _the_pack  # noqa: F401  # knows it as comfyui_ledits
from comfyui_ledits.tools.api import workflow
from comfyui_ledits.tools.api.client import ComfyClient

ROOT = Path(sys.path[0])
HELP = ROOT / "web" / "docs"
SIDE, GROUND, INK = 512, (28, 28, 32), (235, 235, 235)  # the template browser shows squares


def blank():
    page = Image.new("RGB", (SIDE, SIDE), GROUND)
    return page, ImageDraw.Draw(page)


def caption(pen, middle, top, text, size=22):
    pen.multiline_text((middle, top), text, INK, ImageFont.load_default(size=size), anchor="ma", align="center")


def run(client, prompt):
    """{title of a node: its picture} of a prompt, and the words that made it: {title: text}."""
    outputs, found, words = client.run(prompt)["outputs"], {}, {}
    for key, node in prompt.items():
        title = node["_meta"]["title"]
        words[title] = next((node["inputs"][name] for name in ("text", "prompt", "target") if name in node["inputs"]), None)
        for file in outputs.get(key, {}).get("images", []):
            found[title] = Image.open(io.BytesIO(client.fetch(file))).convert("RGB")
    return found, words


def label(words, otherwise=""):
    """What asked for the edit, in a line or two."""
    target = words.get("Target prompt") or words.get("Edit Prompts")
    asked = [target.split(" on ")[0] if isinstance(target, str) else None, words.get("Concept")]
    return "\n".join(textwrap.wrap(", ".join(filter(None, asked)) or otherwise, 22))


def side_by_side(source, edit, text):
    page, pen = blank()
    for middle, picture, below in ((SIDE // 4, source, "source"), (3 * SIDE // 4, edit, text)):
        page.paste(picture.resize((240, 240), Image.Resampling.LANCZOS), (middle - 120, 110))
        caption(pen, middle, 366, below)
    return page


def alone(picture, text):
    """One picture as large as it fits, over its words."""
    page, pen = blank()
    scale = min((SIDE - 24) / picture.width, (SIDE - 84) / picture.height)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    page.paste(picture, ((SIDE - picture.width) // 2, (SIDE - 60 - picture.height) // 2))
    caption(pen, SIDE // 2, SIDE - 60, text)
    return page


def grid(found):
    """Several small pictures with their titles."""
    page, pen = blank()
    columns = 3
    cell, rows = SIDE // columns, -(-len(found) // columns)
    for k, (title, picture) in enumerate(found.items()):
        x, y = k % columns * cell, (SIDE - rows * cell) // 2 + k // columns * cell
        page.paste(picture.resize((cell - 40, cell - 40), Image.Resampling.LANCZOS), (x + 20, y + 4))
        caption(pen, x + cell // 2, y + cell - 32, title, 15)
    return page


def thumbnail(found, words, name):
    """What a run of a workflow has to show for itself.

    Args:
        found: {title of a node: its picture}.
        words: {title of a node: its text}.
        name: of the workflow, without its number and model.
    """
    edit = found.get("Save edit")
    source = found.get("Source") or found.get("Source picture")
    for title in ("Preview Attention", "Inspect Inversion"):
        if title in found:
            return alone(found[title], name)
    if edit and source and edit.size == source.size:
        return side_by_side(source, edit, label(words, name.split(", ")[-1]))
    if edit:
        return alone(edit, name)
    return grid({title: picture for title, picture in found.items() if title != "Source picture"})


def save(picture, path):
    """Save the thumbnail of a workflow; for help pages that start from it, also without its empty rows."""
    picture.save(path.with_suffix(".jpg"), quality=88)
    number = path.stem[:2]
    if any(f"](images/{number}.jpg)" in page.read_text("utf-8") for page in HELP.glob("*.md")):
        drawn = np.flatnonzero(np.abs(np.asarray(picture, int) - GROUND).max((1, 2)) > 24)
        (HELP / "images").mkdir(exist_ok=True)
        picture.crop((0, max(drawn[0] - 12, 0), SIDE, min(drawn[-1] + 13, SIDE))).save(
            HELP / "images" / f"{number}.jpg", quality=88)


def graph(page, path, url):
    """The workflow as the frontend draws it."""
    page.open(url)
    page.run(f"app.loadGraphData({path.read_text('utf-8')}, true, true, null)"
             ".then(() => app.extensionManager.command.execute('Comfy.Canvas.FitView'))"
             ".then(() => new Promise(drawn => setTimeout(drawn, 3000)))"
             ".then(() => app.graph.nodes.forEach(node => node.has_errors = false))"  # no red frame: the checkpoint may miss
             ".then(() => { app.canvas.draw(true, true); return new Promise(drawn => setTimeout(drawn, 500)); })")
    corners = page.run("app.graph.groups.map(g => [[g.pos[0], g.pos[1]], [g.pos[0] + g.size[0], g.pos[1] + g.size[1]]])"
                       ".flat().map(p => app.canvas.ds.convertOffsetToCanvas(p))")
    left, top = (min(p[axis] for p in corners) for axis in (0, 1))
    right, bottom = (max(p[axis] for p in corners) for axis in (0, 1))
    shot = path.with_suffix(".png")
    page.screenshot(shot)
    drawn = Image.open(shot).convert("RGB").crop((round(left), round(top), round(right), round(bottom)))
    shot.unlink()
    square, pen = blank()
    drawn = drawn.resize((SIDE - 24, round((SIDE - 24) * drawn.height / drawn.width)), Image.Resampling.LANCZOS)
    square.paste(drawn, (12, (SIDE - drawn.height) // 2 + 30))
    caption(pen, SIDE // 2, (SIDE - drawn.height) // 4, path.stem.split("(")[-1].strip(")"), 44)
    return square


def main(url, *numbers):
    client = ComfyClient(url)
    info = client.object_info()
    client.ask("/settings", json.dumps({"Comfy.TutorialCompleted": True}).encode())  # or templates cover the first page
    for path in sorted((ROOT / "example_workflows").glob("*.json")):
        if numbers and path.stem[:2] not in numbers:
            continue
        print(path.stem, flush=True)
        if "(demo model)" not in path.stem:
            with chromium.Page((2560, 1440)) as page:
                picture = graph(page, path, url)
        else:
            found, words = run(client, workflow.to_prompt(workflow.read(path), info))
            picture = thumbnail(found, words, re.sub(r"^\d+ | \(.*\)$", "", path.stem))
        save(picture, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
