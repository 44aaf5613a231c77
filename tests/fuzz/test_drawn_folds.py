"""How far drawn networks fold, and what is declined in them: no change of a rule goes unseen.

The networks are those of the fuzzer, short way; ``tests/golden/drawn_folds.txt`` has a line for
each. Where the fuzzer draws otherwise, or a rule folds further, ``tools/drawn_folds.py`` writes the
lines anew: review the difference like code.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from pathlib import Path

import pytest
from torch import fx

from refold.fuzz.agreement import Unclear, agree
from refold.fuzz.cases import Mix, network_for, setting_of
from refold.fuzz.network import DrawnNetwork
from refold.fuzz.program import Unsuited, program_of
from refold.graph.nodes import is_tensor
from refold.graph.ops import op_name
from refold.graph.program import Program
from refold.passes import find_pipeline
from refold.rewrite.context import Context
from refold.stages import Clock, Folded, fold_program
from refold.verify.randomness import draws

GOLDEN = Path(__file__).parent.parent / "golden" / "drawn_folds.txt"
LINES = {int(line.partition(",")[0]): line for line in GOLDEN.read_text().splitlines()}
_SYMBOL = re.compile(r"\bs\d+\b")


@pytest.mark.slow
@pytest.mark.drawn
@pytest.mark.parametrize("seed", LINES)
def test_a_drawn_network_folds_as_far_as_its_golden(seed: int) -> None:
    assert line_of(seed) == LINES[seed], "if it is meant, run tools/drawn_folds.py"


def line_of(seed: int) -> str:
    """Folds and judges the network of a seed.

    Raises:
        Unsuited: the network cannot be written as a graph.
        Breach: it is folded to what computes something else.
    """
    setting = setting_of(seed, Mix(modules=0.0))
    network = network_for(seed, setting)
    program = _program(network, setting.dynamic)
    pipeline = find_pipeline(setting.pipeline)
    folded = fold_program(program, pipeline, Context(growth=setting.growth), Clock())
    if not draws(program.graph_module):
        for inputs in (network.example(), network.example(seed=1)):
            with contextlib.suppress(Unclear):
                agree(program.graph_module, folded.graph_module, inputs)
    return f"{seed}, {pipeline.name}: {described(folded)}"


def _program(network: DrawnNetwork, dynamic: bool) -> Program:
    try:
        return program_of(network, dynamic=dynamic)
    except Unsuited:
        if not dynamic:
            raise
        return program_of(network, dynamic=False)


def described(folded: Folded) -> str:
    """The calls that are left, the rules that were applied, and what was declined."""
    graph = folded.graph_module.graph
    calls = [_call(n) for n in graph.nodes if n.op == "call_function"]
    rules = Counter(a.rule for run in folded.passes for a in run.applied)
    declines = Counter(f"{d.rule}: {d.reason}" for run in folded.passes for d in run.declined)
    applied = ", ".join(f"{n} {rule}" for rule, n in sorted(rules.items()))
    declined = "; ".join(f"{n} {text}" for text, n in sorted(declines.items()))
    return f"{' '.join(calls)} | {applied} | {declined}"


def _call(node: fx.Node) -> str:
    shape = list(node.meta["val"].shape) if is_tensor(node) else ""
    return f"{op_name(node)}{_SYMBOL.sub('n', str(shape))}".replace(" ", "")
