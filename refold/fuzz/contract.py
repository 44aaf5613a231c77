"""What a caller can see of a compiled model is what the original shows; see ``docs/trust.md``.

Values at several batch sizes and on the second call, after the outputs of the first were written;
inputs, strides, what shares memory with what, and the state after each call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from refold.compiled import CompiledModel
from refold.compiler import compile_for_inference
from refold.errors import UsageError
from refold.graph import constants


class Breach(Exception):
    """The compiled model does not keep what the original shows.

    ``error`` is the relative error where numbers differ, infinity where they are not finite in the
    same places, and ``None`` where something else differs.
    """

    def __init__(self, text: str, error: float | None = None) -> None:
        super().__init__(text)
        self.error = error


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def copied(tree: Any) -> Any:
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, tree)


def bound_to(model: nn.Module, settings: Mapping[str, Any]) -> Callable[..., Any]:
    """The model without its bound inputs, whose values are the same in each call: it may write."""
    return lambda *inputs: model(*inputs, **copied(settings.get("bind", {})))


def strides(tree: Any) -> list[tuple[int, ...]]:
    """Of dimensions that have a stride: not of size 1, and of no empty tensor."""
    return [
        tuple(s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1 and t.numel())
        for t in tensors(tree)
    ]


def sharing(outputs: Any, inputs: Any, held: Sequence[Tensor]) -> set[tuple[int, Any]]:
    """For each output the earlier outputs, the inputs, and the model that it shares memory with."""

    def memory(t: Tensor) -> int:
        return t.untyped_storage().data_ptr()

    own = {memory(t) for t in held if t.numel()}
    given = [memory(t) for t in tensors(inputs)]
    found: set[tuple[int, Any]] = set()
    before: list[int] = []
    for i, t in enumerate(tensors(outputs)):
        at = memory(t)
        if t.numel():
            found |= {(i, j) for j, other in enumerate(before) if other == at}
            found |= {(i, f"input {j}") for j, other in enumerate(given) if other == at}
            found |= {(i, "the model")} if at in own else set()
        before.append(at)
    return found


def of_batch(inputs: Any, size: int) -> Any:
    """The inputs with another leading size, where it is that of the first tensor."""
    batch = tensors(inputs)[0].shape[0]

    def resized(v: Any) -> Any:
        if not isinstance(v, Tensor) or not v.dim() or v.shape[0] != batch:
            return v
        return torch.cat([v] * size)[:size].clone()

    return pytree.tree_map(resized, inputs)


def relative_error(actual: Any, expected: Any) -> float:
    """Largest difference over the largest expected value, over all tensors of a structure.

    Raises:
        Breach: the structures, shapes or dtypes differ, or integers, or where numbers are finite.
    """
    left, left_spec = pytree.tree_flatten(actual)
    right, right_spec = pytree.tree_flatten(expected)
    if left_spec != right_spec:
        raise Breach(f"output structure {left_spec}, expected {right_spec}")
    return max((_error(a, b) for a, b in zip(left, right, strict=True)), default=0.0)


def _error(a: Any, b: Any) -> float:
    if not isinstance(b, Tensor):
        if a != b:
            raise Breach(f"output {a!r}, expected {b!r}")
        return 0.0
    if a.shape != b.shape or a.dtype != b.dtype:
        raise Breach(f"{a.dtype} {tuple(a.shape)}, expected {b.dtype} {tuple(b.shape)}")
    if b.is_complex():
        a, b = (torch.view_as_real(v.resolve_conj()) for v in (a, b))
    if not b.is_floating_point() or not b.numel():
        if not torch.equal(a, b):
            raise Breach(f"other {b.dtype} values", math.inf)
        return 0.0
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite):
        raise Breach("NaN or infinity in other places", math.inf)
    a, b = a.double()[finite], b.double()[finite]
    if not b.numel():
        return 0.0
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def keeps_the_contract(
    model: nn.Module,
    inputs: tuple[Any, ...],
    settings: Mapping[str, Any] | None = None,
    *,
    bound: float = 1e-10,
    fixed: bool = False,
    strided: bool = True,
    refusing: bool = False,
) -> CompiledModel:
    """Compares calls of a float64 model with those of its compilation, which it returns.

    Args:
        model: in float64, in eval mode.
        inputs: positional inputs.
        settings: for :func:`refold.compile_for_inference`.
        bound: the relative error that is allowed.
        fixed: whether the batch is not promised to vary.
        strided: whether the strides of results are compared.
        refusing: whether sizes may be refused that the original takes, as a trace's conditions do.

    Raises:
        Breach: the compiled model shows something else.
    """
    settings = settings or {}
    original = bound_to(model, settings)
    held = [*model.parameters(), *model.buffers()]
    versions = [t._version for t in held]
    compiled = compile_for_inference(model, inputs, verify=False, **settings)
    if versions != [t._version for t in held]:
        raise Breach("compiling wrote into the model")
    calls = [inputs, inputs]
    if not fixed and (refusing or not compiled.report.specialised):
        calls += [of_batch(inputs, 1), of_batch(inputs, 3), inputs]
    for given in calls:
        got_inputs, want_inputs = copied(given), copied(given)
        try:
            with torch.no_grad():
                want = original(*want_inputs)
        except (RuntimeError, ValueError, IndexError):
            continue  # the original does not take that batch
        try:
            got = compiled(*got_inputs)
        except UsageError:
            if refusing and given is not inputs:
                continue
            raise
        _compare(compiled, model, (got, got_inputs), (want, want_inputs), bound)
        if strided and strides(got) != strides(want):
            raise Breach(f"strides {strides(got)}, expected {strides(want)}")
        shared = {i for i, _ in sharing(got, got_inputs, _held(compiled))}
        for i, output in enumerate(tensors(got)):
            if i not in shared and not _overlaps(output):
                output.mul_(2) if output.is_floating_point() else output.zero_()
    if not refusing and (fixed or compiled.report.specialised):
        _refuses_other_batches(compiled, inputs)
    return compiled


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements may lie in one place: PyTorch does not write there."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return any(n > 1 and s == 0 for n, s in pairs) or not _dense(tensor)


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory, each in a place of its own."""
    at = 1
    for stride, size in sorted(
        (s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1
    ):
        if stride < at:
            return False
        at = stride * size
    return True


def _refuses_other_batches(compiled: Any, inputs: tuple[Any, ...]) -> None:
    larger = of_batch(copied(inputs), tensors(inputs)[0].shape[0] + 1)
    try:
        compiled(*larger[:1], *inputs[1:])
    except UsageError:
        return
    raise Breach("it takes a batch that is not promised")


def _held(compiled: Any) -> list[Tensor]:
    gm = compiled.graph_module
    return [*gm.parameters(), *gm.buffers()]


def _compare(compiled: Any, model: nn.Module, ours: Any, theirs: Any, bound: float) -> None:
    """Compares outputs and inputs after a call, and the state."""
    (got, got_inputs), (want, want_inputs) = ours, theirs
    error = relative_error(got, want)
    if error > bound:
        raise Breach(f"relative error {error:.1e}", error)
    if not all(map(torch.equal, tensors(got_inputs), tensors(want_inputs))):
        raise Breach("an input was written")
    held = [*model.parameters(), *model.buffers()]
    more = sharing(got, got_inputs, [*held, *_held(compiled)]) - sharing(want, want_inputs, held)
    if more:
        raise Breach(f"outputs share more memory: {more}")
    state = constants.stored(compiled.graph_module)
    for node in constants.written(compiled.graph_module.graph):
        if node.op != "get_attr":
            continue
        name = str(node.target)
        error = relative_error(state[name], model.get_buffer(name))
        if error > bound:
            raise Breach(f"state {name}: relative error {error:.1e}", error)
