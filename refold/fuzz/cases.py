"""One case of a run: a network of a seed, how it is compiled, and what is found of it.

Most cases are graphs: the network is written as the graph that a trace would leave, which is a
hundred times faster than tracing. The others go the whole way of a user: a module, traced, lowered
to a target, called, saved state and all.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from refold.compiled import CompiledModel
from refold.compiler import compile_for_inference
from refold.errors import BackendError, FrontendError, RefitError, VerificationError
from refold.frontends.export import trace
from refold.fuzz import contract, modular
from refold.fuzz.contract import Breach, relative_error
from refold.fuzz.generate import network_of
from refold.fuzz.network import DrawnNetwork, Unsuited, program_of
from refold.graph.copies import with_tensors
from refold.graph.program import Program
from refold.passes import find_pipeline
from refold.rewrite.context import Context
from refold.rewrite.pipeline import Pipeline
from refold.rewrite.result import Decline, watch_failures
from refold.stages import Clock, Folded, Judge, fold_program, report_of
from refold.verify.randomness import draws

WRONG, CRASH, ALARM, UNJUDGED, REFUSED = "wrong", "crash", "false alarm", "unjudged", "refused"

# Relative errors: of a float64 fold, and what rounding does to the original itself, times this.
_EXACT = 1e-10
_ROUNDINGS = 100.0
_NOISES = 3
_ILL = 1e-2  # where rounding changes a result by more, nothing can be said
_SINGLE_TARGETS = 1e-3  # what runtimes that compute in float32 are allowed


@dataclass(frozen=True)
class Setting:
    """How a case is compiled.

    Attributes:
        way: ``graph``, or ``module`` for the whole way.
        pipeline: the passes, as a user names them.
        dtype: of the network.
        dynamic: whether sizes may vary.
        growth: as ``max_growth``.
        recorded: with a recipe; other weights are then tried.
        verified: whether verification runs as well, to count its false alarms.
        exact: whether the exact judge looks as well.
        target: where a module runs.
        options: for :func:`refold.compile_for_inference`.
    """

    way: str = "graph"
    pipeline: str = "default"
    dtype: torch.dtype = torch.float64
    dynamic: bool = False
    growth: float | None = None
    recorded: bool = False
    verified: bool = False
    exact: bool = False
    target: str = "torch"
    options: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What one case found.

    Attributes:
        seed: of the network.
        setting: how it was compiled.
        kind: what is wrong, or why nothing can be said; empty if all is right.
        what: the same, in a sentence.
        operators: the names of what the network called.
        rules: the rules that were applied.
        verified: whether verification ran.
        exact: what the exact judge said: equal, or why nothing.
    """

    seed: int
    setting: Setting
    kind: str = ""
    what: str = ""
    operators: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    verified: bool = False
    exact: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Mix:
    """The shares of settings that a run draws.

    Attributes:
        modules: the share that goes the whole way of a user.
        pipeline: the one to try, or ``None`` for all.
        targets: where modules run.
    """

    modules: float = 0.03
    pipeline: str | None = None
    targets: tuple[str, ...] = ("torch",)

    @property
    def arguments(self) -> str:
        """The options of ``refold fuzz`` that say the same, where they are not the default."""
        said = f" --modules {self.modules}" if self.modules != Mix.modules else ""
        said += f" --pipeline {self.pipeline}" if self.pipeline else ""
        if self.targets != Mix.targets:
            said += "".join(f" --target {t}" for t in self.targets)
        return said


def setting_of(seed: int, mix: Mix) -> Setting:
    """How the case of a seed is compiled."""
    rng = random.Random(f"setting {seed}")
    pipeline = mix.pipeline or rng.choice(("default", "default", "default", "min-nodes"))
    if rng.random() < mix.modules:
        options = [o for o in ("bind", "consume", "exclude", "recipe", "sizes", "copy_weights")
                   if rng.random() < 0.15]  # fmt: skip
        if "consume" in options:
            options = [o for o in options if o not in ("recipe", "copy_weights")]
        if mix.pipeline is None and rng.random() < 0.1:
            pipeline = "shift-add"
        return Setting("module", pipeline, options=tuple(options), target=rng.choice(mix.targets))
    dtype = torch.float64
    if rng.random() < 0.12:
        dtype = rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    return Setting(
        "graph",
        pipeline,
        dtype,
        dynamic=rng.random() < 0.35,
        growth=rng.choice((None, None, None, None, float("inf"), 1.0)),
        recorded=rng.random() < 0.06,
        verified=rng.random() < 0.1,
        exact=dtype is torch.float64 and rng.random() < 0.1,
    )


def network_for(seed: int, setting: Setting) -> DrawnNetwork:
    """The network of a seed, as its setting needs it."""
    return network_of(seed, effects=setting.way == "module", dtype=setting.dtype)


def run_case(seed: int, mix: Mix) -> Outcome:
    """Draws, compiles and judges the case of a seed."""
    setting = setting_of(seed, mix)
    try:
        network = network_for(seed, setting)
    except Exception as error:  # of the fuzzer itself: it is seen, and the others go on
        return Outcome(seed, setting, CRASH, f"nothing was drawn: {type(error).__name__}: {error}")
    return judge(seed, network, setting)


def judge(seed: int, network: DrawnNetwork, setting: Setting) -> Outcome:
    """Compiles and judges one network."""
    outcome = Outcome(seed, setting, operators=tuple(network.operators))
    failures: list[Decline] = []
    start = time.process_time()
    try:
        with watch_failures(failures.append), torch.no_grad():
            way = _of_graph if setting.way == "graph" else _of_module
            way(network, outcome)
    except Breach as breach:
        outcome.kind, outcome.what = WRONG, str(breach)
    except _Unclear as unclear:
        outcome.kind, outcome.what = UNJUDGED, str(unclear)
    except _Alarm as alarm:
        outcome.kind, outcome.what = ALARM, str(alarm)
    except Unsuited as unsuited:
        outcome.kind, outcome.what = REFUSED, str(unsuited)
    except Exception as error:  # what a fuzzer is for: any of them is a fault
        outcome.kind, outcome.what = CRASH, _named(error)
    if failures and outcome.kind != WRONG:
        first = failures[0]
        outcome.kind, outcome.what = CRASH, f"{first.rule} at {first.node}: {first.reason}"
    outcome.seconds = time.process_time() - start
    return outcome


def _named(error: BaseException) -> str:
    trace = error.__traceback__
    place = ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/refold/" in file and "/refold/fuzz/" not in file:
            place = f" at {file.rpartition('/refold/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__}{place}: {' '.join(str(error).split())[:300]}"


class _Unclear(Exception):
    """Rounding alone changes the result so much that nothing can be said."""


# --- graphs ---------------------------------------------------------------------------------------


def _of_graph(network: DrawnNetwork, outcome: Outcome) -> None:
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
    outcome.rules = _rules(folded.passes)
    gm = folded.graph_module
    if draws(program.graph_module):
        return
    for inputs in _inputs(network, setting.dynamic):
        _agree(program.graph_module, gm, inputs)
    if setting.recorded and folded.recipe is not None:
        _agree_refitted(network, program, folded, outcome.seed)
    if setting.exact and folded.recipe is not None:
        _judge_exactly(program, folded, outcome)
    if setting.verified:
        outcome.verified = True
        _verify(program, pipeline, folded)


def _rules(passes: Sequence[Any]) -> tuple[str, ...]:
    return tuple(a.rule for run in passes for a in run.applied)


def _inputs(network: DrawnNetwork, dynamic: bool) -> list[list[torch.Tensor]]:
    own = network.example()
    if not dynamic:
        return [own, network.example(seed=1)]
    return [own, network.example(1, 1), network.example(3, 2, 1), network.example(5, 3, 2)]


def _agree(original: fx.GraphModule, folded: fx.GraphModule, inputs: list[torch.Tensor]) -> None:
    """Compares two graphs on inputs.

    Raises:
        Breach: they differ by more than rounding.
    """
    try:
        want = original(*contract.copied(inputs))
    except (RuntimeError, ValueError, IndexError):
        return  # the network does not take these sizes
    given = contract.copied(inputs)
    got = folded(*given)
    if not all(map(_identical, given, inputs)):
        raise Breach("an input was written")
    exact = all(v.dtype in (torch.float64, torch.complex128) for v in contract.tensors(want)
                if v.is_floating_point() or v.is_complex())  # fmt: skip
    try:
        error = relative_error(got, want)
    except Breach:
        if _flips(original, inputs, want):
            raise _Unclear("a step function, or infinity, within rounding of its edge") from None
        raise
    if error <= (_EXACT if exact else 0.0):
        return
    own = _noise(original, inputs, want)
    if own > _ILL:
        raise _Unclear(f"rounding alone changes the results by {own:.0e}")
    if error > max(_EXACT, _ROUNDINGS * own):
        sizes = [tuple(v.shape) for v in inputs]
        raise Breach(f"relative error {error:.1e} on {sizes}; rounding makes {own:.0e}")


def _identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b)


class _Noisy(fx.Interpreter):
    """Runs a graph whose every result is off by a rounding or two of its dtype."""

    def __init__(self, gm: fx.GraphModule, seed: int) -> None:
        super().__init__(gm)
        self._generator = torch.Generator().manual_seed(seed)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        return result if n.op == "output" else pytree.tree_map(self._off, result)

    def _off(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        noise = torch.rand(value.shape, generator=self._generator, dtype=torch.float64) * 2 - 1
        eps = torch.finfo(value.dtype).eps
        return (value.double() * (1 + 2 * eps * noise)).to(value.dtype)


def _noise(gm: fx.GraphModule, inputs: list[torch.Tensor], want: Any) -> float:
    """How far roundings take the results of a graph: the largest relative error of a few runs."""
    worst = 0.0
    for seed in range(_NOISES):
        try:
            worst = max(worst, relative_error(_Noisy(gm, seed).run(*contract.copied(inputs)), want))
        except (Breach, RuntimeError):
            return float("inf")
    return worst


def _flips(gm: fx.GraphModule, inputs: list[torch.Tensor], want: Any) -> bool:
    return _noise(gm, inputs, want) == float("inf")


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
    _agree(
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


class _Alarm(Exception):
    """Verification refuses what is right."""


def _verify(program: Program, pipeline: Pipeline, folded: Folded) -> None:
    clock = Clock()
    judge_ = Judge(program, clock, verify=True)
    report = report_of(nn.Module(), program, folded, pipeline, "torch", clock, judge_.failures)
    try:
        judge_.judge_folded(folded, report, consumed=False)
    except VerificationError as error:
        raise _Alarm(str(error)) from error


# --- modules --------------------------------------------------------------------------------------


def _of_module(network: DrawnNetwork, outcome: Outcome) -> None:
    setting = outcome.setting
    model, inputs = network.module(), network.arguments(network.example())
    try:
        with torch.no_grad():
            model(*contract.copied(inputs))
    except RuntimeError as error:  # torch refuses a write into what is expanded, or an input twice
        raise Unsuited(f"eager PyTorch does not run it: {error}") from error
    model = network.module()
    settings: dict[str, Any] = {"pipeline": setting.pipeline}
    names = _excluded(network) if "exclude" in setting.options else []
    if names:
        settings["exclude"] = names
    if "bind" in setting.options and len(inputs) > 1:
        settings["bind"] = {f"v{len(inputs) - 1}": inputs[-1]}
        inputs = inputs[:-1]
    if "sizes" in setting.options and not network.wraps:
        settings["dynamic_shapes"] = _any_sizes(inputs)
    for option in ("recipe", "copy_weights"):
        if option in setting.options:
            settings[option] = True
    try:
        compiled = _compile_and_compare(network, model, inputs, settings, setting)
    except FrontendError as error:
        raise Unsuited(f"not traced: {error}") from error
    except BackendError as error:
        raise Unsuited(f"not lowered: {error}") from error
    outcome.rules = _rules(compiled.report.passes)
    if "consume" in setting.options:
        _consumed(network, inputs, settings)
    if "recipe" in setting.options:
        _refitted(network, compiled, inputs, settings)


def _excluded(network: DrawnNetwork) -> list[str]:
    parts = sorted({s.part for s in network.steps})
    return [f"part{parts[0]}"] if "class Part" in network.code else []


def _any_sizes(inputs: tuple[Any, ...]) -> Any:
    """Every dimension of the first input may vary, and the batch of the others, where they can."""
    auto = torch.export.Dim.AUTO
    shapes = [{0: auto} if v.dim() else {} for v in inputs]
    shapes[0] = dict.fromkeys(range(inputs[0].dim()), auto)
    return tuple(shapes)


def _compile_and_compare(
    network: DrawnNetwork,
    model: nn.Module,
    inputs: tuple[Any, ...],
    settings: dict[str, Any],
    setting: Setting,
) -> CompiledModel:
    if setting.pipeline == "shift-add" or setting.target != "torch":
        return _compare_roughly(network, model, inputs, settings, setting)
    try:
        return contract.keeps_the_contract(
            model,
            inputs,
            settings,
            bound=1e-9,
            strided=False,
            fixed=None if "sizes" in setting.options else False,
        )
    except Breach as breach:
        if "relative error" in str(breach) or "NaN" in str(breach):
            _settle(network, inputs, settings, breach)
        raise


def _settle(
    network: DrawnNetwork, inputs: tuple[Any, ...], settings: dict[str, Any], breach: Breach
) -> None:
    """Looks at a breach of numbers again: rounding alone may have made it.

    Raises:
        _Unclear: it may.
    """
    program = trace(network.module(), inputs, bind=settings.get("bind"))
    flat = contract.tensors(inputs)
    with torch.no_grad():
        want = program.graph_module(*contract.copied(inputs))
    if _noise(program.graph_module, list(flat), want) > _EXACT:
        raise _Unclear(f"{breach}, and rounding is to blame") from breach


def _compare_roughly(
    network: DrawnNetwork,
    model: nn.Module,
    inputs: tuple[Any, ...],
    settings: dict[str, Any],
    setting: Setting,
) -> CompiledModel:
    """Compares one call; an approximation has only to run, and a runtime computes in float32."""
    compiled = compile_for_inference(model, inputs, verify=False, target=setting.target, **settings)
    want = network.module()(*contract.copied(inputs), **settings.get("bind", {}))
    got = compiled(*contract.copied(inputs))
    if setting.pipeline == "shift-add":
        return compiled
    error = relative_error(got, want)
    if error > _SINGLE_TARGETS:
        _settle(network, inputs, settings, Breach(f"relative error {error:.1e}"))
        raise Breach(f"{setting.target}: relative error {error:.1e}")
    return compiled


def _consumed(network: DrawnNetwork, inputs: tuple[Any, ...], settings: dict[str, Any]) -> None:
    own = {k: v for k, v in settings.items() if k not in ("recipe", "copy_weights")}
    compiled = compile_for_inference(network.module(), inputs, verify=False, consume=True, **own)
    want = network.module()(*contract.copied(inputs), **settings.get("bind", {}))
    error = relative_error(compiled(*contract.copied(inputs)), want)
    if error > _EXACT:
        _settle(network, inputs, settings, Breach(f"relative error {error:.1e}"))
        raise Breach(f"consumed: relative error {error:.1e}")


def _refitted(
    network: DrawnNetwork, compiled: Any, inputs: tuple[Any, ...], settings: dict[str, Any]
) -> None:
    other = replace(
        network,
        held={n: replace(d, seed=d.seed + 1) for n, d in network.held.items()},
    )
    try:
        fitted = compiled.refit(other.module().state_dict(), verify=False)
    except RefitError:
        return
    want = other.module()(*contract.copied(inputs), **settings.get("bind", {}))
    error = relative_error(fitted(*contract.copied(inputs)), want)
    if error > _EXACT:
        _settle(other, inputs, settings, Breach(f"relative error {error:.1e}"))
        raise Breach(f"refitted: relative error {error:.1e}")
