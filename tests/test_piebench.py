"""PIE-Bench's data, the workflows of the methods, results that survive an interruption, and the table."""

import csv
import http.server
import io
import json
import math
import threading

import numpy as np
import pytest
from comfyui_ledits.tools.benchmarks import piebench, piebench_run, report, runner_work, table_methods
from comfyui_ledits.tools.benchmarks.runner_book import RESULTS, Book
from PIL import Image
from support.piebench_data import runs_of, write_folder

# --- masks and prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runs", "rows"),
    [
        ([], ["11111", "10001", "10001", "11111"]),
        ([6, 2], ["11111", "11101", "10001", "11111"]),  # 6 and 7 of 20: the second row's second and third
        ([7, 6], ["11111", "10111", "11101", "11111"]),  # on over the end of a row
        ([7, 1, 12, 1], ["11111", "10101", "10101", "11111"]),
        ([13, 999], ["11111", "10001", "10011", "11111"]),  # too long: ends with the picture
        ([20, 5], ["11111", "10001", "10001", "11111"]),  # begins at its end: nothing
    ],
)
def test_masks_as_published(runs, rows):
    mask = piebench.decode(runs, 4, 5)
    assert mask.dtype == np.float32 and ["".join(f"{v:.0f}" for v in row) for row in mask] == rows


@pytest.mark.parametrize("runs", [None, {}, "12", [1], [1, -1], [1.5, 2], [True, 2], [21, 1], [[1, 2]]])
def test_broken_masks_are_refused(runs):
    with pytest.raises(piebench.Problem, match="its mask"):
        piebench.decode(runs, 4, 5)


def test_masks_are_written_as_they_are_read():
    rng = np.random.default_rng(0)
    for mask in (rng.random((7, 9)) > 0.5, np.zeros((3, 4)), np.ones((3, 4)), np.eye(5)):
        runs = piebench.encode(mask)
        assert runs == runs_of(mask)
        inner = piebench.decode(runs, *mask.shape)[1:-1, 1:-1]
        assert (inner == np.asarray(mask, bool)[1:-1, 1:-1]).all()


def test_brackets():
    prompt = "a [round] cake with [orange frosting] on a plate"
    assert piebench.plain(prompt) == "a round cake with orange frosting on a plate"
    assert piebench.marked(prompt) == ("round", "orange frosting")
    assert piebench.marked("a cake []") == () and piebench.plain("a cat [] sits") == "a cat  sits"


# --- the folder -----------------------------------------------------------------------------------------------------


def test_a_folder_in_the_published_format(tmp_path):
    mapping = write_folder(tmp_path, 10, 64)
    items, problems = piebench.load(tmp_path)
    assert not problems and [item.key for item in items] == list(mapping)
    assert [item.type for item in items] == list(range(10)) and items[3].path.is_file()
    for item, entry in zip(items, mapping.values()):
        assert "[" not in item.source + item.target and f"[{item.target_marked[0]}]" in entry["editing_prompt"]
        assert item.blended == tuple(entry["blended_word"].split()) and item.truth is None
    assert piebench.decode(items[0].runs, 64, 64).mean() < 0.9


BROKEN = {
    "no set of fields": "text",
    "editing_type_id is 10": {"editing_type_id": "10"},
    "original_prompt is missing": {"original_prompt": None},
    "editing_prompt is empty": {"editing_prompt": "[]"},
    "its mask is not a list": {"mask": "0 1"},
    "reaches beyond the picture of 64 x 64": {"mask": [5000, 1]},
    "nowhere.jpg is missing": {"image_path": "0_random_140/nowhere.jpg"},
    "not inside annotation_images": {"image_path": "../mapping_file.json"},
    "cannot be read": {"image_path": "text.jpg"},
    "is 30 x 64": {"image_path": "narrow.png"},
    "its image_path holds what is no letter": {"image_path": "a\0b.jpg"},
    "its original_prompt holds what is no letter": {"original_prompt": "half \ud800 a letter"},
    "its editing_prompt holds what is no letter": {"editing_prompt": "\0"},
    "cannot be read ([Errno": {"image_path": "x" * 300 + ".jpg"},
    "broken.png cannot be read": {"image_path": "broken.png"},
    "its truth does not say": {"truth": "yes"},
    "its truth does not say what": {"truth": {"target": 5}},
    "its mask is not a list of starts": {"mask": [10**40, 1]},
    "its mask is not a list of": {"mask": [0, 10**40]},
    "editing_type_id is [1]": {"editing_type_id": [1]},
}
ODD_KEYS = ("../evil", "x" * 201, "\u732b" * 90, "half \ud800", "", "a\nb", "nul\0")


def test_what_is_broken_is_told_and_the_rest_goes_on(tmp_path):
    mapping = write_folder(tmp_path, 2, 64)
    good = mapping["000000000001"]
    (tmp_path / "annotation_images" / "text.jpg").write_text("no picture")
    Image.new("RGB", (30, 64)).save(tmp_path / "annotation_images" / "narrow.png")
    whole = (tmp_path / "annotation_images" / good["image_path"]).read_bytes()
    Image.open(io.BytesIO(whole)).save(tmp_path / "annotation_images" / "broken.png")
    path = tmp_path / "annotation_images" / "broken.png"
    path.write_bytes(path.read_bytes()[:8] + b"\xff" * 8 + path.read_bytes()[16:])
    for number, change in enumerate(BROKEN.values()):
        mapping[f"bad{number}"] = change if isinstance(change, str) else good | change
    mapping |= dict.fromkeys(ODD_KEYS, good)
    (tmp_path / "mapping_file.json").write_text("\ufeff" + json.dumps(mapping), "utf-8")
    items, problems = piebench.load(tmp_path)
    assert [item.key for item in items] == ["000000000000", "000000000001"]
    assert len(problems) == len(BROKEN) + len(ODD_KEYS)
    for number, (words, problem) in enumerate(zip(BROKEN, problems)):
        assert problem.startswith(f"bad{number} is left out: ") and words in problem and problem.endswith(".")
    assert all("file name" in problem for problem in problems[len(BROKEN):])
    assert all(problem.isprintable() and problem.encode() and len(problem) < 450 for problem in problems)


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "has no mapping_file.json"), ("{", "is not JSON"), ("[1]", "is not PIE-Bench's mapping"), ("{}", "it is empty"),
     ("[" * 100_000, "is not JSON"), ('{"1": {"mask": [' + "9" * 5000 + "]}}", "can be used")],
)
def test_a_folder_that_is_none(tmp_path, text, words):
    if text is not None:
        (tmp_path / "mapping_file.json").write_text(text)
    with pytest.raises(piebench.Problem, match=words):
        piebench.load(tmp_path)


def test_a_subset_is_spread_over_the_types(tmp_path):
    write_folder(tmp_path, 30, 64)
    items, _ = piebench.load(tmp_path)
    assert sorted(item.type for item in piebench.choose(items, 12)) == [0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [item.key[-2:] for item in piebench.choose(items, 3, {1, 8})] == ["01", "08", "11"]
    assert piebench.choose(items) == items


# --- the methods ----------------------------------------------------------------------------------------------------


def item(source="a [cat] sits", target="a [dog] sits", blended="cat dog", number=1):
    return piebench.Item("1", number, None, piebench.plain(source), piebench.plain(target), piebench.marked(source),
                         piebench.marked(target), tuple(blended.split()))


def test_names_of_methods():
    assert table_methods.parse("all") == table_methods.METHODS and len(set(table_methods.METHODS)) == 36
    assert set(table_methods.parse("paper")) == set(table_methods.PAPER) == set(report.PUBLISHED)
    assert table_methods.parse("direct+p2p, *+masactrl")[0] == "ddim+masactrl" and len(table_methods.parse("*+pnp direct+p2p")) == 7
    for text in ("", "p2p", "direct+photoshop"):
        with pytest.raises(piebench.Problem, match="methods?"):
            table_methods.parse(text)


def test_workflows_fit_the_nodes(server_url):
    """Every input that a node needs is there and links to a node, nothing else is; for every method."""
    info = runner_work.ComfyClient(server_url).object_info()
    for method in table_methods.METHODS:
        graph = table_methods.build(method, item(), "x.png", table_methods.Settings(steps=10))
        used = set()
        for node in graph.values():
            known = info[node["class_type"]]["input"]
            given = {name.split(".")[0] for name in node["inputs"]}
            assert set(known.get("required", {})) <= given, (method, node)
            assert given <= {*known.get("required", {}), *known.get("optional", {})}, (method, node)
            used |= {value[0] for value in node["inputs"].values() if isinstance(value, list)}
        assert used <= set(graph), method
        edit = graph[table_methods.EDIT]["inputs"]
        assert edit["inversion"] == ["inversion", 0] and ("attention" in edit) != ("concepts" in edit)


def test_settings_are_the_papers():
    def inputs(method, node, **more):
        return table_methods.build(method, item(**more), "x", table_methods.Settings("sd.ckpt"))[node]["inputs"]

    control = inputs("direct+p2p", "control")
    assert (control["cross_replace_steps"], control["self_replace_steps"]) == (0.4, 0.6)
    assert (control["equalizer"], control["blend_words"]) == ("dog: 2", "cat, dog")
    assert inputs("direct+p2p", "control", blended="")["equalizer"] == ""
    # words that the prompts do not have are passed over, as in the released code
    odd = inputs("direct+p2p", "control", blended="kitten dog")
    assert (odd["equalizer"], odd["blend_words"]) == ("dog: 2", "dog")
    assert inputs("direct+p2p", "prompts")["mapping"] == "refine"
    assert inputs("direct+p2p", "edit")["cfg"] == 7.5 and inputs("direct+p2p", "edit")["skip"] == 0
    assert inputs("ddim+p2p", "inversion")["path.edit_cfg"] == 7.5
    assert {inputs(f"{name}+p2p", "inversion")["path"] for name in ("null-text", "stylediffusion")} == {"re-simulated"}
    assert inputs("edit-friendly+p2p", "edit")["skip"] == 12 and inputs("edit-friendly+ledits", "edit")["skip"] == 18
    assert inputs("direct+masactrl", "inversion")["positive"] == ["empty", 0]
    assert inputs("null-text+masactrl", "inversion")["positive"] == ["source", 0]
    assert inputs("direct+pnp", "control")["source"] == ["empty", 0]
    assert table_methods.build("direct+pnp", item(), "x", table_methods.Settings("sd.ckpt"))["loader"]["inputs"] == {
        "ckpt_name": "sd.ckpt"
    }
    assert inputs("direct+pix2pix-zero", "control")["xa_guidance"] == 0.1
    assert inputs("direct+pix2pix-zero", "edit")["negative"] == ["source", 0]
    assert inputs("direct+pnp", "edit")["negative"] == ["negative", 0]
    for method in ("stylediffusion+pix2pix-zero", "stylediffusion+pnp", "null-text+pnp"):
        assert inputs(method, "edit")["negative"] == ["empty", 0]
    assert inputs("edit-friendly+ledits", "concept")["scale"] == 15.0


def test_settings_of_a_run_go_before_the_papers():
    chosen = table_methods.Settings(cfg=3.0, concept_scale=2.0, xa_guidance=0.01)
    made = {method: table_methods.build(method, item(), "x", chosen) for method in table_methods.METHODS}
    assert {graph["edit"]["inputs"]["cfg"] for graph in made.values()} == {3.0}
    assert made["direct+ledits"]["concept"]["inputs"]["scale"] == 2.0
    assert made["direct+pix2pix-zero"]["control"]["inputs"]["xa_guidance"] == 0.01
    assert made["direct+p2p"]["loader"]["class_type"] == "LEDITS_LoadDemoModel"


def test_the_concept_of_an_edit():
    assert table_methods.concept(item()) == ("dog", "towards")
    assert table_methods.concept(item("a bike", "a [rusty] bike", "bike bike")) == ("rusty bike", "towards")
    assert table_methods.concept(item("a cat [and a hat]", "a cat", "")) == ("a hat", "away")
    assert table_methods.concept(item("a cat [here]", "a cat [on the left]", "cat cat")) == ("cat on the left", "towards")
    assert table_methods.concept(item("a cat", "a dog")) == ("a dog", "towards")


# --- results --------------------------------------------------------------------------------------------------------


def result(key, method="direct+p2p", error="", **values):
    row = {"key": key, "type": 1, "method": method, **values} | ({"error": error} if error else {})
    return runner_work.Result(row, None if error else piebench.png_of(np.full((8, 8, 3), 0.5)))


def lines(folder):
    with open(folder / RESULTS, newline="") as file:
        return [(row["key"], row["method"], row["error"]) for row in csv.DictReader(file)]


def test_results_survive_an_interruption(tmp_path):
    book = Book(tmp_path, {"steps": 5})
    book.add(result("1", psnr_unedit_part=20.123456789))
    book.add(result("1", psnr_unedit_part=1.0))  # a second time: a task that ran twice
    book.add(result("2", error="It broke, \"badly\".\nTwice."))
    book.add(result("3"))
    with open(tmp_path / RESULTS, "a") as file:
        file.write("4,1,direct+p2p,0.1")  # the disk was full
    again = Book(tmp_path, {"steps": 5})
    assert again.finished("1", "direct+p2p") and not again.finished("1", "ddim+p2p")
    assert [again.finished(key, "direct+p2p") for key in "234"] == [False, True, False]
    assert float(again.rows["1", "direct+p2p"]["psnr_unedit_part"]) == pytest.approx(20.123457)
    again.add(result("2"))
    assert lines(tmp_path) == [(key, "direct+p2p", "") for key in "132"]
    assert Image.open(again.edit_path("2", "direct+p2p")).size == (8, 8)
    with pytest.raises(piebench.Problem, match="made with steps 5: choose another --output"):
        Book(tmp_path, {"steps": 6})


# --- the table ------------------------------------------------------------------------------------------------------


def test_the_table_has_means_and_published_rows(tmp_path):
    write_folder(tmp_path / "data", 4, 64)
    items, _ = piebench.load(tmp_path / "data")
    book = Book(tmp_path / "out", {})
    for number, (psnr, ssim, mse) in enumerate([(20.0, 0.5, 0.001), (30.0, math.nan, 0.003), (None, 0.7, 0.002)]):
        book.add(result(items[number].key, psnr_unedit_part=psnr, ssim_unedit_part=ssim, mse_unedit_part=mse))
    book.add(result(items[3].key, error="failed"))
    book.add(result("elsewhere", psnr_unedit_part=1000.0))  # of a picture that is not asked for
    text = report.write(book, items, ("direct+p2p", "direct+ledits"), runner_work.Scoring())
    assert text == (tmp_path / "out" / "table.md").read_text()
    with open(tmp_path / "out" / "table.csv", newline="") as file:
        ours, published, other = csv.DictReader(file)
    assert (ours["method"], ours["whose"], ours["pictures"]) == ("direct+p2p", "ours", "3")
    named = {key.split(" unedited")[0]: value for key, value in ours.items()}
    assert float(named["PSNR"]) == 25.0  # the mean of the two that have one
    assert float(named["SSIM x10^2"]) == pytest.approx(60) and float(named["MSE x10^4"]) == pytest.approx(20)
    assert named["LPIPS x10^3"] == ""
    assert published["whose"] == "published" and "27.22" in published.values() and "54.55" in published.values()
    assert other["method"] == "direct+ledits" and other["pictures"] == "0"
    sheets = sorted(path.name for path in (tmp_path / "out" / "sheets").iterdir())
    assert sheets == ["0_random.jpg", "1_change_object.jpg", "2_add_object.jpg"]


# --- the whole command ----------------------------------------------------------------------------------------------


def run(folder, output, server, *more):
    return piebench_run.main(["--data", str(folder), "--output", str(output), "--server", server, "--checkpoint", "demo",
                              "--methods", "direct+ledits,direct+pnp", "--steps", "2", *more])


def test_a_run_resumes_without_repeating(server_url, tmp_path, capsys):
    mapping = write_folder(tmp_path / "data", 3)
    assert run(tmp_path / "data", tmp_path / "out", server_url, "--pictures", "1") == 0
    first = lines(tmp_path / "out")
    assert first == [("000000000000", name, "") for name in ("direct+ledits", "direct+pnp")]
    # a picture that breaks after its head was read, and one that has gone
    path = tmp_path / "data" / "annotation_images" / mapping["000000000001"]["image_path"]
    path.write_bytes(path.read_bytes()[:700])
    capsys.readouterr()
    assert run(tmp_path / "data", tmp_path / "out", server_url) == 1
    told = capsys.readouterr().out
    assert "6 edits, 2 of them finished before" in told and "2 of 4 edits failed" in told
    found = lines(tmp_path / "out")
    assert found[:2] == first and [line[0][-1] for line in found] == list("001122")
    assert all(("cannot be read" in error) == (key[-1] == "1") for key, _, error in found)
    with open(tmp_path / "out" / RESULTS, newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["unet_rows"] != "0" and 3 < float(rows[0]["psnr_unedit_part"]) < 60
    edited = np.asarray(Image.open(tmp_path / "out" / "edits" / "direct+pnp" / "000000000002.png"))
    assert edited.shape == (128, 128, 3) and edited.std() > 5
    # nothing is left on the server
    assert runner_work.ComfyClient(server_url).ask_json("/queue") == {"queue_running": [], "queue_pending": []}


class NoComfy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>Hello</html>")

    def log_message(self, *_):
        pass


def test_a_server_that_is_no_comfyui(tmp_path):
    write_folder(tmp_path / "data", 1, 64)
    with http.server.HTTPServer(("127.0.0.1", 0), NoComfy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(runner_work.ComfyError, match="is no ComfyUI: give the address"):
            run(tmp_path / "data", tmp_path / "out", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    with pytest.raises(runner_work.NoAnswer, match="does not answer at http://127.0.0.1:9"):
        run(tmp_path / "data", tmp_path / "out", "http://127.0.0.1:9")
    with pytest.raises(piebench.Problem, match="has no mapping_file.json"):
        run(tmp_path / "nowhere", tmp_path / "out", "http://127.0.0.1:9")
    with pytest.raises(piebench.Problem, match="no type of edit 12"):
        run(tmp_path / "data", tmp_path / "out", "http://127.0.0.1:9", "--types", "1,12")


def test_a_checkpoint_that_the_server_lacks(server_url, tmp_path):
    write_folder(tmp_path / "data", 1, 64)
    with pytest.raises(runner_work.ComfyError, match="has no checkpoint 'mine.safetensors': it has"):
        run(tmp_path / "data", tmp_path / "out", server_url, "--checkpoint", "mine.safetensors")
