"""Draws demo/images/*.png and demo/images/truth.json again: `python tools/run.py demo_pictures`."""

import json

import numpy as np
from PIL import Image

from ..demo import pictures, scenes


def main(arguments):
    pictures.FOLDER.mkdir(exist_ok=True)
    entries = [pictures.truth(*row) for row in pictures.PICTURES]
    for entry in entries:
        if not scenes.held_out(pictures.scene_of(entry)):
            raise SystemExit(f"{entry['file']} shows a combination that the model was trained on.")
        picture = np.rint(pictures.draw(entry)[0] * 255).astype(np.uint8)
        Image.fromarray(picture).save(pictures.FOLDER / entry["file"], optimize=True)
    (pictures.FOLDER / "truth.json").write_text(json.dumps(entries, indent=1) + "\n", "utf-8")
    print(f"{pictures.FOLDER}: {len(entries)} pictures")
    return 0
