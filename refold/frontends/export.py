"""Brings a model into the IR with ``torch.export``: the one door of ``compile_for_inference``.

Whatever comes in, the caller's objects stay as they are: the model is traced through a shallow
copy that shares its parameters, with eval semantics, on fresh copies of the example tensors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

from refold.errors import FrontendError
from refold.frontends import archive, unusual
from refold.frontends import bind as binding
from refold.frontends import guards as size_guards
from refold.frontends.canonical import check_dialect
from refold.frontends.dynamic_shapes import (
    batch_size,
    given_names,
    has_batch,
    is_symbolic,
    repeated,
    requests,
    static_despite,
    user_placeholders,
)
from refold.frontends.faithful import (
    DIFFERS,
    SideBySide,
    apart,
    lowest,
    settle,
)
from refold.frontends.functionalise import fix_ranks as fix_ranks_of
from refold.frontends.functionalise import functional_module, settle_squeezes
from refold.frontends.tracer import Tracer, first_lines
from refold.graph import constants, provenance
from refold.graph.constants import draws_random
from refold.graph.guards import Guard, Guards, names_in
from refold.graph.ops import op_name
from refold.graph.program import InputSpec, Program, fresh


def trace(
    model: nn.Module | ExportedProgram | str | Path,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    dynamic_batch: bool = True,
    bind: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> Program:
    """Traces a model into functional, pre-dispatch ATen.

    Args:
        model: a module, an exported program, or the path of a ``.pt2``.
        args: positional example inputs.
        kwargs: keyword example inputs.
        dynamic_shapes: as ``torch.export.export`` takes it; decides alone when given.
        dynamic_batch: let the leading dimension that the inputs share be dynamic.
        bind: inputs that are constant, by name of the parameter of ``forward``.
        trust: load a ``.pt2`` even if it asks for code to be run.

    Raises:
        FrontendError: the model cannot be traced; the message names the user's own line.
    """
    kwargs = dict(kwargs or {})
    args = tuple(args)
    if isinstance(model, (str, Path)):
        path = Path(model)
        if path.suffix == ".onnx":
            raise FrontendError(
                f"{path}: ONNX as input: not yet. Give the torch module, or a .pt2 of it"
            )
        program = archive.load(path, trust=trust)
        return _from_program(program, args, kwargs, dynamic_shapes, bind or {}, from_file=True)
    if isinstance(model, ExportedProgram):
        return _from_program(model, args, kwargs, dynamic_shapes, bind or {}, from_file=False)
    if not isinstance(model, nn.Module):
        raise FrontendError(_not_a_module(model))
    compiled = getattr(model, "_orig_mod", None)  # what torch.compile returns is a wrapper
    if isinstance(compiled, nn.Module) and type(model).__module__.startswith("torch._dynamo"):
        model = compiled
    return _from_module(model, args, kwargs, dynamic_shapes, dynamic_batch, dict(bind or {}))


def with_fixed_ranks(program: Program, target: str) -> Program:
    """A program that refuses sizes at which results would have another rank than at the trace's.

    It is for a target that fixes ranks.
    """
    texts = _texts(program.inputs, program.names)
    refused = []
    for size, node in fix_ranks_of(program.graph_module):
        code = f"{size} != 1"
        text = re.sub(r"[A-Za-z_]\w*", lambda m: texts.get(m[0], m[0]), code)
        reason = f"{node.name} drops a dimension of size 1, and {target} computes for one rank"
        refused.append(Guard(code, text, provenance.source_line(node), reason))
    conditions = (*program.guards.conditions, *dict.fromkeys(refused))
    return replace(program, guards=replace(program.guards, conditions=conditions))


def _not_a_module(model: object) -> str:
    kind = f"{type(model).__module__}.{type(model).__qualname__}".removeprefix("builtins.")
    if isinstance(model, type) and issubclass(model, nn.Module):
        name = model.__name__
        return f"model is the class {name}, not a module: pass an instance, {name}(...)"
    if isinstance(model, dict):
        return (
            "model is a dict (a state_dict?): build the module, call load_state_dict on it, "
            "and pass the module"
        )
    return (
        f"model is a {kind}; expected a torch.nn.Module, a torch.export.ExportedProgram or the "
        "path of a .pt2. Wrap a function in a module whose forward calls it"
    )


# --- programs -------------------------------------------------------------------------------------


def _from_program(
    program: ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    bind: Mapping[str, Any],
    *,
    from_file: bool,
) -> Program:
    if dynamic_shapes is not None:
        raise FrontendError(
            "dynamic_shapes cannot be given with an exported program: its shapes are fixed "
            "already. Give them to torch.export.export, or pass the module"
        )
    own = not args and not kwargs and program.example_inputs is not None
    if own:
        args, kwargs = program.example_inputs[0], dict(program.example_inputs[1])
    unusual.check_program(program)
    try:
        with torch.no_grad():
            gm, redone = functional_module(program, aliasing_known=not from_file)
    except Exception as error:
        raise FrontendError(
            f"torch could not unlift the exported program ({type(error).__name__}: "
            f"{first_lines(error)}); export the module again with this version of torch"
        ) from error
    bound: dict[str, str] = {}
    if bind:
        whole = (args, kwargs) if own else None
        bound, remaining = binding.replace_inputs(gm, bind, whole)
        args, kwargs = remaining or (args, kwargs)
    _check_structure(gm, args, kwargs)
    _check_inputs(gm, args, kwargs)
    notes = [*_graph_notes(gm), *binding.warnings_of(bind), *binding.unread(gm, bound)]
    if redone:
        notes.append("in-place writes were resolved by run_decompositions({})")
    example = fresh((args, kwargs))
    inputs = _input_specs(gm, example)
    sizes = [s.sizes for s in inputs]
    recorded, unread = size_guards.read(program, gm, sizes, {}, None)
    notes += _unread(unread)
    derived = size_guards.derived(sizes, [s.name for s in inputs])
    guards = Guards(tuple(recorded), tuple(derived))
    return replace(_finish(program, gm, fresh(example), example, (), notes, guards), bound=bound)


def _check_structure(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    expected = gm.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]
    spec = pytree.tree_structure((args, kwargs))
    if spec.num_leaves != expected.num_leaves:
        raise FrontendError(
            f"the exported program takes {expected.num_leaves} inputs, {spec.num_leaves} were "
            "given; pass example_inputs as it was exported, or none if it carries its own"
        )


def _check_inputs(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compares inputs with those of the trace, as far as they have to be alike."""
    unusual.check_inputs((args, kwargs))
    spec = gm.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]
    try:
        leaves = fx_pytree.tree_flatten_spec((args, kwargs), spec)
    except (KeyError, IndexError, RuntimeError, TypeError, AttributeError) as error:
        raise FrontendError(
            "the inputs are nested differently than those of the exported program: expected "
            f"{spec}, got {pytree.tree_structure((args, kwargs))}"
        ) from error
    for node, leaf in zip(gm.graph.find_nodes(op="placeholder"), leaves, strict=False):
        traced = node.meta.get("val")
        if not isinstance(traced, torch.Tensor):
            continue
        sizes = list(traced.shape)
        if (
            not isinstance(leaf, torch.Tensor)
            or leaf.dtype != traced.dtype
            or leaf.dim() != traced.dim()
            or any(type(n) is int and n != m for n, m in zip(sizes, leaf.shape, strict=True))
        ):
            given = f"{leaf.dtype} {list(leaf.shape)}" if isinstance(leaf, torch.Tensor) else leaf
            raise FrontendError(
                f"input {node.name!r} of the exported program is {traced.dtype} {sizes}, got "
                f"{given}; pass example_inputs as it was exported, or none if it carries its own"
            )


# --- modules --------------------------------------------------------------------------------------


def _from_module(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    dynamic_batch: bool,
    bind: Mapping[str, Any],
    *,
    lengths_vary: bool | None = None,
) -> Program:
    notes: list[str] = []
    if model.training or any(m.training for m in model.modules()):
        notes.append("the model was in training mode; it was traced with eval semantics")
    unusual.check_inputs((args, kwargs))
    example = fresh((args, kwargs))
    tracer = Tracer(model, bind, example)
    tracer.lengths_vary = lengths_vary
    if bind:
        tracer.check(example)
    specialised: list[str] = []
    batch: int | None = None
    traced = example
    names: dict[str, str] = {}
    if dynamic_shapes is not None:
        dynamic_shapes = tracer.flat_shapes(dynamic_shapes)
        program = tracer.export(example, dynamic_shapes)
        asked = requests(program, dynamic_shapes, example)
        specialised += static_despite(asked)
        names = given_names(asked)
    else:
        batch = batch_size(example) if dynamic_batch else None
        attempt = _dynamic_batch(tracer, example, batch, specialised) if batch is not None else None
        if attempt is None:
            program, batch = tracer.export(example, None), None
        else:
            program, traced, varies = attempt
            if not varies:
                batch = None
            if batch == 1:
                notes.append("the example has batch 1; it was traced at batch 2, rows repeated")
    gm, redone = tracer.functional(program)
    guards, free = Guards(), set[str]()
    differs = apart(tracer, gm, traced)
    if differs is not None and tracer.lengths_vary and lengths_vary is None:
        return _from_module(  # it asks whether a length is a number
            model, args, kwargs, dynamic_shapes, dynamic_batch, bind, lengths_vary=False
        )
    if differs is not None:
        differs = (
            f"the traced program is not the model: on the example {differs}. torch.export traces "
            "another path than a call takes (a fused fast path, a test for export)"
        )
        notes.append(differs)
    else:
        inputs = _input_specs(gm, traced)
        derived = size_guards.derived([s.sizes for s in inputs], [s.name for s in inputs])
        comparison = SideBySide(tracer, gm, traced, inputs, derived)
        sizes = [s.sizes for s in inputs]
        recorded, unread = size_guards.read(program, gm, sizes, names, tracer.signature)
        reason = _batch_one_differs(comparison, recorded, batch) if batch is not None else None
        if reason:
            specialised.append(f"the batch dimension is static at {batch}: {reason}")
            program, traced, batch = tracer.export(example, None), example, None
            gm, redone = tracer.functional(program)
        else:
            own = {str(s) for s, r in program.range_constraints.items() if _bounds(r)[0] <= 2}
            guards, spurious = _settled(comparison, recorded, own, names)
            notes += _unread(unread)
            notes += [f"sizes need not fulfil {g}: the trace is right without" for g in spurious]
            free = {n for g in spurious for n in g.symbols} - names.keys()
            free -= {n for g in guards.conditions for n in g.symbols if g in recorded}
    _refuse_seeds(tracer, gm, traced)
    if tracer.used_original:
        notes.append("the model could not be copied and was traced itself")
    if redone:
        notes.append("in-place writes were resolved by run_decompositions({})")
    notes += _graph_notes(gm)
    notes += [*binding.warnings_of(bind), *binding.unread(gm, tracer.bound)]
    written = {str(n.target) for n in constants.written(gm.graph) if n.op == "get_attr"}
    finished = _finish(program, gm, fresh(traced), example, tuple(specialised), notes, guards)
    finished = replace(
        finished,
        names=names,
        bound=tracer.bound,
        apart=differs or "",
        module=None if tracer.used_original else tracer.untouched_module,
        ranges=finished.ranges | dict.fromkeys(free, (0, None)),
    )
    if differs is None:
        tracer.refuse_lost_state(finished, traced, written)
    return finished


def _batch_one_differs(comparison: SideBySide, recorded: Sequence[Guard], batch: int) -> str | None:
    """Compares the trace with the model at batch 1, which tracing at 2 or more cannot see."""
    one = dict.fromkeys(_batches(comparison.inputs), 1)
    if batch > 1 and not Guards(tuple(recorded)).admits({**comparison.hints, **one}):
        return None  # a guard refuses it
    verdict = comparison.at(one)
    if verdict.outcome != DIFFERS:
        return None
    return f"the model takes another path at batch 1 ({verdict.reason})"


def _batches(inputs: Iterable[InputSpec]) -> list[str]:
    """The symbols of leading dimensions."""
    leading = [s.sizes[0] for s in inputs if s.sizes and isinstance(s.sizes[0], str)]
    return list(dict.fromkeys(name for size in leading for name in names_in(str(size))))


def _settled(
    comparison: SideBySide, recorded: Sequence[Guard], own: set[str], names: Mapping[str, str]
) -> tuple[Guards, list[Guard]]:
    """What sizes must fulfil: what the trace recorded, and what it cannot see below two.

    Args:
        comparison: the trace beside its model.
        recorded: by the trace.
        own: symbols whose lower bound is the tracer's own.
        names: the user's names of symbols.

    Returns:
        The guards, and the recorded ones that are spurious.
    """
    texts = {s: t for s, t in _texts(comparison.inputs, names).items() if s in own}
    low = list(lowest(comparison, _batches(comparison.inputs), texts, recorded).values())
    kept, spurious = settle(recorded, comparison, low)
    return Guards((*low, *kept), tuple(comparison.derived)), spurious


def _unread(codes: Iterable[str]) -> list[str]:
    return [f"a condition of the trace is not checked in calls: {code}" for code in codes]


def _texts(inputs: Sequence[InputSpec], names: Mapping[str, str]) -> dict[str, str]:
    """Each symbol in the user's words: the name of its ``Dim``, or the dimension it stands for."""
    found: dict[str, str] = {}
    for spec in inputs:
        for axis, size in enumerate(spec.sizes):
            for symbol in names_in(size) if isinstance(size, str) else ():
                text = f"{spec.name}.shape[{axis}]" if symbol == size else symbol
                found.setdefault(symbol, names.get(symbol, text))
    return found


def _dynamic_batch(
    tracer: Tracer, example: Any, batch: int, specialised: list[str]
) -> tuple[ExportedProgram, Any, bool] | None:
    """Exports with a dynamic batch axis; ``None`` (and the reason) where that is not possible.

    The result says whether some batch axis really came out dynamic.
    """
    traced = repeated(example) if batch == 1 else example
    inputs = fresh(traced)
    shapes = ShapesCollection()
    seen: set[int] = set()
    for leaf in pytree.tree_leaves(inputs):
        if has_batch(leaf, 2 if batch == 1 else batch) and id(leaf) not in seen:
            seen.add(id(leaf))
            shapes[leaf] = {0: Dim.AUTO}
    try:
        program = tracer.export(inputs, shapes, copies=False)
    except FrontendError as error:
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {first_lines(cause)[:160]}"
        specialised.append(
            f"the batch dimension is static at {batch}: tracing it failed ({reason})"
        )
        return None
    values = [n.meta["val"] for n in user_placeholders(program)]
    leaves = pytree.tree_leaves(traced)
    fixed = [
        node
        for node, value, leaf in zip(user_placeholders(program), values, leaves, strict=True)
        if has_batch(leaf, 2 if batch == 1 else batch) and not is_symbolic(value.shape[0])
    ]
    if not fixed:
        return program, traced, True
    names = ", ".join(n.name for n in fixed)
    specialised.append(
        f"the batch dimension is static at {batch}: the model fixes dimension 0 of {names}"
    )
    if batch == 1:
        return None
    some = len(fixed) < sum(has_batch(leaf, batch) for leaf in leaves)
    return program, traced, some


def _refuse_seeds(tracer: Tracer, gm: fx.GraphModule, example: Any) -> None:
    """Refuses a model that draws the same numbers at every call, from a seed in its forward.

    A trace keeps the draw and loses the seed: the graph would draw other weights at every call.
    """
    draws = [n for n in gm.graph.nodes if draws_random(n)]
    if not draws or not _repeats(tracer.fresh_module(), example) or _repeats(gm, example):
        return
    where = provenance.source_line(draws[0])
    raise FrontendError(
        f"{type(tracer.original).__name__} seeds the random numbers that it draws in forward "
        f"({op_name(draws[0])}{' at ' + where if where else ''}): a traced program loses the seed "
        "and draws others at every call\n  fix: draw them once, outside of forward, and keep them "
        "as a buffer (register_buffer)"
    )


def _repeats(module: nn.Module, example: Any) -> bool:
    """Whether two calls give the same numbers under different seeds; its state is not written."""
    results = []
    for seed in (0, 1):
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            results.append(torch.func.functional_call(module, buffers, *fresh(example)))
    first, second = map(pytree.tree_leaves, results)
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(first, second, strict=True)
    )


# --- the result -----------------------------------------------------------------------------------


def _finish(
    program: ExportedProgram,
    gm: fx.GraphModule,
    traced: Any,
    example: Any,
    specialised: tuple[str, ...],
    notes: list[str],
    guards: Guards,
) -> Program:
    for node in gm.graph.nodes:
        if constants.is_mutation(node) and "val" not in node.meta:
            node.meta["val"] = node.args[0].meta["val"]  # a copy-back that unlifting added
    constants.own_written(gm)  # the caller's stay as they are
    ranges = {str(s): _bounds(r) for s, r in program.range_constraints.items()}
    settle_squeezes(gm, {s: guards.least(s) if r[0] <= 2 else r[0] for s, r in ranges.items()})
    check_dialect(gm)
    inputs = _input_specs(gm, traced)
    return Program(
        graph_module=gm,
        args=tuple(traced[0]),
        kwargs=dict(traced[1]),
        example=(tuple(example[0]), dict(example[1])),
        inputs=inputs,
        specialised=specialised,
        notes=tuple(notes),
        ranges=ranges,
        names={},
        node_count=sum(n.op == "call_function" for n in gm.graph.nodes),
        state=program.state_dict,
        guards=guards,
    )


def _input_specs(gm: fx.GraphModule, traced: Any) -> tuple[InputSpec, ...]:
    placeholders = gm.graph.find_nodes(op="placeholder")
    leaves = pytree.tree_leaves(traced)
    return tuple(_input_spec(n, leaf) for n, leaf in zip(placeholders, leaves, strict=True))


def _input_spec(node: fx.Node, leaf: Any) -> InputSpec:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return InputSpec(node.name, (), None, None, leaf)
    sizes = tuple(str(s) if is_symbolic(s) else int(s) for s in value.shape)
    batch = 0 if sizes and isinstance(sizes[0], str) else None
    return InputSpec(node.name, sizes, value.dtype, batch, None, value.device)


def _bounds(values: Any) -> tuple[int, int | None]:
    low = int(values.lower) if values.lower.is_Integer else 0
    return low, (int(values.upper) if values.upper.is_Integer else None)


def _graph_notes(gm: fx.GraphModule) -> list[str]:
    notes: list[str] = []
    opaque = Counter(
        str(getattr(n.target, "__name__", n.target))
        for n in gm.graph.nodes
        if n.op == "call_function" and isinstance(n.target, torch._ops.HigherOrderOperator)
    )
    for name, count in opaque.items():
        inside = "its sub-graphs are kept as they are, nothing folds inside"
        if name == "cond":
            inside = "decided at run time, each branch is folded by itself"
        notes.append(f"{count} x {name}: {inside}")
    if constants.written(gm.graph):
        notes.append("the model writes its own state; the compiled model keeps a state of its own")
    training = sum(trains(n) for n in gm.graph.nodes)
    if training:
        notes.append(f"{training} operators were exported in training mode and stay so")
    return notes


def trains(node: fx.Node) -> bool:
    """Dropout that drops, or batch norm with running statistics that it does not use."""
    if node.op != "call_function":
        return False
    name = op_name(node)
    if name in ("dropout", "feature_dropout", "alpha_dropout"):
        return bool(len(node.args) > 2 and node.args[2] and node.args[1] != 0)
    if name == "batch_norm":
        return bool(node.args[5]) and node.args[3] is not None
    return name == "_native_batch_norm_legit_functional"
