"""What a caller can see of a compiled model is what the original shows, over all models here.

Values at three batch sizes and on the second call, after the outputs of the first were written;
inputs, strides, what shares memory with what, and the state after each call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import refold
from refold.cli.torchvision_shim import declare_torchvision_ops
from refold.errors import UsageError
from refold.graph import constants
from tests import small_nets
from tests.compare import EXACT, double, relative_error
from tests.examples import few
from tests.models import MODELS, PATTERNS
from tests.models.random_graphs import RandomGraph
from tests.models.systems import SYSTEMS
from tests.models.systems.case import System, settings_of
from tests.models.timm_networks import NETWORKS, network
from tests.randomise import randomise

SMALL = {
    "ConvNet": (small_nets.ConvNet, (2, 3, 8, 8)),
    "NothingToFold": (small_nets.NothingToFold, (2, 4)),
    "LateNorm": (small_nets.LateNorm, (2, 3, 6, 6)),
}


# What is traced of a batch norm says that its result is contiguous, and the compiled model keeps
# that; the kernel lays it out as its input, which is transposed here.
OTHER_STRIDES = {"linear-transpose-bn1d"}


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def copied(tree: Any) -> Any:
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, tree)


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


def keeps_the_contract(
    model: nn.Module,
    inputs: tuple[Any, ...],
    settings: Mapping[str, Any] | None = None,
    *,
    bound: float = 100 * EXACT,
    fixed: bool = False,
    strided: bool = True,
) -> None:
    """Compares calls of a float64 model with those of its compilation."""
    settings = settings or {}
    model, (inputs, settings) = model.eval().double(), double((inputs, settings))
    original = functools.partial(model, **settings.get("bind", {}))
    versions = [t._version for t in [*model.parameters(), *model.buffers()]]
    compiled = refold.compile_for_inference(model, inputs, verify=False, **settings)
    assert versions == [t._version for t in [*model.parameters(), *model.buffers()]]
    calls = [inputs, inputs]
    if not fixed and not compiled.report.specialised:
        calls += [of_batch(inputs, 1), of_batch(inputs, 3), inputs]
    for given in calls:
        try:
            got_inputs, want_inputs = copied(given), copied(given)
            with torch.no_grad():
                want = original(*want_inputs)
        except (RuntimeError, ValueError):  # the original does not take that batch
            continue
        got = compiled(*got_inputs)
        _same(compiled, model, (got, got_inputs), (want, want_inputs), bound)
        assert not strided or strides(got) == strides(want)
        shared = {i for i, _ in sharing(got, got_inputs, _held(compiled))}
        for i, output in enumerate(tensors(got)):
            if i not in shared:
                output.mul_(2) if output.is_floating_point() else output.zero_()
    if not fixed and not compiled.report.specialised:
        return
    with pytest.raises(UsageError):  # a batch that is not promised is not taken
        compiled(*of_batch(copied(inputs), tensors(inputs)[0].shape[0] + 1)[:1], *inputs[1:])


def _held(compiled: Any) -> list[Tensor]:
    gm = compiled.graph_module
    return [*gm.parameters(), *gm.buffers()]


def _same(compiled: Any, model: nn.Module, ours: Any, theirs: Any, bound: float) -> None:
    """Compares outputs and inputs after a call, and the state."""
    (got, got_inputs), (want, want_inputs) = ours, theirs
    assert relative_error(got, want) <= bound
    assert all(map(torch.equal, tensors(got_inputs), tensors(want_inputs))), "an input was written"
    held = [*model.parameters(), *model.buffers()]
    more = sharing(got, got_inputs, [*held, *_held(compiled)]) - sharing(want, want_inputs, held)
    assert not more, f"outputs share more memory: {more}"
    state = constants.stored(compiled.graph_module)
    for node in constants.written(compiled.graph_module.graph):
        if node.op == "get_attr":
            name = str(node.target)
            assert relative_error(state[name], model.get_buffer(name)) <= bound, f"state {name}"


def drawn(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    inputs = (torch.randn(shape),)
    return randomise(build(), inputs), inputs


@pytest.mark.parametrize("name", SMALL)
def test_small_nets(name: str) -> None:
    keeps_the_contract(*drawn(*SMALL[name]))


@pytest.mark.parametrize("name", few(PATTERNS, 16))
def test_patterns(name: str) -> None:
    model, inputs = drawn(PATTERNS[name].model, PATTERNS[name].shape)
    keeps_the_contract(model, inputs, strided=name not in OTHER_STRIDES)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if i % 9 == 0 else pytest.mark.sweep) for i, n in enumerate(MODELS)],
)
def test_models(name: str) -> None:
    keeps_the_contract(MODELS[name].model(), MODELS[name].inputs())


@pytest.mark.parametrize("seed", few(range(200, 212), 3))
def test_random_graphs(seed: int) -> None:
    model = RandomGraph(seed, steps=6 + seed % 10)
    keeps_the_contract(model, (model.example,))


def _systems() -> list[Any]:
    kept = [(name, s) for name, s in SYSTEMS.items() if not s.refused]
    quick = {name for name, s in kept[::12] if not s.slow}
    return [pytest.param(n, marks=() if n in quick else pytest.mark.sweep) for n, _ in kept]


@pytest.mark.parametrize("name", _systems())
def test_systems(name: str) -> None:
    system: System = SYSTEMS[name]
    if system.requires:
        declare_torchvision_ops()
    for package in system.requires:
        pytest.importorskip(package)
    keeps_the_contract(
        system.model(),
        system.inputs(),
        settings_of(system),
        bound=max(system.bound, 100 * EXACT),
        fixed=system.fixed_batch,
    )


@pytest.mark.sweep
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    pytest.importorskip("timm")
    model, image = network(name, NETWORKS[name])
    keeps_the_contract(model, (image,), bound=1e-8)
