"""The walls of the house: imports point down only, and the formulas know nothing of ComfyUI."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dev

# Every room with those that it may import from; a room may import from itself.
ROOMS = {
    "tools": {"nodes", "files", "samplers", "samplers/methods", "attention_hooks", "evaluation", "demo"},
    "nodes": {"files", "samplers", "samplers/methods", "attention_hooks", "evaluation", "demo"},
    "files": {"samplers/methods", "attention_hooks"},
    "samplers": {"samplers/methods", "attention_hooks"},
    "attention_hooks": set(),
    "samplers/methods": set(),
    "evaluation": set(),
    "demo": set(),
}
FILES = sorted(path.relative_to(dev.ROOT) for room in ROOMS for path in (dev.ROOT / room).rglob("*.py"))


def module_of(file):
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for file in FILES}


def room_of(module):
    path = module.replace(".", "/")
    return max((room for room in ROOMS if path == room or path.startswith(room + "/")), key=len)


def imported(file):
    """Modules of the pack that a file imports, and the first names of all others."""
    inside, outside = set(), set()
    package = list(file.parent.parts)
    for node in ast.walk(ast.parse((dev.ROOT / file).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            outside.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            base = ".".join(filter(None, base))
            for alias in node.names:
                full = f"{base}.{alias.name}" if base else alias.name
                inside.add(full if full in MODULES else base)
    return inside & set(MODULES), outside


@pytest.mark.parametrize("file", [f for f in FILES if f.parts[:2] == ("samplers", "methods")], ids=str)
def test_formulas_do_not_know_comfyui(file):
    _, outside = imported(file)
    assert not {name for name in outside if name.startswith("comfy")} | outside & {"folder_paths", "nodes", "server"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down(room):
    found = {(str(file), other) for file in FILES if room_of(module_of(file)) == room for other in imported(file)[0]
             if room_of(other) not in {room, *ROOMS[room]}}
    assert not found


def test_no_file_is_imported_under_a_second_name():
    """The pack's own folders are imported relatively, or as `comfyui_ledits` where a tool is started."""
    rooms = {room.split("/")[0] for room in ROOMS} - {"nodes"}  # ComfyUI has a `nodes` of its own
    for file in [*FILES, *(path.relative_to(dev.ROOT) for path in (dev.ROOT / "tests").rglob("*.py"))]:
        assert not imported(file)[1] & rooms, file


def test_there_is_no_circle():
    arrows = {module: imported(file)[0] - {module} for module, file in MODULES.items()}
    done = set()

    def walk(module, above):
        assert module not in above, f"{' > '.join([*above, module])}"
        if module not in done:
            for other in arrows[module]:
                walk(other, [*above, module])
            done.add(module)

    for module in arrows:
        walk(module, [])


def test_the_walls_are_looked_for():
    """Of a file that breaks them, the import is seen."""
    inside, outside = imported(Path("nodes/edit_inputs.py"))
    assert "samplers.ledits" in inside and "comfy" in outside


@pytest.mark.parametrize("module", ["runner_dask", "runner_work", "piebench_run", "demobench_run", "table_methods"])
def test_what_workers_of_a_benchmark_import_needs_no_comfyui(module):
    """They speak with servers, and run where no ComfyUI is imported."""
    code = ("import importlib, sys, types; root = sys.argv[1]; pack = types.ModuleType('pack'); pack.__path__ = [root]; "
            "sys.modules['pack'] = pack; importlib.import_module('pack.tools.benchmarks.' + sys.argv[2])")
    done = subprocess.run([sys.executable, "-c", code, str(dev.ROOT), module], capture_output=True, text=True, cwd=dev.ROOT.parent)
    assert done.returncode == 0, done.stderr[-600:]
