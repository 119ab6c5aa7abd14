"""Files of the repository that say the same thing twice: packages, versions of ComfyUI, the publisher, the owner."""
import re

import pytest
import yaml
from packaging.requirements import Requirement

import dev

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

GITHUB = dev.ROOT / ".github"
README = (dev.ROOT / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((dev.ROOT / "pyproject.toml").read_text("utf-8"))


def github(path):
    return yaml.safe_load((GITHUB / path).read_text("utf-8"))


def test_both_lists_of_packages_are_the_same(project):
    """The registry installs those of pyproject.toml, ComfyUI-Manager those of requirements.txt."""
    lines = (dev.ROOT / "requirements.txt").read_text("utf-8").splitlines()
    listed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert set(listed) == set(map(Requirement, project["project"]["dependencies"])) != set()
    assert all(f"`{one.name}`" in README for one in listed)  # said where the README says how to install


def test_tests_run_on_every_version_that_dev_py_knows():
    tests = github("workflows/tests.yml")
    assert sorted(tests["jobs"]["tests"]["strategy"]["matrix"]["comfyui"]) == sorted(dev.COMFYUI_SOURCES)
    assert set(tests[True]) == {"push", "pull_request"}  # YAML takes "on" for true
    assert any(step.get("run", "").startswith(".ci/run") for step in tests["jobs"]["tests"]["steps"])


def test_the_readme_names_the_versions_that_the_pack_was_tried_with(project):
    oldest, newest = sorted(dev.COMFYUI_SOURCES, key=lambda version: [int(part) for part in version.split(".")])
    assert f"ComfyUI {oldest} to {newest}" in README
    assert project["tool"]["comfy"]["requires-comfyui"] == f">={oldest}"


def test_publishing_is_for_the_owner_alone(project):
    publish = github("workflows/publish.yml")
    owner = project["tool"]["comfy"]["PublisherId"]
    assert publish[True]["push"] == {"branches": ["main"], "paths": ["pyproject.toml"]}
    (job,) = publish["jobs"].values()
    assert f"github.repository_owner == '{owner}'" in job["if"]
    assert f"github.com/{owner}/" in project["project"]["urls"]["Repository"]
    action = job["steps"][-1]
    assert action["uses"] == "Comfy-Org/publish-node-action@main"
    assert action["with"] == {"personal_access_token": "${{ secrets.REGISTRY_ACCESS_TOKEN }}"}


@pytest.mark.parametrize("path", sorted(path.name for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml")))
def test_issue_forms_are_forms(path):
    form = github(f"ISSUE_TEMPLATE/{path}")
    if path == "config.yml":
        assert {"blank_issues_enabled", "contact_links"} == set(form)
        return
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    ids = [field["id"] for field in fields]
    assert len(set(ids)) == len(ids) > 1 and all(re.fullmatch("[a-z]+", one) for one in ids)
    assert all(field["attributes"]["label"] for field in fields)
    if path == "bug.yml":
        assert {"comfyui", "frontend", "pack", "model", "workflow", "log"} <= set(ids)


def test_a_clone_is_told_to_leave_the_history_out():
    clones = re.findall(r"git clone [^\n`]*", README)
    assert clones and all("--depth 1" in line for line in clones)
