"""The record of a compilation: versioned data, which JSON holds in full."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from refold.diagnose.dead_parameters import DeadParameter
from refold.errors import UsageError
from refold.graph.program import BoundInput
from refold.rewrite.result import Applied, Decline

if TYPE_CHECKING:
    from typing_extensions import Self

SCHEMA = 1


@dataclass(frozen=True)
class InputRecord:
    """One tensor input: symbolic sizes are names, ``batch`` is the index of the batch axis."""

    name: str
    sizes: tuple[int | str, ...]
    dtype: str
    batch: int | None = None


@dataclass(frozen=True)
class GraphRecord:
    """Size of a graph: calls by kind, distinct parameters and buffers, their bytes."""

    census: dict[str, int]
    parameters: int
    bytes: int

    @property
    def nodes(self) -> int:
        return sum(self.census.values())


@dataclass(frozen=True)
class PassRecord:
    """One run of one pass."""

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    applied: tuple[Applied, ...] = ()
    declined: tuple[Decline, ...] = ()


@dataclass
class Record:
    """What one compilation did.

    Attributes:
        model: the model's name.
        target: name of the target, or ``None`` for a dry run.
        pipeline: name of the pipeline.
        versions: ``refold``, ``torch`` and what the target adds.
        inputs: the tensor inputs as traced.
        unknown: operators that refold knows nothing of, with the number of calls in the folded
            graph: nothing is folded through them.
        bound: the tensor inputs that were declared constant and vanished.
        dead: parameters that no output depends on, whatever their values are.
        warnings: what is likely a mistake in the model.
        specialised: sentences on dimensions that were asked dynamic and came out static.
        notes: other sentences (training mode seen, spellings that a runtime needs, ...).
        passes: one record for each run of a pass, in order.
        declined: declined folds that still stand in the folded graph, each once.
        before: the graph as traced.
        after: the folded graph.
        numerics: the folded graph against the float64 oracle; ``None`` if not verified.
        artifact_numerics: the same for the lowered artifact.
        divergence: how far an approximation's outputs are from those without it (``error``, ``kl``,
            ``top1``, on so many ``inputs``, ``held_out`` or not); ``None`` without one.
        artifact: counts of the artifact (``nodes``, ``bytes``).
        timings: seconds for each stage.
    """

    model: str
    target: str | None
    pipeline: str
    versions: dict[str, str]
    inputs: tuple[InputRecord, ...]
    before: GraphRecord
    after: GraphRecord
    passes: tuple[PassRecord, ...] = ()
    declined: tuple[Decline, ...] = ()
    unknown: dict[str, int] = field(default_factory=dict)
    bound: tuple[BoundInput, ...] = ()
    dead: tuple[DeadParameter, ...] = ()
    warnings: tuple[str, ...] = ()
    specialised: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    numerics: dict[str, Any] | None = None
    artifact_numerics: dict[str, Any] | None = None
    divergence: dict[str, Any] | None = None
    artifact: dict[str, int] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def applied(self) -> list[Applied]:
        """All rewrites, in order."""
        return [a for p in self.passes for a in p.applied]

    def removed(self) -> dict[str, int]:
        """Net number of calls that went, by kind (negative: there are more than before)."""
        kinds = {**self.before.census, **self.after.census}
        gone = {k: self.before.census.get(k, 0) - self.after.census.get(k, 0) for k in kinds}
        return {k: n for k, n in gone.items() if n}

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data, with its schema version."""
        return {"schema": SCHEMA, **_plain(dataclasses.asdict(self))}

    def to_json(self, *, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, allow_nan=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what :meth:`to_json` wrote."""
        data = json.loads(text)
        schema = data.pop("schema", None)
        if schema != SCHEMA:
            raise UsageError(f"report of schema {schema!r}: this version reads schema {SCHEMA}")
        data["inputs"] = tuple(
            InputRecord(**{**i, "sizes": tuple(i["sizes"])}) for i in data["inputs"]
        )
        data["bound"] = tuple(
            BoundInput(**{**b, "shape": tuple(b["shape"])}) for b in data.get("bound", ())
        )
        data["passes"] = tuple(
            PassRecord(
                **{
                    **p,
                    "applied": tuple(_applied(a) for a in p["applied"]),
                    "declined": tuple(Decline(**d) for d in p["declined"]),
                }
            )
            for p in data["passes"]
        )
        data["declined"] = tuple(Decline(**d) for d in data["declined"])
        data["before"] = GraphRecord(**data["before"])
        data["after"] = GraphRecord(**data["after"])
        data["dead"] = tuple(DeadParameter(**d) for d in data.get("dead", ()))
        for name in ("warnings", "specialised", "notes"):
            data[name] = tuple(data.get(name, ()))
        return cls(**data)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _applied(data: dict[str, Any]) -> Applied:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    return Applied(**fields)


def standing(passes: Iterable[PassRecord], remaining: set[str]) -> tuple[Decline, ...]:
    """Declined folds whose node is still there after all passes, each once.

    What one pass had to decline, a later one may have folded.
    """
    seen: dict[tuple[str, str, str], Decline] = {}
    for record in passes:
        for d in record.declined:
            if d.node in remaining or d.failed:
                seen.setdefault((d.rule, d.node, d.reason), d)
    return tuple(seen.values())


def counts(census: Mapping[str, int]) -> dict[str, int]:
    """A census as plain data, most frequent first."""
    return dict(Counter(census).most_common())
