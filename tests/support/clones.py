"""Fixtures of tests of dev.py: clones of the pack with stand-in packages, and what such tests ask of one."""
import os
import time

import pytest

from .stand_ins import Clone


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


@pytest.fixture(scope="session")
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
