"""Quantises a matrix for its inputs: later columns make up for the errors of earlier ones.

With errors ``E = W - Wq`` and inputs ``x``, a layer's outputs change by ``E x``. Over many inputs
the squared change is ``tr(E H E^T)``, H the mean of ``x x^T``. Columns are quantised in turn; once
column i has the error e, the best change of the columns that are still free is

    W[:, j] -= e / U[i, i] U[i, j]   for j > i,   H^-1 = U^T U, U upper triangular,

and the sum becomes that of e^2 / U[i, i]^2, column by column. Scales are fitted when the loop
reaches their group, to the columns as compensated so far and with these weights (see
:class:`_Group`).

What comes first has the most columns left to make up for it, so the columns of the largest inputs
do: the groups in descending order of the sum of H's diagonal, and the columns of each in that of
the diagonal. A group keeps its columns, so the order leaves no trace in the code's layout.

Frantar et al., GPTQ (2022), arXiv:2210.17323.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from refold.algebra.binary_coding import BinaryCode, Family, Levels, Rounding, fit_scales, signs_of

_REFITS = 2  # fits to the columns as they were when their turn came


class Hessian:
    """The mean of ``x x^T`` over the rows of all inputs, in float64."""

    def __init__(self, features: int) -> None:
        self._sum = torch.zeros(features, features, dtype=torch.float64)
        self._rows = 0

    def add(self, x: torch.Tensor) -> None:
        """Takes in ``x [..., features]``."""
        rows = x.detach().reshape(-1, x.shape[-1]).to("cpu", torch.float64)
        self._sum.addmm_(rows.T, rows)
        self._rows += len(rows)

    def mean(self) -> torch.Tensor:
        return self._sum / max(self._rows, 1)


@dataclass(frozen=True)
class InverseFactor:
    """The order in which columns are quantised, and how they make up for each other in it.

    Attributes:
        upper: the upper ``U`` with ``U^T U`` the inverse of the damped Hessian in that order.
        order: the columns, group by group.
    """

    upper: torch.Tensor
    order: torch.Tensor


def inverse_factor(hessian: torch.Tensor, damping: float, group_size: int) -> InverseFactor:
    """The order of the columns, and the factor of ``hessian + damping mean(diag) I`` in it.

    Args:
        hessian: symmetric and positive semi-definite.
        damping: what few inputs leave undetermined is not free to change, but costs this much.
        group_size: columns that stay together.

    Raises:
        ValueError: the matrix is zero or not finite.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not (mean > 0 and mean.isfinite()):
        raise ValueError("the inputs are all zero or not finite")
    order = _largest_first(diagonal, group_size)
    damped = hessian[order][:, order]
    damped.diagonal().add_(damping * mean)
    # H = R R^T with R upper is the Cholesky decomposition from the other end, and U = R^-1.
    reverse = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    identity = torch.eye(len(reverse), dtype=reverse.dtype)
    return InverseFactor(torch.linalg.solve_triangular(reverse, identity, upper=True), order)


def _largest_first(diagonal: torch.Tensor, group_size: int) -> torch.Tensor:
    groups = list(torch.arange(len(diagonal)).split(group_size))
    short = groups.pop() if len(diagonal) % group_size else None  # stays last: the others line up
    groups.sort(key=lambda columns: float(diagonal[columns].sum()), reverse=True)
    if short is not None:
        groups.append(short)
    return torch.cat([g[diagonal[g].argsort(descending=True, stable=True)] for g in groups])


def encode_compensated(
    weight: torch.Tensor,
    factor: InverseFactor,
    bits: int,
    group_size: int,
    family: Family,
    *,
    rounds: int = 15,
    rounding: Rounding | None = None,
) -> BinaryCode:
    """The code of ``weight [N, K]`` whose outputs are nearest; rows do not depend on each other.

    Args:
        weight: the matrix.
        factor: :func:`inverse_factor` of its inputs' Hessian, for groups of this size.
        bits: number of planes.
        group_size: columns that share scales.
        family: what the scales may be.
        rounds: rounds of the alternation from each start.
        rounding: what storage does to a scale.
    """
    features, upper, order = weight.shape[1], factor.upper, factor.order
    free = weight.double().T[order]  # a copy: columns are contiguous, and are written
    importance = upper.diagonal().square().reciprocal()
    signs, scales = [], []

    def fit(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        return fit_scales(
            values.T, bits, family, rounds=rounds, importance=weights, rounding=rounding
        )

    for start in range(0, features, group_size):
        stop = min(start + group_size, features)
        own = importance[start:stop] / importance[start:stop].max()

        group = _Group(free[start:stop], upper[start:stop, start:stop], bits)
        group.offer(fit(free[start:stop], own))
        if not bool((own == 1).all()):
            group.offer(fit(free[start:stop], None))
            for _ in range(_REFITS):
                group.offer(fit(group.targets, own))
        signs.append(group.signs)
        scales.append(group.alpha)
        free[stop:].addmm_(upper[start:stop, stop:].T, group.errors, alpha=-1)
    back, groups = order.argsort(), (order[::group_size] // group_size).argsort()
    alpha = torch.stack(scales, -1).transpose(0, 1)[..., groups].contiguous()
    return BinaryCode(torch.cat(signs, 1)[:, back].transpose(1, 2).contiguous(), alpha, group_size)


class _Group:
    """The columns of one group, transposed, with the best scales so far, row by row.

    The errors of its first columns move what its last ones should be, away from what the scales
    were fitted to: so scales are fitted again to what the columns were when their turn came.
    """

    def __init__(self, columns: torch.Tensor, factor: torch.Tensor, bits: int) -> None:
        self._columns, self._factor, self._bits = columns, factor, bits
        size, rows = columns.shape
        self._loss = torch.full((rows,), torch.inf, dtype=torch.float64)
        self.alpha = torch.empty(0)
        self.signs = torch.empty(bits, size, rows, dtype=torch.int8)
        self.errors, self.targets = torch.empty_like(columns), torch.empty_like(columns)

    def offer(self, alpha: torch.Tensor) -> None:
        """Takes scales where the loss with them is smaller."""
        free, errors = self._columns.clone(), torch.empty_like(self._columns)
        levels, codes = Levels(alpha, self._bits), []
        for column, scale in enumerate(self._factor.diagonal().tolist()):
            values, code = levels.nearest(free[column].unsqueeze(1))
            codes.append(code[:, 0])
            errors[column] = (free[column] - values[:, 0]) / scale
            rest = self._factor[column, column + 1 :]
            free[column + 1 :].addr_(rest, errors[column], alpha=-1)
        signs = signs_of(torch.stack(codes), self._bits)
        loss = errors.square().sum(0)
        better = loss < self._loss
        if not len(self.alpha):
            self.alpha = alpha.clone()
        self.alpha[better] = alpha[better]
        for kept, new in ((self.signs, signs), (self.errors, errors), (self.targets, free)):
            kept[..., better] = new[..., better]
        self._loss = torch.where(better, loss, self._loss)


def output_error(error: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr(E H E^T)``: the mean squared change of a layer's outputs, summed over the outputs."""
    return float(((error @ hessian) * error).sum())
