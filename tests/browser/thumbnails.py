"""Make the thumbnails of the example workflows and the README's picture, by really running them.

    python dev.py serve --port 8188                                       # in one terminal
    .venv/bin/python tests/browser/thumbnails.py http://127.0.0.1:8188    # in another

Workflows of the demo model are run, and their source and edit shown side by side. Those that need a checkpoint are
shown as the frontend draws them, which needs a Chromium (see chromium.py).
"""
import io
import json
import sys
from pathlib import Path

import chromium
import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from demo import pictures, sheet, workflow
from demo.client import ComfyClient

ROOT = Path(sys.path[0])
SIDE, GROUND, INK = 512, (28, 28, 32), (235, 235, 235)  # the template browser shows squares


def blank():
    page = Image.new("RGB", (SIDE, SIDE), GROUND)
    return page, ImageDraw.Draw(page)


def caption(pen, middle, top, text, size=22):
    pen.multiline_text((middle, top), text, INK, ImageFont.load_default(size=size), anchor="ma", align="center")


def run(client, prompt):
    """{title of a node: its picture} of a prompt, and the words that made it: {title: text}."""
    for name in {node["inputs"]["image"] for node in prompt.values() if node["class_type"] == "LoadImage"}:
        client.upload(pictures.FOLDER / name)
    outputs, found, words = client.run(prompt)["outputs"], {}, {}
    for key, node in prompt.items():
        title = node["_meta"]["title"]
        words[title] = node["inputs"].get("text", node["inputs"].get("prompt"))
        for file in outputs.get(key, {}).get("images", []):
            found[title] = Image.open(io.BytesIO(client.fetch(file))).convert("RGB")
    return found, words


def label(words):
    """What asked for the edit, in a line or two."""
    target = words.get("Target prompt")
    return f"{target.split(' on ')[0]},\n{words['Concept']}" if target else words["Concept"]


def side_by_side(found, words):
    page, pen = blank()
    for middle, title, text in ((SIDE // 4, "Source", "source"), (3 * SIDE // 4, "Save edit", label(words))):
        picture = found[title].resize((240, 240), Image.Resampling.LANCZOS)
        page.paste(picture, (middle - 120, 110))
        caption(pen, middle, 366, text)
    return page


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


def main(url):
    client = ComfyClient(url)
    info, cells = client.object_info(), []
    for path in sorted((ROOT / "example_workflows").glob("*.json")):
        print(path.stem, flush=True)
        if any(node["type"] == "CheckpointLoaderSimple" for node in json.loads(path.read_text("utf-8"))["nodes"]):
            with chromium.Page((2560, 1440)) as page:
                picture = graph(page, path, url)
        else:
            found, words = run(client, workflow.to_prompt(workflow.read(path), info))
            picture = side_by_side(found, words)
            if "Save reconstruction" in found:
                steps = [("source", "Source"), ("reconstruction", "Save reconstruction")] if not cells else []
                steps += [(label(words).replace("\n", " "), "Save edit")]
                cells += [(text, np.asarray(found[title], np.float32) / 255) for text, title in steps]
        picture.save(path.with_suffix(".jpg"), quality=88)
    heads = ["source", "reconstruction", "concept alone", "prompt and concept"]
    sheet.draw(heads, [[("", picture) if text in heads else (text, picture) for text, picture in cells]]).save(
        ROOT / "web" / "images" / "edit.jpg", quality=88)


if __name__ == "__main__":
    main(*sys.argv[1:])
