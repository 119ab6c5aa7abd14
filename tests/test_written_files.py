"""What is written to a disk that is full, by several servers at once, or by one that is killed: whole files or none."""
import contextlib
import csv
import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from comfyui_ledits.evaluation import metrics
from comfyui_ledits.files import csv_file, inversion_file, latent_formats, places, store_file, tensor_writer
from comfyui_ledits.nodes.edit_metrics import EditMetrics
from comfyui_ledits.nodes.inversion_files import LoadInversion, SaveInversion
from comfyui_ledits.nodes.store_files import LoadAttentionStore, SaveAttentionStore
from support.records import record
from support.stores import by_hand

import dev

resource = pytest.importorskip("resource", reason="needs limits of a process")
pytestmark = pytest.mark.usefixtures("inference_mode")


def save_inversion(name):
    return SaveInversion.execute(inversion=record(size=32)[0], filename_prefix=name, dtype="float32")


def save_half(name):
    return SaveInversion.execute(inversion=record(size=32)[0], filename_prefix=name, dtype="float16")


def save_store(name):
    return SaveAttentionStore.execute(store=by_hand(2, side=32), filename_prefix=name)


def save_table(name):
    picture = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    return EditMetrics.execute(picture, picture, "plain", "x" * 3000, "", csv=name)


WRITERS = {"inversion": save_inversion, "float16": save_half, "store": save_store, "table": save_table}


@contextlib.contextmanager
def largest_file(size):
    """No file of this process may grow beyond a size, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("room", [0, 9, 2500])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(folders, writer, room):
    with largest_file(room), pytest.raises(ValueError) as error:
        WRITERS[writer]("a/b")
    said = str(error.value)
    assert os.strerror(errno.EFBIG) in said and said.endswith(".") and "'a/b'" in said
    assert files_in(folders[0]) == []
    WRITERS[writer]("a/b")
    assert len(files_in(folders[0])) == 1


@pytest.mark.parametrize("writer", WRITERS)
def test_a_name_that_is_too_long_is_a_sentence(folders, writer):
    for name in ("x" * 300, "y/" + "x" * 254, "x" * 300 + "/y"):
        with pytest.raises(ValueError, match="choose a shorter name"):
            WRITERS[writer](name)
    assert files_in(folders[0]) == []


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_that_is_a_file_is_a_sentence(folders, writer):
    (folders[0] / "a").write_text("mine")
    with pytest.raises(ValueError, match="could not be written to 'a/b'"):
        WRITERS[writer]("a/b")
    assert files_in(folders[0]) == ["a"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_of_another_user_is_a_sentence(folders, writer):
    folders[0].chmod(0o555)
    with pytest.raises(ValueError, match="rights of ComfyUI's output folder"):
        WRITERS[writer]("b")


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_the_mode_is_that_of_any_other_file(folders, writer, mask):
    before = os.umask(mask)
    try:
        WRITERS[writer]("b")
    finally:
        os.umask(before)
    (name,) = files_in(folders[0])
    assert (folders[0] / name).stat().st_mode & 0o777 == 0o666 & ~mask


def test_halves_of_letters_become_question_marks(folders):
    half, (made, _) = "a \ud800 cat", record()
    SaveInversion.execute(inversion=made, filename_prefix="x", dtype="float32", source_prompt=half)
    assert LoadInversion.execute(file="x_00001_.ledits.safetensors [output]")[2] == "a ? cat"
    picture = torch.zeros(1, 32, 32, 3)
    EditMetrics.execute(picture, picture, "plain", half, "", csv="t", label=half)
    with open(folders[0] / "t.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["source_prompt"] == row["label"] == "a ? cat"


# --- several at once ------------------------------------------------------------------------------------------------

def test_nobody_overwrites_the_file_of_another_server(folders):
    """Both have counted the files of the folder before either writes."""
    first = places.new_file("a/b", inversion_file.KIND.suffix)
    second = places.new_file("a/b", inversion_file.KIND.suffix)
    made = [record()[0], record(cfg=2)[0]]
    with first as (one, *_), second as (two, *_):
        assert one != two
        for path, inversion in zip((one, two), made):
            inversion_file.save(path, inversion, latent_formats.describe(inversion.latent_format))
    back = [inversion_file.load(path, latent_formats.make) for path in (one, two)]
    assert [inversion.settings for inversion in back] == [{}, {"cfg": 2}]


def test_a_file_that_was_finished_since_the_folder_was_read_is_not_overwritten(tmp_path):
    path = tmp_path / "x"
    assert tensor_writer.reserve(path)
    assert not tensor_writer.reserve(path)
    with tensor_writer.whole(path) as file:
        file.write(b"first")
    assert not tensor_writer.reserve(path)
    assert path.read_bytes() == b"first" and files_in(tmp_path) == ["x"]


def test_many_servers_write_into_one_folder(folders):
    """81 files of three processes at once."""
    script = (
        "import sys; sys.path[:0] = [sys.argv[1] + '/tests']; import conftest, folder_paths, torch\n"
        "folder_paths.set_output_directory(sys.argv[2])\n"
        "from support.records import record; from comfyui_ledits.nodes.inversion_files import SaveInversion\n"
        "made = [record(size=4, who=f'{sys.argv[3]} {k}')[0] for k in range(27)]\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for x in made: SaveInversion.execute(inversion=x, filename_prefix='x', dtype='float32')\n"
    )
    command = [sys.executable, "-c", script, str(dev.ROOT), str(folders[0])]
    running = [subprocess.Popen([*command, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
               for n in range(3)]
    for process in running:
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    names = files_in(folders[0])
    assert len(names) == 81 and not [name for name in names if name.endswith(".part")]
    found = {LoadInversion.execute(file=f"{name} [output]")[0].settings["who"] for name in names}
    assert found == {f"{n} {k}" for n in range(3) for k in range(27)}


def test_many_threads_add_rows_to_one_table(tmp_path):
    def add(name):
        for k in range(20):
            csv_file.append(tmp_path / "deep" / "t.csv", [{"who": name, "n": k}, {"who": name, "n": None}])

    threads = [threading.Thread(target=add, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with open(tmp_path / "deep" / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted((row["who"], row["n"]) for row in rows) == sorted(
        [(name, str(k)) for name in "abcd" for k in range(20)] + [(name, "") for name in "abcd"] * 20)


def test_a_line_that_was_torn_does_not_spoil_the_next(folders):
    save_table("t")
    path = folders[0] / "t.csv"
    path.write_bytes(path.read_bytes()[:-30])
    save_table("t")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and all(rows[1][name] is not None for name in metrics.METRICS) and rows[1]["mode"] == "plain"


# --- killed ---------------------------------------------------------------------------------------------------------

def test_what_a_killed_server_left_is_removed_when_it_is_old(folders):
    out, day = folders[0], 24 * 3600
    (out / "a").mkdir()
    suffix = inversion_file.KIND.suffix
    stale = [f"a/b_00001_{suffix}.part", f"a/other_00007_{suffix}.part"]
    kept = {f"a/b_00002_{suffix}.part": day - 60,  # of a server that may still write
            f"b_00001_{suffix}.part": 9 * day,  # in another folder
            "a/theirs.part": 9 * day, f"a/x{store_file.KIND.suffix}.part": 9 * day, f"a/y{suffix}": 9 * day,
            ".tmpAbCdEf": 9 * day}
    for name, age in [*((name, day + 60) for name in stale), *kept.items()]:
        (out / name).write_text("half a file")
        os.utime(out / name, (time.time() - age,) * 2)
    (out / "a" / f"folder{suffix}.part").mkdir()
    save_inversion("a/b")
    assert files_in(out) == sorted([*kept, f"a/b_00003_{suffix}"])
    assert (out / "a" / f"folder{suffix}.part").is_dir()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
@pytest.mark.parametrize("kind", ["inversion", "store"])
def test_a_server_killed_while_it_saves_leaves_no_half_file(folders, kind):
    """Killed after the first megabyte; the next save takes another name and is right."""
    script = (
        "import os, signal, sys; sys.path[:0] = [sys.argv[1] + '/tests']; import conftest, folder_paths\n"
        "folder_paths.set_output_directory(sys.argv[2])\n"
        "import test_written_files as t; from comfyui_ledits.files import tensor_writer\n"
        "def dies(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "t.os.fsync = dies\n"
        "t.WRITERS[sys.argv[3]]('x')\n"
    )
    died = subprocess.run([sys.executable, "-c", script, str(dev.ROOT), str(folders[0]), kind], capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    (part,) = files_in(folders[0])
    assert part.endswith(".safetensors.part") and (folders[0] / part).stat().st_size > 1000
    assert places.list_files(inversion_file.KIND) == places.list_files(store_file.KIND) == []
    WRITERS[kind]("x")
    (name,) = [name for name in files_in(folders[0]) if name != part]
    loader = LoadInversion if kind == "inversion" else LoadAttentionStore
    assert loader.validate_inputs(f"{name} [output]") is True
    loader.execute(file=f"{name} [output]")


# --- while files are read ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("loader", [LoadInversion, LoadAttentionStore])
def test_a_file_that_cannot_be_read_is_a_sentence(folders, monkeypatch, loader):
    """A disk that fails, a network drive that is gone: the error of the system, in a sentence."""
    save_inversion("x")
    save_store("x")
    name = [name for name in files_in(folders[0]) if ("store" in name) == (loader is LoadAttentionStore)][0]

    class Broken:
        def __init__(self, handle):
            self.handle = handle

        def __getattr__(self, name):
            if name in ("read", "readinto"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return getattr(self.handle, name)

    from comfyui_ledits.files import tensor_file
    monkeypatch.setattr(tensor_file, "open", lambda *args: Broken(open(*args)), raising=False)
    assert os.strerror(errno.EIO) in loader.validate_inputs(f"{name} [output]")
    with pytest.raises(ValueError, match="cannot be read"):
        loader.execute(file=f"{name} [output]")


def test_a_file_that_disappears_while_the_picker_looks_is_left_out(folders, monkeypatch):
    save_inversion("x")
    path = folders[0] / files_in(folders[0])[0]
    kind, matches = inversion_file.KIND, type(inversion_file.KIND).matches

    def and_gone(self, path):
        found = matches(self, path)
        os.remove(path)
        return found

    monkeypatch.setattr(type(kind), "matches", and_gone)
    assert places.list_files(kind) == [] and not path.exists()
