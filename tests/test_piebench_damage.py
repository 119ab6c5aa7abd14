"""A benchmark in which a line, a picture, an answer or an entry is not as foreseen: it costs itself alone."""

from dataclasses import replace

import numpy as np
import pytest
from comfyui_ledits.tools import contact_sheet
from comfyui_ledits.tools.benchmarks import piebench, report, runner_work, table_methods
from comfyui_ledits.tools.benchmarks.runner_book import RESULTS, Book
from support.piebench_data import write_folder
from test_piebench import lines, result

# --- results --------------------------------------------------------------------------------------------------------


def test_a_file_that_is_torn_anywhere_is_read_up_to_there(tmp_path):
    """Cut after every byte, also inside a letter: whole lines are finished, and no failure passes for a success."""
    book = Book(tmp_path, {})
    book.add(result("1", psnr_unedit_part=20.0))
    book.add(result("2", error="Es brach, \u00fcbel: \u732b, \"so\".\nTwice."))
    book.add(result("3", psnr_unedit_part=30.5))
    raw = (tmp_path / RESULTS).read_bytes()
    ends = [n + 1 for n, byte in enumerate(raw) if byte == 10]
    assert len(ends) == 4
    for cut in range(len(raw) + 1):
        (tmp_path / RESULTS).write_bytes(raw[:cut])
        again = Book(tmp_path, {})
        assert [key for key, _ in again.rows] == [key for key, end in (("1", ends[1]), ("3", ends[3])) if cut >= end], cut
        again.add(result("4"))
        assert Book(tmp_path, {}).finished("4", "direct+p2p")


@pytest.mark.parametrize("junk", [b"\0" * 600 + b"\r\n", b"\xff\xfe\xc3\r\n", b'"' * 7 + b"\r\n", b"a,b\r\n", b"x" * 200_000 + b"\r\n",
                                  b"2,one,direct+p2p" + b"," * 20 + b"\r\n", b"2,1,direct+p2p,fast" + b"," * 40 + b"\r\n"])
def test_a_line_that_a_disk_has_damaged_costs_itself_alone(tmp_path, junk):
    book = Book(tmp_path, {})
    book.add(result("1", psnr_unedit_part=20.0))
    with open(tmp_path / RESULTS, "ab") as file:
        file.write(junk)
    book.add(result("3"))
    assert [key for key, _ in Book(tmp_path, {}).rows] == ["1", "3"]


def test_an_error_is_one_line_that_can_be_read_again(tmp_path):
    book = Book(tmp_path, {})
    book.add(result("1", error="a\0b \ud800\r\n,\"c\" " + "x" * 200_000))
    book.add(result("2"))
    ((key, _, error), other) = lines(tmp_path)
    assert key == "1" and error.startswith(r'a\x00b \ud800  ,"c" xx') and len(error) == 1000 and other[0] == "2"


# --- pictures and answers -------------------------------------------------------------------------------------------


def test_damaged_pictures_cost_their_cells_alone(tmp_path):
    mapping = write_folder(tmp_path / "data", 3, 64)
    items, _ = piebench.load(tmp_path / "data")
    items = [replace(item, truth={"target": "none.png"}) if n == 2 else item for n, item in enumerate(items)]
    book = Book(tmp_path / "out", {})
    for picture in items:
        book.add(result(picture.key, psnr_unedit_part=20.0))
    (tmp_path / "data" / "annotation_images" / mapping["000000000000"]["image_path"]).write_bytes(b"\x89PNG\r\n\x1a\n\0")
    book.edit_path(items[1].key, "direct+p2p").write_bytes(b"")
    (tmp_path / "data" / "annotation_images" / mapping["000000000002"]["image_path"]).unlink()
    text = report.write(book, items, ("direct+p2p",), runner_work.Scoring())
    assert "| direct+p2p | ours | 3 |" in text
    assert len(list((tmp_path / "out" / "sheets").iterdir())) == 3


def test_a_sheet_holds_any_words_and_any_shape():
    wide, tall = np.zeros((8, 4096, 3)), np.zeros((4096, 8, 3))
    page = contact_sheet.draw(["a", "b"], [[("word " * 50_000, wide), ("x" * 100_000, tall)]])
    assert max(page.size) < 2000


class Server:
    """Stands in for a client: what one call of it does."""

    def __init__(self, **calls):
        self.calls, self.cancelled = calls, set()

    def upload(self, *_):
        return self.calls.get("upload", lambda: "x.png")()

    def queue(self, graph):
        return self.calls.get("queue", lambda graph: str(len(graph)))(graph)

    def wait(self, prompt, **_):
        return self.calls["wait"](prompt)

    def fetch(self, image):
        return self.calls["fetch"]()

    def cancel(self, prompts):
        self.cancelled |= set(prompts)


def raises(error):
    def call(*_):
        raise error
    return call


@pytest.mark.parametrize("calls", [
    {"upload": raises(runner_work.ComfyError("no room"))}, {"upload": raises(KeyError("name"))},
    {"queue": raises(runner_work.ComfyError("refused"))}, {"queue": raises(TypeError("odd"))},
    {"wait": raises(TypeError("odd"))}, {"wait": lambda _: None}, {"wait": lambda _: {"outputs": []}},
    {"wait": lambda _: {"outputs": {"shown": {"images": [1]}}}, "fetch": lambda: b"no picture"},
], ids=lambda calls: " ".join(calls))
def test_whatever_goes_wrong_with_a_picture_is_its_own_failure(tmp_path, calls):
    write_folder(tmp_path, 1, 64)
    (picture,), _ = piebench.load(tmp_path)
    methods = ("direct+p2p", "direct+ledits")
    job = runner_work.Job(picture, picture.path.read_bytes(), methods, table_methods.Settings(steps=2), runner_work.Scoring())
    found = list(runner_work.work(job, Server(**calls)))
    assert [r.row["method"] for r in found] == list(methods) and all(r.row["error"] and r.edited is None for r in found)
    with pytest.raises(runner_work.NoAnswer):
        list(runner_work.work(job, Server(**{name: raises(runner_work.NoAnswer("gone")) for name in calls})))


@pytest.mark.parametrize("truth", [{"target": "x"}, {"target": "x", "type": 99}, {"target": "x", "type": 1, "scene": 5}])
def test_an_odd_truth_is_a_failure_of_its_picture(tmp_path, truth):
    write_folder(tmp_path, 1, 64)
    (picture,), _ = piebench.load(tmp_path)
    picture = replace(picture, truth=truth)
    job = runner_work.Job(picture, picture.path.read_bytes(), ("direct+p2p",), table_methods.Settings(steps=2),
                          runner_work.Scoring())
    shown = {table_methods.SHOWN: {"images": [1]}}
    times = {"status": {"messages": [["execution_start", {"timestamp": 0}], ["execution_success", {"timestamp": 9}]]}}
    server = Server(wait=lambda _: {"outputs": shown, **times}, fetch=picture.path.read_bytes)
    (found,) = runner_work.work(job, server)
    assert "could not be used" in found.row["error"]
