"""Demo-Bench: PIE-Bench's format from the renderer, and verdicts that tell made edits from those that were not."""

import json
from dataclasses import replace

import numpy as np
import pytest
from comfyui_ledits.demo import captions, pictures, scenes
from comfyui_ledits.tools.benchmarks import demobench, demobench_truth, piebench
from PIL import Image

EACH = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("demobench") / "data"
    demobench.make(path, EACH)
    return path


@pytest.fixture(scope="module")
def items(folder):
    found, problems = piebench.load(folder)
    assert not problems
    return found


def shown(path):
    return np.asarray(Image.open(path), np.float32) / 255


def target_of(folder, item):
    return shown(folder / demobench.TARGETS / item.truth["target"])


def test_the_format_is_piebench(folder, items):
    assert demobench.EACH * len(demobench.EDITS) >= 200
    assert len(items) == EACH * 8 and {item.type for item in items} == {1, 2, 3, 5, 6, 7, 8, 9}
    mapping = json.loads((folder / "mapping_file.json").read_text())
    for item in items:
        entry = mapping[item.key]
        assert len(item.key) == 12 and item.key.isdigit() and Image.open(item.path).size == (128, 128)
        assert set(entry) - {"truth"} == {"image_path", "original_prompt", "editing_prompt", "editing_instruction",
                                          "editing_type_id", "blended_word", "mask"}
        assert item.source != item.target and item.source_marked + item.target_marked
        for word, prompt in zip(item.blended, (item.source, item.target)):
            assert word in prompt.split()


def test_scenes_are_held_out_and_one_value_differs(items):
    for item in items:
        source, target = (pictures.scene_of({"scene": item.truth[name]}) for name in ("source", "scene"))
        assert scenes.held_out(source) and source.seed == target.seed
        fields = [name for name in ("ground", "style", "ground_pattern") if getattr(source, name) != getattr(target, name)]
        if item.type in (8, 9):
            assert fields == [{8: "ground", 9: "style"}[item.type]] and source.things == target.things
            continue
        assert not fields and len(target.things) - len(source.things) == {2: 1, 3: -1}.get(item.type, 0)
        for a, b in zip(source.things, target.things):
            changed = {name for name in vars(a) if getattr(a, name) != getattr(b, name)}
            allowed = {1: {"kind"}, 5: {"place", "x", "y"}, 6: {"colour"}, 7: {"pattern"}}.get(item.type, set())
            assert changed <= allowed and bool(changed) == bool(allowed)


def test_masks_are_where_the_true_pictures_differ(folder, items):
    """Read back from the files: nothing of the edit is outside the mask, and the mask is no larger than it must be."""
    for item in items:
        mask = piebench.decode(item.runs, 128, 128) > 0
        difference = np.abs(shown(item.path) - target_of(folder, item)).max(-1)
        assert difference[~mask].max(initial=0) <= demobench.DIFFERENCE + 1 / 255
        inner = mask[1:-1, 1:-1]
        if item.type == 9:
            assert mask.all()
        elif item.type in (1, 2, 3, 5):
            assert (difference[1:-1, 1:-1][inner] > 0.01).mean() > 0.5 and inner.mean() < 0.7


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("a red star", "a blue star", ("a [red] star", "a [blue] star")),
        ("a star", "a big star", ("a star", "a [big] star")),
        ("a star and a moon", "a star", ("a star [and a moon]", "a star")),
        ("a moon in the middle here", "a moon at the top here", ("a moon [in the middle] here", "a moon [at the top] here")),
        ("an orange moon", "a striped orange moon", ("[an] orange moon", "[a striped] orange moon")),
    ],
)
def test_brackets_mark_what_differs(before, after, expected):
    found = demobench.bracketed(before, after)
    assert tuple(map(piebench.plain, found)) == (before, after)
    assert found == expected


def test_prompts_are_the_captions(items):
    for item in items:
        scene = pictures.scene_of({"scene": item.truth["scene"]})
        words = item.target.removeprefix("a photo of ")
        assert words in (captions.sentence(scene), captions.sentence(scene, place=False))


def test_the_same_seed_gives_the_same_folder(folder, tmp_path):
    demobench.make(tmp_path / "again", 1)
    demobench.make(tmp_path / "other", 1, seed=1)
    first, again, other = (json.loads((path / "mapping_file.json").read_text())
                           for path in (folder, tmp_path / "again", tmp_path / "other"))
    assert all(first[key] == again[key] for key in again) and not any(other[key] == again[key] for key in again)
    for entry in again.values():
        name = f"annotation_images/{entry['image_path']}"
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_folder_is_made_once(tmp_path):
    demobench.ready(tmp_path / "data", 1)
    before = (tmp_path / "data" / "mapping_file.json").stat().st_mtime_ns
    demobench.ready(tmp_path / "data", 1)
    assert (tmp_path / "data" / "mapping_file.json").stat().st_mtime_ns == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("Dear ...")
    with pytest.raises(piebench.Problem, match="is no Demo-Bench: choose another folder"):
        demobench.ready(tmp_path / "mine", 1)
    assert (tmp_path / "mine" / "letter.txt").is_file()


# --- verdicts -------------------------------------------------------------------------------------------------------


def test_true_targets_succeed_and_unedited_pictures_do_not(folder, items):
    for item in items:
        pair = target_of(folder, item), shown(item.path)
        made, same = (demobench_truth.judge(item.truth, picture) for picture in pair)
        assert (made["success"], made["kept"], same["success"]) == (1, 1, 0), item
        assert made["target_psnr"] > 45 > same["target_psnr"]  # a PNG rounds


def drawn(scene):
    return scenes.render(scene)[0]


def test_half_made_edits_are_told_apart():
    """The right colour on another kind, the right thing at another place, a thing too many, another ground."""
    star = scenes.Thing("star", "red", radius=0.45)
    source = scenes.Scene((star,), "grey", seed=3)

    def verdict(kind, target, edited, thing=0):
        truth = {"type": kind, "source": demobench.asdict(source), "scene": demobench.asdict(target), "thing": thing}
        found = demobench_truth.judge(truth, drawn(edited))
        return found["success"], found["kept"]

    blue = replace(source, things=(replace(star, colour="blue"),))
    assert verdict(6, blue, blue) == (1, 1)
    assert verdict(6, blue, replace(blue, things=(replace(blue.things[0], kind="square"),))) == (1, 0)
    assert verdict(6, blue, replace(blue, ground="brown")) == (1, 0)
    assert verdict(6, blue, replace(blue, things=(replace(star, colour="green"),))) == (0, 1)
    left = replace(source, things=(replace(star, x=-0.42, place="on the left"),))
    right = replace(source, things=(replace(star, x=0.42, place="on the right"),))
    assert verdict(5, left, left) == (1, 1) and verdict(5, left, right)[0] == 0
    small, moon = replace(star, radius=0.34, x=-0.42), scenes.Thing("moon", "white", radius=0.34, x=0.42)
    both = replace(source, things=(small, moon))
    assert verdict(2, both, both, 1) == (1, 1)
    assert verdict(2, both, replace(both, things=(small, replace(moon, kind="heart"))), 1)[0] == 0
    assert verdict(1, source, both)[1] == 0


def test_surface_and_style_are_read_right():
    wrong = []
    for seed in range(40):
        pattern, style = ("plain", "striped", "dotted")[seed % 3], scenes.STYLES[seed % 2]
        scene = scenes.random_scene(470_000 + seed, things=1, pattern=pattern, style=style, size="medium")
        picture, masks = scenes.render(scene)
        found = demobench_truth.pattern_of(picture, masks[0]), demobench_truth.style_of(picture, masks)
        if found != (pattern, style):
            wrong.append((seed, pattern, style, found))
    assert len(wrong) <= 1, wrong
