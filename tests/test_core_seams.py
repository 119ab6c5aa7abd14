"""What the pack leans on in ComfyUI is there, by name and by signature: collected from the sources, checked without a run."""
import ast
import functools
import importlib
import inspect
from pathlib import Path

import pytest

import dev

ROOMS = ("nodes", "files", "samplers", "attention_hooks", "evaluation", "demo")
FILES = [Path("__init__.py"), *sorted(path.relative_to(dev.ROOT) for room in ROOMS for path in (dev.ROOT / room).rglob("*.py"))]
CORE = {"comfy", "comfy_api", "comfy_execution", "comfyui_version", "comfy_extras", "folder_paths", "latent_preview",
        "node_helpers", "server"}  # first names of ComfyUI's own modules
ABSENT = object()


class Seams(ast.NodeVisitor):
    """The seams of one source.

    Attributes:
        names: set of (line, dotted name): imported from core, or reached through such a name.
        calls: list of (line, dotted name, positional arguments, keywords): calls of them that give every argument plainly.
        members: set of (line, dotted name of a class, attribute): used on a parameter that is annotated with the class,
            or on `self` in a class that inherits from it and does not define the attribute itself. What the source
            asks for with `hasattr` or `getattr` may be missing.
    """

    def __init__(self, source):
        self.names, self.calls, self.members, self._known, self._typed = set(), [], set(), {}, [{}]
        tree = ast.parse(source)
        for node in ast.walk(tree):  # imports first: some are inside functions
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self._import(node, alias.name, alias.asname or alias.name.split(".")[0],
                                 alias.name if alias.asname else alias.name.split(".")[0])
            elif isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    self._import(node, full, alias.asname or alias.name, full)
        self.visit(tree)
        asked = {node.args[1].value for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) > 1
                 and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr")
                 and isinstance(node.args[1], ast.Constant)}
        self.members = {member for member in self.members if member[2] not in asked}

    def _import(self, node, imported, name, means):
        if imported.split(".")[0] in CORE:
            self.names.add((node.lineno, imported))
            self._known[name] = means

    def dotted(self, node):
        """The full name of an expression that is one of core's, or None."""
        if isinstance(node, ast.Attribute):
            before = self.dotted(node.value)
            return before and f"{before}.{node.attr}"
        return self._known.get(node.id) if isinstance(node, ast.Name) else None

    def visit_Attribute(self, node):
        if name := self.dotted(node):
            self.names.add((node.lineno, name))
        elif isinstance(node.value, ast.Name) and (kind := self._typed[-1].get(node.value.id)):
            self.members.add((node.lineno, kind, node.attr))
        self.generic_visit(node)

    def visit_Call(self, node):
        plain = not any(isinstance(a, ast.Starred) for a in node.args) and all(k.arg for k in node.keywords)
        if plain and (name := self.dotted(node.func)):
            self.calls.append((node.lineno, name, len(node.args), tuple(k.arg for k in node.keywords)))
        self.generic_visit(node)

    def visit_FunctionDef(self, node):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        typed = {a.arg: self._class(a.annotation) for a in arguments if a.annotation is not None}
        hidden = {a.arg: None for a in arguments if a.annotation is None and a.arg != "self"}
        self._typed.append(self._typed[-1] | hidden | typed)
        self.generic_visit(node)
        self._typed.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node):
        bases = [name for name in map(self.dotted, node.bases) if name]
        own = {n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        own |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        own |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        if len(bases) == len(node.bases) == 1:
            found = {(n.lineno, bases[0], n.attr) for n in ast.walk(node) if isinstance(n, ast.Attribute)
                     and isinstance(n.value, ast.Name) and n.value.id == "self" and n.attr not in own}
            self.members |= found
        self.generic_visit(node)

    def _class(self, annotation):
        """The core class that an annotation names, alone or with None, or None."""
        if isinstance(annotation, ast.BinOp):
            return self._class(annotation.left) or self._class(annotation.right)
        return self.dotted(annotation)


@functools.cache
def found(name):
    """The module or object of a dotted name, or ABSENT."""
    first, *rest = name.split(".")
    try:
        value = importlib.import_module(first)
    except ImportError:
        return ABSENT
    for count, part in enumerate(rest, 2):
        if hasattr(value, part):
            value = getattr(value, part)
            continue
        try:
            value = importlib.import_module(".".join(name.split(".")[:count]))
        except ImportError:
            return ABSENT
    return value


@functools.cache
def has(kind, attribute):
    """Whether a class has an attribute, also one that its methods set on `self`; unknown counts as yes."""
    if hasattr(kind, attribute) or hasattr(kind, "__getattr__"):
        return True
    return any(attribute in getattr(base, "__annotations__", {}) or f"self.{attribute} =" in inspect.getsource(base)
               or f"self.{attribute}," in inspect.getsource(base) or f"self.{attribute}:" in inspect.getsource(base)
               for base in kind.__mro__ if base.__module__.split(".")[0] in CORE)


def problems(file, seams):
    """A sentence for every seam that has come apart."""
    where = "{}:{} ".format
    for line, name in sorted(seams.names):
        if found(name) is ABSENT:
            yield where(file, line) + f"uses {name}, which this ComfyUI does not have."
    for line, name, positional, keywords in seams.calls:
        called = found(name)
        if called is ABSENT or not callable(called):
            continue
        try:
            signature = inspect.signature(called)
        except (TypeError, ValueError):  # of C code
            continue
        try:
            signature.bind(*[None] * positional, **dict.fromkeys(keywords))
        except TypeError as error:
            yield where(file, line) + f"calls {name}{signature} in another way: {error}."
    for line, name, attribute in sorted(seams.members):
        kind = found(name)
        if inspect.isclass(kind) and not has(kind, attribute):
            yield where(file, line) + f"uses {attribute} of {name}, which this ComfyUI's class does not have."


@pytest.mark.parametrize("file", FILES, ids=str)
def test_what_the_pack_uses_of_core_is_there(file):
    sentences = list(problems(file, Seams((dev.ROOT / file).read_text("utf-8"))))
    assert not sentences, "\n".join(sentences)


def test_all_kinds_of_seams_are_collected():
    """...or the test above would hold nothing."""
    seams = [Seams((dev.ROOT / file).read_text("utf-8")) for file in FILES]
    names = {name for one in seams for _, name in one.names}
    assert {"comfy.model_patcher.ModelPatcher", "comfy.samplers.CFGGuider", "comfy_api.latest.io.Schema",
            "comfy.model_management.intermediate_device", "folder_paths.get_folder_paths"} <= names
    assert {"latent_preview.prepare_callback", "comfy_api.latest.io.NodeOutput"} <= {c[1] for one in seams for c in one.calls}
    members = {(name, attribute) for one in seams for _, name, attribute in one.members}
    assert {("comfy.model_patcher.ModelPatcher", "model"), ("comfy.samplers.CFGGuider", "model_patcher")} <= members


BROKEN = '''
import comfy.utils
import comfy.nothing
from comfy.samplers import CFGGuider, KSAMPLER as K
from comfy.model_patcher import ModelPatcher


def f(model: ModelPatcher, guider: CFGGuider | None, other):
    import latent_preview
    latent_preview.prepare_callback(model, 1)
    latent_preview.prepare_callback(model)
    comfy.utils.ProgressBar(total=3)
    comfy.utils.ProgressBar(3, amount=3)
    comfy.utils.no_such_function(1)
    model.clone()
    model.cloned()
    guider.model_patcher.anything
    guider.model_patched
    other.whatever
    hasattr(guider, "rows") and guider.rows
    K.sampled


class Mine(CFGGuider):
    def run(self):
        self.kept = self.model_options, self.run, self.conds
        return self.lost
'''


def test_a_seam_that_has_come_apart_is_named_with_its_line():
    sentences = list(problems("x.py", Seams(BROKEN)))
    lines = {int(sentence.split(":")[1].split()[0]): sentence for sentence in sentences}
    assert sorted(lines) == [3, 11, 13, 14, 16, 18, 21, 27] and len(sentences) == 8
    assert lines[3] == "x.py:3 uses comfy.nothing, which this ComfyUI does not have."
    assert "missing a required argument" in lines[11] and "amount" in lines[13]
    assert lines[16].startswith("x.py:16 uses cloned of comfy.model_patcher.ModelPatcher")
