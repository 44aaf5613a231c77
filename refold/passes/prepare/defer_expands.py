"""Expand late: what acts alike on every copy of a constant runs on one copy.

    f(expand(c)) = expand(f(c))    for f that treats the indices of the expanded axes alone

Learned queries, class tokens and latents are one constant that is repeated along the batch before
it is normalised and projected. Every sample computes the same. On one copy the layers depend on
constants alone, so they fold away; what is left is the expansion, which costs nothing. The size of
the batch may be symbolic: it is what hides the constant.

Exact when: every operand is a constant, or is expanded from one; each function is elementwise, or
mixes other axes only: a projection the last one, a norm the normalised ones, a softmax or a sum its
own, an attention all but the batch and the heads, a convolution all but the batch. Layouts move the
axes along. One number in a tensor of symbolic sizes (``ones(batch, 8)``) is an expansion of it, so
masks and position encodings of the batch's size alone are constants, too. What reads the result
sees zero strides from now on, so a result that the caller gets, or that a call reads whose value
depends on strides, stays.

Before::

    %e = expand(@query, [%s0, -1, -1])
    %n = layer_norm(%e, [16], @gamma, @beta)
    %q = linear(%n, @weight, @bias)
    %a = scaled_dot_product_attention(%q, %k, %v)

After::

    %n = layer_norm(@query, [16], @gamma, @beta)
    %q = linear(%n, @weight, @bias)
    %e = expand(%q, [%s0, 5, 16])
    %a = scaled_dot_product_attention(%e, %k, %v)

Where it occurs: object queries (Carion et al., DETR, ECCV 2020, section 3.2), latents (Jaegle et
al., Perceiver, ICML 2021), attention pooling (Lee et al., Set Transformer, ICML 2019, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from refold.errors import Declined
from refold.graph import aliasing, constants, ops, provenance
from refold.graph.nodes import (
    arguments,
    aten,
    call,
    dtype,
    is_call,
    is_tensor,
    pinned,
    same,
    shape,
)
from refold.graph.ops import op_name
from refold.graph.records import fills
from refold.rewrite.context import Context
from refold.rewrite.edit import Editor
from refold.rewrite.result import PassResult, applied

_ANYWHERE = ops.ELEMENTWISE | ops.CAST | ops.PERMUTE | ops.UNIT_AXES | ops.ALIAS | ops.COPY
_ALONG_DIM = frozenset({  # which act along their ``dim`` or ``dims``, and no other
    "softmax", "_softmax", "log_softmax", "cumsum", "cumprod", "sum", "mean", "prod", "amax",
    "amin", "any", "all", "argmax", "argmin", "var", "std", "logsumexp", "logcumsumexp", "flip",
    "roll", "index_select", "repeat_interleave",
})  # fmt: skip
_OF_SAMPLES = frozenset({  # layers that treat each sample by itself
    "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "group_norm",
})  # fmt: skip

Extent = fx.Node | int


@dataclass(frozen=True)
class DeferExpands:
    """Moves expansions of constants behind what reads them; see the module docstring."""

    name: str = "defer-expands"
    exactness: str = "reassociates"

    def run(self, gm: fx.GraphModule, context: Context = Context()) -> PassResult:
        return _Deferral(gm, self.name).run()


@dataclass(frozen=True)
class _Spread:
    """A value that is the same at every index of some axes: ``one`` copy, of size 1 there.

    ``computed`` tells a layer's result from what layouts alone make of the constant.
    """

    one: fx.Node
    extents: Mapping[int, Extent]
    computed: bool


@dataclass
class _Deferral:
    gm: fx.GraphModule
    rule: str
    found: dict[fx.Node, _Spread] = field(default_factory=dict)
    made: list[fx.Node] = field(default_factory=list)
    result: PassResult = field(default_factory=PassResult)

    def __post_init__(self) -> None:
        self.editor = Editor(self.gm, self.rule, self.result)
        self._constant = constants.constant_nodes(self.gm.graph)

    def run(self) -> PassResult:
        written = self.editor.written
        for node in list(self.gm.graph.nodes):
            if not _is_plain(node) or (written and written & aliasing.roots(node)):
                continue
            with self.editor.candidate(node):
                spread = self._fill(node) or self._expansion(node) or self._deferred(node)
                if spread is not None:
                    self.found[node] = spread
        replaced = 0
        for node in filter(self._is_last, self.found):
            with self.editor.candidate(node):
                self._replace(node)
                replaced += 1
        with self.editor.edit() as edit:
            edit.remove(self.made)
        if replaced:
            self._record(replaced)
        self.result.modified = bool(replaced)
        return self.result

    # --- what is the same everywhere --------------------------------------------------------------

    def _fill(self, node: fx.Node) -> _Spread | None:
        """One number everywhere, in a tensor whose sizes are symbolic: ``ones(batch, 8)``."""
        value, number = node.meta["val"], fills.filled(node)
        axes = [a for a, size in enumerate(value.shape) if not isinstance(size, int)]
        if number is None or not axes:
            return None
        extents = {a: self._extent(node, a) for a in axes}
        sizes = [1 if a in axes else size for a, size in enumerate(value.shape)]
        kwargs = {"dtype": value.dtype, "device": value.device}
        one = self._call(node, aten.full.default, (sizes, number), kwargs)
        return _Spread(one, extents, computed=False)

    def _expansion(self, node: fx.Node) -> _Spread | None:
        """A constant of fixed size that is expanded, or repeated along axes of size 1.

        What is spread already may be spread along other axes, too.
        """
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return None
        spread = self.found.get(source)
        if spread is None and source not in self._constant:
            return None
        copy = source if spread is None else spread.one
        after = shape(node)
        added = len(after) - len(shape(source))
        before, one = (1,) * added + shape(source), (1,) * added + shape(copy)
        axes = [a for a, size in enumerate(after) if not same(size, before[a])]
        if not all(isinstance(s, int) for s in one) or any(before[a] != 1 for a in axes):
            return None
        if is_call(node, aten.expand.default, aten.repeat.default):
            sizes: Any = node.args[1]
        elif is_call(node, aten.expand_as.default):
            sizes = [self._extent(node, a) if a in axes else s for a, s in enumerate(after)]
        else:
            return None
        if not axes or not all(isinstance(sizes[a], (fx.Node, int)) for a in axes):
            return None
        if added:
            copy = self._call(node, aten.reshape.default, (copy, list(one)))
        extents = {a: sizes[a] for a in axes}
        if spread is None:
            return _Spread(copy, extents, computed=False)
        extents.update({a + added: extent for a, extent in spread.extents.items()})
        return _Spread(copy, extents, computed=spread.computed)

    def _extent(self, node: fx.Node, axis: int) -> Extent:
        """A size of what a call makes, read off an input of the network where one has it.

        A tensor that was asked for its shape alone need not be computed.
        """
        size = shape(node)[axis]
        if isinstance(size, int):
            return size
        args = arguments(node)
        if "size" in args:
            given: Extent = args["size"][axis]
            return given
        for source in node.graph.find_nodes(op="placeholder"):
            found = (
                [a for a, s in enumerate(shape(source)) if same(s, size)]
                if is_tensor(source)
                else []
            )
            if found:
                return self._call(node, aten.sym_size.int, (source, found[0]))
        like = args["other" if is_call(node, aten.expand_as.default) else "self"]
        return self._call(node, aten.sym_size.int, (like, axis))

    def _deferred(self, node: fx.Node) -> _Spread | None:
        """A call of expanded constants, run on one copy."""
        read = [a for a in node.all_input_nodes if a in self.found]
        if not read:
            return None
        one = self._on_one_copy(node)
        if one is None:
            return None
        value, narrow = node.meta["val"], one.meta["val"]
        fits = narrow.ndim == value.ndim and narrow.dtype == value.dtype
        axes = [a for a in range(value.ndim) if fits and not same(value.shape[a], narrow.shape[a])]
        if not axes or any(not same(narrow.shape[a], 1) for a in axes):
            return None
        extents: dict[int, Extent] = {}
        for spread, source in ((self.found[a], a) for a in read):
            for axis, extent in spread.extents.items():
                size = shape(source)[axis]
                extents.update({a: extent for a in axes if same(value.shape[a], size)})
        if len(extents) < len(axes):
            return None
        computed = not ops.is_layout(node)
        return _Spread(one, extents, computed or any(self.found[a].computed for a in read))

    def _on_one_copy(self, node: fx.Node) -> fx.Node | None:
        if ops.has(node, ops.VIEW) and not ops.has(node, ops.UNIT_AXES):
            sizes = self._reshaped(node)
            if sizes is None:
                return None
            source = self.found[node.all_input_nodes[0]].one
            return self._call(node, aten.reshape.default, (source, sizes))
        operands = [a for a in node.all_input_nodes if a not in self.found]
        if not all(a in self._constant for a in operands) or not self._acts_apart(node):
            return None
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: self.found[n].one if n in self.found else n
        )
        copies = {n: self.found[n].one.meta["val"] for n in node.all_input_nodes if n in self.found}
        try:
            aliasing.run_fake(node, copies)
        except RuntimeError:  # an operator that does not broadcast: another operand is not expanded
            return None
        return self._call(node, node.target, args, kwargs)

    def _acts_apart(self, node: fx.Node) -> bool:
        """True if a call treats each index of the expanded axes of its operands by itself."""
        name = op_name(node)
        if ops.has(node, _ANYWHERE) or name.endswith("_like"):
            return True
        args = arguments(node)
        if name in ("cat", "stack"):
            return True  # copies of parts that are spread otherwise do not fit together
        if name == "einsum":
            return self._sums_products(args)
        spread = {k: axes for k, v in args.items() if (axes := self._axes(v))}
        if name in ("matmul", "mm", "bmm"):
            # Where one operand alone expands the axis that is summed over, one copy does not fit.
            left = node.all_input_nodes[0]
            return len(shape(left)) - 1 not in self._axes(left)
        if name == "scaled_dot_product_attention":
            operands = {"query", "key", "value"}
            return set(spread) == operands and all(axes == {0} for axes in spread.values())
        if name == "embedding":
            return set(spread) == {"indices"}
        first = next(iter(args))
        if set(spread) != {first}:
            return False
        axes, rank = spread[first], len(shape(args[first]))
        if name == "linear":
            return rank - 1 not in axes
        if name in ("layer_norm", "rms_norm"):
            return max(axes) < rank - len(args["normalized_shape"])
        if name in _ALONG_DIM:
            along = args.get("dims", args.get("dim"))
            dims = along if isinstance(along, (list, tuple)) else [along]
            return bool(dims) and all(isinstance(d, int) and d % rank not in axes for d in dims)
        if ops.has(node, ops.PART):
            full = name == "slice" and args["step"] == 1 and same(shape(node), shape(args[first]))
            return full or args["dim"] % rank not in axes
        if name == "index":
            return self._picks_apart(args["indices"], axes)
        if name in ("pad", "constant_pad_nd"):
            return max(axes) < rank - len(args["pad"]) // 2
        if ops.has(node, ops.RESIZE):
            return max(axes) < 2
        if name in _OF_SAMPLES:
            # without a batch axis, axis 0 would be the channels
            return axes == {0} and (name == "group_norm" or rank == len(shape(args["weight"])))
        return name == "batch_norm" and axes == {0} and not args["training"]

    def _picks_apart(self, indices: Sequence[fx.Node | None], axes: set[int]) -> bool:
        """Indices of other axes; a mask would span several of them."""
        if any(i is not None and dtype(i) in (torch.bool, torch.uint8) for i in indices):
            return False
        return not any(i is not None for a, i in enumerate(indices) if a in axes)

    def _sums_products(self, args: Mapping[str, Any]) -> bool:
        """An einsum that keeps the axes: each operand that has one is spread along it."""
        inputs, arrow, result = args["equation"].replace(" ", "").partition("->")
        if not arrow or "." in inputs:
            return False
        held: dict[str, set[bool]] = {}
        for term, operand in zip(inputs.split(","), args["tensors"], strict=True):
            axes = self._axes(operand)
            for axis, letter in enumerate(term):
                held.setdefault(letter, set()).add(axis in axes)
        return all(had == {False} or (had == {True} and a in result) for a, had in held.items())

    def _axes(self, operand: object) -> set[int]:
        found = self.found.get(operand) if isinstance(operand, fx.Node) else None
        return set() if found is None else set(found.extents)

    def _reshaped(self, node: fx.Node) -> list[int] | None:
        """The sizes that a reshape gives one copy, where every expanded axis stays an axis."""
        source = node.all_input_nodes[0]
        before, after = shape(source), list(shape(node))
        for axis in self.found[source].extents:
            match = [
                a
                for a, size in enumerate(after)
                if same(size, before[axis]) and same(_product(after[:a]), _product(before[:axis]))
            ]
            if len(match) != 1:
                return None
            # The product of what surrounds the next axis is compared without this one.
            after[match[0]] = 1
            before = (*before[:axis], 1, *before[axis + 1 :])
        fixed = [size for size in after if isinstance(size, int)]
        return fixed if len(fixed) == len(after) else None

    def _call(
        self, node: fx.Node, target: Any, args: Any, kwargs: Mapping[str, Any] | None = None
    ) -> fx.Node:
        """A call on one copy, which has no value of the original's."""
        with node.graph.inserting_before(node):
            made = call(
                node.graph, target, args, dict(kwargs or {}), rule=self.rule, sources=[node]
            )
        provenance.derive(made, [node], self.rule, value=None)
        self.made.append(made)
        return made

    # --- the rewrite ------------------------------------------------------------------------------

    def _is_last(self, node: fx.Node) -> bool:
        """True for a layer's result, or a layout of it, that something else reads."""
        return self.found[node].computed and any(u not in self.found for u in node.users)

    def _replace(self, node: fx.Node) -> None:
        """Lets those that read a result read an expansion of its one copy.

        Raises:
            Declined: the caller would get a view of the copy, or a reader would see its strides.
        """
        if aliasing.reached_outputs(node):
            raise Declined("the caller gets its result, in memory of its own")
        spread = self.found[node]
        sizes = [spread.extents.get(axis, size) for axis, size in enumerate(shape(spread.one))]
        with self.editor.edit() as edit:
            with edit.before(node):
                new = edit.call(aten.expand.default, (spread.one, sizes), sources=[node])
            edit.replace(node, new)
        self.made.append(new)

    def _record(self, expansions: int) -> None:
        gone: dict[fx.Node, None] = {}
        for node in reversed(self.found):
            if all(user in gone for user in node.users):
                gone[node] = None
        kept = [n for n in self.made if not n._erased]
        detail = f"{expansions} expanded {'result is' if expansions == 1 else 'results are'} one"
        self.result.applied.append(applied(self.rule, reversed(gone), kept, detail))
        with self.editor.edit() as edit:
            edit.remove(gone)


def _is_plain(node: fx.Node) -> bool:
    """Pure calls of an operator that make one tensor, and that passes may rewrite."""
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and is_tensor(node)
        and not pinned(node)
        and constants.impurity(node) is None
    )


def _product(sizes: Any) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total
