"""What one compilation produced, and the same with other weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx

from refold.backends.base import Artifact, Runner, Target
from refold.errors import RefitError, UsageError
from refold.graph import constants, provenance
from refold.graph.copies import copy_sharing_tensors, with_tensors
from refold.inputs import InputCheck
from refold.refit.recipe import Recipe, as_weights, listed
from refold.report.report import Report
from refold.verify.compare import verify_widely
from refold.verify.references import references
from refold.weights.shared import SharedWeights, copy_shared

if TYPE_CHECKING:
    from refold.graph.program import Program

_INPUTS = 1  # what refitted numbers are compared on: the recipe itself is exact


@dataclass(frozen=True)
class Kept:
    """What a compiled model keeps to take new weights: its recipe, and the unfolded program.

    The program has the first weights; the present ones are the recipe's.
    """

    recipe: Recipe
    program: Program
    original: fx.GraphModule


@dataclass(frozen=True)
class Compilation:
    """Everything that one compilation produced; ``inputs`` are the files that it was made of."""

    graph_module: fx.GraphModule
    check: InputCheck
    target: Target
    artifact: Artifact
    runner: Runner
    report: Report
    weights: dict[str, dict[str, Any]]
    shared: SharedWeights
    options: Any = None
    kept: Kept | None = None
    copies_weights: bool = False
    inputs: tuple[Path, ...] = ()

    @property
    def state(self) -> list[str]:
        """Names of the tensors that calls write."""
        written = constants.written(self.graph_module.graph)
        return [str(n.target) for n in written if n.op == "get_attr"]

    def copied(self) -> Compilation:
        """The same with state of its own; what no call writes is shared."""
        if not self.state:
            return self
        content = self.artifact.content
        runs = _with_own_state(content.graph_module)
        same = content.graph_module is self.graph_module
        gm = runs if same else _with_own_state(self.graph_module)
        artifact = replace(self.artifact, content=replace(content, graph_module=runs))
        runner = self.target.load(artifact, self.options)
        return replace(self, graph_module=gm, artifact=artifact, runner=runner)


def _with_own_state(gm: fx.GraphModule) -> fx.GraphModule:
    copy = copy_sharing_tensors(gm)
    constants.own_written(copy)
    return copy


def refit(
    done: Compilation,
    weights: Any,
    bind: Mapping[str, Any] | None,
    *,
    strict: bool,
    verify: bool,
) -> Compilation:
    """The compilation with other weights; see :meth:`refold.CompiledModel.refit`."""
    kept, target = done.kept, done.target
    if kept is None:
        raise UsageError("the model has no recipe: compile it with recipe=True")
    if not target.refits:
        raise UsageError(
            f"target {target.name!r} cannot take new weights: compile again, or refit for 'torch', "
            "'onnx' or 'ort'"
        )
    recipe = kept.recipe.assign(as_weights(weights), bind, strict=strict)
    tensors = recipe.constants()
    missing = constants.stored(done.graph_module).keys() - tensors.keys()
    if missing:
        raise RefitError(f"how {listed(missing)} was computed is not known: compile again")
    gm = with_tensors(done.graph_module, tensors)
    if done.copies_weights:
        copy_shared(gm, recipe.values.values())
    artifact = target.refit(done.artifact, gm, tensors)
    runner = target.load(artifact, done.options)
    note = "refitted: these are new weights in the graph that was folded from others"
    report = replace(done.report, notes=(*done.report.notes, note), numerics=None,
                     artifact_numerics=None)  # fmt: skip
    if verify:
        original = with_tensors(kept.original, recipe.values)
        known = references(original, kept.program, most=_INPUTS)
        if artifact.leaves_inputs:
            known = known.leaving_inputs()
        result, known = verify_widely(original, runner, kept.program, known)
        report.numerics = result.to_dict()  # of what runs, which is the graph or was made from it
    return replace(
        done,
        graph_module=gm,
        artifact=artifact,
        runner=runner,
        report=report,
        kept=Kept(recipe, kept.program, kept.original),
        shared=SharedWeights(gm, recipe.values.values()),
    )


def weight_origins(gm: fx.GraphModule, original: fx.GraphModule) -> dict[str, dict[str, Any]]:
    """For each constant of the folded graph: original keys, module paths, rules."""
    sources = {n.name: n for n in original.graph.nodes}
    keys = {str(n.target) for n in original.graph.nodes if n.op == "get_attr"}
    constant = constants.constant_nodes(original.graph)
    out: dict[str, dict[str, Any]] = {}
    for node in gm.graph.nodes:
        if node.op != "get_attr" or not node.users:
            continue
        name = str(node.target)
        if name in keys:
            out[name] = {"from": [name], "modules": [provenance.module_path(node)], "rules": []}
            continue
        origins = [provenance.of(user) for user in node.users]
        named = dict.fromkeys(n for o in origins for n in o["nodes"])
        read: dict[str, None] = {}
        for source in named:
            if source in sources:
                _keys_read(sources[source], constant, read)
        out[name] = {
            "from": list(read),
            "modules": list(dict.fromkeys(m for o in origins for m in o["modules"])),
            "rules": list(dict.fromkeys(r for o in origins for r in o["rules"])),
        }
    return out


def _keys_read(node: fx.Node, constant: set[fx.Node], found: dict[str, None]) -> None:
    """Adds the parameters that a node reads, directly or through constant expressions."""
    pending, seen = [node], set[fx.Node]()
    while pending:
        current = pending.pop()
        for source in reversed(current.all_input_nodes):
            if source.op == "get_attr":
                found[str(source.target)] = None
            elif source in constant and source not in seen:
                seen.add(source)
                pending.append(source)
