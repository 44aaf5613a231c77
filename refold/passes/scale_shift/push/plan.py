"""The plan of one path: what the scale and shift cross, what takes them, what is to be written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import fx

from refold.errors import Declined
from refold.passes.scale_shift.push.factor import Factor
from refold.passes.scale_shift.push.region import LONGEST
from refold.rewrite.cost import FREE, Price
from refold.rewrite.edit import Edit

Write = Callable[[Edit], None]


@dataclass(frozen=True)
class Step:
    """One call or constant that the scale and shift come to.

    Attributes:
        node: the call, or the constant.
        crosses: they go on behind it; otherwise it takes them in, and its path ends.
        keeps: a reader that takes them in computes what it did.
        goes: another scale-shift, which is pushed on with them and leaves the graph.
    """

    node: fx.Node
    crosses: bool
    keeps: bool = False
    goes: bool = False

    @property
    def stays(self) -> bool:
        """A call that is in the graph afterwards, too, and has another value or other weights."""
        return self.node.op == "call_function" and not self.goes


@dataclass(frozen=True)
class Plan:
    """A whole path, before anything changes.

    Attributes:
        steps: what the scale and shift come to, in the order in which they do.
        writes: what is to be done, in order, through the door.
        spent: bytes by which it grows the constants.
    """

    steps: tuple[Step, ...]
    writes: tuple[Write, ...]
    spent: int

    @property
    def touched(self) -> list[fx.Node]:
        """The calls that stay, with another value or other weights."""
        return [step.node for step in self.steps if step.stays]

    @property
    def removed(self) -> list[fx.Node]:
        return [step.node for step in self.steps if step.goes]

    @property
    def crossed(self) -> list[fx.Node]:
        return [step.node for step in self.steps if step.crosses]

    @property
    def takers(self) -> list[fx.Node]:
        return [step.node for step in self.steps if not step.crosses]


@contextmanager
def came_to(node: fx.Node) -> Iterator[None]:
    """What is declined in the block is declined with the scale and shift come as far as a call."""
    try:
        yield
    except Declined as reason:
        reason.node = reason.node or node
        raise


Mark = tuple[
    int, int, int, Price,
    dict[fx.Node, tuple[fx.Node, Factor]], dict[tuple[fx.Node, fx.Node], Factor],
]  # fmt: skip


class Draft:
    """A plan that one direction is making: it can go back to a mark and try another way.

    Attributes:
        parts: per tensor that several paths reach through disjoint slices, its reader on the path
            and the joint factor; it is pushed once, when every path has arrived.
        shared: what each reader of a tensor wants of the whole of it, where all readers are on the
            path.
        price: what the plan adds to the time that the graph takes.
        spent: bytes by which it grows the constants.
    """

    def __init__(self) -> None:
        self.parts: dict[fx.Node, tuple[fx.Node, Factor]] = {}
        self.shared: dict[tuple[fx.Node, fx.Node], Factor] = {}
        self.price: Price = FREE
        self.spent = 0
        self._steps: list[Step] = []
        self._writes: list[Write] = []
        self._met: set[fx.Node] = set()  # the calls that stay
        self._length = 0  # calls between the scale-shift and where the plan has come to

    def done(self) -> Plan:
        return Plan(tuple(self._steps), tuple(self._writes), self.spent)

    def enter(self, node: fx.Node) -> None:
        """One call further on a path, which is planned by recursion; ``leave`` undoes it."""
        if self._length == LONGEST:
            raise Declined(f"{node.name} is more than {LONGEST} calls away")
        self._length += 1

    def leave(self) -> None:
        self._length -= 1

    def cross(self, node: fx.Node) -> None:
        """The scale and shift go on behind a call."""
        self._add(Step(node, crosses=True))

    def carry_off(self, node: fx.Node) -> None:
        """They go on behind another scale-shift, and take it with them."""
        self._steps.append(Step(node, crosses=True, goes=True))

    def take(self, node: fx.Node, *, keeps: bool = False) -> None:
        """A call takes the scale and shift in; with ``keeps`` it computes what it did."""
        self._add(Step(node, crosses=False, keeps=keeps))

    def take_constant(self, node: fx.Node) -> None:
        """A copy of a constant takes them in: several calls may each read one of their own."""
        self._steps.append(Step(node, crosses=False))

    def later(self, write: Write) -> None:
        """What is to be done when the plan is carried out."""
        self._writes.append(write)

    def check_new(self, node: fx.Node) -> None:
        """Refuses to come to a call twice."""
        if node in self._met:
            raise Declined(f"the path reaches {node.name} twice")

    def has(self, node: fx.Node) -> bool:
        """True if the plan has come to a call already."""
        return node in self._met

    def _add(self, step: Step) -> None:
        self.check_new(step.node)
        self._met.add(step.node)
        self._steps.append(step)

    def mark(self) -> Mark:
        lengths = (len(self._steps), len(self._writes))
        return *lengths, self.spent, self.price, dict(self.parts), dict(self.shared)

    def rewind(self, mark: Mark) -> None:
        del self._steps[mark[0] :], self._writes[mark[1] :]
        self.spent, self.price, self.parts, self.shared = mark[2:]
        self._met = {step.node for step in self._steps if step.stays}
