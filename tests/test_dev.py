"""dev.py as a newcomer meets it: run as a script in a clone with stand-in packages (see stand_ins.py)."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from support.clones import gone, refused
from support.stand_ins import Clone, make_wheel

import dev

posix = pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")


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


def test_the_commands_are_listed(ready):
    code, output, _ = ready.run()
    assert code == 2
    for command in ("demo", "test", "serve", "bench"):
        assert f"\n  {command} " in output
