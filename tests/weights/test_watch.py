"""The native watch of tensors notices what asking each of them in Python notices."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refold import native
from refold.native import build
from refold.weights import watch


@pytest.fixture(scope="module", autouse=True)
def a_library() -> Iterator[None]:
    """Neither a missing library nor a switch in the environment decides what is tested."""
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv(native.OFF, raising=False)
        if native.library() is None and build.compiler() is None:
            pytest.skip("no C compiler")
        assert native.library() is not None, native.status()
        yield


def _write(t: torch.Tensor) -> None:
    t.add_(1)


def _write_a_view(t: torch.Tensor) -> None:
    t.view(-1)[:1].zero_()


def _exchange_data(t: torch.Tensor) -> None:
    t.data = torch.rand_like(t)


def _set(t: torch.Tensor) -> None:
    t.set_(torch.rand_like(t))


def _grow(t: torch.Tensor) -> None:
    t.resize_(1 << 16)


def _read(t: torch.Tensor) -> None:
    t.sum()


def _leave_no_trace(t: torch.Tensor) -> None:
    t.data.view(-1)[-1:].mul_(2)


NOTICED = [_write, _write_a_view, _exchange_data, _set, _grow]
CHANGES = [_write, _write_a_view, _exchange_data, _set, _read, _leave_no_trace]
BOTH = pytest.mark.parametrize("off", ["1", "0"], ids=["native", "python"])


def tensors(count: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(12, generator=generator) for _ in range(count)]


def watched(of: list[torch.Tensor], statistics: list[bool] | None = None) -> Callable[[], bool]:
    look = watch.watch(of, statistics or [False] * len(of))
    assert look()
    return look


@BOTH
@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("change", NOTICED, ids=lambda c: c.__name__.strip("_"))
def test_changes_are_noticed(
    change: Callable[[torch.Tensor], None], at: int, off: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.OFF, off)
    of = tensors()
    look = watched(of)
    assert isinstance(look, watch._Watch) == (off == "1")
    change(of[at])
    assert not look()


@BOTH
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "apart", "scalar", "empty"])
def test_statistics_are_compared_by_content(
    kind: str, off: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.OFF, off)
    of = {
        "float32": lambda: torch.rand(12),
        "bfloat16": lambda: torch.rand(12).bfloat16(),
        "apart": lambda: torch.rand(12, 2)[:, 0],  # read by torch, native or not
        "scalar": lambda: torch.tensor(2.0),
        "empty": lambda: torch.rand(0),
    }[kind]()
    look = watched([torch.rand(3), of], [False, True])
    of.mul_(1)  # counts a version, and writes what is there
    assert look()
    if of.numel():
        of.data.view(-1)[-1:].mul_(2)
        assert not look()


@BOTH
def test_bits_are_compared_not_numbers(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.OFF, off)
    of = torch.tensor([float("nan"), 0.0])
    look = watched([of], [True])
    of.data.neg_()
    assert not look()


@given(
    made=st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, 4)), max_size=3),
    statistics=st.lists(st.booleans(), min_size=5, max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_it_says_what_python_says(
    made: list[tuple[Callable[[torch.Tensor], None], int]], statistics: list[bool]
) -> None:
    of = tensors()
    fast = watched(of, statistics)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(native.OFF, "0")
        slow = watched(of, statistics)
    assert isinstance(fast, watch._Watch)
    assert not isinstance(slow, watch._Watch)
    for change, at in made:
        change(of[at])
        assert fast() == slow()


@BOTH
def test_tensors_that_count_no_versions(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.OFF, off)
    with torch.inference_mode():
        of = tensors(1)
        look = watched(of)
        of[0].data = torch.zeros(12)
    assert not look()


def test_no_tensors() -> None:
    assert watched([])()


def test_it_holds_its_tensors_and_lets_them_go() -> None:
    of = tensors(1)
    alive = weakref.ref(of[0])
    look = watched(of)
    assert isinstance(look, watch._Watch)
    del of
    gc.collect()
    assert alive() is not None
    assert look()
    del look
    gc.collect()
    assert alive() is None


def test_without_the_functions_of_torch_python_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_FUNCTIONS", ("aoti_torch_get_data_ptr", "no_such_function"))
    watch._functions_of_torch.cache_clear()
    try:
        look = watched(tensors())
    finally:
        watch._functions_of_torch.cache_clear()
    assert not isinstance(look, watch._Watch)


def test_what_reads_something_else_than_python_is_not_used() -> None:
    of = tensors(2)
    assert watch._native(of, [0, 0], [False, False]) is not None
    assert watch._native(of, [0, 1], [False, False]) is None
