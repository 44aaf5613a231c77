"""The whole way of a case, as a user goes it: a module, traced, lowered to a target, called."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from refold.compiled import CompiledModel
from refold.compiler import compile_for_inference
from refold.errors import BackendError, FrontendError, RefitError
from refold.frontends.export import trace
from refold.fuzz import contract
from refold.fuzz.agreement import EXACT, Unclear, exceeds_rounding
from refold.fuzz.contract import Breach, relative_error
from refold.fuzz.graphs import rules_of
from refold.fuzz.network import DrawnNetwork
from refold.fuzz.outcome import Outcome, Setting
from refold.fuzz.program import Unsuited
from refold.fuzz.source import code_of, module_of

_SINGLE = 1e-4  # relative error that a runtime may make in float32 before rounding is looked at


def judge_module(network: DrawnNetwork, outcome: Outcome) -> None:
    """Compiles and compares a network; see :func:`refold.fuzz.cases.judge`."""
    setting = outcome.setting
    model, inputs = module_of(network), network.arguments(network.example())
    try:
        with torch.no_grad():
            model(*contract.copied(inputs))
    except RuntimeError as error:  # torch refuses a write into what is expanded, or an input twice
        raise Unsuited(f"eager PyTorch does not run it: {error}") from error
    model = module_of(network)
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
    outcome.rules = rules_of(compiled.report.passes)
    if "consume" in setting.options:
        _consumed(network, inputs, settings)
    if "recipe" in setting.options:
        _refitted(network, compiled, inputs, settings)


def _excluded(network: DrawnNetwork) -> list[str]:
    parts = sorted({s.part for s in network.steps})
    return [f"part{parts[0]}"] if "class Part" in code_of(network) else []


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
        return _compare_once(network, model, inputs, settings, setting)
    try:
        return contract.keeps_the_contract(
            model, inputs, settings, bound=1e-9, strided=False, refusing=True
        )
    except Breach as breach:
        _settle(network, inputs, settings, breach)
        raise


def _compare_once(
    network: DrawnNetwork,
    model: nn.Module,
    inputs: tuple[Any, ...],
    settings: dict[str, Any],
    setting: Setting,
) -> CompiledModel:
    """Compares one call of a runtime; an approximation has only to run."""
    compiled = compile_for_inference(model, inputs, verify=False, target=setting.target, **settings)
    got = compiled(*contract.copied(inputs))
    if setting.pipeline != "shift-add":
        bound = EXACT if setting.dtype is torch.float64 else _SINGLE
        _same(network, inputs, settings, got, setting.target, bound)
    return compiled


def _consumed(network: DrawnNetwork, inputs: tuple[Any, ...], settings: dict[str, Any]) -> None:
    own = {k: v for k, v in settings.items() if k not in ("recipe", "copy_weights")}
    compiled = compile_for_inference(module_of(network), inputs, verify=False, consume=True, **own)
    _same(network, inputs, settings, compiled(*contract.copied(inputs)), "consumed")


def _refitted(
    network: DrawnNetwork, compiled: Any, inputs: tuple[Any, ...], settings: dict[str, Any]
) -> None:
    other = replace(
        network,
        held={n: replace(d, seed=d.seed + 1) for n, d in network.held.items()},
    )
    try:
        fitted = compiled.refit(module_of(other).state_dict(), verify=False)
    except RefitError:
        return  # the fold depends on values of these weights, and the recipe says so
    _same(other, inputs, settings, fitted(*contract.copied(inputs)), "refitted")


def _same(
    network: DrawnNetwork,
    inputs: tuple[Any, ...],
    settings: dict[str, Any],
    got: Any,
    what: str,
    bound: float = EXACT,
) -> None:
    """Compares results with those of the module itself.

    Raises:
        Breach: they differ.
        Unclear: by no more than rounding may make.
    """
    want = module_of(network)(*contract.copied(inputs), **settings.get("bind", {}))
    try:
        error = relative_error(got, want)
        if error > bound:
            raise Breach(f"{what}: relative error {error:.1e}", error)
    except Breach as breach:
        _settle(network, inputs, settings, breach)
        raise


def _settle(
    network: DrawnNetwork, inputs: tuple[Any, ...], settings: dict[str, Any], breach: Breach
) -> None:
    """Looks at a breach of numbers again: rounding alone may have made it.

    Raises:
        Unclear: it may.
    """
    if breach.error is None:
        return
    program = trace(module_of(network), inputs, bind=settings.get("bind"))
    with torch.no_grad():
        want = program.graph_module(*contract.copied(inputs))
    if not exceeds_rounding(program.graph_module, inputs, want, breach):
        raise Unclear(f"{breach}, and rounding is to blame") from breach
