"""The whole way of a case, as a user goes it: a module, traced, lowered to a target, called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from refold.compiled import CompiledModel
from refold.compiler import compile_for_inference
from refold.errors import BackendError, FrontendError, RefitError, UsageError
from refold.frontends.export import trace
from refold.fuzz import contract
from refold.fuzz.agreement import EXACT, Unclear, exceeds_rounding
from refold.fuzz.contract import Breach, relative_error
from refold.fuzz.graphs import rules_of
from refold.fuzz.network import DrawnNetwork
from refold.fuzz.outcome import Outcome, Setting
from refold.fuzz.program import Unsuited
from refold.fuzz.source import code_of, module_of

_CALLS = 1e-9  # relative error of a float64 module over several calls, its state among them
_SINGLE = 1e-4  # relative error that a runtime may make in float32 before rounding is looked at


def judge_module(network: DrawnNetwork, outcome: Outcome) -> None:
    """Compiles and compares a network; see :func:`refold.fuzz.cases.judge`."""
    setting = outcome.setting
    case = _case_of(network, setting)
    try:
        with torch.no_grad():
            case.original(*contract.copied(case.inputs))
    except RuntimeError as error:  # torch refuses a write into what is expanded, or an input twice
        raise Unsuited(f"eager PyTorch does not run it: {error}") from error
    try:
        compiled = _compiled(case, setting)
    except FrontendError as error:
        raise Unsuited(f"not traced: {error}") from error
    except BackendError as error:
        raise Unsuited(f"not lowered: {error}") from error
    except UsageError as error:
        if "exclude" not in setting.options:
            raise
        raise Unsuited(f"its part computes nothing: {error}") from error
    outcome.rules = rules_of(compiled.report.passes)
    if "consume" in setting.options:
        consumed = compile_for_inference(
            module_of(network), case.inputs, verify=False, consume=True, **case.settings
        )
        case.compare(consumed, "consumed")
    if "recipe" in setting.options:
        _compare_refitted(case, compiled, setting)


@dataclass(frozen=True)
class _Case:
    """A network with the inputs and settings that it is compiled with."""

    network: DrawnNetwork
    inputs: tuple[Any, ...]
    settings: Mapping[str, Any]

    @property
    def original(self) -> Callable[..., Any]:
        """A fresh module, called without the bound inputs."""
        return contract.bound_to(module_of(self.network), self.settings)

    def compare(self, compiled: Callable[..., Any], what: str, bound: float = EXACT) -> None:
        """Compares one call with that of the module itself.

        Raises:
            Breach: they differ.
            Unclear: by no more than rounding may make.
        """
        got = compiled(*contract.copied(self.inputs))
        want = self.original(*contract.copied(self.inputs))
        try:
            error = relative_error(got, want)
            if error > bound:
                raise Breach(f"{what}: relative error {error:.1e}", error)
        except Breach as breach:
            self.settle(breach)
            raise

    def settle(self, breach: Breach) -> None:
        """Looks at a breach of numbers again: rounding alone may have made it.

        Raises:
            Unclear: it may.
        """
        if breach.error is None:
            return
        program = trace(module_of(self.network), self.inputs, bind=self.settings.get("bind"))
        with torch.no_grad():
            want = program.graph_module(*contract.copied(self.inputs))
        if not exceeds_rounding(program.graph_module, self.inputs, want, breach):
            raise Unclear(f"{breach}, and rounding is to blame") from breach


def _case_of(network: DrawnNetwork, setting: Setting) -> _Case:
    """What the options of a setting mean for a network."""
    inputs = network.arguments(network.example())
    settings: dict[str, Any] = {"pipeline": setting.pipeline}
    if "exclude" in setting.options and "class Part" in code_of(network):
        settings["exclude"] = [f"part{min(s.part for s in network.steps)}"]
    if "bind" in setting.options and len(inputs) > 1:
        settings["bind"] = {f"v{len(inputs) - 1}": inputs[-1]}
        inputs = inputs[:-1]
    if "sizes" in setting.options and not network.wraps:
        settings["dynamic_shapes"] = _any_sizes(inputs)
    for option in ("recipe", "copy_weights"):
        if option in setting.options:
            settings[option] = True
    return _Case(network, inputs, settings)


def _any_sizes(inputs: tuple[Any, ...]) -> Any:
    """Every dimension of the first input may vary, and the batch of the others, where they can."""
    auto = torch.export.Dim.AUTO
    shapes = [{0: auto} if v.dim() else {} for v in inputs]
    shapes[0] = dict.fromkeys(range(inputs[0].dim()), auto)
    return tuple(shapes)


def _compiled(case: _Case, setting: Setting) -> CompiledModel:
    """Compiles and compares: with the whole contract, or one call of another runtime."""
    if setting.target == "torch" and setting.pipeline != "shift-add":
        try:
            return contract.keeps_the_contract(
                module_of(case.network), case.inputs, case.settings, bound=_CALLS, strided=False,
                refusing=True,
            )  # fmt: skip
        except Breach as breach:
            case.settle(breach)
            raise
    compiled = compile_for_inference(
        module_of(case.network), case.inputs, verify=False, target=setting.target, **case.settings
    )
    if setting.pipeline == "shift-add":
        compiled(*contract.copied(case.inputs))  # an approximation has only to run
    else:
        case.compare(compiled, setting.target, _bound_of(setting))
    return compiled


def _bound_of(setting: Setting) -> float:
    return EXACT if setting.dtype is torch.float64 else _SINGLE


def _compare_refitted(case: _Case, compiled: CompiledModel, setting: Setting) -> None:
    """Other weights give what the module gives with them."""
    held = {n: replace(d, seed=d.seed + 1) for n, d in case.network.held.items()}
    other = replace(case, network=replace(case.network, held=held))
    try:
        fitted = compiled.refit(module_of(other.network).state_dict(), verify=False)
    except RefitError:
        return  # the fold depends on values of these weights, and the recipe says so
    other.compare(fitted, "refitted", _bound_of(setting))
