"""Reads ``.pt2`` archives without letting them run code.

``torch.export.load`` unpickles what the archive asks for, evaluates its size expressions as
Python, imports modules that its structure names, calls any attribute of ``torch`` that its graph
names, and loads compiled libraries. Each of these is looked for first, with the reader that torch
itself uses, and refused unless the caller trusts the file.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from refold.errors import FrontendError, first_line
from refold.native import op  # noqa: F401  (archives may call refold's own operators)

_TARGET = re.compile(
    r"(torch\.ops\.\w+(\.\w+)+|_operator\.\w+|math\.\w+|torch\.(_)?sym_\w+"
    r"|torch\._sym_\w+|torch\._higher_order_ops(\.\w+)+)"
)
_SIZE_FUNCTION = re.compile(r"[A-Z]\w*|floor|ceiling|sqrt|round")
_IMPORTS = re.compile(r"__enum__|default_factory_module")
_FROM_TEXT = {"Symbol": r"[A-Za-z_]\w*", "Float": r"[-+.\de]+"}
_SIZE_NAME = re.compile(r"[a-z]+\d+|oo|int_oo|[A-Z]\w*|floor|ceiling|sqrt|round|True|False")


def load(path: Path, *, trust: bool) -> ExportedProgram:
    """Loads a program saved by ``torch.export.save``.

    Args:
        path: the file.
        trust: skip the inspection and let the file run code if it asks to.

    Raises:
        FrontendError: the file is missing, damaged, of another kind, or asks for code to be run.
    """
    if not path.is_file():
        raise FrontendError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise FrontendError(
            f"{path}: not a .pt2 archive (it is no zip file, or is cut off); "
            "write it again with torch.export.save(program, path)"
        )
    if not trust:
        for reason in _dangers(path):
            raise FrontendError(
                f"{path}: {reason}, which could run any code; refused. If you trust where the file "
                "comes from, pass trust=True, or save it again with torch.export.save"
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
        first = first_line(error)
        raise FrontendError(
            f"{path}: torch could not read this archive ({type(error).__name__}: {first}); it may "
            "be damaged or from another version of torch: save it again with torch.export.save"
        ) from error
    finally:
        log.setLevel(level)
    program._guards_code = []
    return program


def _load_inspected(path: Path) -> ExportedProgram:
    # Not torch.export.load: on an error that one goes on to older formats that unpickle.
    from torch.export.pt2_archive._package import load_pt2

    return load_pt2(str(path)).exported_programs["model"]


def _dangers(path: Path) -> Iterator[str]:
    """Reasons not to load the archive, most telling first; a damaged archive raises."""
    from torch.export.pt2_archive import PT2ArchiveReader

    try:
        with PT2ArchiveReader(str(path)) as reader:
            yield from _inspect(reader)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        first = first_line(error)
        raise FrontendError(
            f"{path}: damaged, or not written by torch.export.save ({first}); "
            "write it again with torch.export.save(program, path)"
        ) from error


def _inspect(reader: Any) -> Iterator[str]:
    from torch.export.pt2_archive import constants as layout

    names = reader.get_file_names()
    if len(set(names)) != len(names):
        yield "two of its entries have the same name"
    models = [n for n in names if n.startswith(layout.MODELS_DIR)]
    if not models:
        raise ValueError("it holds no exported program")
    for name in names:
        if name.startswith((layout.AOTINDUCTOR_DIR, layout.EXECUTORCH_DIR)):
            yield f"it carries a compiled library ({name})"
        if name.startswith((layout.WEIGHTS_DIR, layout.CONSTANTS_DIR)):
            if name.endswith(".pt"):
                yield f"its tensors are pickled ({name})"
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
            yield f"its settings ask for {name!r} to be unpickled"
        if not str(entry["path_name"]).startswith(plain):
            yield f"{name!r} is an object, not a tensor, and is pickled"


def _unsafe_pickle(data: bytes, name: str) -> Iterator[str]:
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:  # whatever it is: torch would unpickle it without limits next
        yield f"{name} holds more than tensors ({type(error).__name__}) and is pickled"


def _program(document: Any) -> Iterator[str]:
    for key, value in _entries(document):
        if key == "target" and isinstance(value, str) and not _TARGET.fullmatch(value):
            yield f"its graph calls {value!r}, which is not an operator"
        elif key == "expr_str" and not _is_size_expression(value):
            yield f"one of its sizes is the expression {str(value)[:60]!r}"
        elif key == "range_constraints" and isinstance(value, dict):
            for name in value:
                if not _is_size_expression(name):
                    yield f"one of its sizes is the expression {name[:60]!r}"
        elif key in ("in_spec", "out_spec") and _IMPORTS.search(str(value)):
            yield "its input or output structure names a module to import"


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


def _is_size_node(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float, bool))
    if isinstance(node, ast.Name):
        return bool(_SIZE_NAME.fullmatch(node.id))
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name) or not _SIZE_FUNCTION.fullmatch(node.func.id):
            return False
        if node.func.id in _FROM_TEXT:
            return _is_leaf(node, _FROM_TEXT[node.func.id])
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
    return True
