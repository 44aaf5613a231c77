"""The short way of a case: the network is written as a graph, folded, and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from refold.errors import RefitError, VerificationError
from refold.fuzz import modular
from refold.fuzz.agreement import agree
from refold.fuzz.contract import Breach
from refold.fuzz.network import DrawnNetwork
from refold.fuzz.outcome import Alarm, Outcome
from refold.fuzz.program import Unsuited, program_of
from refold.graph.copies import with_tensors
from refold.graph.program import Program
from refold.passes import find_pipeline
from refold.rewrite.context import Context
from refold.rewrite.pipeline import Pipeline
from refold.stages import Clock, Folded, Judge, fold_program, report_of
from refold.verify.randomness import draws


def judge_graph(network: DrawnNetwork, outcome: Outcome) -> None:
    """Folds and compares a network; see :func:`refold.fuzz.cases.judge`."""
    setting = outcome.setting
    try:
        program = program_of(network, dynamic=setting.dynamic)
    except Unsuited:
        if not setting.dynamic:
            raise
        outcome.setting = setting = replace(setting, dynamic=False)
        program = program_of(network, dynamic=False)
    pipeline, context = find_pipeline(setting.pipeline), Context(growth=setting.growth)
    recorded = setting.recorded or setting.exact
    folded = fold_program(program, pipeline, context, Clock(), recorded=recorded)
    outcome.rules = rules_of(folded.passes)
    gm = folded.graph_module
    if draws(program.graph_module):
        return
    for inputs in _inputs(network, setting.dynamic):
        agree(program.graph_module, gm, inputs)
    if setting.recorded and folded.recipe is not None:
        _agree_refitted(network, program, folded, outcome.seed)
    if setting.exact and folded.recipe is not None and not modular.ORDERED & {*outcome.rules}:
        _judge_exactly(program, folded, outcome)
    if setting.verified:
        outcome.verified = True
        _verify(program, pipeline, folded)


def rules_of(passes: Sequence[Any]) -> tuple[str, ...]:
    """The rules that were applied."""
    return tuple(a.rule for run in passes for a in run.applied)


def _inputs(network: DrawnNetwork, dynamic: bool) -> list[list[torch.Tensor]]:
    own = network.example()
    if not dynamic:
        return [own, network.example(seed=1)]
    return [own, network.example(1, 1), network.example(3, 2, 1), network.example(5, 3, 2)]


def _agree_refitted(network: DrawnNetwork, program: Program, folded: Folded, seed: int) -> None:
    """Other weights through the recipe give what the original gives with them."""
    assert folded.recipe is not None
    names = dict(program.graph_module.named_parameters()) | dict(
        program.graph_module.named_buffers()
    )
    new = {
        name: replace(network.held[name], seed=seed + 1).make()
        for name in names if name in network.held
    }  # fmt: skip
    try:
        constants = folded.recipe.assign(new, None, strict=False).constants()
    except RefitError:
        return  # the fold depends on values of these weights, and the recipe says so
    agree(
        with_tensors(program.graph_module, new),
        with_tensors(folded.graph_module, constants),
        network.example(),
    )


def _judge_exactly(program: Program, folded: Folded, outcome: Outcome) -> None:
    assert folded.recipe is not None
    found = modular.judge_graphs(
        program.graph_module,
        folded.graph_module,
        folded.recipe.tape,
        (program.args, program.kwargs),
        seed=outcome.seed,
    )
    outcome.exact = found.kind
    if found.kind == modular.DIFFERENT:
        raise Breach(f"not equal modulo a prime: {found.reason}")


def _verify(program: Program, pipeline: Pipeline, folded: Folded) -> None:
    clock = Clock()
    judge_ = Judge(program, clock, verify=True)
    report = report_of(nn.Module(), program, folded, pipeline, "torch", clock, judge_.failures)
    try:
        judge_.judge_folded(folded, report, consumed=False)
    except VerificationError as error:
        raise Alarm(str(error)) from error
