"""What every module must keep: layers, and for each pass a place, a test, a golden, a property."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from refold.graph import ops
from refold.passes import BY_NAME, PASSES, PIPELINES
from refold.rewrite.result import Pass

ROOT = Path(__file__).resolve().parent.parent
PASS_FILES = sorted({Path(inspect.getfile(kind)) for kind in PASSES.values()})
MODULES = sorted((ROOT / "refold").rglob("*.py"))


def name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Everything that a module imports, inside functions too, but not for type checking alone."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = node.module or ""
            found.update({module, *(f"{module}.{alias.name}" for alias in node.names)})
    return found


def within(module: str, *packages: str) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


# The floors of the house, the lowest first: a module imports its own floor and those below.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "refold.errors",
        "refold._version",
        "refold.options",
        "refold.plugins",
        "refold.reading",
        "refold.scratch",
    ),
    ("refold.algebra",),
    ("refold.ops",),
    ("refold.graph",),
    ("refold.native", "refold.diagnose", "refold.refit"),
    ("refold.weights",),
    ("refold.frontends",),
    ("refold.rewrite",),
    ("refold.calibrate",),
    ("refold.passes",),
    ("refold.verify",),
    ("refold.backends",),
    ("refold.inputs", "refold.compile_lock", "refold.training", "refold.report"),
    ("refold.compilation", "refold.compiled"),
    ("refold.stages",),
    ("refold.compiler", "refold.torch_compile"),
    ("refold.fuzz",),
    ("refold.cli",),
    ("refold", "refold.__main__"),
)


def floor(module: str) -> int:
    """Of a module: that of its package, the longest that is named."""
    found = [
        (len(package), level)
        for level, packages in enumerate(FLOORS)
        for package in packages
        if (module == package if package == "refold" else within(module, package))
    ]
    assert found, f"{module} stands on no floor"
    return max(found)[1]


def imported_modules(path: Path) -> set[str]:
    """The modules of refold that one imports, for type checking too."""
    known = {name(m) for m in MODULES}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module or "")
    return (found & known) - {name(path)}


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_nothing_imports_a_higher_floor(path: Path) -> None:
    own = name(path)
    if own != "refold":  # its imports are for type checkers: it loads each name on first use
        assert not [m for m in imported_modules(path) if floor(m) > floor(own)]
    if within(own, "refold.algebra"):
        others = {m.partition(".")[0] for m in imports(path) if not within(m, "refold")}
        assert others <= {"torch", *sys.stdlib_module_names}


def test_files_import_each_other_in_no_circle() -> None:
    graph = {name(path): imported_modules(path) for path in MODULES}

    def reached(start: str) -> set[str]:
        seen, stack = set[str](), [start]
        while stack:
            for other in graph[stack.pop()] - seen:
                seen.add(other)
                stack.append(other)
        return seen

    circles = {
        frozenset(m for m in reached(n) if n in reached(m)) for n in graph if n in reached(n)
    }
    assert not circles


def test_star_imports_and_prints_are_nowhere() -> None:
    for path in MODULES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert all(alias.name != "*" for alias in node.names), path
            if not within(name(path), "refold.cli") and isinstance(node, ast.Call):
                assert not (isinstance(node.func, ast.Name) and node.func.id == "print"), path


def test_no_two_classes_share_a_name() -> None:
    homes: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(name(path))
    assert not {kind: where for kind, where in homes.items() if len(where) > 1}


def test_there_is_one_word_for_no() -> None:
    """What stays is ``Declined`` where it is found out and a ``Decline`` in results and reports."""
    others = {"refold.frontends.dynamo.NotFoldable"}  # of a captured graph, which runs as it is
    found = {
        f"{name(path)}.{node.name}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and any(w in node.name for w in ("Declin", "Refus", "Unproven", "NotFold", "Verdict"))
    }
    assert found == {"refold.errors.Declined", "refold.rewrite.result.Decline", *others}


_DIRECT = {"replace_all_uses_with", "erase_node", "replace_input_with", "eliminate_dead_code"}
# What does not go through the door, and why.
_BESIDE_THE_DOOR = {
    "refold.rewrite.edit": "the door",
    "refold.passes.experts.join": "the stated expectation is no pass: it makes the reference",
}


@pytest.mark.parametrize(
    "path", [m for m in MODULES if within(name(m), "refold.passes", "refold.rewrite")], ids=name
)
def test_passes_change_graphs_through_the_door_alone(path: Path) -> None:
    tree = ast.parse(path.read_text())
    direct = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in _DIRECT
    }
    direct |= {
        target.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for assigned in node.targets
        for target in ast.walk(assigned)
        if isinstance(target, ast.Attribute) and target.attr in ("args", "kwargs", "target")
    }
    direct |= {
        "replace"
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and ast.unparse(node) == "nodes.replace")
        or (isinstance(node, ast.ImportFrom) and node.module == "refold.graph.nodes"
            and any(alias.name == "replace" for alias in node.names))
    }  # fmt: skip
    assert bool(direct) == (name(path) in _BESIDE_THE_DOOR), direct


def _states_exactness(part: ast.stmt) -> bool:
    if isinstance(part, ast.AnnAssign):
        return ast.unparse(part.target) == "exactness"
    return isinstance(part, ast.FunctionDef) and part.name == "exactness"


def test_every_pass_has_an_id() -> None:
    """What states its exactness is a pass: it is listed, or nobody can ask for it."""
    stated = {
        path
        for path in (ROOT / "refold/passes").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and not any(ast.unparse(base).endswith("Rule") for base in node.bases)
        and any(_states_exactness(part) for part in node.body)
    }
    assert stated == set(PASS_FILES)


@pytest.mark.parametrize("path", PASS_FILES, ids=name)
def test_every_pass_has_a_place_a_test_a_golden_and_a_property(path: Path) -> None:
    module = name(path)
    listed = [item for pipeline in PIPELINES.values() for item in pipeline.passes]
    named = [kind.__module__ for kind in BY_NAME]
    assert module in [*named, *(type(item).__module__ for item in listed)], "it is in no pipeline"
    assert any(kind.__module__ == module for kind in PASSES.values()), "it has no id in PASSES"
    test = ROOT / "tests" / path.relative_to(ROOT / "refold").with_name(f"test_{path.stem}.py")
    assert test.exists(), f"it has no {test.name}"
    text = test.read_text()
    assert "golden.check(" in text, f"{test.name} has no golden"
    assert "@given(" in text, f"{test.name} has no property test"


ROOMS = [p.parent.relative_to(ROOT / "refold") for p in MODULES if p.name == "__init__.py"]


@pytest.mark.parametrize("room", [room for room in ROOMS if room.parts], ids=str)
def test_every_room_has_tests_in_a_folder_of_its_name(room: Path) -> None:
    assert list((ROOT / "tests" / room).glob("test_*.py"))


@pytest.mark.parametrize("identifier", sorted(PASSES))
def test_passes_keep_their_contract(identifier: str) -> None:
    made = PASSES[identifier]()
    assert isinstance(made, Pass)
    assert made.name == identifier == identifier.lower().replace("_", "-")
    assert made.exactness in ("exact", "reassociates", "approximate")
    assert type(made).__dataclass_params__.frozen, "a pass is a frozen dataclass"
    docstring = sys.modules[type(made).__module__].__doc__ or ""
    assert "Before::" in docstring, "its module docstring shows a graph before ..."
    assert "After::" in docstring, "... and after"


def test_every_place_in_a_pipeline_says_why() -> None:
    lines = (ROOT / "refold/passes/__init__.py").read_text().splitlines()
    entries = [line for line in lines if line.startswith(" " * 8) and line.rstrip().count("(")]
    for line in entries:
        if any(f"{kind.__name__}(" in line for kind in PASSES.values()):
            assert "  # " in line, f"{line.strip()} does not say why it stands there"


@pytest.mark.slow
def test_pass_pages_are_what_the_docstrings_say() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/pass_pages.py"), "--check"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"run tools/pass_pages.py: {done.stdout}{done.stderr}"


def test_the_page_on_architecture_lists_the_floors() -> None:
    """In their order, each with all of its packages."""
    page = (ROOT / "docs/architecture.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `refold")]
    assert [tuple(re.findall(r"`([\w.]+)`", row)) for row in rows] == list(FLOORS)


def test_nothing_points_to_texts_that_strangers_do_not_have() -> None:
    private = re.compile(r"mechanism [AB]\b|\bthe design\b|design\.md|house\.md", re.IGNORECASE)
    for path in [*MODULES, *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]:
        assert not private.search(path.read_text()), path


def _listed_operators(value: ast.expr) -> int:
    """How many operators a collection lists, by name or as attributes of ``aten``."""
    names = [n.value for n in ast.walk(value) if isinstance(n, ast.Constant)]
    written = {n for n in names if isinstance(n, str) and n in ops.ROWS}
    attributes = {
        ast.unparse(n) for n in ast.walk(value) if isinstance(n, ast.Attribute)
        and isinstance(n.value, ast.Name) and n.value.id == "aten"
    }  # fmt: skip
    return len(written | attributes)


@pytest.mark.parametrize(
    "path", [m for m in MODULES if within(name(m), "refold.passes", "refold.rewrite")], ids=name
)
def test_a_list_of_operators_in_a_pass_says_why_it_is_no_trait(path: Path) -> None:
    """What operators are is said in ``graph/ops.py``; what one pass can do with some, beside it."""
    lines = path.read_text().splitlines()
    for node in ast.parse(path.read_text()).body:
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        if value is not None and _listed_operators(value) >= 3:
            first = lines[node.lineno - 1]
            said = "  # " in first and "fmt:" not in first
            assert said or lines[node.lineno - 2].startswith("# "), f"{path}:{node.lineno}"
