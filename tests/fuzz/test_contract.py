"""The contract sees each promise that a compiled model breaks."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from refold.errors import UsageError
from refold.fuzz import contract
from refold.fuzz.contract import Breach, keeps_the_contract


class Original(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.weight, (x + 1).t().contiguous()


def first_write_is_seen(model: Any, x: Tensor) -> Any:
    """Gives the same memory in each call, which a caller then writes."""
    if not hasattr(model, "kept"):
        model.kept = model(x)
    return model.kept if x.shape == model.kept[0].shape else model(x)


BREACHES: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "values": (lambda m, x: (m(x)[0] * (1 + 1e-9), m(x)[1]), "relative error 1.0e-09"),
    "one batch": (lambda m, x: tuple(v + (len(x) == 3) for v in m(x)), "relative error"),
    "structure": (lambda m, x: list(m(x)), "output structure"),
    "dtype": (lambda m, x: tuple(v.float() for v in m(x)), "torch.float32"),
    "NaN": (lambda m, x: tuple(v / 0 for v in m(x)), "NaN or infinity"),
    "an input": (lambda m, x: (m(x), x.zero_())[0], "an input was written"),
    "strides": (lambda m, x: (m(x)[0], (x + 1).t()), "strides"),
    "kept memory": (first_write_is_seen, "relative error"),
}  # fmt: skip


def check(monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any], **options: Any) -> None:
    model = Original()
    graph = fx.symbolic_trace(nn.Identity())

    class Compiled:
        graph_module = graph
        report = SimpleNamespace(specialised=options.pop("specialised", ()))

        def __call__(self, x: Tensor) -> Any:
            return call(model, x)

    monkeypatch.setattr(contract, "compile_for_inference", lambda *a, **k: Compiled())
    keeps_the_contract(model, (torch.randn(2, 4, dtype=torch.float64),), **options)


def test_what_keeps_it_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, lambda m, x: m(x))


@pytest.mark.parametrize("name", BREACHES)
def test_each_breach_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, words = BREACHES[name]
    with pytest.raises(Breach, match=words):
        check(monkeypatch, call)


def test_shared_memory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def shares(model: Any, x: Tensor) -> Any:
        both = torch.cat([v.reshape(-1) for v in model(x)])
        return both[: x.numel()].view(x.shape), both[x.numel() :].view(x.t().shape)

    with pytest.raises(Breach, match="share more memory"):
        check(monkeypatch, shares)


def test_a_batch_that_is_not_promised_is_to_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(model: Any, x: Tensor) -> Any:
        if len(x) != 2:
            raise UsageError("another batch")
        return model(x)

    with pytest.raises(Breach, match="not promised"):
        check(monkeypatch, lambda m, x: m(x), fixed=True)
    check(monkeypatch, refuses, fixed=True)
    check(monkeypatch, refuses, refusing=True)
    with pytest.raises(UsageError):
        check(monkeypatch, refuses)


def test_a_bound_input_that_is_written_has_its_value_in_each_call() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return x + shift.add_(0.5)

    shift = torch.ones(4, dtype=torch.float64)
    keeps_the_contract(Writes(), (torch.randn(2, 4).double(),), {"bind": {"shift": shift}})
    assert torch.equal(shift, torch.ones(4))
