"""Judges a compiled model by its numbers: its distance from a float64 oracle of the original.

The candidate may be as far from the oracle as rounding explains: four times as far as the original
model in its own dtype, or 64 units of the output's dtype (8 in half precision), relative to the
output's scale and pooled over several inputs. Integer and boolean outputs are compared exactly,
except where floats within that tolerance flipped them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from refold.errors import VerificationError
from refold.frontends.export import Program, fresh
from refold.graph import constants, provenance
from refold.graph.evaluate import Oracle, flat_inputs
from refold.graph.kinds import op_name
from refold.graph.nodes import is_tensor, same, shape
from refold.graph.records import MIRRORED

OWN_ERROR_FACTOR = 4.0
FLOOR_UNITS = 64.0  # units in the last place that reassociation may always cost
_NARROW_UNITS = 8.0  # the same for half precision, where 64 units would hide a wrong result
_DOUBLE_FLOOR = 1e-12  # float64 has no wider oracle: the original's own distance reads 0
_NEIGHBOURS = 4  # runs of the original beside each of them
_MORE_RUNS = 16  # inputs that decide where the first ones are past the tolerance
_WATCH_LIMIT = 2**31  # bytes of intermediate values kept to find a deviating node
_INDEX_OF = frozenset({"argmax", "argmin", "max", "min", "topk", "sort", "argsort"})

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Numerics:
    """How far a compiled model is from the float64 oracle of its original.

    Attributes:
        error: the largest distance of the candidate, relative to the output's scale.
        own_error: the distance of the unfolded model in its own dtype, at the same output.
        tolerance: what was allowed at that output.
        inputs: how many inputs were compared.
        worst_output: which output that is.
        flips: integer or boolean elements that differ, each explained by rounding.
        notes: what was left out, and why.
        passed: whether everything was within its tolerance (or nothing could be compared).
    """

    error: float = 0.0
    own_error: float = 0.0
    tolerance: float = 0.0
    inputs: int = 0
    worst_output: str = ""
    flips: int = 0
    notes: list[str] = field(default_factory=list)
    passed: bool = True

    @property
    def summary(self) -> str:
        if not self.inputs:
            return f"not compared: {'; '.join(self.notes)}"
        text = (
            f"{self.inputs} inputs, relative error {self.error:.1e} "
            f"(unfolded {self.own_error:.1e}, allowed {self.tolerance:.1e})"
        )
        return text + (f", {self.flips} flips within rounding" if self.flips else "")

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data, with a one-line ``summary``."""
        return {**asdict(self), "summary": self.summary}


@dataclass
class References:
    """What the original computes: inputs, float64 results and the model's own, for comparisons.

    They outlive the original, so that a compilation may release its weights. ``allowed`` is the
    relative error that the user accepts for approximations asked for by name.
    """

    calls: list[Call] = field(default_factory=list)
    exact: list[Any] = field(default_factory=list)
    own: list[Any] = field(default_factory=list)
    nearby: list[list[Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    allowed: float = 0.0


def references(
    original: fx.GraphModule, program: Program, *, runs: int = 4, most: int | None = None
) -> References:
    """Runs the original in float64 and in its own dtype on at least ``runs`` inputs.

    No more than ``most``, where that is given.

    A graph that draws random numbers gives no references, and a note.
    """
    found = References()
    drawn = next((n for n in original.graph.nodes if _draws(n)), None)
    if drawn is not None:
        where = provenance.source_line(drawn)
        place = f"{drawn.name}{f' at {where}' if where else ''}"
        found.notes.append(f"{place} draws random numbers: two runs cannot be compared")
        return found
    oracle = Oracle(original)
    for call, generated in itertools.islice(_calls(program, runs), most):
        try:
            exact = oracle.run(*fresh(call))
            with _state_kept(original), torch.no_grad():
                own = original(*fresh(call)[0], **fresh(call)[1])
        except Exception as error:
            if not generated:
                raise
            found.notes.append(f"{_shapes(call)}: the original fails on it ({_first(error)})")
            continue
        found.calls.append(call)
        found.exact.append(exact)
        found.own.append(own)
        found.nearby.append([])
    return found


def _add_nearby(original: fx.GraphModule, found: References) -> None:
    generator = torch.Generator().manual_seed(1)
    for call, results in zip(found.calls, found.nearby, strict=True):
        for _ in range(_NEIGHBOURS):
            args, kwargs = pytree.tree_map_only(
                torch.Tensor, lambda t: _one_rounding_away(t, generator), fresh(call)
            )
            with _state_kept(original), torch.no_grad():
                results.append(original(*args, **kwargs))


def _one_rounding_away(leaf: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not leaf.is_floating_point():
        return leaf
    drawn = torch.rand(leaf.shape, generator=generator, dtype=torch.float64) * 2 - 1
    factor = 1 + torch.finfo(leaf.dtype).eps * drawn
    return (leaf.double().cpu() * factor).to(leaf.device, leaf.dtype)


def verify(
    original: fx.GraphModule | None,
    candidate: Callable[..., Any],
    found: References,
    *,
    folded_gm: fx.GraphModule | None = None,
) -> Numerics:
    """Compares a candidate with the float64 oracle of the original graph.

    Args:
        original: the IR before any pass, to find the first node that deviates; ``None`` where its
            weights were released.
        candidate: anything with the model's signature.
        found: what the original computes (:func:`references`).
        folded_gm: the IR after the passes, to find the first node that deviates.

    Raises:
        VerificationError: structure, shape, dtype, NaN pattern or numbers differ.
    """
    result = Numerics(inputs=len(found.calls), notes=list(found.notes))
    graphs = [g for g in (original, folded_gm, candidate) if isinstance(g, fx.GraphModule)]
    leaves: dict[int, _Leaf] = {}
    for call, exact, own, nearby in zip(
        found.calls, found.exact, found.own, found.nearby, strict=True
    ):
        _compare(leaves, _run_candidate(candidate, graphs, call), own, exact, call)
        for other in nearby:
            _widen(leaves, other, exact)
    for leaf in leaves.values():
        leaf.settle(found.allowed)
    ranked = sorted(leaves.values(), key=lambda x: x.error / x.tolerance if x.tolerance else 0.0)
    if ranked:
        worst = ranked[-1]
        result.error, result.own_error = worst.error, worst.own_error
        result.tolerance, result.worst_output = worst.tolerance, worst.name
        if not worst.error <= worst.tolerance:
            raise _too_far(worst, original, folded_gm, found.calls)
    _settle_flips(result, leaves, original, folded_gm, found.calls, found.allowed)
    return result


def outputs(gm: fx.GraphModule, calls: list[Call]) -> list[Any]:
    """What a graph returns for each call, in its own dtype; its state stays as it is."""
    found = []
    for call in calls:
        args, kwargs = fresh(call)
        with _state_kept(gm), torch.no_grad():
            found.append(gm(*args, **kwargs))
    return found


def draws(gm: fx.GraphModule) -> bool:
    """True if two runs of a graph may differ."""
    return any(_draws(n) for n in gm.graph.nodes)


def verify_widely(
    original: fx.GraphModule | None,
    candidate: Callable[..., Any],
    program: Program,
    known: References,
) -> tuple[Numerics, References]:
    """Compares a candidate with its original; more inputs decide where the first do not.

    Few inputs may miss the original's own worst rounding, which is heavy-tailed; so may a single
    run where the candidate happens to have its worst. More inputs are drawn then, and the
    original is also run one rounding beside each of them.

    Returns:
        The verdict, and the references that it was reached with.

    Raises:
        VerificationError: as :func:`verify`.
    """
    folded = candidate if isinstance(candidate, fx.GraphModule) else None
    try:
        return verify(original, candidate, known, folded_gm=folded), known
    except VerificationError:
        if original is None:
            raise
    known = replace(references(original, program, runs=_MORE_RUNS), allowed=known.allowed)
    _add_nearby(original, known)
    return verify(original, candidate, known, folded_gm=folded), known


def _draws(node: fx.Node) -> bool:
    reason = constants.impurity(node) if node.op == "call_function" else None
    if reason is None or not node.users:
        return False
    return "random" in reason or ("uninitialised" in reason and not _overwritten(node))


def _overwritten(node: fx.Node) -> bool:
    """True if a permutation writes every row of a tensor before anything reads one."""
    for user in node.users:
        if op_name(user) != "index_put" or user.args[0] is not node:
            return False
        indices: Any = user.args[1]
        accumulate = user.args[3] if len(user.args) > 3 else user.kwargs.get("accumulate", False)
        if accumulate or len(indices) != 1 or not _permutes(indices[0], node):
            return False
    return True


def _permutes(index: fx.Node, rows: fx.Node) -> bool:
    source: Any = index.args[0] if index.op == "call_function" and index.args else None
    if op_name(index) == "getitem" and index.args[1] == 1 and op_name(source) == "sort":
        drawn = source.args[0]
    elif op_name(index) == "argsort":
        drawn = source
    else:
        return False
    return len(shape(drawn)) == 1 and same(shape(drawn)[0], shape(rows)[0])


@contextmanager
def _state_kept(*graphs: fx.GraphModule) -> Iterator[None]:
    """Runs with the graphs' state as it was, and puts it back afterwards."""
    written = [n for gm in graphs for n in constants.written(gm.graph)]
    state = [constants.tensor(n) for n in written if n.op == "get_attr"]
    saved = [t.clone() for t in state]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(state, saved, strict=True):
                tensor.copy_(value)


def _run_candidate(candidate: Callable[..., Any], graphs: list[fx.GraphModule], call: Call) -> Any:
    args, kwargs = fresh(call)
    try:
        with _state_kept(*graphs), torch.no_grad():
            return candidate(*args, **kwargs)
    except Exception as error:
        raise VerificationError(
            f"the compiled model fails on inputs that the original takes ({_shapes(call)}): "
            f"{type(error).__name__}: {_first(error)}"
        ) from error


def _first(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def _shapes(call: Call) -> str:
    tensors = [t for t in pytree.tree_leaves(call) if isinstance(t, torch.Tensor)]
    return ", ".join(str(list(t.shape)) for t in tensors) or "no tensors"


# --- inputs ---------------------------------------------------------------------------------------


def _calls(program: Program, runs: int) -> Iterator[tuple[Call, bool]]:
    """The example, then random inputs like it: at batch 1, 2 and 3, at half the other sizes."""
    example: Call = program.example
    yield example, False
    generator = torch.Generator().manual_seed(0)
    given = 1
    symbols = {s.sizes[s.batch] for s in program.inputs if s.batch is not None}
    plain = bool(symbols) and all(isinstance(s, str) and s.isidentifier() for s in symbols)
    if plain:
        for batch in (1, 2, 3):
            if all(_allowed(program, s, batch) for s in symbols):
                yield _like(program, example, generator, dict.fromkeys(symbols, batch)), True
                given += 1
    halved = _halved(program, symbols)
    if halved:
        yield _like(program, example, generator, halved), True
        given += 1
    while given < runs:
        yield _like(program, example, generator, {}), True
        given += 1


def _halved(program: Program, batches: set[Any]) -> dict[Any, int]:
    """Half the example's size for each dynamic dimension that is not a batch."""
    found = {}
    for leaf, described in zip(pytree.tree_leaves(program.example), program.inputs, strict=True):
        for size, have in zip(described.sizes, getattr(leaf, "shape", ()), strict=False):
            if isinstance(size, str) and size not in batches:
                if not size.isidentifier() or not _allowed(program, size, have // 2):
                    return {}
                found[size] = int(have) // 2
    return found


def _allowed(program: Program, symbol: Any, size: int) -> bool:
    low, high = program.ranges.get(symbol, (0, None))
    # The tracer's own lower bound is 2, for want of a better one.
    return size >= (1 if low <= 2 else low) and (high is None or size <= high)


def _like(
    program: Program, example: Call, generator: torch.Generator, resized: dict[Any, int]
) -> Call:
    """Random inputs like the example's; ``resized`` holds other sizes for symbols."""
    leaves, spec = pytree.tree_flatten(example)
    out = []
    for leaf, described in zip(leaves, program.inputs, strict=True):
        if not isinstance(leaf, torch.Tensor):
            out.append(leaf)
            continue
        sizes = [
            resized.get(size, have) if isinstance(size, str) else have
            for size, have in zip(described.sizes, leaf.shape, strict=True)
        ]
        out.append(_random_like(leaf, [int(s) for s in sizes], generator))
    return pytree.tree_unflatten(out, spec)


def _random_like(leaf: torch.Tensor, sizes: list[int], generator: torch.Generator) -> torch.Tensor:
    """Random values in the range of ``leaf``; integers and booleans are drawn from its values."""
    if not (leaf.is_floating_point() or leaf.is_complex()):
        values = leaf.detach().reshape(-1).cpu()
        count = int(torch.tensor(sizes).prod()) if sizes else 1
        if not values.numel():
            return torch.zeros(sizes, dtype=leaf.dtype, device=leaf.device)
        chosen = torch.randint(values.numel(), (count,), generator=generator)
        return values[chosen].reshape(sizes).to(leaf.device)
    if leaf.is_complex():
        drawn = torch.randn([*sizes, 2], generator=generator, dtype=torch.float64)
        return torch.view_as_complex(drawn).to(leaf.device, leaf.dtype)
    finite = leaf.detach()[leaf.detach().isfinite()].double()
    low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
    if low == high:  # a constant example says nothing about the range
        width = abs(low) or 1.0
        low, high = low - width, high + width
    drawn = torch.rand(sizes, generator=generator, dtype=torch.float64) * (high - low) + low
    return drawn.to(leaf.device, leaf.dtype)


# --- comparison -----------------------------------------------------------------------------------


@dataclass
class _Leaf:
    """One output over all inputs."""

    index: int
    name: str
    dtype: torch.dtype
    distance: float = 0.0
    own_distance: float = 0.0
    scale: float = 0.0
    error: float = 0.0
    own_error: float = 0.0
    tolerance: float = 0.0
    worst_call: int = 0
    count: int = 0
    differing: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = field(
        default_factory=list
    )

    def settle(self, allowed: float = 0.0) -> None:
        scale = self.scale or 1.0
        self.error, self.own_error = self.distance / scale, self.own_distance / scale
        self.tolerance = tolerance(self.own_error, self.dtype)
        if self.dtype.is_floating_point or self.dtype.is_complex:
            self.tolerance = max(self.tolerance, allowed)


def tolerance(own_error: float, dtype: torch.dtype) -> float:
    """What rounding explains at an output: see the module docstring."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    info = torch.finfo(dtype)
    floor = (FLOOR_UNITS if info.bits >= 32 else _NARROW_UNITS) * info.eps
    if dtype in (torch.float64, torch.complex128):
        floor = max(floor, _DOUBLE_FLOOR)
    return max(OWN_ERROR_FACTOR * own_error, floor)


def _compare(leaves: dict[int, _Leaf], got: Any, own: Any, reference: Any, call: Call) -> None:
    ours, spec = pytree.tree_flatten(got)
    theirs, expected = pytree.tree_flatten(own)
    exact = pytree.tree_leaves(reference)
    if spec != expected:
        raise VerificationError(
            f"the compiled model returns {spec}, the original {expected}: the structure differs"
        )
    for index, (a, b, r) in enumerate(zip(ours, theirs, exact, strict=True)):
        name = f"output {index}" if len(ours) > 1 else "the output"
        if not isinstance(b, torch.Tensor):
            if a != b:
                raise VerificationError(f"{name} is {a!r}, the original's is {b!r}")
            continue
        if not isinstance(a, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            raise VerificationError(
                f"{name} is {_describe(a)}, the original's is {_describe(b)} for {_shapes(call)}"
            )
        leaf = leaves.setdefault(index, _Leaf(index, name, b.dtype))
        if b.dtype.is_floating_point or b.dtype.is_complex:
            _measure(leaf, a, b, r, call)
        elif not torch.equal(a.cpu(), b.cpu()):
            leaf.differing.append((leaf.count, a, b, r))
        leaf.count += 1


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"a {type(value).__name__}"


def _measure(leaf: _Leaf, a: torch.Tensor, b: torch.Tensor, r: torch.Tensor, call: Call) -> None:
    wide = torch.complex128 if b.dtype.is_complex else torch.float64
    a, b, r = (t.detach().to("cpu", wide) for t in (a, b, r))
    finite_a, finite_b, finite_r = a.isfinite(), b.isfinite(), r.isfinite()
    if not (finite_a.all() and finite_b.all() and finite_r.all()):
        wrong = ~(_same_class(a, b) | _same_class(a, r))
        if wrong.any():
            raise VerificationError(
                f"{leaf.name}: {int(wrong.sum())} of {wrong.numel()} elements are NaN or infinite "
                f"on one side only, for inputs {_shapes(call)}"
            )
    both = finite_a & finite_r
    if not both.any():
        return
    leaf.scale = max(leaf.scale, float(r[finite_r].abs().max()))
    distance = float((a - r)[both].abs().max())
    if distance > leaf.distance:
        leaf.distance, leaf.worst_call = distance, leaf.count
    both = finite_b & finite_r
    if both.any():
        leaf.own_distance = max(leaf.own_distance, float((b - r)[both].abs().max()))


def _widen(leaves: dict[int, _Leaf], nearby: Any, reference: Any) -> None:
    """Takes another run of the original as a measure of its own rounding."""
    results, exact = pytree.tree_leaves(nearby), pytree.tree_leaves(reference)
    for leaf in leaves.values():
        b, r = results[leaf.index], exact[leaf.index]
        if leaf.dtype.is_floating_point and b.shape == r.shape:
            distance = (b.detach().cpu().double() - r.detach().cpu().double()).abs()
            finite = distance[distance.isfinite()]
            if finite.numel():
                leaf.own_distance = max(leaf.own_distance, float(finite.max()))


def _same_class(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Elementwise: both finite, both NaN, or the same infinity."""
    both_finite, both_nan = a.isfinite() & b.isfinite(), a.isnan() & b.isnan()
    return both_finite | both_nan | (a == b)


# --- integers and booleans ------------------------------------------------------------------------


def _settle_flips(
    result: Numerics,
    leaves: dict[int, _Leaf],
    original: fx.GraphModule | None,
    folded: fx.GraphModule | None,
    calls: list[Call],
    allowed: float,
) -> None:
    """Counts flips that rounding explains; raises on the others."""
    outputs = pytree.tree_leaves(original.graph.output_node().args[0]) if original else []
    for leaf in leaves.values():
        for at, a, b, r in leaf.differing:
            flipped = a != b
            count = int(flipped.sum())
            node = outputs[leaf.index] if original is not None else None
            explained = None
            if folded is not None and original is not None:
                explained = _follows_from_floats(
                    leaf.index, a, original, folded, calls[at], allowed
                )
            if explained is None:
                natural = OWN_ERROR_FACTOR * int((b != r).sum())
                explained = int((a != r).sum()) <= natural or (
                    original is not None and _within_margin(node, original, calls[at], a, b)
                )
            if not explained:
                layer = _name_of(node) if isinstance(node, fx.Node) else leaf.name
                raise VerificationError(
                    f"{leaf.name}: {count} of {flipped.numel()} {leaf.dtype} elements differ from "
                    f"the original's, more than rounding explains ({layer})",
                    layer,
                )
            result.flips += count
            result.notes.append(
                f"{leaf.name}: {count} of {flipped.numel()} elements flipped within rounding"
            )


def _within_margin(
    node: Any, original: fx.GraphModule, call: Call, a: torch.Tensor, b: torch.Tensor
) -> bool:
    """For an index of an extreme value: is the value at the other index as good, up to rounding?

    For a comparison: are both sides equal, up to rounding?
    """
    if not isinstance(node, fx.Node):
        return False
    if op_name(node) in MIRRORED:
        return _near_threshold(node, original, call, (a != b).cpu())
    source = node.args[0] if op_name(node) == "getitem" else node
    if not isinstance(source, fx.Node) or op_name(source) not in _INDEX_OF:
        return False
    scored = source.args[0]
    if not isinstance(scored, fx.Node) or not is_tensor(scored):
        return False
    traced = scored.meta["val"].dtype
    if not traced.is_floating_point:
        return False
    seen: dict[str, torch.Tensor] = {}
    Oracle(original).run(
        *fresh(call), watch=lambda n, v: seen.update({n.name: v}) if n is scored else None
    )
    if scored.name not in seen:
        return False
    values = seen[scored.name]
    args = list(source.args[1:])
    axis: Any = {"topk": args[1] if op_name(source) == "topk" and len(args) > 1 else -1}.get(
        op_name(source), args[0] if args else source.kwargs.get("dim")
    )
    if axis is None:
        values, a, b, axis = values.reshape(-1), a.reshape(-1), b.reshape(-1), 0
    if not isinstance(axis, int) or isinstance(axis, bool):
        axis = -1
    values = values.to(a.device)
    if a.dim() == values.dim() - 1:
        a, b = a.unsqueeze(axis), b.unsqueeze(axis)
    if a.dim() != values.dim():
        return False
    gap = (values.gather(axis, a.long()) - values.gather(axis, b.long())).abs().max()
    scale = float(values.abs().max()) or 1.0
    return float(gap) / scale <= 2 * tolerance(0.0, traced)


def _near_threshold(
    node: fx.Node, original: fx.GraphModule, call: Call, flipped: torch.Tensor
) -> bool:
    left, right = node.args[0], cast(Any, node.args[1])
    if not isinstance(left, fx.Node) or not is_tensor(left):
        return False
    dtype = left.meta["val"].dtype
    if not dtype.is_floating_point:
        return False
    sides = {n.name for n in (left, right) if isinstance(n, fx.Node)}
    seen = _watched(Oracle(original).run, call, sides, {})
    x = seen[left.name].cpu()
    y = seen[right.name].cpu() if isinstance(right, fx.Node) else right
    gap = (x - y).abs().expand(flipped.shape)[flipped].max()
    scale = float(x.abs().max()) or 1.0
    return float(gap) / scale <= 2 * tolerance(0.0, dtype)


def _follows_from_floats(
    index: int,
    value: torch.Tensor,
    original: fx.GraphModule,
    folded: fx.GraphModule,
    call: Call,
    allowed: float,
) -> bool | None:
    """Are the floats behind an integer output close, and is it what follows from them?

    ``None`` if those floats cannot be found in the folded graph.
    """
    node = pytree.tree_leaves(original.graph.output_node().args[0])[index]
    sources = {n.name: n for n in _float_sources(node)} if isinstance(node, fx.Node) else {}
    if not sources:
        return None
    reference = _watched(Oracle(original).run, call, set(sources), {})
    own = _native(original, call, {name: name for name in sources})
    twins: dict[str, str] = {}
    for other in folded.graph.nodes:
        name = _stands_for(other, sources)
        if name is not None:
            twins[other.name] = name
    got = _native(folded, call, twins)
    for name, traced in sources.items():
        if name not in got or got[name].shape != reference[name].shape:
            return None
        leaf = _Leaf(0, name, traced.meta["val"].dtype)
        _measure(leaf, got[name], own[name], reference[name], call)
        leaf.settle(allowed)
        if not leaf.error <= leaf.tolerance:
            return False
    args, kwargs = fresh(call)
    known = {traced: got[name] for name, traced in sources.items()}
    with _state_kept(original), torch.no_grad():
        outputs = fx.Interpreter(original).run(
            *flat_inputs(original.graph, args, kwargs),
            initial_env=known,
            enable_io_processing=False,
        )
    return torch.equal(pytree.tree_leaves(outputs)[index], value)


def _float_sources(node: fx.Node) -> list[fx.Node]:
    """The nearest floating values upstream of an integer one, input and constants left out."""
    out: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        current = stack.pop()
        if current in seen or current.op != "call_function":
            continue
        seen.add(current)
        if is_tensor(current) and current.meta["val"].dtype.is_floating_point:
            out.append(current)
        else:
            stack.extend(current.all_input_nodes)
    return out


def _native(gm: fx.GraphModule, call: Call, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Values of some nodes in the model's own dtype, under the names given."""
    seen: dict[str, torch.Tensor] = {}

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in names:
                seen[names[n.name]] = value.detach().clone()
            return value

    args, kwargs = fresh(call)
    with _state_kept(gm), torch.no_grad():
        Watching(gm).run(*flat_inputs(gm.graph, args, kwargs), enable_io_processing=False)
    return seen


def _watched(
    run: Callable[..., Any], call: Call, names: set[str], seen: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    def watch(node: fx.Node, value: Any) -> None:
        if node.name in names:
            seen[node.name] = value

    run(*fresh(call), watch=watch)
    return seen


# --- where it went wrong --------------------------------------------------------------------------


def _too_far(
    leaf: _Leaf,
    original: fx.GraphModule | None,
    folded: fx.GraphModule | None,
    calls: list[Call],
) -> VerificationError:
    call = calls[min(leaf.worst_call, len(calls) - 1)]
    text = (
        f"{leaf.name} is {leaf.error:.2e} from the float64 reference (relative to its scale "
        f"{leaf.scale:.3g}), allowed are {leaf.tolerance:.2e}; the original itself is "
        f"{leaf.own_error:.2e} from it. Worst for inputs {_shapes(call)}"
    )
    layer = None
    if folded is not None and original is not None:
        found = first_deviation(original, folded, call, leaf.tolerance)
        if found is None:
            text += (
                "\n  every layer agrees in float64: the loss is rounding, or comes after folding"
            )
        else:
            node, error = found
            layer = _name_of(node)
            text += f"\n  first layer that deviates: {layer}, by {error:.2e}"
    return VerificationError(text, layer)


def _name_of(node: fx.Node) -> str:
    path, line = provenance.module_path(node), provenance.source_line(node)
    return node.name + (f" in module {path!r}" if path else "") + (f" at {line}" if line else "")


def first_deviation(
    original: fx.GraphModule, folded: fx.GraphModule, call: Call, allowed: float
) -> tuple[fx.Node, float] | None:
    """The first node of the original whose value in float64 the folded graph does not have."""
    values: dict[str, tuple[fx.Node, torch.Tensor]] = {}
    kept = 0

    def keep(node: fx.Node, value: Any) -> None:
        nonlocal kept
        if node.op == "call_function" and isinstance(value, torch.Tensor):
            kept += value.numel() * value.element_size()
            if value.is_floating_point() and kept < _WATCH_LIMIT:
                values[node.name] = (node, value)

    Oracle(original).run(*fresh(call), watch=keep)
    found: list[tuple[fx.Node, float]] = []

    def look(node: fx.Node, value: Any) -> None:
        if found or not isinstance(value, torch.Tensor) or node.op == "get_attr":
            return
        name = _stands_for(node, values)
        if name is None or values[name][1].shape != value.shape:
            return
        source, expected = values[name]
        finite = expected.isfinite() & value.isfinite()
        if not finite.any():
            return
        scale = float(expected[finite].abs().max()) or 1.0
        error = float((value - expected)[finite].abs().max()) / scale
        if error > max(allowed, tolerance(0.0, source.meta["val"].dtype)):
            found.append((source, error))

    Oracle(folded).run(*fresh(call), watch=look)
    return found[0] if found else None


def _stands_for(node: fx.Node, names: Any) -> str | None:
    """The original node whose value a node of the folded graph has, if it is among ``names``."""
    name = provenance.value_of(node)
    return name if name in names else None
