"""Hands the layers of binary planes of a graph to the native kernel."""

from __future__ import annotations

import torch
from torch import fx

from refold import native
from refold.graph import constants, nodes, provenance
from refold.graph.copies import copy_sharing_tensors
from refold.native import op  # noqa: F401  (registers the operator)
from refold.native.layer import GEMV_ROWS, pack

RULE = "lower-bcq-linear"


def lower(gm: fx.GraphModule, *, exact: bool) -> tuple[str, ...]:
    """Replaces ``bcq_linear`` by ``bcq_linear_packed``, in place; planes are then kept once.

    Args:
        gm: the graph.
        exact: keep sums of activations in float32; see ``docs/native-kernel.md``.

    Returns:
        Which kernel runs, as sentences for the report; none if there is no such layer.
    """
    layers = [n for n in gm.graph.nodes if n.target is torch.ops.refold.bcq_linear.default]
    before = sum(map(is_packed, gm.graph.nodes))  # of a program that was lowered, then saved
    if not layers and not before:
        return ()
    kernel = native.library()
    if kernel is None:
        return (
            f"{len(layers) + before} layers of binary planes run without the native kernel, slowly "
            f"(their weights are formed in each call): {native.status()}",
        )
    packed: dict[tuple[fx.Node, fx.Node], tuple[fx.Node, fx.Node]] = {}
    lowered = sum(_replace(gm, node, packed, exact) for node in layers)
    if lowered:
        constants.sweep(gm)
    notes = []
    if lowered + before:
        sums = "float32 sums" if exact else "8-bit sums of activations"
        isa = kernel.isas[-1]
        rows = GEMV_ROWS[isa][0 if exact else 1]
        notes.append(
            f"{lowered + before} layers of binary planes run on the native kernel ({isa}, {sums}); "
            f"past {rows} rows their weights are formed tile by tile"
        )
    if left := len(layers) - lowered:
        notes.append(
            f"{left} layers of binary planes run without the native kernel, slowly: it takes "
            "constant planes on the CPU, four at most, and neither float64 scales nor inputs"
        )
    return tuple(notes)


def with_sums(gm: fx.GraphModule, *, exact: bool) -> fx.GraphModule:
    """A lowered graph over the same tensors with the other kind of sums, or the same."""
    copy = copy_sharing_tensors(gm)
    for node in copy.graph.nodes:
        if is_packed(node):
            node.args = (*node.args[:-1], exact)
    copy.recompile()
    return copy


def is_packed(node: fx.Node) -> bool:
    return node.target is torch.ops.refold.bcq_linear_packed.default


def _replace(
    gm: fx.GraphModule,
    node: fx.Node,
    packed: dict[tuple[fx.Node, fx.Node], tuple[fx.Node, fx.Node]],
    exact: bool,
) -> bool:
    given = nodes.arguments(node)
    x, planes, alpha = given["x"], given["planes"], given["alpha"]
    if not _suits(x, planes, alpha):
        return False
    if (planes, alpha) not in packed:
        layer = pack(constants.tensor(planes), constants.tensor(alpha), given["group_size"])
        with gm.graph.inserting_before(node):
            packed[planes, alpha] = (
                constants.add(gm, f"{node.name}.planes", layer.planes),
                constants.add(gm, f"{node.name}.scales", layer.scales),
            )
    own = packed[planes, alpha]
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(
            torch.ops.refold.bcq_linear_packed.default,
            (x, *own, given["bias"], nodes.shape(planes)[1], given["group_size"], exact),
        )
    new.meta.update(node.meta)
    provenance.derive(new, [node], RULE)
    node.replace_all_uses_with(new, propagate_meta=False)
    gm.graph.erase_node(node)
    return True


def _suits(x: fx.Node, planes: fx.Node, alpha: fx.Node) -> bool:
    if not (constants.is_get_attr(planes) and constants.is_get_attr(alpha)):
        return False
    return (
        planes.meta["val"].device.type == "cpu"
        and nodes.hints(planes)[0] <= 4
        and torch.float64 not in (nodes.dtype(x), nodes.dtype(alpha))
    )
