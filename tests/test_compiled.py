"""A compiled model is a snapshot: weights that change later, copies, and what a module is asked."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.backends.registry import find_target
from refold.errors import UsageError
from tests.examples import few
from tests.randomise import randomise


def small() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    )
    randomise(net, (torch.randn(4, 3, 8, 8),))
    return net.eval()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def old_and_new(net: nn.Module, change: Callable[[nn.Module], Any], **settings: Any) -> Any:
    """The compiled model, and what the original returned before it was changed."""
    done = refold.compile_for_inference(net, X, **settings)
    with torch.no_grad():
        old = net(X)
        torch.testing.assert_close(done(X), old, rtol=1e-4, atol=1e-5)
    change(net)
    return done, old


def _scale(net: nn.Module) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)


def _exchange(net: nn.Module) -> None:
    net[4].weight.data = torch.randn_like(net[4].weight)


def _without_a_trace(net: nn.Module) -> None:
    net[4].weight.data.mul_(2)


def _train(net: nn.Module) -> None:
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net.train()(X).square().sum().backward()
    optimizer.step()


def _train_fused(net: nn.Module) -> None:
    optimizer = torch.optim.Adam(net.parameters(), 0.1, fused=True)
    net.train()(X).square().sum().backward()
    optimizer.step()


def _load(net: nn.Module) -> None:
    net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()})


def _halve(net: nn.Module) -> None:
    net.half()


CHANGES = [_scale, _exchange, _without_a_trace, _train, _train_fused, _load, _halve]


@pytest.mark.parametrize(
    ("change", "target"),
    # Both targets look the same way: two changes show that inductor looks at all.
    [*((c, "torch") for c in CHANGES)]
    + [pytest.param(c, "inductor", marks=pytest.mark.slow) for c in (_scale, _halve)],
)
def test_change_of_a_shared_weight_is_noticed(change: Callable[..., Any], target: str) -> None:
    done, _ = old_and_new(small(), change, target=target)
    with pytest.raises(UsageError, match=r"copy_weights=True.*refit"):
        done(X)


def test_the_changed_weight_is_named_and_the_file_is_not_written(tmp_path) -> None:
    done, _ = old_and_new(small(), _exchange)
    for call in (lambda: done(X), lambda: done.save(tmp_path / "net.pt2")):
        with pytest.raises(UsageError, match=r"\(4\.weight\)"):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", few(CHANGES, 3))
def test_copied_weights_stay(change: Callable[..., Any], tmp_path) -> None:
    done, old = old_and_new(small(), change, copy_weights=True)
    torch.testing.assert_close(done(X), old, rtol=1e-4, atol=1e-5)
    done.save(tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    torch.testing.assert_close(loaded(X), old, rtol=1e-4, atol=1e-5)


def test_copied_weights_share_what_they_shared() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    net, x = Tied().eval(), torch.randn(2, 64)
    done = refold.compile_for_inference(net, x, copy_weights=True)
    held = {t.data_ptr() for t in done.graph_module.parameters()}
    assert len(held) == 1
    assert net.a.weight.data_ptr() not in held


def test_change_that_the_compiled_model_does_not_read_is_none() -> None:
    """What was folded is the compiled model's own: without a shared weight it is a snapshot."""

    def change(net: nn.Module) -> None:
        net[1].running_mean.add_(1)
        net[1].num_batches_tracked.add_(1)

    done, old = old_and_new(small(), change)
    torch.testing.assert_close(done(X), old, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "ort", "openvino", "aoti"])
def test_runtimes_with_weights_of_their_own_stay(target: str, tmp_path) -> None:
    done, old = old_and_new(small(), _scale, target=target)
    torch.testing.assert_close(done(X), old, rtol=1e-4, atol=1e-4)
    path = tmp_path / f"net{find_target(target).suffix}"
    if target in ("onnx", "ort"):
        with pytest.raises(UsageError, match="copy_weights=True"):
            done.save(path)
        done, _ = old_and_new(small(), _scale, target=target, copy_weights=True)
        import onnxruntime

        session = onnxruntime.InferenceSession(done.save(path))
        got = session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(got), old, rtol=1e-4, atol=1e-4)
    else:
        assert done.save(path).exists()


@pytest.mark.slow
def test_refit_takes_the_changed_weights_over() -> None:
    net = small()
    done, _ = old_and_new(net, _scale, recipe=True)
    with pytest.raises(UsageError):
        done(X)
    fitted = done.refit(net)
    with torch.no_grad():
        torch.testing.assert_close(fitted(X), net(X), rtol=1e-4, atol=1e-5)
        new = net(X)
    _scale(net)
    with pytest.raises(UsageError, match="copy_weights"):
        fitted(X)
    copied = refold.compile_for_inference(small(), X, recipe=True, copy_weights=True)
    net = small()
    _scale(net)
    fitted = copied.refit(net)
    _scale(net)
    torch.testing.assert_close(fitted(X), new, rtol=1e-4, atol=1e-5)


def test_state_that_the_compiled_model_writes_is_no_change() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.n += 1
            return self.lin(x) * self.n

    net, x = Counts().eval(), torch.randn(2, 4)
    done = refold.compile_for_inference(net, x)
    for i in (1, 2, 3):
        torch.testing.assert_close(done(x), net.lin(x) * i)
    with torch.no_grad():
        net(x)  # its own state, not the compiled model's
    torch.testing.assert_close(done(x), net.lin(x) * 4)


@pytest.mark.slow
def test_compiling_again_is_no_change() -> None:
    net = small()
    first = refold.compile_for_inference(net, X)
    refold.compile_for_inference(net, X, target="inductor")
    refold.explain(net, X)
    with torch.no_grad():
        net(X)
        net.load_state_dict  # noqa: B018 (reading is no change either)
        torch.testing.assert_close(first(X), net(X), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_weights_that_were_folded_away_are_not_held() -> None:
    net = small()
    folded, shared = weakref.ref(net[0].weight), weakref.ref(net[4].weight)
    done = refold.compile_for_inference(net, X)
    del net
    gc.collect()
    assert folded() is None
    assert shared() is not None
    done(X)


def test_consumed_weights_are_no_change() -> None:
    net = small()
    with torch.no_grad():
        want = net(X)
    done = refold.compile_for_inference(net, X, consume=True)
    torch.testing.assert_close(done(X), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="consume=True"):
        refold.compile_for_inference(small(), X, consume=True, copy_weights=True)


# --- habits ---------------------------------------------------------------------------------------


def test_evaluation_is_what_it_does_anyway() -> None:
    done = refold.compile_for_inference(small(), X)
    assert done.eval() is done
    assert done.train(False) is done
    with pytest.raises(UsageError, match="cannot be trained"):
        done.train()


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("total", torch.zeros(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.total = self.total + self.lin(x)
        return self.total * 2


@pytest.mark.slow
@pytest.mark.parametrize("target", ["torch", "inductor"])
def test_deep_copy_has_state_of_its_own(target: str) -> None:
    net, x = Sums().eval(), torch.randn(2, 4)
    done = refold.compile_for_inference(net, x, target=target)
    first = done(x).clone()
    other = copy.deepcopy(done)
    assert other is not done
    second = done(x).clone()
    torch.testing.assert_close(second, first * 2)
    torch.testing.assert_close(other(x), second)  # it went on from where it was copied
    torch.testing.assert_close(done(x), first * 3)
    assert other.report.target == target


@pytest.mark.slow
def test_copy_of_a_model_without_state_is_as_good() -> None:
    done = refold.compile_for_inference(small(), X)
    for other in (copy.copy(done), copy.deepcopy(done)):
        assert torch.equal(other(X), done(X))
    lazy = refold.compile_for_inference(small())
    other = copy.deepcopy(lazy)
    other(X)
    assert "not compiled yet" in repr(lazy)


def test_pickling_says_what_to_do_instead() -> None:
    with pytest.raises(UsageError, match=r"save\(path\)"):
        pickle.dumps(refold.compile_for_inference(small(), X))
