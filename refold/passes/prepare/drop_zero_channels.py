"""Drop channels that are constant or that nothing reads: pruned, masked, quantised to zero.

    W_2 * f(W_1 * x + b_1) + b_2,  row c of W_1 zero  ->  f_c = f(b_1c) is a constant:
    column c of W_2 goes, with b_2 += W_2[:, c] f_c; then row c of W_1 and what f holds for it
    column c of W_2 zero  ->  row c of W_1 and what f holds for it go

A layer's channels reach others through operations that keep channels apart (elementwise functions,
scale-shifts, batch norms, depthwise convolutions, pools, resizes, sums and products of tensors).
What is so connected shrinks together: a channel goes when every reader either sees a constant
there or has a column of zeros. A dropped column may leave a row of zeros, so it repeats.

Exact when: the zeros are exact and the inputs finite (zero times infinity is NaN); a padded
reader only loses constants that are zero, for the border has no bias. Whatever else reads or makes
the tensor (an output, a norm over channels, groups, a concatenation) keeps it as it is. Channels go
by fours, and only where an eighth of them can: kernels work on blocks, and 63 channels are slower
than 64 (ONNX Runtime 1.31, 3x3: 507 instead of 421 us; 60 channels: 421 us, 48: 323 us).

Before::

    %a = conv2d(%x, @w1, @b1)
    %r = relu(%a)
    %y = conv2d(%r, @w2, @b2)

After::

    %a = conv2d(%x, @folded_w1, @folded_b1)
    %r = relu(%a)
    %y = conv2d(%r, @folded_w2, @folded_b2)

Where it occurs: channels pruned by the scale of their norm (Liu et al., Network Slimming, ICCV
2017), masks, channels that a trained quantiser gives no bits (Csefalvay and Imber, Self-Compressing
Neural Networks, 2023).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import fx

from refold.algebra.lazy import Lazy
from refold.errors import Declined
from refold.graph import constants, nodes, ops
from refold.graph.nodes import aten, is_call, is_tensor, same, shape
from refold.graph.ops import op_name
from refold.graph.records import convolutions, products, scale_shifts, windows
from refold.rewrite.context import Context
from refold.rewrite.edit import Edit, Editor
from refold.rewrite.result import PassResult, applied, declined

_BLOCK = 4  # channels that kernels compute together
_KEEPING = ops.ORDER | ops.MEAN | ops.RESIZE | ops.NEAREST  # each channel by itself
# The layers whose weights are cut; others only carry channels.
_LAYERS = (aten.linear.default, *(
    overload for op in (aten.conv1d, aten.conv2d, aten.conv3d)
    for overload in (op.default, op.padding)
))  # fmt: skip


@dataclass(frozen=True)
class _Layer:
    """A dense convolution or linear: ``weight`` is ``[O, I, *kernel]``, ``None`` bias is zero."""

    node: fx.Node
    x: fx.Node
    weight: Lazy
    bias: Lazy | None
    padded: bool
    depthwise: bool

    @property
    def axis(self) -> int:
        return len(shape(self.node)) - 1 if self.node.target is aten.linear.default else 1

    @property
    def offset(self) -> torch.Tensor:
        rows = self.weight.shape[0]
        zeros = torch.zeros(rows, dtype=torch.float64)
        return zeros if self.bias is None else self.bias.get().reshape(-1)


@dataclass(frozen=True)
class _Channels:
    """What is known of a tensor's channels: which are constant, and their values."""

    constant: torch.Tensor
    value: torch.Tensor

    def only(self, condition: torch.Tensor) -> _Channels:
        return _Channels(self.constant & condition, self.value)


@dataclass
class _Region:
    """Tensors whose channels correspond, with the channels' axis of each, and the layers around."""

    axes: dict[fx.Node, int] = field(default_factory=dict)
    makers: dict[fx.Node, _Layer] = field(default_factory=dict)
    readers: dict[fx.Node, _Layer] = field(default_factory=dict)


@dataclass(frozen=True)
class DropZeroChannels:
    """Drops constant and unread channels; see the module docstring."""

    name: str = "drop-zero-channels"
    exactness: str = "reassociates"

    def run(self, gm: fx.GraphModule, context: Context = Context()) -> PassResult:
        return _Dropper(gm, self.name).run()


def _layer(node: fx.Node) -> _Layer | None:
    """Reads a layer that maps all channels to all, or each to itself."""
    if node.op != "call_function" or node.target not in _LAYERS:
        return None
    if (linear := products.linear(node)) is not None:
        return _Layer(node, linear.x, linear.weight, linear.bias, padded=False, depthwise=False)
    conv = convolutions.conv(node)
    if conv is None:
        return None
    depthwise = conv.groups > 1 and conv.groups == conv.weight.shape[0]
    if conv.groups != 1 and not (depthwise and conv.weight.shape[1] == 1):
        return None
    padded = any(conv.padding) or nodes.arguments(node)["padding"] == "same"
    return _Layer(node, conv.x, conv.weight, conv.bias, padded, depthwise)


@dataclass
class _Dropper:
    gm: fx.GraphModule
    rule: str
    result: PassResult = field(default_factory=PassResult)
    touched: set[fx.Node] = field(default_factory=set)  # layers whose weights have changed

    def __post_init__(self) -> None:
        self.editor = Editor(self.gm, self.rule, self.result)

    def run(self) -> PassResult:
        self._round(list(self.gm.graph.nodes))
        while self.touched:  # a layer that lost rows may leave columns of others unread
            self.result.modified = True
            touched = sorted(self.touched)
            self.touched.clear()
            self._round(touched)
        return self.result

    def _round(self, starts: list[fx.Node]) -> None:
        seen: set[fx.Node] = set()
        refused: dict[fx.Node, Declined] = {}
        for start in starts:
            for tensor, axis in _starts(start):
                if tensor in seen:
                    continue
                region = _Region()
                with self.editor.candidate(start):
                    try:
                        _explore(region, tensor, axis, refused)
                        self._shrink(region)
                    except Declined as refusal:
                        if refusal.node is None:  # of the door: this one edit may not be
                            raise
                        self._decline(start, refusal.reason, refusal.node)
                        refused.update(dict.fromkeys(region.axes, refusal))
                seen.update(region.axes)

    def _decline(self, start: fx.Node, reason: str, at: fx.Node) -> None:
        self.result.declined.append(
            declined(
                self.rule, start,
                f"it has channels of zeros, which stay: {reason} (at {at.name})",
            )
        )  # fmt: skip

    def _shrink(self, region: _Region) -> None:
        first = next(iter(region.axes))
        count = int(shape(first)[region.axes[first]])
        known_ = _propagate(region, count)
        free = torch.ones(count, dtype=torch.bool)
        for reader in region.readers.values():
            weight = _in_own_dtype(reader)
            unread = ~(weight != 0).reshape(*weight.shape[:2], -1).any(-1).any(0)
            seen = known_[reader.x]
            if reader.padded:
                seen = seen.only(seen.value == 0)
            free &= unread | seen.constant
        live = int((~free).sum())
        kept = min(count, max(-(-live // _BLOCK), 1) * _BLOCK)
        if kept == count or not region.readers:
            return
        if nodes.dtype(first) == torch.float16:
            raise Declined("a bias that takes constants in could overflow float16", first)
        spare = free.nonzero().reshape(-1)[: kept - live]
        keep = ~free
        keep[spare] = True
        self._apply(region, known_, keep)

    def _apply(self, region: _Region, known_: dict[fx.Node, _Channels], keep: torch.Tensor) -> None:
        index = keep.nonzero().reshape(-1)
        with self.editor.edit() as edit:
            for node in region.readers:
                layer = _layer(node)
                assert layer is not None
                moved = _moved(layer, known_[layer.x].only(~keep))
                self._set(edit, layer, _columns(layer.weight, index), moved)
            for node in region.makers:
                layer = _layer(node)
                assert layer is not None
                bias = None if layer.bias is None else _rows(layer.bias, index)
                self._set(edit, layer, _rows(layer.weight, index), bias)
            for node in sorted(region.axes):
                if node not in region.makers:
                    self._narrow(edit, node, region, index, keep.numel())
                value = _of_size(node.meta["val"], region.axes[node], index.numel())
                edit.set(node, value=value)
                edit.stamp(node, [node], value=None)
            for node in region.readers:  # their values stay, but for what region they make
                edit.stamp(node, [node], value=None if node in region.axes else node)
        gone = int((~keep).sum())
        layers = [*region.makers, *region.readers]
        self.touched.update(layers, (n for n in region.axes if _layer(n) is not None))
        detail = f"{gone} of {keep.numel()} channels of {', '.join(n.name for n in region.makers)}"
        self.result.applied.append(applied(self.rule, [], layers, detail))

    def _set(self, edit: Edit, layer: _Layer, weight: Lazy, bias: Lazy | None) -> None:
        node = layer.node
        like = node.meta["val"]
        with edit.before(node):
            values = {1: edit.constant(f"{node.name}.weight", weight, like)}
            if bias is not None:
                values[2] = edit.constant(f"{node.name}.bias", bias, like)
        edit.set_arguments(node, values)

    def _narrow(
        self, edit: Edit, node: fx.Node, region: _Region, index: torch.Tensor, count: int
    ) -> None:
        """Gives an operation inside a region the constants of the channels that stay."""
        axis = region.axes[node]
        layer = _layer(node)
        if layer is not None:
            bias = None if layer.bias is None else _rows(layer.bias, index)
            self._set(edit, layer, _rows(layer.weight, index), bias)
            edit.set_arguments(node, {6: int(index.numel())})
            return
        if is_call(node, aten.view, aten.reshape):
            sizes = list(node.args[1])  # type: ignore[arg-type]
            sizes[axis] = -1 if sizes[axis] == -1 else int(index.numel())
            edit.set(node, args=(node.args[0], sizes))
            return
        rank = len(shape(node))
        norm = is_call(node, aten.batch_norm.default)
        for operand in node.all_input_nodes:
            value = constants.exact(operand) or constants.compact(operand)
            if value is None:
                continue
            at = 0 if norm else axis - (rank - len(value.shape))
            if at < 0 or shape(operand)[at - len(value.shape)] != count:
                continue
            if value.shape[at] == count:  # else one value for all, expanded
                sizes_ = (*value.shape[:at], int(index.numel()), *value.shape[at + 1 :])
                value = value.map(sizes_, partial(torch.index_select, dim=at, index=index))
            with edit.before(node):
                name = f"{node.name}.{operand.name}"
                new = edit.constant(name, value, operand.meta["val"])
            edit.set_operand(node, operand, new)


def _of_size(value: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """A fake tensor of another size; running the operator on fakes takes a hundred times longer."""
    sizes = list(value.shape)
    sizes[axis] = size
    return value.new_empty(sizes)


def _rows(data: Lazy, index: torch.Tensor) -> Lazy:
    return data.map((int(index.numel()), *data.shape[1:]), lambda t: t.index_select(0, index))


def _columns(weight: Lazy, index: torch.Tensor) -> Lazy:
    sizes = (weight.shape[0], int(index.numel()), *weight.shape[2:])
    return weight.map(sizes, lambda t: t.index_select(1, index))


def _moved(layer: _Layer, seen: _Channels) -> Lazy | None:
    """The bias of a reader that takes in what constant channels add to it."""
    value = torch.where(seen.constant, seen.value, 0.0)
    if not bool(value.any()):
        return layer.bias
    weight = layer.weight

    def total() -> torch.Tensor:
        return layer.offset + weight.get().reshape(*weight.shape[:2], -1).sum(-1) @ value

    return Lazy((weight.shape[0],), total)


def _starts(node: fx.Node) -> Iterator[tuple[fx.Node, int]]:
    """Tensors of which a node says that enough channels are zero or unread, with their axes."""
    layer = _layer(node)
    if layer is not None:
        weight = _in_own_dtype(layer)
        flat = weight.reshape(*weight.shape[:2], -1).any(-1)
        if _enough(~flat.any(1)):
            yield node, layer.axis
        if not layer.depthwise and _enough(~flat.any(0)):
            axis = len(shape(layer.x)) - 1 if layer.node.target is aten.linear.default else 1
            yield layer.x, axis
    elif (affine := scale_shifts.affine(node)) is not None:
        varying = [a for a, s in enumerate(affine.scale.shape) if s != 1]
        if len(varying) == 1 and _enough(affine.scale.get().reshape(-1) == 0):
            yield node, varying[0]


def _enough(free: torch.Tensor) -> bool:
    """Whether so many channels are free that kernels would notice: a block, and an eighth."""
    count = free.numel()
    # A recipe holds for weights of which the same is true, not of which as many are zero.
    return count > 1 and bool(free.sum() >= max((count - 1) % _BLOCK + 1, count / 8))


def _in_own_dtype(layer: _Layer) -> torch.Tensor:
    """A layer's weight: as it is stored, where no pass has changed it."""
    node = layer.node.args[1]
    assert isinstance(node, fx.Node)
    pending = not constants.is_get_attr(node) or "refold_lazy" in node.meta
    return layer.weight.get() if pending else constants.tensor(node)


def _explore(region: _Region, start: fx.Node, axis: int, refused: dict[fx.Node, Declined]) -> None:
    """Collects what is connected with a tensor's channels; ``refused`` holds what cannot change."""
    stack = [(start, axis)]
    while stack:
        node, axis = stack.pop()
        if node in region.axes:
            if region.axes[node] != axis:
                raise Declined("its channels meet another axis", node)
            continue
        if not is_tensor(node) or not isinstance(shape(node)[axis], int) or nodes.pinned(node):
            raise Declined("it is excluded, or of dynamic size", node)
        if node in refused:
            raise refused[node]
        region.axes[node] = axis
        layer = _layer(node)
        if layer is not None and not layer.depthwise and layer.axis == axis:
            region.makers[node] = layer
        else:
            stack += _above(node, axis)
        for user in node.users:
            reader = _layer(user)
            if reader is not None and not reader.depthwise:
                reads = len(shape(node)) - 1 if user.target is aten.linear.default else 1
                if reader.x is not node or reads != axis or nodes.pinned(user):
                    raise Declined("it does not read the channels as channels", user)
                region.readers[user] = reader
            else:
                stack.append((user, _below(user, node, axis)))


def _above(node: fx.Node, axis: int) -> list[tuple[fx.Node, int]]:
    """The tensors whose channels a node keeps, with their axes.

    Raises:
        Declined: it mixes them, or makes them in a way that is not known.
    """
    sources = [(n, _input_axis(node, n, axis)) for n in _operands(node)]
    rank = len(shape(node))
    out = []
    for source, at in sources:
        if at < 0 or (same(shape(source)[at], 1) and not same(shape(node)[axis], 1)):
            continue  # it broadcasts along the channels
        if not same(shape(source)[at], shape(node)[axis]):
            raise Declined(f"{op_name(node)} changes the number of channels", node)
        out.append((source, at))
    if not out or rank < 2:
        raise Declined(f"nothing is known of the channels that {op_name(node)} makes", node)
    return out


def _operands(node: fx.Node) -> list[fx.Node]:
    """The data operands of an operation that keeps channels apart."""
    if node.op != "call_function":
        raise Declined("it is an input", node)
    name = op_name(node)
    layer = _layer(node)
    if layer is not None:
        if not layer.depthwise:
            raise Declined("its channels are made along another axis", node)
        return [layer.x]
    affine = scale_shifts.affine(node)
    if affine is not None and affine.reader is node and not _is_tuple(node):
        return [affine.x]
    plain = _is_function(node) or ops.has(node, _KEEPING) or name == "flatten"
    if plain or is_call(node, aten.mean.dim, aten.view, aten.reshape) or _pools(node):
        tensors = [n for n in node.all_input_nodes if is_tensor(n)]
        if len(tensors) == 1 and node.args and tensors[0] is node.args[0]:
            return tensors
    binary = is_call(node, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)
    if binary and all(is_tensor(a) and constants.compact(a) is None for a in node.args):
        return list(node.args)  # type: ignore[arg-type]
    raise Declined(f"nothing is known of how {name} keeps channels apart", node)


def _is_function(node: fx.Node) -> bool:
    """True for a continuous function of each element alone."""
    return ops.has(node, ops.ELEMENTWISE) and not ops.has(node, ops.MIXES | ops.STEP)


def _is_tuple(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _pools(node: fx.Node) -> bool:
    return windows.avg_pool(node) is not None or windows.pad(node) is not None


def _input_axis(node: fx.Node, source: fx.Node, axis: int) -> int:
    """The axis of an operand's channels; negative where it has none (it broadcasts)."""
    before, after = shape(source), shape(node)
    name = op_name(node)
    if is_call(node, aten.mean.dim):
        args = nodes.arguments(node)
        reduced = {int(d) % len(before) for d in args["dim"] or ()}
        kept = [a for a in range(len(before)) if args["keepdim"] or a not in reduced]
        if not reduced or args["dtype"] is not None or kept[axis] in reduced:
            raise Declined("it averages over the channels", node)
        return kept[axis]
    if name in ("flatten", "view", "reshape"):
        if axis != len(after) - 1 or not same(before[: axis + 1], after):
            raise Declined(f"{name} moves the channels", node)
        return axis
    if ops.has(node, _KEEPING) or _pools(node):
        pooled = next((int(c) for c in name if c.isdigit()), 0)
        if (pad := windows.pad(node)) is not None:
            pooled = len(pad.low)
        if axis >= len(after) - pooled:
            raise Declined(f"{name} acts along the channels", node)
    layer = _layer(node)
    if layer is not None and axis != 1:
        raise Declined("it acts along another axis than the channels", node)
    return axis - (len(after) - len(before))


def _below(user: fx.Node, node: fx.Node, axis: int) -> int:
    """The axis of a reader's channels, if it keeps them apart."""
    if user.op != "call_function" or not is_tensor(user):
        raise Declined(
            f"{op_name(user) if user.op == 'call_function' else 'an output'} reads it", user
        )
    rank, mine = len(shape(user)), len(shape(node))
    candidates = [axis + rank - mine] if rank >= mine else [axis]
    if is_call(user, aten.mean.dim) and rank < mine:
        candidates = list(range(rank))
    for at in candidates:
        if 0 <= at < rank and node in _operands(user) and _input_axis(user, node, at) == axis:
            return at
    raise Declined(f"nothing is known of how {op_name(user)} keeps channels apart", user)


def _propagate(region: _Region, count: int) -> dict[fx.Node, _Channels]:
    """Which channels of each tensor of a region are constant."""
    found: dict[fx.Node, _Channels] = {}
    for node in sorted(region.axes):
        if node in region.makers:
            channels = _made(region.makers[node])
        else:
            channels = _kept(node, region, found, count)
        found[node] = channels.only(channels.value.isfinite())
    return found


def _made(layer: _Layer) -> _Channels:
    weight = layer.weight.get()
    return _Channels((weight.reshape(weight.shape[0], -1) == 0).all(1), layer.offset)


def _kept(node: fx.Node, region: _Region, found: dict[fx.Node, _Channels], count: int) -> _Channels:
    axis = region.axes[node]
    layer = _layer(node)
    if layer is not None:
        return _depthwise(layer, found[layer.x])
    operands = _operands(node)
    unknown = _Channels(torch.zeros(count, dtype=torch.bool), torch.zeros(count).double())
    inner = [found.get(n, unknown) for n in operands]
    if (affine := scale_shifts.affine(node)) is not None:
        sizes = (*enumerate(affine.scale.shape), *enumerate(affine.shift.shape))
        if any(size != 1 for a, size in sizes if a != axis):
            return unknown  # another value at every position
        scale = affine.scale.get().reshape(-1).expand(count)
        shift = affine.shift.get().reshape(-1).expand(count)
        constant = inner[0].constant | (scale == 0)
        value = torch.where(inner[0].constant, inner[0].value, 0.0)
        return _Channels(constant, scale * value + shift)
    if is_call(node, aten.mul.Tensor):
        left, right = inner
        zero = (left.constant & (left.value == 0)) | (right.constant & (right.value == 0))
        both = left.constant & right.constant
        return _Channels(zero | both, torch.where(zero, 0.0, left.value * right.value))
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        alpha = nodes.arguments(node)["alpha"] * (1 if is_call(node, aten.add) else -1)
        left, right = inner
        return _Channels(left.constant & right.constant, left.value + alpha * right.value)
    if (pool := windows.avg_pool(node)) is not None:
        return inner[0] if pool.keeps_constants else inner[0].only(inner[0].value == 0)
    if (pad := windows.pad(node)) is not None:
        return inner[0] if pad.mode != "constant" else inner[0].only(inner[0].value == pad.value)
    if _is_function(node):
        value = node.target(inner[0].value, *node.args[1:], **node.kwargs)  # type: ignore[operator]
        return _Channels(inner[0].constant, value)
    return inner[0]


def _depthwise(layer: _Layer, inner: _Channels) -> _Channels:
    weight = layer.weight.get().reshape(layer.weight.shape[0], -1)
    silent = (weight == 0).all(1)
    passing = inner.constant & ((inner.value == 0) | (not layer.padded))
    value = torch.where(passing, inner.value, 0.0)
    return _Channels(silent | passing, weight.sum(1) * value + layer.offset)
