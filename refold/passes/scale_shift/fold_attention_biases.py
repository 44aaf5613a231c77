"""Take the biases of keys and values out of an attention.

    softmax(q @ (k + 1 b^T)^T) = softmax(q @ k^T + (q @ b) 1^T) = softmax(q @ k^T)
    softmax(s) @ (v + 1 b^T)   = softmax(s) @ v + 1 b^T
    W (y + b) + c              = W y + (W b + c)

A key's bias adds the same number to every score of a row, which a softmax does not see: the
parameter changes nothing, and goes. Rows of weights sum to one, so a value's bias comes out as it
went in, and the layer that reads the attention takes it into its own bias.

Exact when: between projection and product stand layouts alone (no rotary embedding, no norm, no
cache), and nothing else reads what changes. For values, the rows must sum to one: written out they
do, or are NaN in any case; the fused operator gives zeros for a row whose keys are all hidden, so
its mask is absent, causal, or a constant that leaves every row a key. A bias goes as a whole or
not at all: one that also serves queries stays.

Before::

    %k = linear(%x, @wk, @bk)
    %v = linear(%x, @wv, @bv)
    %a = scaled_dot_product_attention(%q, %k, %v)
    %y = linear(%a, @wo, @bo)

After::

    %k = linear(%x, @wk)
    %v = linear(%x, @wv)
    %a = scaled_dot_product_attention(%q, %k, %v)
    %y = linear(%a, @wo, @folded_bias)

Source: Namazifar et al., Role of Bias Terms in Dot-Product Attention (ICASSP 2023), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from refold.algebra.lazy import Lazy
from refold.errors import Declined
from refold.graph import layout, nodes
from refold.graph.nodes import aten, is_tensor, shape
from refold.graph.ops import kind
from refold.graph.records import convolutions, products
from refold.graph.records.attention import Attention, KeyedOperand, attention
from refold.passes.scale_shift.push.carry import reads
from refold.passes.scale_shift.push.weights import constant_name, overflows
from refold.rewrite.context import Context
from refold.rewrite.edit import Edit, Editor
from refold.rewrite.result import Applied, PassResult, applied, declined

# Layers that have a bias to take out.
_PROJECTIONS = (
    aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default
)  # fmt: skip


@dataclass(frozen=True)
class FoldAttentionBiases:
    """Takes key and value biases out of attentions; see the module docstring."""

    name: str = "fold-attention-biases"
    exactness: str = "reassociates"

    def run(self, gm: fx.GraphModule, context: Context = Context()) -> PassResult:
        return _BiasFolder(gm, self.name).run()


@dataclass(frozen=True)
class _Projection:
    """A layer with a bias, and the layouts from it to an operand, the layer's own reader first."""

    layer: fx.Node
    bias_node: fx.Node
    bias: torch.Tensor
    path: tuple[tuple[fx.Node, fx.Node], ...]

    @property
    def spread(self) -> torch.Tensor:
        """The bias as it broadcasts against the layer's result."""
        rank, axis = len(shape(self.layer)), _channels(self.layer)
        return self.bias.reshape([-1 if a == axis else 1 for a in range(rank)])


@dataclass
class _Claim:
    """Elements of a layer's bias that need not be there, and what the readers get instead."""

    projection: _Projection
    elements: torch.Tensor
    role: str
    passed: tuple[fx.Node, ...]
    reader: products.Linear | None = None
    added: torch.Tensor | None = None


@dataclass
class _BiasFolder:
    gm: fx.GraphModule
    rule: str
    result: PassResult = field(default_factory=PassResult)

    def __post_init__(self) -> None:
        self.editor = Editor(self.gm, self.rule, self.result)

    def run(self) -> PassResult:
        while any(_projects(reader) for reader in self._round()):
            pass  # what a reader took in may leave the attention that it projects for
        self.result.modified = bool(self.result.applied)
        return self.result

    def _round(self) -> set[fx.Node]:
        """Settles every layer once; the readers that took something in."""
        self.result.declined.clear()
        claims: dict[fx.Node, list[_Claim]] = {}
        for node in list(self.gm.graph.nodes):
            found = attention(node)
            if found is None or nodes.pinned(node):
                continue
            with self.editor.candidate(node):
                for claim in self._claims(found):
                    claims.setdefault(claim.projection.layer, []).append(claim)
        took: set[fx.Node] = set()
        for layer, held in claims.items():
            with self.editor.candidate(layer):
                if layer not in took and self._settle(layer, held):
                    took.update(c.reader.node for c in held if c.reader is not None)
        return took

    def _claims(self, found: Attention) -> list[_Claim]:
        """What an attention lets go; why it lets nothing go is recorded."""
        if self._is_fused(found):
            self._decline_fused(found)
            return []
        claims = []
        for make in (self._keys, self._values):
            try:
                claim = make(found)
            except Declined as refusal:
                self.result.declined.append(declined(self.rule, found.node, str(refusal)))
                continue
            if claim is not None:
                claims.append(claim)
        return claims

    def _is_fused(self, found: Attention) -> bool:
        """Whether one layer makes queries, keys and values, as most do."""
        if found.queries is None or isinstance(found.keys, str):
            return False
        layer = _origin(found.queries)
        return all(_origin(o.node) is layer for o in (found.keys, found.values))

    def _decline_fused(self, found: Attention) -> None:
        try:
            claim = self._keys(found)
        except Declined as refusal:
            self.result.declined.append(declined(self.rule, found.node, str(refusal)))
            return
        if claim is not None:
            reason = "its bias serves more than keys and values, so it stays as a whole"
            self.result.declined.append(
                declined(self.rule, claim.projection.layer, reason + _dead(claim))
            )

    def _keys(self, found: Attention) -> _Claim | None:
        if isinstance(found.keys, str):
            raise Declined(f"the keys' bias stays: {found.keys}")
        projection = _projection(found.keys, "keys")
        if projection is None:
            return None
        scores = found.scores[:-1]
        if any(nodes.pinned(n) for n in scores):
            raise Declined("the keys' bias stays: the scores are excluded")
        elements = self._elements(projection, found.keys, next(iter(scores), found.node), "keys")
        return _Claim(projection, elements, "keys", scores)

    def _values(self, found: Attention) -> _Claim | None:
        projection = _projection(found.values, "values")
        if projection is None:
            return None
        if found.hidden is not None:
            raise Declined(f"the values' bias stays: {found.hidden}")
        shift = found.carried(self._arriving(projection))
        elements = self._elements(projection, found.values, found.node, "values")
        reader, vector, passed = self._reader(found.node, shift)
        added = reader.weight.get() @ vector
        if nodes.dtype(reader.node) == torch.float16 and overflows(Lazy.of(added)):
            raise Declined("the values' bias stays: the reader's bias would overflow float16")
        return _Claim(projection, elements, "values", passed, reader, added)

    def _arriving(self, projection: _Projection) -> torch.Tensor:
        """The bias where the product reads it."""
        shift = projection.spread
        for node, source in projection.path:
            shift = layout.push(node, source, _pair(shift), self.gm.graph)[1]
        return shift

    def _elements(
        self, projection: _Projection, operand: KeyedOperand, product: fx.Node, role: str
    ) -> torch.Tensor:
        """Which elements of the bias the operand reads; nothing else may read them."""
        if len(operand.node.users) > 1 or reads(product, operand.node) > 1:
            raise Declined(f"{operand.node.name} is read more than once")
        masks = []
        for symbols in layout.assignments(self.gm.graph):
            places = layout.along(projection.layer, _channels(projection.layer), symbols)
            own = places.pop(operand.node)
            if not torch.equal(own, own.narrow(operand.axis, 0, 1).expand_as(own)):
                raise Declined(f"the {role}' bias stays: it differs from key to key")
            mask = torch.zeros(projection.bias.shape, dtype=torch.bool)
            mask[own.long().reshape(-1)] = True
            for node, other in places.items():
                reader = next((u for u in node.users if not layout.is_layout(u)), None)
                if reader is not None and bool(mask[other.long().reshape(-1)].any()):
                    raise Declined(f"{reader.name} reads what the bias is added to")
            masks.append(mask)
        if not torch.equal(masks[0], masks[-1]):
            raise Declined(f"the {role}' bias stays: what is read of it depends on a dynamic size")
        return masks[0]

    def _reader(
        self, node: fx.Node, shift: torch.Tensor
    ) -> tuple[products.Linear, torch.Tensor, tuple[fx.Node, ...]]:
        """The layer that reads an attention, and the shift as it meets its weight."""
        passed = [node]
        while True:
            users = list(passed[-1].users)
            if len(users) != 1 or not is_tensor(users[0]):
                raise Declined(f"the values' bias stays: not one layer alone reads {passed[-1]}")
            reader = products.linear(users[0])
            if reader is not None and reader.x is passed[-1]:
                break
            if not layout.is_layout(users[0]) or nodes.pinned(users[0]):
                raise Declined(f"the values' bias stays: {users[0].name} is not linear")
            shift = layout.push(users[0], passed[-1], _pair(shift), self.gm.graph)[1]
            passed.append(users[0])
        if reader.node.target is not aten.linear.default or nodes.pinned(reader.node):
            raise Declined(f"the values' bias stays: {reader.node.name} is not to be changed")
        if any(size != 1 for size in shift.shape[:-1]):
            raise Declined("the values' bias stays: it varies along another axis than the features")
        return reader, shift.reshape(-1).expand(reader.weight.shape[1]), tuple(passed)

    def _settle(self, layer: fx.Node, claims: list[_Claim]) -> bool:
        """Removes a bias whose every element is claimed."""
        projection = claims[0].projection
        claimed = torch.stack([c.elements for c in claims]).any(0)
        if bool((projection.bias * ~claimed).any()):
            roles = " and ".join(c.role for c in claims)
            of_keys = "".join(_dead(c) for c in claims if c.role == "keys")
            self.result.declined.append(
                declined(
                    self.rule, layer,
                    f"its bias serves more than {roles}, so it stays as a whole{of_keys}",
                )
            )  # fmt: skip
            return False
        args = (*layer.args[:2], *((None, *layer.args[3:]) if len(layer.args) > 3 else ()))
        kwargs = {k: v for k, v in layer.kwargs.items() if k != "bias"}
        changed = [layer, *(n for n, _ in projection.path)]
        with self.editor.edit() as edit:
            edit.set(layer, args=args, kwargs=kwargs)
            for claim in claims:
                changed += [n for n, _ in claim.projection.path] + list(claim.passed)
                if claim.reader is not None:
                    self._take(edit, claim.reader.node, claim)
            for node in dict.fromkeys(changed):
                edit.stamp(node, [node], value=None)
        self.result.applied.append(_record(self.rule, projection, claims))
        return True

    def _take(self, edit: Edit, reader: fx.Node, claim: _Claim) -> None:
        now = products.linear(reader)
        assert now is not None
        assert claim.added is not None
        added, bias = claim.added, now.bias
        total = Lazy.of(added) if bias is None else bias.map(bias.shape, lambda b: b + added)
        with edit.before(reader):
            data = edit.constant(f"{reader.name}.bias", total, reader.meta["val"])
        edit.set(reader, args=(now.x, now.weight_node, data), kwargs={})
        edit.stamp(reader, [claim.projection.layer, reader])


def _dead(claim: _Claim) -> str:
    """How many elements of a bias are the keys', and which, if they are one block."""
    places = claim.elements.nonzero().reshape(-1)
    first, end, count = int(places[0]), int(places[-1]) + 1, places.numel()
    block = f"{constant_name(claim.projection.bias_node)}[{first}:{end}], "
    where = block if end - first == count else ""
    return f"; {count} elements of it, {where}the keys', change nothing"


def _record(rule: str, projection: _Projection, claims: list[_Claim]) -> Applied:
    name = str(projection.bias_node.target)
    if all(claim.role == "keys" for claim in claims):
        detail = f"{name} changes nothing: it adds one number to every score of a row"
    else:
        into = ", ".join(c.reader.node.name for c in claims if c.reader is not None)
        detail = f"{name} into the bias of {into}"
    return applied(rule, [], [c.reader.node for c in claims if c.reader is not None], detail)


def _projection(operand: KeyedOperand, role: str) -> _Projection | None:
    """Walks up from an operand through layouts; ``None`` where no bias is to be had."""
    path: list[tuple[fx.Node, fx.Node]] = []
    node = operand.node
    while (source := _above(node)) is not None:
        path.insert(0, (node, source))
        node = source
    layer = products.linear(node) or convolutions.conv(node)
    if layer is None or node.target not in _PROJECTIONS or nodes.pinned(node):
        between = node.op == "call_function" and not layout.is_layout(node)
        if between and any(
            products.linear(n) or convolutions.conv(n) for n in node.all_input_nodes
        ):
            raise Declined(f"the {role}' bias stays: {node.name} stands between it and the product")
        return None
    if layer.bias is None:
        return None
    bias_node = nodes.arguments(node)["bias"]
    return _Projection(node, bias_node, layer.bias.get(), tuple(path))


def _projects(layer: fx.Node) -> bool:
    """True if what a layer makes may reach a product through layouts."""
    stack = list(layer.users)
    while stack:
        user = stack.pop()
        if layout.is_layout(user):
            stack.extend(user.users)
        elif kind(user) in ("matmul", "attention"):
            return True
    return False


def _above(node: fx.Node) -> fx.Node | None:
    """The tensor that a layout reads."""
    if not layout.is_layout(node) or nodes.pinned(node):
        return None
    source = layout.source_of(node)
    if source is not None and not is_tensor(source):  # the parts of a split
        source = layout.source_of(source)
    return source if source is not None and is_tensor(source) else None


def _origin(node: fx.Node) -> fx.Node:
    while (source := _above(node)) is not None:
        node = source
    return node


def _channels(layer: fx.Node) -> int:
    return len(shape(layer)) - 1 if layer.target is aten.linear.default else 1


def _pair(shift: torch.Tensor) -> layout.Pair:
    return torch.ones((1,) * shift.dim(), dtype=torch.float64), shift
