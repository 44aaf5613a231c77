"""Training with experts whose weights are averaged in the end.

    partition   tokens -> N random parts of equal size, part i -> expert i, parts -> tokens
    share       W_i <- (1 - beta) W_i + beta / (N - 1) sum over j != i of W_j
    deploy      W = (W_1 + ... + W_N) / N: one network of the original size

Sharing leaves the mean of the experts as it is and contracts their deviations from it by
1 - beta N / (N - 1), so the mean stays near each expert, and the average of the outputs near the
output of the average. The compiler's pass ``average-experts`` does the last step.

Source: Huang et al., Experts Weights Averaging (2023), arXiv:2308.06093. The paper's code is not
public; how its share rate grows over layers and epochs is left to the caller here.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from refold.errors import UsageError


class EWAMoE(nn.Module):
    """Experts of which each sees a random part of the tokens; becomes one of them to deploy.

    In training mode the tokens (all axes but the last) are permuted at random and split evenly; a
    step costs what one expert costs. Where the tokens do not divide, random experts take one more,
    so that every token meets every expert equally often; with fewer tokens than experts, some get
    none, and no gradient. The random numbers are those of ``torch.manual_seed``.

    In eval mode the output is the mean of all experts' outputs, which is the expectation of the
    random partition: deterministic, at N times the cost of one expert until the experts' weights
    are averaged.

    Example::

        for block in vit.blocks:
            block.mlp = EWAMoE(Mlp(dim, 4 * dim) for _ in range(4))

    Args:
        experts: modules that map ``[tokens, features]`` row by row, with parameters of the same
            names and shapes. To fine-tune a trained network, copies of its own
            (``copy.deepcopy``); to train from scratch, independently initialised ones.
    """

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        if not len(self.experts):
            raise UsageError("EWAMoE needs at least one expert")
        if len({id(expert) for expert in self.experts}) < len(self.experts):
            raise UsageError("EWAMoE: an expert stands twice; give each as copy.deepcopy(expert)")
        _isomorphic("EWAMoE", self.experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        mixed = self._partition(tokens) if self.training else self._mean(tokens)
        return mixed.reshape(*x.shape[:-1], mixed.shape[-1])

    def _mean(self, tokens: torch.Tensor) -> torch.Tensor:
        total = self.experts[0](tokens)
        for index in range(1, len(self.experts)):
            total = total + self.experts[index](tokens)
        return total / len(self.experts)

    def _partition(self, tokens: torch.Tensor) -> torch.Tensor:
        count = len(self.experts)
        order = torch.randperm(len(tokens), device=tokens.device)
        parts = torch.tensor_split(tokens[order], count)
        first = 0
        if len(tokens) % count:  # the longer parts come first: they must not always be the same's
            first = int(torch.randint(count, ()))
        outputs = [
            self.experts[(first + index) % count](part)
            for index, part in enumerate(parts)
            if len(part) or not len(tokens)
        ]
        return torch.cat(outputs)[order.argsort()]


@torch.no_grad()
def ewa_step_(
    model: nn.Module,
    share_rate: float | Sequence[float],
    *,
    experts: str | Sequence[str] | None = None,
) -> None:
    """Shares weights between the experts of every mixture, in place, after an optimiser step.

    Each parameter W of expert i becomes (1 - beta) W_i + beta / (N - 1) times the sum of the other
    experts'. The mean stays; the deviations from it shrink by 1 - beta N / (N - 1), which is 0 at
    beta = (N - 1) / N: then all experts become their mean. All parameters take part, frozen ones
    too; buffers and the optimiser's state do not.

    Example::

        depth = 12
        rates = [0.3 * (layer + 1) / depth for layer in range(depth)]  # more, the deeper
        for step, (x, y) in enumerate(batches):
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
            refold.ewa_step_(model, [rate * step / steps for rate in rates])  # and the later

    Args:
        model: the network in training.
        share_rate: beta, from 0 (nothing happens) to 1; a sequence has one for each mixture, in the
            order of ``model.named_modules()``.
        experts: globs of the paths of the ``ModuleList`` objects that hold experts, such as
            ``"blocks.*.moe.experts"``. Without it, the experts of every :class:`EWAMoE`: that other
            lists hold experts, and not layers, is something that their structure does not tell.

    Raises:
        UsageError: no mixture was found, experts differ in their parameters, or a rate does not
            fit. Nothing has been changed then.
    """
    lists = _expert_lists(model, experts)
    rates = list(share_rate) if isinstance(share_rate, Sequence) else [share_rate] * len(lists)
    if len(rates) != len(lists):
        raise UsageError(
            f"share_rate has {len(rates)} rates for {len(lists)} mixtures of experts: "
            f"{', '.join(lists)}"
        )
    for path, rate in zip(lists, rates, strict=True):
        if not 0 <= rate <= 1:
            raise UsageError(f"share rate {rate} of {path} is not in [0, 1]")
    for path, members in lists.items():
        _isomorphic(path, members)
    for members, rate in zip(lists.values(), rates, strict=True):
        _share_(members, rate)


def _share_(experts: nn.ModuleList, rate: float) -> None:
    count = len(experts)
    if count == 1 or rate == 0:
        return
    # W_i + beta N / (N - 1) (mean - W_i) is the same sum; the mean is taken from differences, so
    # that equal experts stay equal to the last bit.
    step = rate * count / (count - 1)
    by_name = [dict(expert.named_parameters()) for expert in experts]
    for name in by_name[0]:
        tensors = [parameters[name] for parameters in by_name]
        wide = torch.promote_types(tensors[0].dtype, torch.float32)
        first = tensors[0].to(wide, copy=True)
        offset = torch.zeros_like(first)
        for tensor in tensors[1:]:
            offset += tensor.to(wide) - first
        mean = first.add_(offset.div_(count))
        # A tensor that several experts share is written once.
        for tensor in {id(tensor): tensor for tensor in tensors}.values():
            tensor.copy_(torch.lerp(tensor.to(wide), mean, step))


def _expert_lists(
    model: nn.Module, experts: str | Sequence[str] | None
) -> dict[str, nn.ModuleList]:
    every = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    if experts is None:
        own = {id(m.experts) for m in model.modules() if isinstance(m, EWAMoE)}
        found = {path: m for path, m in every.items() if id(m) in own}
        if not found:
            raise UsageError(
                "the model has no EWAMoE layer: name the lists that hold its experts, "
                f"experts=[...]; its ModuleLists are: {', '.join(every) or 'none'}"
            )
        return found
    globs = [experts] if isinstance(experts, str) else list(experts)
    for glob in globs:
        if not any(fnmatch.fnmatchcase(path, glob) for path in every):
            raise UsageError(
                f"experts={glob!r} matches no ModuleList of the model; "
                f"it has: {', '.join(every) or 'none'}"
            )
    found = {p: m for p, m in every.items() if any(fnmatch.fnmatchcase(p, g) for g in globs)}
    for path, members in found.items():
        if not len(members):
            raise UsageError(f"{path} holds no experts: it is empty")
    return found


def _isomorphic(path: str, experts: nn.ModuleList) -> None:
    """Raises unless the experts' parameters agree in name, shape, (floating) dtype and device."""
    first = dict(experts[0].named_parameters())
    for index, expert in enumerate(experts):
        own = dict(expert.named_parameters())
        if own.keys() != first.keys():
            odd = sorted(own.keys() ^ first.keys())[0]
            raise UsageError(
                f"{path}: expert {index} and expert 0 are not alike: only one of them has "
                f"a parameter {odd!r}"
            )
        for name, tensor in own.items():
            if _kind(tensor) != _kind(first[name]):
                raise UsageError(
                    f"{path}: {name} of expert {index} is {_said(tensor)}, "
                    f"of expert 0 {_said(first[name])}: experts must be alike"
                )
            if not tensor.is_floating_point():
                raise UsageError(
                    f"{path}: {name} is {_said(tensor)}, which has no average: experts need "
                    "floating-point weights, not quantised ones"
                )


def _kind(tensor: torch.Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device


def _said(tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype}{list(tensor.shape)} on {tensor.device}"
