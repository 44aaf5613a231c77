"""What the exact judge says of each rule, on the networks in which bugs are planted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import fx

from refold.frontends.export import trace
from refold.fuzz.modular import DIFFERENT, EQUAL, ORDERED, Judgement, judge_graphs
from refold.graph.copies import copy_sharing_tensors
from refold.passes import PASSES
from refold.refit.recipe import record
from refold.rewrite.pipeline import Pipeline
from refold.rewrite.result import Decline, Pass
from tests.examples import few
from tests.planted import Only, Planted
from tests.test_planted_bugs import CASES, EVERY, Case

PAGE = Path(__file__).parents[2] / "docs/trust.md"
UNSERVED = {
    "clean-up/rounded": "whole numbers are whole by their order, which residues have not",
    "clean-up/clamps": "of two bounds the order decides, which residues have not",
    "substitute-shift-add": "it approximates: a code is compared with its weights instead",
}


class Planter:
    """A network in which a rule fires, and what the judge says of the rule there."""

    def __init__(self, rule: str, case: Case) -> None:
        torch.manual_seed(0)
        self._rule, self._case = Only(case.instead or EVERY[rule], rule), case
        x = case.inputs()
        self._x = x.double() if x.is_floating_point() else x
        self._program = trace(case.build().double().eval(), (self._x,))

    def judged(self, bug: int | None) -> tuple[Judgement, str]:
        """Of the rule, or of one of the bugs in it, and its name; none where there is no such."""
        planted = None if bug is None else Planted(self._rule, bug)
        gm, before = self._start()
        passes: tuple[Pass, ...] = (*before, self._rule if planted is None else planted)
        _, recipe = record(self._program, gm, lambda _: Pipeline("one", passes).run(gm))
        call = ((self._x,), {})
        found = judge_graphs(self._program.graph_module, gm, recipe.tape, call)
        return found, "" if planted is None else planted.bug

    def _start(self) -> tuple[fx.GraphModule, tuple[Pass, ...]]:
        original = copy_sharing_tensors(self._program.graph_module)
        if self._case.call:
            return self._case.graph(original), ()
        return original, tuple(PASSES[name]() for name in self._case.before)


def rows() -> dict[str, tuple[str, str]]:
    """The page's table: by rule, what the judge says of its rewrites, and why nothing."""
    found = re.findall(r"^\| `([^|]+)` \| (equal|unjudged) \| ([^|]*) ?\|$", PAGE.read_text(), re.M)
    return {rule: (kind, why.strip()) for rule, kind, why in found}


def test_the_page_has_every_rule() -> None:
    assert list(rows()) == list(CASES)
    assert UNSERVED.keys() > ORDERED
    unserved = {rule: why for rule, (kind, why) in rows().items() if kind != EQUAL}
    assert unserved == UNSERVED


@pytest.mark.parametrize("rule", few((rule for rule in CASES if rule not in UNSERVED), 4))
def test_right_rewrites_are_equal_and_planted_bugs_differ(
    rule: str, failures: list[Decline]
) -> None:
    for case in CASES[rule]:
        planter = Planter(rule, case)
        assert planter.judged(None)[0] == Judgement(EQUAL)
        kinds = []
        for bug in range(4):
            found, name = planter.judged(bug)
            if name and not failures:
                kinds.append(found.kind)
            failures.clear()
        assert DIFFERENT in kinds
        assert kinds.count(DIFFERENT) >= len(kinds) - 1, kinds
