"""Reads ``.pt2`` archives without letting them run code.

``torch.export.load`` unpickles what the archive asks for, evaluates its size expressions as
Python, imports modules that its structure names, calls any attribute of ``torch`` that its graph
names, and loads compiled libraries. Each of these is looked for first, with the reader that torch
itself uses, and refused unless the caller trusts the file.

Whoever is trusted, a file that is damaged gives no numbers: torch looks at no checksum and at no
byte order, takes an empty record for zeros, and weights of another shape than its graph was traced
with.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import math
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from refold.errors import FrontendError, first_line
from refold.frontends import unusual
from refold.native import op  # noqa: F401  (archives may call refold's own operators)
from refold.reading import damaged_zip, memory, unreadable

_AGAIN = "write it again with torch.export.save(program, path)"
_ANY_CODE = "which could run any code"

_TARGET = re.compile(
    r"(torch\.ops\.\w+(\.\w+)+|_operator\.\w+|math\.\w+|torch\.(_)?sym_\w+"
    r"|torch\._sym_\w+|torch\._higher_order_ops(\.\w+)+)"
)
# What torch writes sizes with. SymPy knows more, some of which takes for ever.
_SIZE_FUNCTIONS = frozenset({
    "Abs", "Add", "And", "BooleanFalse", "BooleanTrue", "CeilDiv", "CeilToInt", "CleanDiv", "Eq",
    "Equality", "ExprCondPair", "Float", "FloatPow", "FloatTrueDiv", "FloorDiv", "FloorToInt", "Ge",
    "GreaterThan", "Gt", "Half", "Identity", "Infinity", "IntTrueDiv", "Integer",
    "IsNonOverlappingAndDenseIndicator", "LShift", "Le", "LessThan", "Lt", "Max", "Min", "Mod",
    "ModularIndexing", "Mul", "Ne", "NegativeInfinity", "NegativeOne", "Not", "One", "Or",
    "Piecewise", "Pow", "PowByNatural", "PythonMod", "RShift", "Rational", "RoundDecimal",
    "RoundToInt", "StrictGreaterThan", "StrictLessThan", "Symbol", "ToFloat", "TruncToFloat",
    "TruncToInt", "Tuple", "Unequality", "Where", "Zero", "ceiling", "floor", "round", "sqrt",
})  # fmt: skip
_SIZE_FUNCTION = re.compile(r"(OpaqueUnaryFn|BitwiseFn)_\w+")
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift"})
_LARGEST, _HIGHEST_POWER = 1 << 63, 64
_IMPORTS = re.compile(r"__enum__|default_factory_module")
_FROM_TEXT = {"Symbol": r"[A-Za-z_]\w*", "Float": r"[-+.\de]+"}
_SIZE_NAME = re.compile(r"[a-z]+\d+|oo|int_oo|True|False")
_READ_JSON = 64  # bytes of memory that a byte of JSON may take: two bytes make an empty list
# Bytes of memory that a byte of JSON may take: two make an empty list.
_READ_JSON = 64
# Strides of zero make many numbers of few bytes: so much is a mask, and more is an attack.
_DENSE_BYTES, _MOST_DENSE = 1 << 30, 100


def load(path: Path, *, trust: bool) -> ExportedProgram:
    """Loads a program saved by ``torch.export.save``.

    Args:
        path: the file.
        trust: skip the inspection and let the file run code if it asks to.

    Raises:
        FrontendError: the file is missing, damaged, of another kind, or asks for code to be run.
    """
    if reason := unreadable(path):
        raise FrontendError(f"{path}: {reason}")
    if not zipfile.is_zipfile(path):
        raise FrontendError(
            f"{path}: not a .pt2 archive (it is no zip file, or is cut off); {_AGAIN}"
        )
    if reason := damaged_zip(path):
        raise FrontendError(f"{path}: {reason}; {_AGAIN}")
    for reason in _damages(path, trust=trust):
        raise FrontendError(f"{path}: {reason}; {_AGAIN}")
    if not trust:
        for reason in _dangers(path):
            raise FrontendError(
                f"{path}: {reason}; refused. If you trust where the file comes from, pass "
                "trust=True, or save it again with torch.export.save"
            )
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        if trust:
            program = torch.export.load(path)
        else:
            program = _load_inspected(path)
    except Exception as error:
        raise FrontendError(
            f"{path}: torch could not read this archive ({type(error).__name__}: {_said(error)}); "
            "it may be damaged or from another version of torch: save it again with "
            "torch.export.save"
        ) from error
    finally:
        log.setLevel(level)
    program._guards_code = []
    for reason in _misfits(program, path.stat().st_size):
        raise FrontendError(f"{path}: {reason}; {_AGAIN}")
    return program


def _said(error: BaseException) -> str:
    """An error's first sentence: torch's reader goes on about what may be the matter."""
    return first_line(error).partition(". This is")[0]


def _load_inspected(path: Path) -> ExportedProgram:
    # Not torch.export.load: on an error that one goes on to older formats that unpickle.
    from torch.export.pt2_archive._package import load_pt2

    return load_pt2(str(path)).exported_programs["model"]


def _damages(path: Path, *, trust: bool) -> Iterator[str]:
    """What torch would read without a word, and read wrongly."""
    from torch.export.pt2_archive import constants as layout

    with zipfile.ZipFile(path) as archive:
        records = {e.filename.partition("/")[2]: e for e in archive.infolist()}
        longest = max((e.file_size for n, e in records.items() if n.endswith(".json")), default=0)
        if longest > memory() // _READ_JSON:
            yield f"it describes its graph in {longest:,} bytes, too many for this machine's memory"
            return
        order = archive.read(records["byteorder"]) if "byteorder" in records else b""
        if order and order != sys.byteorder.encode():
            yield (
                f"its numbers are in the byte order {order[:20].decode(errors='replace')!r} of "
                f"another machine, and this one's is {sys.byteorder}"
            )
        for folder in (layout.WEIGHTS_DIR, layout.CONSTANTS_DIR):
            for name in records:
                if not name.startswith(folder) or not name.endswith("_config.json"):
                    continue
                try:
                    described = json.loads(archive.read(records[name]))["config"]
                    yield from _empty_records(described, folder, records)
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                    if not trust:  # what other formats have under these names is not known
                        yield f"damaged, or not written by torch.export.save ({_said(error)})"


def _empty_records(
    described: Mapping[str, Any], folder: str, records: Mapping[str, zipfile.ZipInfo]
) -> Iterator[str]:
    """Tensors with elements whose record has none: torch would make them zeros."""
    for key, told in described.items():
        record = records.get(folder + told["path_name"])
        if told["tensor_meta"] is None or record is None or record.file_size:
            continue
        if all(size["as_int"] for size in told["tensor_meta"]["sizes"]):
            yield f"the record of {key!r} ({told['path_name']}) is empty"


def _misfits(program: ExportedProgram, size: int) -> Iterator[str]:
    """What the archive claims of its tensors and cannot be: ``size`` is that of the file."""
    given = pytree.tree_leaves(program.example_inputs)
    stored = [*program.state_dict.values(), *program.constants.values(), *given]
    dense = sum(t.numel() * t.element_size() for t in stored if isinstance(t, torch.Tensor))
    if dense > max(_DENSE_BYTES, _MOST_DENSE * size):
        yield f"its tensors claim {dense:,} bytes, and the file has {size:,}"
    for key, tensor, traced in unusual.stored_and_traced(program):
        found, expected = _layout(tensor), _layout(traced)
        if found != expected:
            yield f"{key!r} is {found} in it, and its graph was traced with {expected}"


def _layout(tensor: torch.Tensor) -> str:
    """How a tensor lies in memory, as far as that decides its elements."""
    strides = [d for d, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]
    return f"{tensor.dtype} {list(tensor.shape)} with strides {strides}"


def _dangers(path: Path) -> Iterator[str]:
    """Reasons not to load the archive, most telling first; a damaged archive raises."""
    from torch.export.pt2_archive import PT2ArchiveReader

    try:
        with PT2ArchiveReader(str(path)) as reader:
            yield from _inspect(reader)
    except Exception as error:  # torch's reader raises whatever the damage leads to
        raise FrontendError(
            f"{path}: damaged, or not written by torch.export.save ({_said(error)}); {_AGAIN}"
        ) from error


def _inspect(reader: Any) -> Iterator[str]:
    from torch.export.pt2_archive import constants as layout

    names = reader.get_file_names()
    models = [n for n in names if n.startswith(layout.MODELS_DIR)]
    if not models:
        raise ValueError("it holds no exported program")
    for name in names:
        if name.startswith((layout.AOTINDUCTOR_DIR, layout.EXECUTORCH_DIR)):
            yield f"it carries a compiled library ({name}), {_ANY_CODE}"
        if name.startswith((layout.WEIGHTS_DIR, layout.CONSTANTS_DIR)):
            if name.endswith(".pt"):
                yield f"its tensors are pickled ({name}), {_ANY_CODE}"
            if name.endswith("_config.json"):
                yield from _pickled_entries(json.loads(reader.read_string(name)))
        if name.startswith(layout.SAMPLE_INPUTS_DIR):
            yield from _unsafe_pickle(reader.read_bytes(name), name)
    for name in models:
        yield from _program(json.loads(reader.read_string(name)))


def _pickled_entries(config: dict[str, Any]) -> Iterator[str]:
    from torch.export.pt2_archive import constants as layout

    plain = (layout.WEIGHT_FILENAME_PREFIX, layout.TENSOR_CONSTANT_FILENAME_PREFIX)
    for name, entry in config["config"].items():
        if entry["use_pickle"] is not False:
            yield f"its settings ask for {name!r} to be unpickled, {_ANY_CODE}"
        if not str(entry["path_name"]).startswith(plain):
            yield f"{name!r} is an object, not a tensor, and is pickled, {_ANY_CODE}"


def _unsafe_pickle(data: bytes, name: str) -> Iterator[str]:
    if not data:
        return
    if zipfile.is_zipfile(io.BytesIO(data)) and (reason := damaged_zip(io.BytesIO(data))):
        raise ValueError(f"{name}: {reason}")
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:  # whatever it is: torch would unpickle it without limits next
        yield f"{name} holds more than tensors ({type(error).__name__}) and is pickled, {_ANY_CODE}"


def _program(document: Any) -> Iterator[str]:
    for key, value in _entries(document):
        if key == "target" and isinstance(value, str) and not _TARGET.fullmatch(value):
            yield f"its graph calls {value!r}, which is not an operator and could run any code"
        elif key == "expr_str":
            yield from _size(value)
        elif key == "range_constraints" and isinstance(value, dict):
            for name in value:
                yield from _size(name)
        elif key in ("in_spec", "out_spec") and _IMPORTS.search(str(value)):
            yield f"its input or output structure names a module to import, {_ANY_CODE}"


def _size(text: Any) -> Iterator[str]:
    if not _is_size_expression(text):
        yield f"one of its sizes is the expression {str(text)[:60]!r}, {_ANY_CODE}"
    elif _is_costly(text):
        yield f"one of its sizes is the expression {text[:60]!r}, which may take for ever"


def _entries(document: Any) -> Iterator[tuple[str, Any]]:
    stack = [document]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            for key, value in item.items():
                yield key, value
                stack.append(value)
        elif isinstance(item, list):
            stack.extend(item)


def _is_size_expression(text: object) -> bool:
    """True for arithmetic on size symbols: names, numbers, operators, known functions."""
    if not isinstance(text, str) or len(text) > 10_000:
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return _is_size_node(tree.body)


def _is_costly(text: str) -> bool:
    """True for an expression with a number of more digits than anybody has time for."""
    return _power(ast.parse(text, mode="eval").body) > _HIGHEST_POWER


def _power(node: ast.AST) -> float:
    """A bound of the exponent that numbers are raised to, those of powers of powers multiplied."""
    inside = max((_power(c) for c in ast.iter_child_nodes(node)), default=1.0)
    exponent: ast.AST | None = None
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Pow, ast.LShift)):
        exponent = node.right
    elif isinstance(node, ast.Call) and len(node.args) == 2 and _called(node) in _POWERS:
        exponent = node.args[1]
    return inside if exponent is None else inside * max(1.0, _bound(exponent))


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _bound(node: ast.AST) -> float:
    """The largest number in an exponent; what is no number there has no bound."""
    found = 1.0
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, (int, float)):
            found = max(found, abs(float(part.value)))
        elif isinstance(part, ast.Name) and part.id in ("Integer", "Rational", "Float"):
            continue
        elif not isinstance(part, (ast.Call, ast.UnaryOp, ast.unaryop, ast.expr_context)):
            return math.inf
    return found


def _is_size_node(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float)) and abs(node.value) <= _LARGEST
    if isinstance(node, ast.Name):
        return bool(_SIZE_NAME.fullmatch(node.id))
    if isinstance(node, ast.Call):
        name = _called(node)
        if name not in _SIZE_FUNCTIONS and not _SIZE_FUNCTION.fullmatch(name):
            return False
        if name in _FROM_TEXT:
            return _is_leaf(node, _FROM_TEXT[name])
        return not node.keywords and all(_is_size_node(a) for a in node.args)
    if not isinstance(node, (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare)):
        return False
    parts = [c for c in ast.iter_child_nodes(node) if isinstance(c, ast.expr)]
    return all(_is_size_node(c) for c in parts)


def _is_leaf(node: ast.Call, text: str) -> bool:
    """True for ``Symbol('s0', integer=True)`` and the like: plain text, plain assumptions."""
    for value in [*node.args, *(k.value for k in node.keywords)]:
        if not isinstance(value, ast.Constant):
            return False
        if isinstance(value.value, str) and not re.fullmatch(text, value.value):
            return False
        number = value.value
        if isinstance(number, str) and text == _FROM_TEXT["Float"]:
            number = float(number)
        if isinstance(number, (int, float)) and not abs(number) <= _LARGEST:
            return False
    return all(k.arg != "precision" or _is_small(k.value) for k in node.keywords)


def _is_small(node: ast.expr) -> bool:
    """Of a number of digits."""
    return isinstance(node, ast.Constant) and isinstance(node.value, int) and node.value <= 1000
