"""Breaks refold in one place at a time and asks the quick tests: what none notices survives.

Run from the repository's root: ``make mutate``, or ``python tools/mutate.py``. ``--sample N --seed
S`` takes N of the mutants, evenly over the files; ``--only TEXT`` those whose place or key has the
text. It ends with 1 if fewer than 95 % of the mutants that are not equivalent are killed.

A mutant is one change of the syntax tree: a condition negated; an operand of ``and``/``or``, a
filter, a guard's ``return``, a ``not`` or a statement dropped; a comparison, an operator, a number,
a truth value or a ``None`` replaced; ``any``/``all`` and ``min``/``max`` exchanged; nothing
returned. Texts, annotations, assertions (they speak to the type checker), ``strict=`` and
decorators are left alone. Its *key* is made of the function's name, the statement's text and the
change, so that edits elsewhere do not touch it; equivalent mutants are listed by it in
``mutants_equivalent.txt``.

One process imports torch, the package and the tests, and forks for each mutant; the child puts the
changed code in the place of the function's and runs the tests that execute the statement, those of
the mirrored folder first, until one fails. Code outside of functions is imported anew, changed, in
a child of a process without the package. What every test executes is measured once, by probes
(``.mutants/coverage.json``). Results (``.mutants/results.json``) hold as long as the changed file
and the test that killed are the same, or, for a survivor, all code and tests: a run that was
stopped goes on where it was. A test that executes the statement is left out only where those before
it took ``BUDGET`` seconds, so the share of the killed is never overstated.

mutmut 3.8 and cosmic-ray 8.7 were tried. mutmut forks as well, and runs here; but it drops neither
guards nor operands nor statements, which are the conditions without which a rule is wrong, changes
texts and arguments instead, cannot draw a sample, and knows which function a test enters, not which
statement. cosmic-ray starts a process for each mutant: five seconds of imports for half a second of
tests.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import copy
import gc
import hashlib
import importlib.abc
import importlib.util
import json
import os
import random
import resource
import selectors
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

ROOT = Path(__file__).resolve().parent.parent
MUTATED = (
    "refold/algebra",
    "refold/rewrite",
    "refold/passes",
    "refold/verify",
    "refold/frontends/canonical.py",
)
# The tests that are asked: the quick ones of the rooms and of whole foldings, and of the slow ones
# those that fold drawn networks. The others read the source or the documents, run other programs,
# or are about what happens after folding.
ASKED = (
    "tests/algebra",
    "tests/rewrite",
    "tests/passes",
    "tests/verify",
    "tests/frontends",
    "tests/test_must_not_fold.py",
    "tests/test_patterns.py",
    "tests/test_contract.py",
    "tests/test_planted_bugs.py",
    "tests/test_random_graphs.py",
    "tests/test_dynamic_shapes.py",
    "tests/test_unusual_programs.py",
    "tests/refit",
    "tests/fuzz/test_drawn_folds.py",
)
WHICH = "not slow and not sweep and not edge and not rtx or drawn"
KEPT = ROOT / ".mutants"
EQUIVALENT = ROOT / "tools" / "mutants_equivalent.txt"
ENOUGH = 0.95
# Seconds of unmutated time after which a mutant that no test noticed has survived, a test is too
# slow to be asked, and what a mutated test may take beyond ten times its own.
BUDGET, SLOW, GRACE = 15.0, 6.0, 8.0
MEMORY = 6 << 30
FILES = 12  # that a child imports for code outside of functions

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Mod: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
CALLS = {"any": "all", "all": "any", "min": "max", "max": "min"}


@dataclass(frozen=True)
class Mutant:
    """One change: where, what, and the way to the node in the module's syntax tree.

    ``apply`` changes the node at ``way`` of a copy of the tree. ``function`` is the outermost
    function around it, None outside of functions.
    """

    path: str
    line: int
    column: int
    scope: str
    function: str | None
    statement: str
    kind: str
    change: str
    key: str
    way: tuple[Any, ...]
    apply: Callable[[ast.AST], ast.AST] = field(compare=False, repr=False)

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}:{self.column}:{self.kind}"

    def module(self, tree: ast.Module) -> ast.Module:
        """The module's tree with the change."""
        return self._changed(tree, self.way)

    def _changed(self, node: Any, way: tuple[Any, ...]) -> Any:
        """A copy of what the way leads through."""
        if not way:
            new = self.apply(copy.deepcopy(node))
            return ast.fix_missing_locations(ast.copy_location(new, node))
        node, step = copy.copy(node), way[0]
        if isinstance(step, str):
            setattr(node, step, self._changed(getattr(node, step), way[1:]))
        else:
            node[step] = self._changed(node[step], way[1:])
        return node


def digest(*texts: str) -> str:
    return hashlib.sha1("|".join(texts).encode()).hexdigest()[:12]


def header(statement: ast.stmt) -> str:
    """A statement's own text: of a compound one, what stands before its body."""
    if hasattr(statement, "body"):
        bare: Any = copy.copy(statement)
        bare.body = [ast.Pass()]
        for other in ("orelse", "finalbody", "handlers", "decorator_list"):
            if hasattr(bare, other):
                setattr(bare, other, [])
        if isinstance(bare, ast.Try):
            return "try"
        return ast.unparse(bare)
    return ast.unparse(statement)


class Finder:
    """Finds the statements and the mutants of one module, in the order of the text."""

    def __init__(self, path: str, tree: ast.Module) -> None:
        self.path = path
        self.mutants: list[Mutant] = []
        self.statements: list[tuple[str, str, ast.stmt]] = []
        self._seen: Counter[str] = Counter()
        self._scope: tuple[str, ...] = ()
        self._function: str | None = None
        self._statement = ""
        self._text = ""
        # Whether nothing follows in the function, and in the loop: a ``return`` or a ``continue``
        # that is dropped there is another mutant, or none.
        self._last = {ast.Return: False, ast.Continue: False}
        self._block(tree.body, ("body",))

    def _block(self, body: Sequence[ast.stmt], way: tuple[Any, ...]) -> None:
        last = self._last
        for i, statement in enumerate(body):
            self._last = {kind: at and i == len(body) - 1 for kind, at in last.items()}
            if isinstance(statement, ast.For | ast.While):
                self._last = {ast.Return: False, ast.Continue: True}
            self._visit_statement(statement, (*way, i))
        self._last = last

    def _visit_statement(self, node: ast.stmt, way: tuple[Any, ...]) -> None:
        if _silent(node):
            return
        outer = self._statement, self._text
        self._text = header(node)
        name = digest(self.path, ".".join(self._scope), self._text)
        self._seen[name] += 1
        self._statement = digest(name, str(self._seen[name]))
        self.statements.append((self._statement, self._scoped, node))
        if _droppable(node) and not self._last.get(type(node), False):
            self._add(node, way, "drop", f"{self._text} -> pass", lambda _: ast.Pass())
        if isinstance(node, ast.Return) and not _nothing(node.value):
            self._add(node, way, "return", f"{self._text} -> return None",
                      lambda _: ast.Return(ast.Constant(None)))  # fmt: skip
        if isinstance(node, ast.Continue):
            self._add(node, way, "break", "continue -> break", lambda _: ast.Break())
        if isinstance(node, ast.Break):
            self._add(node, way, "continue", "break -> continue", lambda _: ast.Continue())
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            self._definition(node, way)
        else:
            self._fields(node, way)
        self._statement, self._text = outer

    @property
    def _scoped(self) -> str:
        return f"{self.path}::{'.'.join(self._scope)}"

    def _definition(self, node: Any, way: tuple[Any, ...]) -> None:
        if isinstance(node, FUNCTIONS):
            for kind in ("defaults", "kw_defaults"):
                for i, default in enumerate(getattr(node.args, kind)):
                    if default is not None:
                        self._expression(default, (*way, "args", kind, i))
        scope, function = self._scope, self._function
        self._scope = (*scope, node.name)
        if isinstance(node, FUNCTIONS) and function is None:
            self._function = ".".join(self._scope)
        last, self._last = self._last, {ast.Return: True, ast.Continue: False}
        self._block(node.body, (*way, "body"))
        self._scope, self._function, self._last = scope, function, last

    def _fields(self, node: ast.AST, way: tuple[Any, ...]) -> None:
        """Visits what a node consists of, without texts of errors and annotations."""
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "exc", "cause", "type", "format_spec"):
                continue
            if isinstance(value, list):
                if value and isinstance(value[0], ast.stmt):
                    self._block(value, (*way, name))
                    continue
                for i, item in enumerate(value):
                    self._expression(item, (*way, name, i))
            elif isinstance(value, ast.AST):
                self._expression(value, (*way, name))

    def _expression(self, node: Any, way: tuple[Any, ...]) -> None:
        if node is None or isinstance(
            node, (ast.JoinedStr, ast.expr_context, ast.operator, ast.cmpop, ast.boolop)
        ):
            return
        if isinstance(node, ast.keyword) and node.arg == "strict":
            return
        if isinstance(node, ast.stmt):
            raise TypeError(node)
        if isinstance(node, ast.expr):
            self._changes(node, way)
        self._fields(node, way)

    def _changes(self, node: ast.expr, way: tuple[Any, ...]) -> None:
        parent = way[-1] if isinstance(way[-1], str) else way[-2]
        if parent == "test" and not _opposed(node):
            self._put(node, way, "negate", lambda n: ast.UnaryOp(ast.Not(), n))
        if parent == "ifs":
            self._put(node, way, "filter", lambda n: ast.Constant(True))
        if isinstance(node, ast.BoolOp):
            for i in range(len(node.values)):
                self._put(node, way, f"operand{i}", partial(_without, i=i))
        elif isinstance(node, ast.Compare):
            for i, op in enumerate(node.ops):
                if type(op) in COMPARISONS:
                    self._put(node, way, f"compare{i}", partial(_compared, i=i))
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS and not _text(node):
            self._put(node, way, "operator", _operated)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            self._put(node, way, "unary", lambda n: n.operand)
        elif isinstance(node, ast.Constant):
            other = _other_constant(node.value)
            silent = parent == "comparators" or self._text == "return None"
            if other is not None and not (node.value is None and silent):
                self._put(node, way, "constant", lambda n: ast.Constant(other))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
            self._put(node, way, "call", _called)

    def _put(
        self, node: ast.AST, way: tuple[Any, ...], kind: str, apply: Callable[[Any], ast.AST]
    ) -> None:
        change = f"{ast.unparse(node)} -> {ast.unparse(apply(copy.deepcopy(node)))}"
        self._add(node, way, kind, change, apply)

    def _add(
        self,
        node: Any,
        way: tuple[Any, ...],
        kind: str,
        change: str,
        apply: Callable[[Any], ast.AST],
    ) -> None:
        name = digest(self._statement, kind, change)
        self._seen[name] += 1
        key = digest(name, str(self._seen[name]))
        change = " ".join(change.split())
        self.mutants.append(
            Mutant(
                self.path,
                node.lineno,
                node.col_offset,
                ".".join(self._scope),
                self._function,
                self._statement,
                kind,
                change,
                key,
                way,
                apply,
            )
        )


def _silent(node: ast.stmt) -> bool:
    """What is not mutated: documents, imports, assertions, branches for the type checker, texts."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Assert | ast.Global | ast.Nonlocal):
        return True
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return True
    if isinstance(node, FUNCTIONS) and node.name in ("__repr__", "__str__"):
        return True
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _droppable(node: ast.stmt) -> bool:
    """Statements without which the function still runs: all but those that make names."""
    if isinstance(
        node, ast.Expr | ast.AugAssign | ast.Raise | ast.Delete | ast.Continue | ast.Break
    ):
        return True
    if isinstance(node, ast.Return):
        return True
    if isinstance(node, ast.Assign):
        used = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
        names = [n for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        return all(n.id in used for n in names if isinstance(n.ctx, ast.Store))
    return False


def _nothing(value: ast.expr | None) -> bool:
    """None, or what is as false as it."""
    return value is None or (isinstance(value, ast.Constant) and value.value in (None, False))


def _opposed(test: ast.expr) -> bool:
    """Whether another mutant negates the condition already."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return True
    exact = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
    return isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], exact)


def _text(node: ast.BinOp) -> bool:
    return any(
        isinstance(side, ast.JoinedStr)
        or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in (node.left, node.right)
    )


def _without(node: ast.BoolOp, i: int) -> ast.expr:
    rest = [v for j, v in enumerate(node.values) if j != i]
    return rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)


def _compared(node: ast.Compare, i: int) -> ast.expr:
    ops = [COMPARISONS[type(op)]() if i == j else op for j, op in enumerate(node.ops)]
    return ast.Compare(node.left, ops, node.comparators)


def _operated(node: ast.BinOp) -> ast.expr:
    return ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)


def _called(node: ast.Call) -> ast.expr:
    assert isinstance(node.func, ast.Name)
    return ast.Call(ast.Name(CALLS[node.func.id], ast.Load()), node.args, node.keywords)


def _other_constant(value: object) -> Any:
    if value is None:
        return 1
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if value in (0, 1, 2) or isinstance(value, int) else value * 2
    return None


# ----------------------------------------------------------------------------------- the code


@dataclass
class Source:
    """A mutated module: its text, its tree, what can be changed in it."""

    path: str
    text: str
    tree: ast.Module
    found: Finder

    @property
    def digest(self) -> str:
        return digest(self.text)

    def compiled(self, tree: ast.Module) -> CodeType:
        return compile(tree, str(ROOT / self.path), "exec", dont_inherit=True)


def sources() -> dict[str, Source]:
    made = {}
    for file in _files(MUTATED, "*.py"):
        path = str(file.relative_to(ROOT))
        text = file.read_text()
        tree = ast.parse(text)
        made[path] = Source(path, text, tree, Finder(path, tree))
    return made


def codes_of(code: CodeType) -> Iterator[CodeType]:
    """The codes of all functions in a module's."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from codes_of(constant)


Named = tuple[str, str, int]


def _name(code: CodeType) -> Named:
    return code.co_filename, code.co_qualname, code.co_firstlineno


def functions(paths: Iterable[str]) -> dict[Named, list[FunctionType]]:
    """All functions that exist, of the files, by the name of their code."""
    files = {str(ROOT / p) for p in paths}
    found: dict[Named, list[FunctionType]] = defaultdict(list)
    for thing in gc.get_objects():
        if isinstance(thing, FunctionType) and thing.__code__.co_filename in files:
            found[_name(thing.__code__)].append(thing)
    return found


def replace(existing: dict[Named, list[FunctionType]], code: CodeType, inside: str | None) -> None:
    """Puts a module's code in the place of that of the functions that exist."""
    for new in codes_of(code):
        if inside is None or new.co_qualname == inside or new.co_qualname.startswith(inside + "."):
            for function in existing.get(_name(new), ()):
                if len(function.__code__.co_freevars) == len(new.co_freevars):
                    function.__code__ = new


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module with other code."""

    def __init__(self, source: Source, code: CodeType) -> None:
        self.name = source.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        self.file = ROOT / source.path
        self.code = code

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.name:
            return None
        package = [str(self.file.parent)] if self.file.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(
            name, self.file, loader=self, submodule_search_locations=package
        )

    def exec_module(self, module: Any) -> None:
        exec(self.code, module.__dict__)


# ------------------------------------------------------------------------------- the children


def child(work: Callable[[Callable[[str], None]], None]) -> tuple[int, int]:
    """Forks: the child does the work, and says lines through a pipe."""
    out, into = os.pipe()
    pid = os.fork()
    if pid:
        os.close(into)
        return pid, out
    try:
        os.close(out)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        work(lambda line: _say(into, line))
    finally:  # an end without a verdict is a crash to the parent
        os._exit(0)


def _say(into: int, line: str) -> None:
    os.write(into, f"{line}\n".encode())


@dataclass
class Job:
    mutant: Any
    pid: int
    out: int
    tests: dict[str, float]
    deadline: float
    now: str = ""
    verdict: str = ""
    text: bytes = b""

    def read(self) -> bool:
        """Takes what the child said; False once it has ended."""
        data = os.read(self.out, 65536)
        self.text += data
        *lines, self.text = self.text.split(b"\n")
        for line in lines:
            word, _, rest = line.decode().partition(" ")
            if word == "start":
                self.now = rest
                self.deadline = time.monotonic() + 10 * self.tests.get(rest, 1.0) + GRACE
            else:
                self.verdict = word
        return bool(data)

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)  # it is there until it is waited for
        os.waitpid(self.pid, 0)
        os.close(self.out)


def crowd(jobs: Iterator[Job], workers: int) -> Iterator[Job]:
    """Runs jobs, a number at a time, and yields each with its verdict."""
    waiting = selectors.DefaultSelector()
    running: dict[int, Job] = {}
    more = True
    while more or running:
        while more and len(running) < workers:
            job = next(jobs, None)
            if job is None:
                more = False
                break
            running[job.out] = job
            waiting.register(job.out, selectors.EVENT_READ)
        for key, _ in waiting.select(timeout=0.2):
            job = running[key.fd]
            if not job.read():
                job.verdict = job.verdict or "crashed"
        for job in list(running.values()):
            if not job.verdict and time.monotonic() > job.deadline:
                job.verdict = "timeout"
            if job.verdict:
                waiting.unregister(job.out)
                del running[job.out]
                job.end()
                yield job


def reports(item: pytest.Item, after: pytest.Item | None) -> list[pytest.TestReport]:
    """Runs one test."""
    return runtestprotocol(item, log=False, nextitem=after)


def ask(items: Sequence[pytest.Item], say: Callable[[str], None]) -> None:
    """Runs tests until one fails."""
    for i, item in enumerate(items):
        say(f"start {item.nodeid}")
        after = items[i + 1] if i + 1 < len(items) else None
        if any(report.failed for report in reports(item, after)):
            say("killed")
            return
    say("survived")


class Instead:
    """A plugin that does something else with the collected tests than running them."""

    def __init__(self, work: Callable[[list[pytest.Item]], None]) -> None:
        self.work = work

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.work(session.items)
        return True


def collect(tests: Sequence[str], work: Callable[[list[pytest.Item]], None]) -> None:
    """Collects tests and does the work with them."""
    quiet = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:warnings", "-s"]
    pytest.main([*quiet, "-m", WHICH, *tests], plugins=[Instead(work)])


def preload() -> None:
    """Imports what is slow to import and not the package; property tests shall not shrink."""
    import hypothesis
    import torch._dynamo
    import torch._inductor
    import torch.export  # noqa: F401

    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile(
        "mutants", database=None, derandomize=True, deadline=None, phases=phases
    )
    hypothesis.settings.load_profile("mutants")


# ------------------------------------------------------------------------------ what tests execute


class Coverage:
    """Which statements each quick test executes, by the statements' names."""

    FILE = KEPT / "coverage.json"

    def __init__(self, made: dict[str, Source]) -> None:
        self.made = made
        self.files: dict[str, Any] = json.loads(self.FILE.read_text()) if self.FILE.exists() else {}

    def measure(self) -> None:
        """Runs the tests that changed since, a child a file, with probes at every statement."""
        now = test_digests()
        self.files = {f: kept for f, kept in self.files.items() if f in now}
        if not any(self._stale(file, now) for file in now):
            return
        pid = os.fork()
        if pid == 0:
            collect(ASKED, lambda items: self._measure(items, now))
            os._exit(0)
        os.waitpid(pid, 0)
        self.files = json.loads(self.FILE.read_text())

    def _stale(self, file: str, now: dict[str, str]) -> bool:
        return file not in self.files or self.files[file]["digest"] != now[file]

    def _measure(self, items: list[pytest.Item], now: dict[str, str]) -> None:
        by_file: dict[str, list[pytest.Item]] = defaultdict(list)
        for item in items:
            by_file[item.nodeid.partition("::")[0]].append(item)
        names, hits = self._probe()
        stale = {f: i for f, i in by_file.items() if self._stale(f, now)}
        gc.freeze()
        for n, (file, its) in enumerate(stale.items()):
            start = time.monotonic()
            kept = KEPT / f"part-{os.getpid()}.json"
            kept.unlink(missing_ok=True)
            pid = os.fork()
            if pid == 0:
                null = os.open(os.devnull, os.O_RDWR)
                os.dup2(null, 1)
                os.dup2(null, 2)
                kept.write_text(json.dumps(self._one(its, names, hits)))
                os._exit(0)
            os.waitpid(pid, 0)
            if kept.exists():
                self.files[file] = {"digest": now[file], **json.loads(kept.read_text())}
                kept.unlink()
            said = f"coverage {n + 1}/{len(stale)} {file} {time.monotonic() - start:.1f} s"
            print(said, flush=True)
            self.FILE.write_text(json.dumps(self.files))

    def _probe(self) -> tuple[list[str], set[int]]:
        """Puts a probe before each statement of each function."""
        names: list[str] = []
        hits: set[int] = set()
        vars(builtins)["__mutants_hit__"] = hits.add
        existing = functions(self.made)
        for source in self.made.values():
            tree = copy.deepcopy(source.tree)
            number = {}
            for key, _, statement in Finder(source.path, tree).statements:
                number[statement] = len(names)
                names.append(key)
            Probes(number).visit(tree)
            replace(existing, source.compiled(ast.fix_missing_locations(tree)), None)
        return names, hits

    def _one(self, items: list[pytest.Item], names: list[str], hits: set[int]) -> dict[str, Any]:
        measured: dict[str, tuple[float, set[int]]] = {}
        for i, item in enumerate(items):
            hits.clear()
            start = time.monotonic()
            after = items[i + 1] if i + 1 < len(items) else None
            passed = all(report.passed for report in reports(item, after))
            took = time.monotonic() - start
            if passed and took < SLOW:
                measured[item.nodeid] = took, set(hits)
        used = sorted(set().union(*(h for _, h in measured.values())))
        place = {k: i for i, k in enumerate(used)}
        tests = {
            name: (round(took, 4), hex(sum(1 << place[k] for k in h)))
            for name, (took, h) in measured.items()
        }
        return {"statements": [names[k] for k in used], "tests": tests}

    @cached_property
    def _tests(self) -> list[tuple[str, dict[str, int], list[tuple[str, float, int]]]]:
        """By file: the place of each statement in its tests' masks, and names, times and masks."""
        return [
            (
                file,
                {key: i for i, key in enumerate(kept["statements"])},
                [(name, t, int(hits, 16)) for name, (t, hits) in kept["tests"].items()],
            )
            for file, kept in self.files.items()
        ]

    def order(self, mutant: Mutant) -> dict[str, float]:
        """The tests to ask, with their times: of the mirrored folder first, then a mix of all."""
        found = self.made[mutant.path].found.statements
        wanted = {mutant.statement}
        if mutant.function is None:
            wanted = {key for key, _, _ in found}
        elif not any(mutant.statement in known for _, known, _ in self._tests):
            scope = f"{mutant.path}::{mutant.scope}"
            wanted = {key for key, around, _ in found if around == scope}
        mirrored = Path(mutant.path.replace("refold/", "tests/", 1))
        ranked = []
        for file, known, tests in self._tests:
            mask = sum(1 << known[key] for key in wanted & known.keys())
            if not mask:
                continue
            its = [(t, name) for name, t, hits in tests if hits & mask]
            distance = 2
            if Path(file).name == f"test_{mirrored.name}":
                distance = 0
            elif Path(file).is_relative_to(mirrored.parent):
                distance = 1
            spent = 0.0
            for t, name in sorted(its):
                spent += t
                ranked.append((distance, spent, t, name))
        chosen, spent = {}, 0.0
        for _, _, t, name in sorted(ranked):
            spent += t
            if spent > BUDGET:
                break
            chosen[name] = t
        return chosen


class Probes(ast.NodeTransformer):
    def __init__(self, number: dict[ast.stmt, int]) -> None:
        self.number = number
        self.inside = 0

    def generic_visit(self, node: ast.AST) -> ast.AST:
        inner = isinstance(node, FUNCTIONS)
        self.inside += inner
        super().generic_visit(node)
        self.inside -= inner
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if (self.inside or inner) and isinstance(body, list):
                setattr(node, name, [new for s in body for new in (*self._probe(s), s)])
        return node

    def _probe(self, statement: ast.stmt) -> list[ast.stmt]:
        if statement not in self.number:
            return []
        name = ast.Name("__mutants_hit__", ast.Load())
        hit = ast.Expr(ast.Call(name, [ast.Constant(self.number[statement])], []))
        return [ast.copy_location(hit, statement)]


def test_digests() -> dict[str, str]:
    return {str(f.relative_to(ROOT)): digest(f.read_text()) for f in _files(ASKED, "test_*.py")}


def _files(starts: Iterable[str], pattern: str) -> list[Path]:
    """The files that are named, and those under the folders that are."""
    found = []
    for start in starts:
        path = ROOT / start
        found += [path] if path.is_file() else sorted(path.rglob(pattern))
    return found


# ---------------------------------------------------------------------------------- results


class Results:
    """What became of each mutant, as long as that is still true."""

    FILE = KEPT / "results.json"

    def __init__(self, made: dict[str, Source]) -> None:
        self.made = made
        self.tests = test_digests()
        self.all = digest(*(f.read_text() for f in _files(("refold", "tests"), "*.py")))
        self.kept: dict[str, Any] = json.loads(self.FILE.read_text()) if self.FILE.exists() else {}

    def get(self, mutant: Mutant) -> str | None:
        row = self.kept.get(mutant.key)
        if row is None:
            return None
        if row["verdict"] in ("killed", "timeout", "crashed"):
            test = row["by"].partition("::")[0]
            same = row["source"] == self.made[mutant.path].digest
            return row["verdict"] if same and row["test"] == self.tests.get(test) else None
        return row["verdict"] if row["all"] == self.all else None

    def put(self, mutant: Mutant, verdict: str, by: str) -> None:
        test = self.tests.get(by.partition("::")[0])
        self.kept[mutant.key] = {
            "place": mutant.place, "scope": mutant.scope, "change": mutant.change,
            "verdict": verdict, "by": by, "test": test, "all": self.all,
            "source": self.made[mutant.path].digest,
        }  # fmt: skip

    def write(self) -> None:
        self.FILE.write_text(json.dumps(self.kept, indent=1))


def equivalents() -> dict[str, str]:
    """The mutants that change nothing that anybody could see, with the reason."""
    lines = EQUIVALENT.read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return {key: reason for key, _, _, reason in rows}


def drawn(mutants: list[Mutant], sample: int, seed: int) -> list[Mutant]:
    """Every n-th mutant, from a random one on: as many of each file as it has a share."""
    if not sample or sample >= len(mutants):
        return mutants
    step = len(mutants) / sample
    start = random.Random(seed).random() * step
    return [mutants[int(start + i * step)] for i in range(sample)]


def table(mutants: Sequence[Mutant], verdict: dict[str, str]) -> float:
    """Prints what became of the mutants, file by file; returns the killed share."""
    words = ("killed", "timeout", "crashed", "survived", "untested", "equivalent")
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for mutant in mutants:
        rows[mutant.path][verdict[mutant.key]] += 1
    rows = dict(sorted(rows.items()))
    rows["all"] = sum(rows.values(), Counter())
    print(f"\n| {'file':52} | mutants | {' | '.join(words)} | killed % |")
    print("|---" * (len(words) + 3) + "|")
    share = 1.0
    for path, row in rows.items():
        total = sum(row.values()) - row["equivalent"]
        dead = row["killed"] + row["timeout"] + row["crashed"]
        share = dead / total if total else 1.0
        counts = " | ".join(f"{row[w]:{len(w)}}" for w in words)
        print(f"| {path:52} | {sum(row.values()):7} | {counts} | {100 * share:8.1f} |")
    return share


class Campaign:
    """Asks the tests about mutants, and keeps what they say."""

    def __init__(self, made: dict[str, Source], coverage: Coverage, results: Results) -> None:
        self.made, self.coverage, self.results = made, coverage, results
        self._start, self._done = time.monotonic(), 0

    def run(self, wanted: Sequence[Mutant], workers: int) -> None:
        """Asks about code outside of functions first, while this process lacks the package."""
        for job in crowd((j for m in wanted if not m.function for j in self._anew(m)), workers):
            self._settle(job.mutant, job.verdict, job.now)
        inner = [m for m in wanted if m.function]

        def inside(items: list[pytest.Item]) -> None:
            named = {item.nodeid: item for item in items}
            existing = functions(self.made)
            gc.freeze()
            jobs = (j for m in inner for j in self._replaced(m, named, existing))
            for job in crowd(jobs, workers):
                self._settle(job.mutant, job.verdict, job.now)

        if inner:
            collect(ASKED, inside)
        self.results.write()

    def _anew(self, mutant: Mutant) -> Iterator[Job]:
        """A child that imports the changed module, and all others, itself."""
        source, asked = self.made[mutant.path], self.coverage.order(mutant)
        files = list(dict.fromkeys(name.partition("::")[0] for name in asked))[:FILES]

        def work(say: Callable[[str], None]) -> None:
            def chosen(items: list[pytest.Item]) -> None:
                named = {item.nodeid: item for item in items}
                ask([named[name] for name in asked if name in named], say)

            sys.meta_path.insert(0, Changed(source, source.compiled(mutant.module(source.tree))))
            collect(files, chosen)

        yield from self._job(mutant, asked, work)

    def _replaced(
        self,
        mutant: Mutant,
        named: dict[str, pytest.Item],
        existing: dict[Named, list[FunctionType]],
    ) -> Iterator[Job]:
        """A child that puts the changed code in the place of a function's."""
        source = self.made[mutant.path]
        asked = {n: t for n, t in self.coverage.order(mutant).items() if n in named}

        def work(say: Callable[[str], None]) -> None:
            replace(existing, source.compiled(mutant.module(source.tree)), mutant.function)
            ask([named[name] for name in asked], say)

        yield from self._job(mutant, asked, work)

    def _job(
        self, mutant: Mutant, asked: dict[str, float], work: Callable[[Callable[[str], None]], None]
    ) -> Iterator[Job]:
        if not asked:
            self._settle(mutant, "untested", "")
            return
        pid, out = child(work)
        yield Job(mutant, pid, out, asked, time.monotonic() + 60)

    def _settle(self, mutant: Mutant, verdict: str, by: str) -> None:
        self._done += 1
        self.results.put(mutant, verdict, by)
        if verdict in ("survived", "untested"):
            print(f"{verdict}  {mutant.place} {mutant.key} {mutant.scope}: {mutant.change}")
        if self._done % 20 == 0:
            self.results.write()
            print(f"{self._done} in {time.monotonic() - self._start:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    KEPT.mkdir(exist_ok=True)
    sys.path.insert(0, str(ROOT))
    made = sources()
    all_mutants = [m for source in made.values() for m in source.found.mutants]
    equal = equivalents()
    gone = equal.keys() - {m.key for m in all_mutants}
    mutants = drawn(all_mutants, arguments.sample, arguments.seed)
    mutants = [m for m in mutants if arguments.only in f"{m.place} {m.key}"]
    print(f"{len(mutants)} of {len(all_mutants)} mutants")
    preload()
    coverage = Coverage(made)
    coverage.measure()
    results = Results(made)
    wanted = [m for m in mutants if m.key not in equal and results.get(m) is None]
    Campaign(made, coverage, results).run(wanted, arguments.workers)
    verdict = {m.key: "equivalent" if m.key in equal else results.get(m) or "?" for m in mutants}
    share = table(mutants, verdict)
    for key in sorted(gone):
        print(f"{EQUIVALENT.name}: no mutant has the key {key}")
    return int(share < ENOUGH or bool(gone))


if __name__ == "__main__":
    sys.exit(main())
