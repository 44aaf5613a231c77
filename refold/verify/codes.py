"""Judges a substitution of weights by codes: by the weights, not by what the substitution measured.

How far codes are from the weights that they stand for is reported, not bounded. That they are codes
of these weights is not a matter of degree, and is checked on its own:

- with the weights themselves in place of the codes, the graph computes what the original does, to
  rounding: what is read, its layout, the bias;
- what is stored, decoded here, is as far from each weight as was said when it was made;
- no channel is further off than plain rounding explains: one even grid for each group, found by
  trial. On calibration inputs, where columns make up for each other, its outputs are not;
- no layer is further off than the user allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import fx

from refold.calibrate.lockstep import Lockstep
from refold.errors import VerificationError
from refold.graph import constants, provenance
from refold.graph.copies import copy_sharing_tensors
from refold.graph.program import Program
from refold.rewrite.result import Approximation, StoredCode
from refold.verify.compare import verify_widely
from refold.verify.references import References

_SAID = 1e-6  # of what was said: sums in another order
_SAID_OF_OUTPUTS = 0.05  # the same, where inputs are computed in half precision by other kernels
_PLAIN = 1.5  # times the squared error of plain rounding: the trial is coarse, scales are stored
_PLAIN_OUTPUTS = 2.0  # the same for outputs: the errors of columns do not add up as squares
_STORED = 2e-3  # of a channel's square: what rounding its scales costs, to sums of powers at most
_STORED_OUTPUTS = 2e-2  # the same for outputs: errors of one sign add up
_TRIALS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the largest entry of a group
_POWERS = (-3, -2, -1, 0, 1)  # the same for powers of two


def judge(
    approximation: Approximation, whole: fx.GraphModule, known: References, program: Program
) -> str:
    """Checks the codes of a substitution; see the module docstring.

    Args:
        approximation: what became of the graph.
        whole: the original.
        known: what it computes.
        program: what the trace promised of its inputs.

    Returns:
        A sentence for the report.

    Raises:
        VerificationError: the codes are not those of the weights.
    """
    after = approximation.after
    assert after is not None
    try:
        verify_widely(whole, with_weights(after, approximation.codes), program, known)
    except VerificationError as error:
        raise VerificationError(
            f"the weights themselves in place of their codes do not give the original: {error}",
            error.layer,
        ) from error
    named = {node.name: node for node in after.graph.nodes}
    lockstep = Lockstep(after, approximation.calibration)
    worst = 0.0
    for code in approximation.codes:
        node = named[code.node]
        lockstep.advance(node)
        inputs = lockstep.values(node.args[0])  # type: ignore[arg-type]
        worst = max(worst, _judge(node, code, inputs))
    return (
        f"{len(approximation.codes)} codes decoded apart: as far from their weights as said, at "
        f"most {worst:.1e}, and no channel further than plain rounding explains"
    )


def with_weights(gm: fx.GraphModule, codes: Iterable[StoredCode]) -> fx.GraphModule:
    """The graph with the weights themselves where it reads codes."""
    dense = copy_sharing_tensors(gm)
    named = {node.name: node for node in dense.graph.nodes}
    for index, code in enumerate(codes):
        node = named[code.node]
        name, like = f"refold_weight_{index}", node.meta["val"]
        dense.register_buffer(name, code.weight.evaluate().to(like.device, like.dtype))
        with dense.graph.inserting_before(node):
            weight = dense.graph.get_attr(name)
            operands = (node.args[0], weight, node.args[3])
            new = dense.graph.call_function(torch.ops.aten.linear.default, operands)
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        dense.graph.erase_node(node)
    dense.recompile()
    return dense


def _judge(node: fx.Node, code: StoredCode, inputs: list[torch.Tensor]) -> float:
    """Checks one code, and returns how far it is from its weight, relative L2."""
    args: Any = node.args
    planes, alpha, group_size = constants.tensor(args[1]), constants.tensor(args[2]), args[4]
    weight = code.weight.evaluate()
    size = weight.square().sum(1)
    error = decoded(planes, alpha, weight.shape[1], group_size) - weight
    apart = _ratio(error.square().sum(1), size)
    _as_said(node, "its weight", apart, code.weight_error, _SAID)
    bits, reached = len(planes), apart
    plain = _plain(weight, bits, group_size, powers=code.powers)
    if not inputs:
        _no_further(node, error.square().sum(1), _PLAIN * plain.sum(1) + _STORED * size)
    else:
        moved, exact, energy = _over(inputs, error, weight)
        reached = _ratio(moved, exact)
        _as_said(node, "its outputs", reached, code.output_error, _SAID_OF_OUTPUTS)
        bound = _PLAIN_OUTPUTS * plain + _STORED_OUTPUTS * weight.square()
        _no_further(node, moved, (bound * energy).sum(1))
    if reached > code.limit * (1 + _SAID_OF_OUTPUTS):
        raise VerificationError(
            f"{_name(node)} is {reached:.1e} from what it stands for (relative L2), allowed are "
            f"{code.limit:g}",
            node.name,
        )
    return apart


def decoded(
    planes: torch.Tensor, alpha: torch.Tensor, features: int, group_size: int
) -> torch.Tensor:
    """The matrix ``[N, K]`` that is stored, in float64."""
    bits = np.unpackbits(planes.cpu().numpy(), axis=-1, count=features, bitorder="little")
    group = torch.arange(features) // group_size
    scales = alpha.cpu().double()
    total = torch.zeros(planes.shape[1], features, dtype=torch.float64)
    for index, plane in enumerate(bits):
        even = len(scales) == 1  # planes count 4, 2 and 1 half steps
        own = scales[0] * 2.0 ** (len(bits) - 1 - index) if even else scales[index]
        total += torch.where(torch.from_numpy(plane).bool(), own[:, group], -own[:, group])
    return total


def _plain(weight: torch.Tensor, bits: int, group_size: int, *, powers: bool) -> torch.Tensor:
    """The squared errors ``[N, K]`` of rounding to the best even grid, for each group, of some."""
    top, found = 2**bits - 1, []
    for group in weight.split(group_size, 1):
        widest = group.abs().amax(1, keepdim=True) / top
        best = torch.full_like(group, torch.inf)
        for step in _steps(widest, powers=powers):
            level = ((group / step / 2).floor() * 2 + 1).clamp(-top, top) * step
            error = (level - group).square()
            better = error.sum(1, keepdim=True) < best.sum(1, keepdim=True)
            best = torch.where(better, error, best)
        found.append(torch.where(widest > 0, best, 0.0))
    return torch.cat(found, 1)


def _steps(widest: torch.Tensor, *, powers: bool) -> Iterator[torch.Tensor]:
    """Half steps of a grid that reaches the largest entry, and of narrower ones."""
    widest = widest.clamp_min(torch.finfo(torch.float64).tiny)
    if not powers:
        yield from (widest * factor for factor in _TRIALS)
        return
    exponent = widest.log2().round()
    yield from (torch.exp2(exponent + more) for more in _POWERS)


def _over(
    inputs: list[torch.Tensor], error: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean squares over inputs: of what each output moves by, of itself, and of each input."""
    rows, sums = 0, [torch.zeros(len(weight)), torch.zeros(len(weight)), torch.zeros(1)]
    for x in inputs:
        x = x.detach().reshape(-1, x.shape[-1]).to("cpu", torch.float64)
        rows += len(x)
        for index, values in enumerate((x @ error.T, x @ weight.T, x)):
            sums[index] = sums[index] + values.square().sum(0)
    moved, exact, energy = (total / max(rows, 1) for total in sums)
    return moved, exact, energy


def _ratio(error: torch.Tensor, size: torch.Tensor) -> float:
    return float((error.sum() / size.sum().clamp_min(1e-300)).sqrt())


def _as_said(node: fx.Node, what: str, apart: float, said: float, share: float) -> None:
    if abs(apart - said) <= share * said + 1e-9:
        return
    raise VerificationError(
        f"{_name(node)}: what is stored is {apart:.1e} from {what} (relative L2), and was said to "
        f"be {said:.1e}: it is not the code that was made",
        node.name,
    )


def _no_further(node: fx.Node, error: torch.Tensor, bound: torch.Tensor) -> None:
    past = error - bound
    if not bool((past > 0).any()):
        return
    worst = int(past.argmax())
    ratio = float((error[worst] / bound[worst].clamp_min(1e-300)).sqrt())
    raise VerificationError(
        f"{_name(node)}: channel {worst} is {ratio:.1f} times as far from its weight as plain "
        "rounding explains: its code is not that of this weight",
        node.name,
    )


def _name(node: fx.Node) -> str:
    return provenance.module_path(node) or node.name
