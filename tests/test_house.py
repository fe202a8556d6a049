"""The shape of the package: rooms in one order, no circles of imports, and each joint hides what it should. docs/architecture.md is the map."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "rerank_lab"
# From the bottom up: a module imports from its own room and from rooms before it. Rooms in one tuple do not import each other.
ORDER: list[tuple[str, ...]] = [
    ("errors",), ("files", "timing", "environment"), ("models",), ("cli",), ("cache",), ("datasets",), ("first_stage",), ("methods",), ("measures",),
    ("engine",), ("reranker",), ("client",), ("eval",), ("replay", "report", "server"), ("__init__",),
]  # fmt: skip
AT_THE_DOOR = {"__init__", "reranker", "engine", "files", "cli", "errors", "timing", "environment"}
# (importing module, imported module) → why the import is needed. The order forbids it, so it is allowed only inside a function.
LAZY: dict[tuple[str, str], str] = {}

# (file, function) → the text that it splits at : or (. Only eval/system.py parses a row's label.
LABELS = "eval/system.py"
TAKEN_APART = {
    ("methods/__init__.py", "(module)"): "the suffix of a row with the cross-encoder is declared here",
    ("methods/__init__.py", "labels"): "labels are made here, not taken apart",
    ("methods/__init__.py", "make_method"): "a method's own spec, NAME:SETTING=VALUE",
    ("files.py", "expanded"): "a prefix of hf:, irds: or run:",
    ("datasets/load.py", "_collection"): "a prefix of hf: or irds:",
    ("first_stage/__init__.py", "find"): "--candidates, NAME:ARGUMENT",
    ("first_stage/__init__.py", "FirstStageKind.make"): "where a first stage's class is, MODULE:CLASS",
    ("eval/evaluate.py", "stem"): "a prefix of hf: or irds:",
    ("eval/grid.py", "_short"): "a prefix of hf: or irds:",
    ("eval/executors/ray.py", "RayExecutor._connect"): "HOST:PORT",
    ("models/registry.py", "locate"): "a model's source, package:NAME",
    ("server/__main__.py", "known_roles"): "a model's source, package:NAME",
    ("environment.py", "_cpu_name"): "a line of /proc/cpuinfo",
}
OF_LABELS = {"CROSS_SUFFIX"}
LABEL_TEXTS = {"best+cross", "endpoint:", "+cross", "endpoint"}

# File → what it reads or writes as dict[str, Any]: JSON, TOML or a library's data.
EDGES = {
    "client/endpoint.py": "bodies of v3",
    "datasets/beir.py": "files of a folder, or members of a zip",
    "datasets/dataset.py": "records of BEIR and MTEB",
    "datasets/runs.py": "runs in JSON",
    "eval/journal.py": "lines of the journal",
    "eval/results.py": "results.json",
    "eval/settings.py": "TOML files",
    "files.py": "any JSON",
    "eval/executors/ray.py": "keyword arguments of Ray's functions",
    "methods/inputs.py": "documents as people hand them over",
    "models/after.py": "a module's JSON",
    "models/pooling.py": "a module's JSON",
    "models/checkpoint.py": "a checkpoint's JSON",
    "models/folder.py": "a checkpoint's JSON",
    "models/late_checkpoint.py": "a checkpoint's JSON",
    "models/families.py": "a checkpoint's JSON",
    "models/tasks.py": "a checkpoint's JSON",
    "replay/recorded.py": "requests and --json",
    "replay/answers.py": "bodies of answers",
    "server/clients.py": "bodies of other services",
    "server/contract.py": "bodies of v3",
    "server/service.py": "the answer about models",
    "server/openapi.py": "the OpenAPI document",
}
LOOSE = {"dict", "Dict", "Mapping", "MutableMapping", "OrderedDict", "defaultdict"}


def name_of(path: Path) -> str:
    """rerank_lab/eval/grid.py → rerank_lab.eval.grid; an __init__.py has the name of its folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def short(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room(module: str) -> str:
    """The room of a module, or its own name if it is in no room."""
    return [*module.split("."), "__init__"][1]


def named(node: ast.AST, module: str) -> Iterator[str]:
    """The modules that a node of this module's tree imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
        start = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
        base = ".".join(filter(None, (start, node.module)))
        yield from (f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args and isinstance(node.args[0], ast.Constant):
        yield str(node.args[0].value)


def imports(module: str) -> dict[str, int]:
    """Module of this package → line that imports it. Imports under TYPE_CHECKING and inside functions count, and so do packages whose __init__ runs."""
    found: dict[str, int] = {}
    for node in ast.walk(tree(MODULES[module])):
        for target in named(node, module):
            while target.startswith("rerank_lab.") and target not in MODULES:  # the last part is a name in a module
                target = target.rpartition(".")[0]
            parts = target.split(".")
            for package in [".".join(parts[:n]) for n in range(2, len(parts))] + [target]:
                if package in MODULES and package != module and not (package != target and f"{module}.".startswith(f"{package}.")):
                    found.setdefault(package, node.lineno)  # type: ignore[attr-defined]
    return found


def nothing(found: list[str]) -> None:
    """Fails if anything was found, and lists it, one per line."""
    assert not found, "\n" + "\n".join(found)


def scoped(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Every node, with the name of the function or class around it."""

    def walk(node: ast.AST, scope: tuple[str, ...]) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            inner = (*scope, child.name) if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) else scope
            yield ".".join(scope) or "(module)", child
            yield from walk(child, inner)

    yield from walk(tree(path), ())


def test_the_rooms_are_those_of_the_map() -> None:
    rooms = {room for level in ORDER for room in level}
    assert {path.name.removesuffix(".py") for path in PACKAGE.glob("*.py")} == AT_THE_DOOR
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))} == rooms - AT_THE_DOOR
    told = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    nothing([f"docs/architecture.md does not speak of {one}" for one in sorted(rooms) if f"`{one}" not in told and f"/{one}" not in told])


def test_imports_point_one_way() -> None:
    height = {one: n for n, level in enumerate(ORDER) for one in level}
    upward = {
        (module, target): line
        for module in MODULES
        for target, line in imports(module).items()
        if room(target) != room(module) and height[room(target)] >= height[room(module)]
    }
    told = [f"{MODULES[module].relative_to(ROOT)}:{line} imports {target}" for (module, target), line in upward.items() if (module, target) not in LAZY]
    nothing(told + [f"{module} and {target}: no longer need to be an exception" for module, target in LAZY if (module, target) not in upward])
    at_once = [node for module, _ in LAZY for node in tree(MODULES[module]).body if any((module, target) in LAZY for target in named(node, module))]
    assert at_once == [], "what LAZY allows stands in a function"


def test_no_imports_run_in_a_circle() -> None:
    graph = {module: {target for target in imports(module) if (module, target) not in LAZY} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" ← ".join(error.args[1]))


def test_kernels_know_nothing_of_the_house() -> None:
    found = []
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        commands = [
            node for node in tree(path).body if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        ]  # a command at a module's end may import anything
        for top in (node for node in tree(path).body if node not in commands):
            for node in ast.walk(top):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                found += [f"{path.name} imports {name}" for name in names if name.partition(".")[0] == "rerank_lab"]
    nothing(found)


def test_nobody_but_models_imports_a_kind_of_model() -> None:
    kinds = {
        f"rerank_lab.models.{name}" for name in ("bi_encoder", "causal", "cross_encoder", "cross_modules", "late_interaction", "one_way", "sparse", "static")
    }
    assert kinds <= MODULES.keys()
    nothing([f"{module} imports {kind}" for module in MODULES if room(module) != "models" for kind in sorted(kinds & imports(module).keys())])


def test_nobody_but_models_asks_what_kind_a_model_is() -> None:
    kinds = {node.name for path in (PACKAGE / "models").rglob("*.py") if path.name != "base.py" for node in tree(path).body if isinstance(node, ast.ClassDef)}
    assert {"BiEncoder", "CrossEncoder", "LateInteraction", "OneWayCrossEncoder", "StaticEncoder"} <= kinds
    found = []
    for path in MODULES.values():
        if path.is_relative_to(PACKAGE / "models"):
            continue
        taken = {
            a.name for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom) and "rerank_lab.models" in (node.module or "") for a in node.names
        } & kinds
        for scope, node in scoped(path):
            asked: list[ast.AST] = []
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
                asked = [*node.args[1:]]
            elif isinstance(node, ast.MatchClass):
                asked = [node.cls]
            elif isinstance(node, ast.Compare) and any(
                isinstance(side, ast.Call) and ast.unparse(side.func) == "type" for side in (node.left, *node.comparators)
            ):
                asked = [node.left, *node.comparators]
            names = {word for one in asked for part in ast.walk(one) for word in [getattr(part, "id", getattr(part, "attr", ""))]} & taken
            found += [f"{short(path)}: {scope} asks for {name}" for name in sorted(names)]
    nothing(found)


def test_a_label_is_taken_apart_in_one_place() -> None:
    found: dict[tuple[str, str], int] = {}
    for path in MODULES.values():
        if short(path) == LABELS:
            continue
        for scope, node in scoped(path):
            cut = (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("partition", "rpartition", "split", "rsplit")
                and bool(node.args) and isinstance(node.args[0], ast.Constant) and node.args[0].value in (":", " (")
            )  # fmt: skip
            known = (isinstance(node, ast.Name) and node.id in OF_LABELS) or (isinstance(node, ast.alias) and node.name in OF_LABELS)
            text = isinstance(node, ast.Constant) and node.value in LABEL_TEXTS
            if cut or known or text:
                found.setdefault((short(path), scope), node.lineno)  # type: ignore[attr-defined]
    told = [f"{file}:{line} in {scope}" for (file, scope), line in found.items() if (file, scope) not in TAKEN_APART]
    nothing(told + [f"{file}, {scope}: no longer needs to be an exception" for file, scope in TAKEN_APART if (file, scope) not in found])


def loose(node: ast.AST) -> bool:
    """Whether a node is dict[str, Any] or a similar mapping, in quotes too."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and "ict[str, " in node.value:
        node = ast.parse(node.value, mode="eval").body if node.value.isprintable() and node.value.endswith("]") else node
    if not isinstance(node, ast.Subscript) or ast.unparse(node.value).rpartition(".")[2] not in LOOSE:
        return False
    return (
        isinstance(node.slice, ast.Tuple)
        and ast.unparse(node.slice.elts[0]) == "str"
        and ast.unparse(node.slice.elts[1]).rpartition(".")[2] in ("Any", "Any | None")
    )


def test_what_has_no_type_stays_at_the_edges() -> None:
    found: dict[str, int] = {}
    aliases: dict[tuple[str, str], Path] = {}
    for module, path in MODULES.items():
        for node in ast.walk(tree(path)):
            found[short(path)] = found.get(short(path), 0) + loose(node)
        named_so = [node for node in tree(path).body if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None and loose(node.value)]
        aliases |= {
            (module, target.id): path
            for node in named_so
            for target in getattr(node, "targets", [getattr(node, "target", None)])
            if isinstance(target, ast.Name)
        }
    told = [f"{file}: {count} times" for file, count in found.items() if count and file not in EDGES]
    told += [f"{file}: no longer needs to be an exception" for file in EDGES if not found.get(file)]
    for path in MODULES.values():
        names = [(node.module or "", a.name) for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom) for a in node.names]
        told += [
            f"{short(path)}: {name} of {module} is another name for it" for module, name in names if (module, name) in aliases and short(path) not in EDGES
        ]
    nothing(told)
