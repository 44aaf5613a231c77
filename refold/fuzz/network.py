"""A random network as data: it runs, it is a graph for the passes, and it prints as Python.

A network is a list of operator calls (:class:`DrawnCall`) over numbered values: the inputs first,
then the result of each call. Its weights are drawn from seeds (:class:`Drawn`), so that the printed
module has the very same numbers.
"""

from __future__ import annotations

import itertools
import linecache
import operator
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils import _pytree as pytree

from refold.frontends.canonical import check_dialect, write_canonical
from refold.frontends.functionalise import settle_squeezes
from refold.graph import constants
from refold.graph.program import InputSpec, Program

_sources = itertools.count()
_HOME = "refold_fuzz_network"


@dataclass(frozen=True)
class Value:
    """The number of a value: an input, or the result of a step."""

    index: int


@dataclass(frozen=True)
class Held:
    """A tensor that the network holds, by name."""

    name: str


@dataclass(frozen=True)
class Drawn:
    """How a tensor is made.

    Attributes:
        kind: ``normal``, ``positive`` (0.5 and more), ``unit`` (from 0.25 to 1.25), ``sparse`` (a
            normal one with zeros), ``full`` (one number), ``integers``, ``mask``, ``complex`` or
            ``given`` (the numbers themselves).
        shape: its sizes.
        dtype: of the result.
        seed: of the draw.
        detail: the number of ``full``, the limit of ``integers``, the values of ``given``.
        buffer: whether it is a buffer of the module, rather than a parameter.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    seed: int = 0
    detail: Any = 0
    buffer: bool = False

    def make(self, shape: Sequence[int] | None = None) -> torch.Tensor:
        """The tensor, or one of another shape that is made alike."""
        return draw_tensor(
            self.kind, self.shape if shape is None else shape, self.dtype, self.seed, self.detail
        )

    @property
    def code(self) -> str:
        detail = f", {_text(self.detail, {})}" if self.detail != 0 else ""
        return f"draw({self.kind!r}, {list(self.shape)}, {self.dtype}, {self.seed}{detail})"


def draw_tensor(
    kind: str, shape: Sequence[int], dtype: torch.dtype, seed: int, detail: Any = 0
) -> torch.Tensor:
    """Makes a tensor from a seed; see :class:`Drawn`."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "given":
        return torch.tensor(detail, dtype=dtype).reshape(tuple(shape))
    if kind == "full":
        return torch.full(tuple(shape), detail, dtype=dtype)
    if kind == "integers":
        return torch.randint(0, detail, tuple(shape), generator=generator).to(dtype)
    if kind == "mask":
        return torch.rand(tuple(shape), generator=generator) > 0.5
    if kind == "complex":
        return torch.randn(tuple(shape), generator=generator, dtype=dtype)
    values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    if kind == "unit":
        values = torch.rand(tuple(shape), generator=generator, dtype=torch.float64) + 0.25
    if kind == "positive":
        values = values.abs() + 0.5
    if kind == "sparse":
        values = values * (torch.rand(tuple(shape), generator=generator) > 0.4)
    return values.to(dtype)


# The same function, as the printed module defines it.
_DRAW = """\
def draw(kind, shape, dtype, seed, detail=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "given":
        return torch.tensor(detail, dtype=dtype).reshape(shape)
    if kind == "full":
        return torch.full(shape, detail, dtype=dtype)
    if kind == "integers":
        return torch.randint(0, detail, shape, generator=generator).to(dtype)
    if kind == "mask":
        return torch.rand(shape, generator=generator) > 0.5
    if kind == "complex":
        return torch.randn(shape, generator=generator, dtype=dtype)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "unit":
        values = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.25
    if kind == "positive":
        values = values.abs() + 0.5
    if kind == "sparse":
        values = values * (torch.rand(shape, generator=generator) > 0.4)
    return values.to(dtype)
"""


@dataclass(frozen=True)
class Cond:
    """Stands as the target of a step that takes one of two networks, by a truth value."""

    then: DrawnNetwork
    otherwise: DrawnNetwork


@dataclass(frozen=True)
class DrawnCall:
    """One call: ``target(*args, **kwargs)``, with :class:`Value` and :class:`Held` in it.

    Attributes:
        target: an overload of an operator, ``getitem``, or :class:`Cond`.
        args: its operands.
        kwargs: its keyword operands.
        part: the submodule that makes it, a number from 0.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    part: int = 0

    @property
    def reads(self) -> list[int]:
        """The numbers of the values that it reads."""
        return [v.index for v in leaves((self.args, self.kwargs)) if isinstance(v, Value)]

    @property
    def holds(self) -> list[str]:
        """The names of the held tensors that it reads."""
        return [v.name for v in leaves((self.args, self.kwargs)) if isinstance(v, Held)]


@dataclass(frozen=True)
class DrawnNetwork:
    """Steps over inputs and held tensors.

    Attributes:
        inputs: how each input is made; the leading size of those that ``batched`` says is the
            batch.
        held: the tensors of the module.
        steps: in the order in which they run.
        outputs: a tree of :class:`Value`.
        batched: for each input, whether its first dimension is the batch.
        sizes: dimensions of the first input, beside the batch, that may vary.
        wraps: whether the inputs are given in a dictionary.
    """

    inputs: tuple[Drawn, ...]
    held: Mapping[str, Drawn]
    steps: tuple[DrawnCall, ...]
    outputs: Any
    batched: tuple[bool, ...] = ()
    sizes: tuple[int, ...] = ()
    wraps: bool = False

    # --- running ----------------------------------------------------------------------------------

    def run(self, inputs: Sequence[torch.Tensor], held: Mapping[str, torch.Tensor]) -> Any:
        """What eager PyTorch computes."""
        values: list[Any] = list(inputs)
        with torch.no_grad():
            for step in self.steps:
                values.append(call(step, values, held))
        return pytree.tree_map(
            lambda v: values[v.index] if isinstance(v, Value) else v, self.outputs,
            is_leaf=_is_leaf,
        )  # fmt: skip

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: drawn.make() for name, drawn in self.held.items()}

    def example(self, batch: int | None = None, seed: int = 0, more: int = 0) -> list[torch.Tensor]:
        """Inputs: those of the network, or others of another batch and of larger sizes."""
        made = []
        for at, (drawn, batched) in enumerate(zip(self.inputs, self.batched, strict=True)):
            shape = list(drawn.shape)
            if batched and batch is not None:
                shape[0] = batch
            for axis in self.sizes if at == 0 else ():
                shape[axis] += more
            made.append(replace(drawn, seed=drawn.seed + 1000 * seed).make(shape))
        return made

    # --- reading ----------------------------------------------------------------------------------

    @property
    def operators(self) -> list[str]:
        """The names of what it calls, branches too."""
        found = []
        for step in self.steps:
            if isinstance(step.target, Cond):
                found += [*step.target.then.operators, *step.target.otherwise.operators]
            elif isinstance(step.target, torch._ops.OpOverload):
                found.append(step.target._schema.name.split("::")[-1])
        return found

    @property
    def pure(self) -> bool:
        """Whether no call writes into a tensor, and none is a choice of two networks."""
        return not any(_writes(s.target) or isinstance(s.target, Cond) for s in self.steps)

    def pruned(self) -> DrawnNetwork:
        """Without steps and held tensors that nothing needs, and with values numbered anew."""
        count = len(self.inputs)
        needed = {v.index for v in leaves(self.outputs)}
        kept: set[int] = set()
        for at in reversed(range(len(self.steps))):
            step = self.steps[at]
            if count + at in needed or _writes(step.target):
                kept.add(at)
                needed.update(step.reads)
        order = [*range(count), *(count + at for at in sorted(kept))]
        return self.renumbered({old: new for new, old in enumerate(order)})

    def renumbered(self, numbers: Mapping[int, int]) -> DrawnNetwork:
        """With other numbers for values; steps whose number is not among them are left out."""
        count = len(self.inputs)

        steps = [renumbered(s, numbers) for at, s in enumerate(self.steps) if count + at in numbers]
        names = {name for s in steps for name in s.holds}
        for step in steps:
            if isinstance(step.target, Cond):
                names |= {*step.target.then.held, *step.target.otherwise.held}
        held = {name: drawn for name, drawn in self.held.items() if name in names}
        return replace(self, steps=tuple(steps), outputs=_moved(self.outputs, numbers), held=held)

    # --- as a module ------------------------------------------------------------------------------

    @property
    def code(self) -> str:
        """The network as Python: a module ``Net``, its ``inputs``, and a call."""
        return "\n".join(_code(self))

    def module(self) -> nn.Module:
        """The module that the code defines."""
        file = f"<fuzz {next(_sources)}>"
        code = self.code
        linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
        home = types.ModuleType(_HOME)
        sys.modules[_HOME] = home  # where torch.cond's tracer looks for the names of a function
        exec(compile(code, file, "exec"), vars(home))
        made: nn.Module = home.Net()
        return made.eval()

    def arguments(self, inputs: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """Inputs as the module takes them."""
        if self.wraps:
            return ({f"x{i}": [v] for i, v in enumerate(inputs)},)
        return tuple(inputs)


def _is_leaf(value: Any) -> bool:
    return isinstance(value, (Value, Held))


def leaves(tree: Any) -> list[Any]:
    """The leaves of nested operands, :class:`Value` and :class:`Held` among them."""
    if isinstance(tree, (list, tuple)):
        return [leaf for item in tree for leaf in leaves(item)]
    if isinstance(tree, Mapping):
        return [leaf for item in tree.values() for leaf in leaves(item)]
    return [tree]


def mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Nested operands with every leaf changed."""
    if isinstance(tree, (list, tuple)):
        return type(tree)(mapped(item, change) for item in tree)
    if isinstance(tree, Mapping):
        return {key: mapped(item, change) for key, item in tree.items()}
    return change(tree)


def _moved(tree: Any, numbers: Mapping[int, int]) -> Any:
    return mapped(tree, lambda v: Value(numbers[v.index]) if isinstance(v, Value) else v)


def renumbered(step: DrawnCall, numbers: Mapping[int, int]) -> DrawnCall:
    """A step whose operands have other numbers."""
    args, kwargs = _moved(step.args, numbers), _moved(dict(step.kwargs), numbers)
    return replace(step, args=args, kwargs=kwargs)


def call(step: DrawnCall, values: Sequence[Any], held: Mapping[str, torch.Tensor]) -> Any:
    """Runs one step."""

    def filled(leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return values[leaf.index]
        return held[leaf.name] if isinstance(leaf, Held) else leaf

    args, kwargs = mapped(step.args, filled), mapped(step.kwargs, filled)
    if isinstance(step.target, Cond):
        chosen = step.target.then if bool(args[0]) else step.target.otherwise
        return chosen.run(args[1:], held)
    return step.target(*args, **kwargs)


def _writes(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


# --- as Python ------------------------------------------------------------------------------------


def _code(network: DrawnNetwork) -> Iterator[str]:
    yield from ("import torch", "from torch import nn", "", "", *_DRAW.splitlines(), "", "")
    parts: dict[int, list[int]] = {}
    for at, step in enumerate(network.steps):
        parts.setdefault(step.part, []).append(at)
    nested = len(parts) > 1 and _in_order(network)
    inside: dict[int, list[str]] = {p: [] for p in parts}
    for step in network.steps:
        for name in _held_by(step):
            if not any(name in names for names in inside.values()):
                inside[step.part if nested else 0 if 0 in inside else step.part].append(name)
    count = len(network.inputs)
    body: list[str] = []
    if nested:
        for part, steps in parts.items():
            given, made = _borders(network, steps)
            yield from (f"class Part{part}(nn.Module):", "    def __init__(self):",
                        "        super().__init__()")  # fmt: skip
            yield from (_register(name, network.held[name]) for name in inside[part])
            yield from ("", f"    def forward(self, {', '.join(f'v{i}' for i in given)}):")
            owners = {n: f"self.{n}" for n in inside[part]}
            for at in steps:
                yield from _lines(network.steps[at], count + at, owners)
            yield from (f"        return {', '.join(f'v{i}' for i in made)}", "", "")
            takes = ", ".join(f"v{i}" for i in given)
            body.append(f"        {', '.join(f'v{i}' for i in made)} = self.part{part}({takes})")
    yield from ("class Net(nn.Module):", "    def __init__(self):", "        super().__init__()")
    if nested:
        yield from (f"        self.part{part} = Part{part}()" for part in parts)
    else:
        names = [n for part in inside.values() for n in part]
        yield from (_register(name, network.held[name]) for name in names)
        owners = {n: f"self.{n}" for n in names}
        for at, step in enumerate(network.steps):
            body += _lines(step, count + at, owners)
    takes = "given" if network.wraps else ", ".join(f"v{i}" for i in range(count))
    yield from ("", f"    def forward(self, {takes}):")
    if network.wraps:
        yield from (f"        v{i} = given['x{i}'][0]" for i in range(count))
    yield from body
    yield f"        return {_text(network.outputs, {})}"
    yield from ("", "", f"inputs = [{', '.join(d.code for d in network.inputs)}]")


def _in_order(network: DrawnNetwork) -> bool:
    """Whether the steps of each part follow each other, and no part reads another's tensors."""
    order = [s.part for s in network.steps]
    owners: dict[str, int] = {}
    for step in network.steps:
        for name in _held_by(step):
            if owners.setdefault(name, step.part) != step.part:
                return False
    return order == sorted(order)


def _held_by(step: DrawnCall) -> list[str]:
    names = step.holds
    if isinstance(step.target, Cond):
        names = [*names, *step.target.then.held, *step.target.otherwise.held]
    return names


def _borders(network: DrawnNetwork, steps: Sequence[int]) -> tuple[list[int], list[int]]:
    """The values that a part takes, and those that it gives."""
    count = len(network.inputs)
    own = {count + at for at in steps}
    read = dict.fromkeys(i for at in steps for i in network.steps[at].reads if i not in own)
    outside = {i for at, s in enumerate(network.steps) if at not in steps for i in s.reads}
    outside |= {v.index for v in leaves(network.outputs) if isinstance(v, Value)}
    made = sorted(own & outside) or [max(own)]
    return list(read), made


def _register(name: str, drawn: Drawn) -> str:
    if drawn.buffer or not drawn.dtype.is_floating_point:
        return f"        self.register_buffer({name!r}, {drawn.code})"
    return f"        self.{name} = nn.Parameter({drawn.code}, requires_grad=False)"


def _lines(step: DrawnCall, number: int, owners: Mapping[str, str]) -> Iterator[str]:
    if isinstance(step.target, Cond):
        for name, branch in (("then", step.target.then), ("otherwise", step.target.otherwise)):
            yield from _function(f"{name}{number}", branch, owners)
        pick, *given = (_text(a, owners) for a in step.args)
        yield f"        v{number} = torch.cond({pick}, then{number}, otherwise{number}, ({', '.join(given)},))"  # noqa: E501
        return
    if step.target is operator.getitem:
        yield f"        v{number} = {_text(step.args[0], owners)}[{step.args[1]}]"
        return
    given = [*(_text(a, owners) for a in step.args),
             *(f"{k}={_text(v, owners)}" for k, v in step.kwargs.items())]  # fmt: skip
    yield f"        v{number} = torch.ops.{step.target}({', '.join(given)})"


def _function(name: str, network: DrawnNetwork, owners: Mapping[str, str]) -> Iterator[str]:
    takes = ", ".join(f"v{i}" for i in range(len(network.inputs)))
    yield f"        def {name}({takes}):"
    for at, step in enumerate(network.steps):
        for line in _lines(step, len(network.inputs) + at, owners):
            yield f"    {line}"
    yield f"            return {_text(network.outputs, owners)}"


def _text(operand: Any, owners: Mapping[str, str]) -> str:
    if isinstance(operand, Value):
        return f"v{operand.index}"
    if isinstance(operand, Held):
        return owners[operand.name]
    if isinstance(operand, tuple):
        return f"({', '.join(_text(o, owners) for o in operand)}{',' * (len(operand) == 1)})"
    if isinstance(operand, list):
        return f"[{', '.join(_text(o, owners) for o in operand)}]"
    if isinstance(operand, Mapping):
        return f"{{{', '.join(f'{k!r}: {_text(v, owners)}' for k, v in operand.items())}}}"
    if isinstance(operand, float) and operand in (float("inf"), float("-inf")):
        return f"float('{operand}')"
    return repr(operand)


# --- as a program ---------------------------------------------------------------------------------


class Unsuited(Exception):
    """The network is none of those that can be written as a graph at once."""


def program_of(network: DrawnNetwork, *, dynamic: bool) -> Program:
    """The network as the graph that tracing would leave, made without tracing.

    Args:
        network: calls that write nothing.
        dynamic: whether the batch, and the sizes that the network says, are symbols.

    Raises:
        Unsuited: a call fixes a size that was to vary, or it writes.
    """
    if not network.pure:
        raise Unsuited("it writes, or chooses")
    shapes = ShapeEnv()
    fake = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=False)
    inputs, held = network.example(), network.weights()
    root = nn.Module()
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for at, value in enumerate(inputs):
        node = graph.placeholder(f"x{at}")
        node.meta["val"] = fake.from_tensor(
            value, symbolic_context=_symbols(network, at, value, dynamic)
        )
        nodes.append(node)
    reading: dict[str, fx.Node] = {}
    for name, value in held.items():
        if network.held[name].buffer or not value.is_floating_point():
            root.register_buffer(name, value)
        else:
            root.register_parameter(name, nn.Parameter(value, requires_grad=False))
        with graph.inserting_before(nodes[0]):
            reading[name] = graph.get_attr(name)
        reading[name].meta["val"] = fake.from_tensor(value, static_shapes=True)

    def node_of(leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return nodes[leaf.index]
        return reading[leaf.name] if isinstance(leaf, Held) else leaf

    with fake, torch.no_grad(), enable_python_dispatcher():  # as a trace runs them
        for step in network.steps:
            args, kwargs = mapped(step.args, node_of), mapped(dict(step.kwargs), node_of)
            node = graph.call_function(step.target, args, kwargs)
            node.meta["val"] = _faked(step.target, args, kwargs)
            nodes.append(node)
    if shapes.guards:
        raise Unsuited("a call fixes a size")
    outputs = leaves(network.outputs)
    graph.output(tuple(node_of(v) for v in outputs))
    gm = fx.GraphModule(root, graph)
    constants.own_written(gm)
    write_canonical(gm)
    ranges: dict[str, tuple[int, int | None]] = {str(s): (2, None) for s in shapes.var_to_range}
    settle_squeezes(gm, dict.fromkeys(ranges, 1))
    check_dialect(gm)
    return Program(
        graph_module=gm,
        args=tuple(inputs),
        kwargs={},
        example=(tuple(inputs), {}),
        inputs=tuple(_spec(n) for n in graph.find_nodes(op="placeholder")),
        specialised=(),
        notes=(),
        ranges=ranges,
        names={},
        node_count=sum(n.op == "call_function" for n in gm.graph.nodes),
        state=held,
    )


def _symbols(
    network: DrawnNetwork, at: int, value: torch.Tensor, dynamic: bool
) -> StatelessSymbolicContext:
    kinds = [DimDynamic.STATIC] * value.dim()
    if dynamic and network.batched[at] and value.dim():
        kinds[0] = DimDynamic.DYNAMIC
    for axis in network.sizes if dynamic and at == 0 else ():
        kinds[axis] = DimDynamic.DYNAMIC
    return StatelessSymbolicContext(dynamic_sizes=kinds)


def _faked(target: Any, args: Any, kwargs: Any) -> Any:
    def value(leaf: Any) -> Any:
        return leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf

    try:
        return target(*mapped(args, value), **mapped(kwargs, value))
    except Exception as error:  # whatever its shape function raises: tracing fails on it too
        raise Unsuited(f"{target}: {type(error).__name__}") from error


def _spec(node: fx.Node) -> InputSpec:
    value = node.meta["val"]
    sizes = tuple(int(s) if isinstance(s, int) else str(s) for s in value.shape)
    batch = 0 if sizes and isinstance(sizes[0], str) else None
    return InputSpec(node.name, sizes, value.dtype, batch, None, value.device)
