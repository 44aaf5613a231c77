"""The watch of tensors notices what asking each of them in Python notices."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refold import native
from refold.native import watch as module
from refold.native.interface import Library
from refold.native.watch import watch
from refold.torch_compile import _watch_in_python


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
    t.data.mul_(2)


CHANGES = [_write, _write_a_view, _exchange_data, _set, _grow]
NO_CHANGES = [_read, _leave_no_trace]


def tensors(count: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, 4, generator=generator) for _ in range(count)]


def versions(of: list[torch.Tensor]) -> list[int]:
    return [t._version for t in of]


@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__.strip("_"))
def test_changes_are_noticed(
    kernel: Library, change: Callable[[torch.Tensor], None], at: int
) -> None:
    of = tensors()
    unchanged = watch(of, versions(of))
    assert unchanged is not None
    assert unchanged()
    change(of[at])
    assert not unchanged()


@given(
    made=st.lists(st.tuples(st.sampled_from(CHANGES + NO_CHANGES), st.integers(0, 4)), max_size=3),
    counting=st.lists(st.booleans(), min_size=5, max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_it_says_what_python_says(
    library_path: object,
    made: list[tuple[Callable[[torch.Tensor], None], int]],
    counting: list[bool],
) -> None:
    library = native.library()
    if library is None:
        pytest.skip(str(native.status()))
    of = tensors()
    fast = watch(of, [t._version if c else -1 for t, c in zip(of, counting, strict=True)])
    slow = _watch_in_python(of, counting)
    assert fast is not None
    for change, at in made:
        change(of[at])
        assert fast() == slow()


def test_tensors_that_count_no_versions_are_not_asked(kernel: Library) -> None:
    with torch.inference_mode():
        of = tensors(1)
    unchanged = watch(of, [-1])
    assert unchanged is not None
    assert unchanged()
    with torch.inference_mode():
        of[0].data = torch.zeros(3, 4)
    assert not unchanged()


def test_no_tensors(kernel: Library) -> None:
    unchanged = watch([], [])
    assert unchanged is not None
    assert unchanged()


def test_it_holds_its_tensors_and_lets_them_go(kernel: Library) -> None:
    of = tensors(1)
    alive = weakref.ref(of[0])
    unchanged = watch(of, versions(of))
    assert unchanged is not None
    del of
    gc.collect()
    assert unchanged()
    assert alive() is not None
    del unchanged
    gc.collect()
    assert alive() is None


def test_without_the_library_there_is_none(
    kernel: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.OFF, "0")
    assert watch(tensors(), versions(tensors())) is None


def test_without_the_functions_of_torch_there_is_none(
    kernel: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FUNCTIONS", ("aoti_torch_get_data_ptr", "no_such_function"))
    module._functions_of_torch.cache_clear()
    try:
        assert watch(tensors(), versions(tensors())) is None
    finally:
        module._functions_of_torch.cache_clear()


def test_what_reads_something_else_than_python_is_not_used(kernel: Library) -> None:
    of = tensors()
    assert watch(of, [version + 1 for version in versions(of)]) is None
