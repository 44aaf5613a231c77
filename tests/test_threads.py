"""Compilations in several threads: one at a time, each result right."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refold


def conv_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4 + seed, 3), nn.BatchNorm2d(4 + seed), nn.ReLU()).eval()
    with torch.no_grad():
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
    return net


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 4 + seed)).eval()


def run_together(count: int, work: Callable[[int], None]) -> None:
    """Runs ``work(0) ... work(count - 1)`` at once; what one raises, the test raises."""
    failed: list[BaseException] = []
    ready = threading.Barrier(count)

    def guarded(index: int) -> None:
        try:
            ready.wait()
            work(index)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def agree(compiled: Callable[..., Tensor], model: nn.Module, batch: int) -> None:
    x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [2, 8])
def test_different_models(count: int) -> None:
    models = [conv_net(i) if i % 2 else mlp(i) for i in range(count)]

    def work(index: int) -> None:
        compiled = refold.compile_for_inference(models[index], torch.randn(2, 3, 8, 8))
        agree(compiled, models[index], 3)

    run_together(count, work)


@pytest.mark.parametrize("count", [2, 8])
def test_one_model(count: int) -> None:
    model = conv_net(1)

    def work(index: int) -> None:
        compiled = refold.compile_for_inference(model, torch.randn(2 + index, 3, 8, 8))
        agree(compiled, model, 1 + index)
        assert compiled.report.after.census.get("batch-norm", 0) == 0

    run_together(count, work)


def test_one_lazy_model_compiles_once() -> None:
    model = conv_net(2)
    compiled = refold.compile_for_inference(model)
    run_together(4, lambda index: agree(compiled, model, 2 + index))


def test_explanations_beside_compilations() -> None:
    def work(index: int) -> None:
        model, x = conv_net(index), torch.randn(2, 3, 8, 8)
        if index % 2:
            assert refold.explain(model, x).after.census.get("batch-norm", 0) == 0
        else:
            agree(refold.compile_for_inference(model, x), model, 2)

    run_together(4, work)


def test_torch_compile_beside_compilations() -> None:
    torch._dynamo.reset()
    models = [conv_net(i) for i in range(4)]
    backend = refold.backend(inner="eager")

    def work(index: int) -> None:
        if index % 2:
            agree(torch.compile(models[index], backend=backend), models[index], 2)
        else:
            model = models[index]
            agree(refold.compile_for_inference(model, torch.randn(2, 3, 8, 8)), model, 2)

    with torch.no_grad():
        run_together(4, work)


@pytest.mark.slow
def test_the_garbage_collector_is_as_it_was_after_a_compilation() -> None:
    assert not gc.get_freeze_count()
    refold.compile_for_inference(conv_net(0), torch.randn(2, 3, 8, 8))
    assert not gc.get_freeze_count()
    with pytest.raises(refold.errors.FrontendError):
        refold.compile_for_inference(conv_net(0), torch.randn(2, 5, 8, 8))
    assert not gc.get_freeze_count()
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        refold.compile_for_inference(conv_net(0), torch.randn(2, 3, 8, 8))
        assert gc.get_freeze_count() > before / 2  # but for those that are no more
    finally:
        gc.unfreeze()


@pytest.mark.slow
def test_a_compilation_does_not_look_through_older_objects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frozen: list[int] = []
    fold = refold.compiler.fold_program

    def counting(*args: Any, **kwargs: Any) -> Any:
        frozen.append(gc.get_freeze_count())
        return fold(*args, **kwargs)

    monkeypatch.setattr(refold.compiler, "fold_program", counting)
    older = len(gc.get_objects())
    refold.compile_for_inference(conv_net(0), torch.randn(2, 3, 8, 8))
    assert frozen[0] > older / 2
