"""A folder in PIE-Bench's published format, of drawn scenes: JPEG pictures, bracketed prompts, run-length masks."""

import json

import numpy as np
from comfyui_ledits.demo import captions, pictures, scenes
from PIL import Image

FOLDERS = ("0_random_140", "1_change_object_80", "2_add_object_80", "3_delete_object_80", "4_change_attribute_content_40",
           "5_change_attribute_pose_40", "6_change_attribute_color_40", "7_change_attribute_material_40",
           "8_change_background_80", "9_change_style_80")


def runs_of(mask):
    """[start, length, ...], pixel by pixel."""
    out, last = [], 0
    for i, value in enumerate(np.asarray(mask).ravel() > 0.5):
        if value and not last:
            out += [i, 0]
        if value:
            out[-1] += 1
        last = value
    return out


def write_folder(folder, count, side=128):
    """Pictures whose colour is to change, over all ten types in turn; the mapping as a dict."""
    mapping = {}
    for number in range(count):
        scene = scenes.random_scene(600_000 + number, things=1)
        thing, colour = scene.things[0], pictures.other_colour(scene, np.random.default_rng(number))
        picture, masks = scenes.render(scene, side)
        name = f"{FOLDERS[number % 10]}/{number:012d}.jpg"
        path = folder / "annotation_images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(picture * 255).astype(np.uint8)).save(path, quality=95)
        words = captions.sentence(scene)
        mapping[f"{number:012d}"] = {
            "image_path": name,
            "original_prompt": words.replace(f"{thing.colour} {thing.kind}", f"[{thing.colour}] {thing.kind}"),
            "editing_prompt": words.replace(f"{thing.colour} {thing.kind}", f"[{colour}] {thing.kind}"),
            "editing_instruction": f"Make the {thing.kind} {colour}",
            "editing_type_id": str(number % 10),
            "blended_word": f"{thing.kind} {thing.kind}",
            "mask": runs_of(masks[0]),
        }
    (folder / "mapping_file.json").write_text(json.dumps(mapping), "utf-8")
    return mapping
