"""What a trace took for granted about the sizes of its inputs, checked on each call.

``torch.export`` follows one path of the model's Python. Where that path depends on a size
(``if x.shape[0] == 3``), the trace holds for the sizes that take it, and for no others: the edited
graph would compute wrong numbers for those without a word. The conditions are expressions of
Python over the symbols of the input sizes.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

_SCOPE: dict[str, Any] = {**SYMPY_INTERP, "math": math, "inf": math.inf, "max": max, "min": min}
_NAME = re.compile(r"(?<![\w.])[A-Za-z_]\w*(?:\.\w+)*")


@dataclass(frozen=True)
class Guard:
    """One condition.

    Attributes:
        code: a Python expression over symbols, true where the trace holds.
        text: the same in the user's names.
        source: the line that asked for it; empty where it is not known.
        reason: what is known of the sizes that it refuses.
    """

    code: str
    text: str
    source: str = ""
    reason: str = ""

    @property
    def symbols(self) -> tuple[str, ...]:
        """The symbols that it is about, in the order of their names."""
        return names_in(self.code)

    def __str__(self) -> str:
        at = f", at {self.source}" if self.source else ""
        return f"{self.text}{at}{f' ({self.reason})' if self.reason else ''}"


@dataclass(frozen=True)
class DerivedSize:
    """A size that is no symbol but an expression of one, as ``2*s0``.

    Attributes:
        name: by which a call's size is known, beside the symbols.
        code: the expression.
        where: the dimension, in the user's names.
        root: the symbol, where no other input tells it.
        solved: that symbol from the size, as an expression over ``name``.
    """

    name: str
    code: str
    where: str
    root: str = ""
    solved: str = ""


@dataclass(frozen=True)
class Guards:
    """All conditions of a program, compiled to one function of the sizes."""

    conditions: tuple[Guard, ...] = ()
    derived: tuple[DerivedSize, ...] = ()

    def admits(self, sizes: Mapping[str, int]) -> bool:
        """Whether the trace holds for these sizes of symbols (all that the conditions name)."""
        return self._holds(sizes)

    def broken(self, sizes: Mapping[str, int]) -> Guard | None:
        """The first condition that sizes do not fulfil."""
        if self._holds(sizes):
            return None
        return next(g for g in self.conditions if not evaluate(g.code, sizes))

    def least(self, symbol: str) -> int:
        """The smallest size of a symbol: 1, or 2 where a condition on it alone refuses that."""
        alone = [g for g in self.conditions if g.symbols == (symbol,)]
        return 1 if all(evaluate(g.code, {symbol: 1}) for g in alone) else 2

    def with_roots(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The sizes of a call and those symbols that only expressions tell."""
        known = dict(sizes)
        for size in self.derived:
            if size.root:
                known[size.root] = int(evaluate(size.solved, known))
        return known

    def misfit(self, sizes: Mapping[str, int]) -> tuple[DerivedSize, int] | None:
        """The first derived size that is not what its expression gives, and what that is."""
        for size in self.derived:
            expected = int(evaluate(size.code, sizes))
            if sizes[size.name] != expected:
                return size, expected
        return None

    @functools.cached_property
    def _holds(self) -> Callable[[Mapping[str, int]], bool]:
        if not self.conditions:
            return lambda sizes: True
        text = " and ".join(f"({g.code})" for g in self.conditions)
        return lambda sizes: bool(evaluate(text, sizes))


def names_in(code: str) -> tuple[str, ...]:
    """The symbols that an expression names."""
    found = {n for n in _NAME.findall(code) if "." not in n and n not in _SCOPE}
    return tuple(sorted(found - {"and", "or", "not", "True", "False", "if", "else"}))


@functools.lru_cache(maxsize=1024)
def _function(code: str) -> tuple[tuple[str, ...], Callable[..., Any]]:
    names = names_in(code)
    return names, eval(f"lambda {', '.join(names)}: {code}", dict(_SCOPE))


def evaluate(code: str, sizes: Mapping[str, int]) -> Any:
    """The value of an expression of a guard; what divides by zero is false."""
    names, function = _function(code)
    try:
        return function(*[sizes[n] for n in names])
    except ZeroDivisionError:
        return False
