"""Recipes in files: what ``refold refit`` reads beside an ONNX model.

The file holds tensors and JSON (read by ``torch.load`` with ``weights_only=True``: no code runs).
Weights of the model are not in it; tensors that the model keeps outside of its state dict are.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from refold._version import __version__
from refold.backends.onnx import initializers
from refold.backends.write import write_atomically
from refold.errors import RefitError, UsageError, first_line
from refold.refit.recipe import Recipe, Source
from refold.refit.tape import StepValue, Tape, TapeStep

if TYPE_CHECKING:
    import os

FORMAT = 1
SUFFIX = ".recipe"
_NAMED: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}
_SCALARS = (bool, int, float, str, type(None))


def write(path: Path, recipe: Recipe, related: initializers.Initializers) -> None:
    """Writes a recipe and what becomes of its constants in an ONNX file."""
    tape = recipe.tape
    seen = {i: s.seen for i, s in enumerate(tape.steps) if isinstance(s.seen, torch.Tensor)}
    described = {
        "format": FORMAT,
        "refold": __version__,
        "steps": [_written(step) for step in tape.steps],
        "sources": tape.sources,
        "results": tape.results,
        "unknown": sorted(tape.unknown),
        "origins": {
            name: [list(s.keys), s.bound, list(s.shape), _plain(s.dtype), str(s.device)]
            for name, s in recipe.sources.items()
        },
        "shapes": {name: list(shape) for name, shape in recipe.shapes.items()},
        "written": list(related.written),
        "refused": related.refused,
    }
    torch.save(
        {
            "recipe": json.dumps(described),
            "literals": tape.literals,
            "seen": seen,
            "values": {n: recipe.values[n] for n, s in recipe.sources.items() if not s.keys},
            "fixed": related.fixed,
            "program": torch.frombuffer(
                bytearray(related.program) or bytearray(1), dtype=torch.uint8
            ),
        },
        path,
    )


def write_beside(
    related: initializers.Initializers | None, recipe: Recipe, folder: Path, name: str
) -> bool:
    """Writes the recipe of a file, if its weights follow from the graph's constants."""
    if related is not None:
        write(folder / f"{name}{SUFFIX}", recipe, related)
    return related is not None


def read(path: Path) -> tuple[Recipe, initializers.Initializers]:
    """Reads what :func:`write` wrote.

    Raises:
        UsageError: there is no such file, or it is no recipe of this version.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such recipe; refold export --recipe writes one")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        described = json.loads(stored["recipe"])
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is no recipe: {first_line(error)}") from error
    if described.get("format") != FORMAT:
        raise UsageError(
            f"{path} is a recipe of format {described.get('format')}, this version reads {FORMAT}"
        )
    steps = [_step(s, stored["seen"].get(i)) for i, s in enumerate(described["steps"])]
    tape = Tape(
        steps,
        described["sources"],
        stored["literals"],
        described["results"],
        frozenset(described["unknown"]),
    )
    sources = {
        name: Source(tuple(keys), bound, tuple(shape), _operand(dtype), torch.device(device))
        for name, (keys, bound, shape, dtype, device) in described["origins"].items()
    }
    shapes = {name: tuple(shape) for name, shape in described["shapes"].items()}
    related = initializers.Initializers(
        stored["program"].numpy().tobytes(),
        tuple(described["written"]),
        stored["fixed"],
        described["refused"],
    )
    return Recipe(tape, sources, shapes, stored["values"]), related


def refit_file(
    model: str | os.PathLike[str],
    weights: Mapping[str, torch.Tensor],
    output: str | os.PathLike[str],
    *,
    bind: Mapping[str, Any] | None = None,
    recipe: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Path:
    """Writes an ONNX file with new weights.

    Args:
        model: the file that was compiled with a recipe.
        weights: a state dict of the same architecture.
        output: file to write.
        bind: new values of bound inputs; others stay.
        recipe: by default the file's name with ``.recipe``.
        force: overwrite ``output``.

    Raises:
        RefitError: keys, shapes or values that do not fit the folded graph.
    """
    import onnx_ir

    from refold.backends.onnx.export import save

    source = Path(model)
    if not source.is_file():
        raise UsageError(f"{source}: no such file")
    known, related = read(Path(recipe) if recipe else source.with_name(source.name + SUFFIX))
    loaded = onnx_ir.load(source)
    missing = [n for n in related.written if n not in loaded.graph.initializers]
    if missing:
        raise RefitError(
            f"{source} is not what the recipe was written for: no {missing[0]!r} in it"
        )
    values = related.values(known.assign(weights, bind).constants())
    for name, value in values.items():
        kept = loaded.graph.initializers[name].const_value
        if tuple(kept.shape) != value.shape:
            raise RefitError(f"{source} is not what the recipe was written for: {name!r} differs")
        loaded.graph.initializers[name].const_value = onnx_ir.tensor(value, name=name)
    return write_atomically(output, lambda folder, name: save(loaded, folder, name), force=force)


def _written(step: TapeStep) -> list[Any]:
    seen = "tensor" if isinstance(step.seen, torch.Tensor) else _plain(step.seen)
    name = None if step.op is None else str(step.op)
    return [name, _plain(step.args), _plain(step.kwargs), list(step.out), step.looks, seen,
            step.where]  # fmt: skip


def _step(stored: list[Any], seen: torch.Tensor | None) -> TapeStep:
    name, args, kwargs, out, looks, value, where = stored
    known = seen if seen is not None else _operand(value)
    op = None if name is None else _operator(name)
    return TapeStep(op, _operand(args), _operand(kwargs), tuple(out), known, looks, where)


def _operator(name: str) -> Any:
    """An ATen operator by its name; no other library's, and none that reads files."""
    library, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    if library != "aten" or packet == "from_file":
        raise UsageError(f"the recipe calls {name!r}, which is no operator that a recipe may call")
    try:
        return getattr(getattr(torch.ops.aten, packet), overload)
    except AttributeError:
        raise UsageError(
            f"the recipe calls {name!r}, which torch {torch.__version__} does not have"
        ) from None


def _plain(value: Any) -> Any:
    """Operands as JSON."""
    if isinstance(value, StepValue):
        return {"slot": value.index}
    if isinstance(value, tuple):
        return {"tuple": [_plain(v) for v in value]}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {"dict": {k: _plain(v) for k, v in value.items()}}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for name, kind in _NAMED.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    if isinstance(value, _SCALARS):
        return value
    raise RefitError(f"the recipe cannot be written: an operand is a {type(value).__name__}")


def _operand(value: Any) -> Any:
    if isinstance(value, list):
        return [_operand(v) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "slot":
        return StepValue(content)
    if kind == "tuple":
        return tuple(_operand(v) for v in content)
    if kind == "dict":
        return {k: _operand(v) for k, v in content.items()}
    if kind == "device":
        return torch.device(content)
    found = getattr(torch, content, None)
    if kind not in _NAMED or not isinstance(found, _NAMED[kind]):
        raise UsageError(f"the recipe names an unknown {kind}: {content!r}")
    return found
