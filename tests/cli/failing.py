"""Makers of models that do not make one, for the tests of the command line."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from torch import Tensor, nn

from tests.small_nets import ConvNet


def raises() -> NoReturn:
    _inner()


def _inner() -> NoReturn:
    raise ValueError("no weights for you")


def exits() -> NoReturn:
    sys.exit(7)


def exits_with_nothing() -> NoReturn:
    raise SystemExit


def interrupted() -> NoReturn:
    raise KeyboardInterrupt


class _OfTheirOwn(BaseException):
    pass


def raises_its_own() -> NoReturn:
    raise _OfTheirOwn("odd")


def recurses() -> Any:
    return recurses()


def no_memory() -> NoReturn:
    raise MemoryError


def asserts() -> None:
    assert not ConvNet


def a_type_error_inside() -> int:
    return len(5)  # type: ignore[arg-type]


def reads_a_file() -> Any:
    with open("/nonexistent/weights.pt") as file:
        return file.read()


class FailsInInit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        raise RuntimeError("in init")


def fails_in_eval() -> nn.Module:
    class Fails(nn.Module):
        def eval(self) -> NoReturn:
            raise RuntimeError("in eval")

    return Fails()


class _NoAttributes:
    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError(f"asked for {name}")


no_attributes = _NoAttributes()
number = 5


def takes_one(model: nn.Module) -> nn.Module:
    return model


def makes_nothing() -> None:
    pass


def makes_a_class() -> type:
    return ConvNet


def makes_two() -> tuple[nn.Module, nn.Module]:
    return ConvNet(), ConvNet()


async def makes_later() -> nn.Module:
    return ConvNet()


class Prints(ConvNet):
    def __init__(self) -> None:
        print("hello from the maker")  # noqa: T201
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        print("hello from forward")  # noqa: T201
        return super().forward(x)
