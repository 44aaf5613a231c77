"""Recipes in files: what ``refold refit`` reads beside an ONNX model.

The file holds tensors and JSON (read by ``torch.load`` with ``weights_only=True``: no code runs).
Weights of the model are not in it; tensors that the model keeps outside of its state dict are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from refold._version import __version__
from refold.backends.onnx import file, initializers
from refold.backends.write import check_output, write_atomically
from refold.errors import RefitError, RefoldError, UsageError, first_line
from refold.reading import damaged_zip, unreadable
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
_AGAIN = "write it again with refold export --recipe"
_FOREIGN = "is not what the recipe was written for"
_SCALARS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Stored:
    """What a file says: a recipe, what becomes of its constants, and which graph they are for."""

    recipe: Recipe
    related: initializers.Initializers
    graph: str


def write(path: Path, recipe: Recipe, related: initializers.Initializers, model: Path) -> None:
    """Writes a recipe, and what becomes of its constants in the file of a ``model``."""
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
        "graph": initializers.fingerprint(file.read(model), related.written),
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
        write(folder / f"{name}{SUFFIX}", recipe, related, folder / name)
    return related is not None


def read(path: Path) -> Stored:
    """Reads what :func:`write` wrote.

    Raises:
        UsageError: there is no such file, or it is no recipe of this version.
    """
    if reason := unreadable(path):
        raise UsageError(f"{path}: {reason}; refold export --recipe writes a recipe")
    reason = damaged_zip(path)
    if not reason:
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            described = json.loads(stored["recipe"])
            if described["format"] == FORMAT:
                return _read(stored, described)
        except RefoldError:
            raise
        except Exception as error:  # damage leads to anything
            reason = f"{type(error).__name__}: {first_line(error)}"
    if reason:
        raise UsageError(f"{path} is no recipe, or damaged ({reason[:200]}): {_AGAIN}")
    raise UsageError(
        f"{path} is a recipe of format {described['format']}, this version reads {FORMAT}: {_AGAIN}"
    )


def _read(stored: Mapping[str, Any], described: Mapping[str, Any]) -> Stored:
    tape = Tape(
        [_step(s, stored["seen"].get(i)) for i, s in enumerate(described["steps"])],
        dict(described["sources"]),
        dict(stored["literals"]),
        dict(described["results"]),
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
        dict(stored["fixed"]),
        described["refused"],
    )
    # Recipes of earlier versions do not say which graph they are for.
    return Stored(
        Recipe(tape, sources, shapes, stored["values"]), related, described.get("graph", "")
    )


def refit_file(
    model: str | os.PathLike[str],
    weights: Mapping[str, torch.Tensor],
    output: str | os.PathLike[str],
    *,
    bind: Mapping[str, Any] | None = None,
    recipe: str | os.PathLike[str] | None = None,
    force: bool = False,
    keep: Sequence[str | os.PathLike[str]] = (),
) -> Path:
    """Writes an ONNX file with new weights.

    Args:
        model: the file that was compiled with a recipe.
        weights: a state dict of the same architecture.
        output: file to write.
        bind: new values of bound inputs; others stay.
        recipe: by default the file's name with ``.recipe``.
        force: overwrite ``output``, if it is none of the files that are read.
        keep: further files that are not overwritten, such as those of ``weights``.

    Raises:
        RefitError: keys, shapes or values that do not fit the folded graph.
    """
    import onnx_ir

    from refold.backends.onnx.export import save

    source = Path(model)
    if reason := unreadable(source):
        raise UsageError(f"{source}: {reason}")
    path = Path(recipe) if recipe else source.with_name(source.name + SUFFIX)
    stored = read(path)
    loaded = file.read(source)
    inputs = (source, path, *file.external_data(loaded), *keep)
    check_output(output, force=force, inputs=inputs)
    _check_graph(loaded, source, stored)
    for name, value in _computed(path, stored, weights, bind).items():
        kept = loaded.graph.initializers[name].const_value
        if tuple(kept.shape) != value.shape:
            raise RefitError(f"{source} {_FOREIGN}: {name!r} differs")
        loaded.graph.initializers[name].const_value = onnx_ir.tensor(value, name=name)
    return write_atomically(
        output, lambda folder, name: save(loaded, folder, name), force=force, inputs=inputs
    )


def _check_graph(model: Any, source: Path, stored: Stored) -> None:
    written = stored.related.written
    missing = [n for n in written if n not in model.graph.initializers]
    if missing:
        raise RefitError(f"{source} {_FOREIGN}: no {missing[0]!r} in it")
    if stored.graph and stored.graph != initializers.fingerprint(model, written):
        raise RefitError(f"{source} {_FOREIGN}: its graph is another")


def _computed(
    path: Path,
    stored: Stored,
    weights: Mapping[str, torch.Tensor],
    bind: Mapping[str, Any] | None,
) -> initializers.Arrays:
    try:
        return stored.related.values(stored.recipe.assign(weights, bind).constants())
    except RefoldError:
        raise
    except Exception as error:  # a recipe is data: what it computes may fail in any way
        raise RefitError(
            f"{path} cannot be computed ({type(error).__name__}: {first_line(error)[:200]}): it is "
            f"damaged, or no recipe of these weights; {_AGAIN}"
        ) from error


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
    found = getattr(torch, str(content), None)
    if kind not in _NAMED or not isinstance(found, _NAMED[kind]):
        raise UsageError(f"the recipe names an unknown {kind}: {content!r}")
    return found
