"""How far drawn networks fold, and what is declined in them: no change of a rule goes unseen.

The networks are those of the fuzzer, short way. Each line of a golden is one of them; where the
fuzzer draws otherwise, or a rule folds further, they are written anew
(``tools/regenerate_goldens.py tests/fuzz``).
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter

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
from tests import golden

BATCHES, SIZE = 100, 10
_SYMBOL = re.compile(r"\bs\d+\b")


@pytest.mark.slow
@pytest.mark.drawn
@pytest.mark.parametrize("batch", range(BATCHES))
def test_drawn_networks_fold_as_far_as_their_golden(batch: int) -> None:
    lines = [line_of(seed) for seed in range(batch * SIZE, (batch + 1) * SIZE)]
    golden.check(f"drawn/{batch:02}", "\n".join(lines) + "\n")


def line_of(seed: int) -> str:
    """Folds and judges the network of a seed."""
    setting = setting_of(seed, Mix(modules=0.0))
    network = network_for(seed, setting)
    try:
        program = _program(network, setting.dynamic)
    except Unsuited as unsuited:
        return f"{seed}: {unsuited}"
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
