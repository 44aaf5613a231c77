"""``torch.compile``: refold against Inductor with freezing on the training form.

Three measurements: the cost of the check that every call makes of its parameters, run time, and
time to compile. Run from the repository's root, on a machine that does nothing else:
``python -m bench.dynamo [NAME ...] [--rounds 30]``. Each network is compiled with empty caches.
Ratios are paired: the forms run in turn, in a new order each round; each has a 95 % interval.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import nn
from torch._inductor.utils import fresh_inductor_cache

import refold
from bench.common import interleaved, quiet, ratio, save
from refold.torch_compile.backend import _Guarded, _picker, _State
from tests.compare import relative_error
from tests.models.timm_networks import deploy_form, network

if TYPE_CHECKING:
    from collections.abc import Iterator

OURS = ("refold", "refold, frozen", "target")
_CALLS = 10  # a round: what dynamo guards is read from caches in a loop, and not after other forms
NETWORKS = ("mobileone_s0", "repvit_m0_9", "repvgg_a0")


def check_seconds(tensors: Sequence[torch.Tensor], repeats: int = 200, rounds: int = 9) -> float:
    """Median seconds of one look at parameters that have not changed."""
    state = _State.of(list(tensors), checksum=False)
    args = tuple(tensors)
    pick = _picker(range(len(args)))
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            assert state.matches(pick(args))
        taken.append((time.perf_counter() - start) / repeats)
    return statistics.median(taken)


def check_of_300() -> dict[str, float]:
    """The check of 300 parameters, and of 300 of which 120 are running statistics."""
    parameters: list[torch.Tensor] = [nn.Parameter(torch.randn(64, 64)) for _ in range(300)]
    buffers = [torch.randn(128) for _ in range(120)]
    return {
        "parameters": 1e6 * check_seconds(parameters),
        "with statistics": 1e6 * check_seconds([*parameters[:180], *buffers]),
    }


def check_in_calls(run: Callable[[], Any], calls: int = 30) -> float:
    """Median seconds of the looks of a call, whose caches hold what the call before has left."""
    taken: list[float] = []
    matches = _State.matches

    def timed(self: _State, tensors: Any) -> bool:
        start = time.perf_counter()
        result = matches(self, tensors)
        taken[-1] += time.perf_counter() - start
        return result

    with mock.patch.object(_State, "matches", timed):
        for _ in range(calls):
            taken.append(0.0)
            run()
    return statistics.median(taken)


@contextmanager
def guarded() -> Iterator[list[_Guarded]]:
    """Collects the compiled graphs of refold that are made meanwhile."""
    made: list[_Guarded] = []
    original = _Guarded.__init__

    def initialise(self: _Guarded, *args: Any) -> None:
        original(self, *args)
        made.append(self)

    _Guarded.__init__ = initialise  # type: ignore[method-assign]
    try:
        yield made
    finally:
        _Guarded.__init__ = original  # type: ignore[method-assign]


def _prepare(model: nn.Module, image: torch.Tensor, how: str) -> Callable[..., Any]:
    if how == "target":
        return refold.compile_for_inference(
            model, (image,), target="inductor", dynamic_shapes=({},)
        )  # fmt: skip
    options: dict[str, Any] = {}
    if how == "refold, frozen":
        skip = torch.compiler.skip_guard_on_all_nn_modules_unsafe
        options = {"options": {"frozen": True, "guard_filter_fn": skip}}
    backend = "inductor" if how == "freezing" else "refold"
    fast: Callable[..., Any] = torch.compile(model, backend=backend, dynamic=False, **options)
    return fast


def compiled(model: nn.Module, image: torch.Tensor, how: str) -> tuple[Callable[[], Any], float]:
    """A compiled call, and the seconds until its first result, with empty caches.

    ``how`` is one of

    - ``freezing``: Inductor with freezing;
    - ``refold``: ``torch.compile(backend="refold")``, which looks at the parameters in each call;
    - ``refold, frozen``: with ``frozen=True`` and without dynamo's guards of modules, which is what
      freezing takes for granted;
    - ``target``: ``compile_for_inference(target="inductor")``, without dynamo.
    """
    # Inductor's own freezing is a setting of the process: dynamo reads it too.
    freezing = torch._inductor.config.patch(freezing=how == "freezing")
    with fresh_inductor_cache(), freezing, torch.no_grad():
        start = time.perf_counter()
        fast = _prepare(model, image, how)
        fast(image)
        seconds = time.perf_counter() - start

    def run() -> Any:
        with torch.no_grad():
            return fast(image)

    return run, seconds


@functools.cache
def warm_up() -> None:
    """What only the first compilation of a process pays."""
    for how in ("freezing", "refold"):
        compiled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(1, 3, 8, 8), how)


def measure(name: str, size: int | None, batch: int, rounds: int) -> dict[str, Any]:
    """One network: compile seconds, check, and ratios of run time."""
    with quiet():
        model, images = network(name, size)
        return measure_model(
            name, model, deploy_form(model), images[:1].repeat(batch, 1, 1, 1), rounds
        )


def measure_model(
    name: str, model: nn.Module, deploy: nn.Module, image: torch.Tensor, rounds: int
) -> dict[str, Any]:
    """The same for a model and the form that its author deploys."""
    torch._dynamo.reset()
    warm_up()
    seconds: dict[str, float] = {}
    runs: dict[str, Callable[[], Any]] = {}
    runs["deploy"], seconds["deploy"] = compiled(deploy, image, "freezing")
    runs["freezing"], seconds["freezing"] = compiled(model, image, "freezing")
    with guarded() as graphs:
        runs["refold"], seconds["refold"] = compiled(model, image, "refold")
    for form in ("refold, frozen", "target"):
        runs[form], seconds[form] = compiled(model, image, form)
    taken = interleaved(runs, rounds, calls=_CALLS)
    parameters = [t for g in graphs for t in g._variants[0].state.tensors]
    check = sum(check_seconds(g._variants[0].state.tensors) for g in graphs)
    within = check_in_calls(runs["refold"])
    median = {form: statistics.median(s) for form, s in taken.items()}
    with torch.no_grad():
        expected = model(image)
    return {
        "network": name,
        "image": list(image.shape),
        "compile seconds": seconds,
        "freezing / refold, compile": seconds["freezing"] / seconds["refold"],
        "median ms": {form: 1e3 * s for form, s in median.items()},
        "freezing / deploy": ratio(taken["freezing"], taken["deploy"]),
        **{f"freezing / {form}": ratio(taken["freezing"], taken[form]) for form in OURS},
        **{f"deploy / {form}": ratio(taken["deploy"], taken[form]) for form in OURS},
        "parameters": len(parameters),
        "check us": 1e6 * check,
        "check / call": check / median["refold"],
        "check in a call us": 1e6 * within,
        "check in a call / call": within / median["refold"],
        "error": relative_error(runs["refold"](), expected),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="names of timm models")
    parser.add_argument("--size", type=int, help="image size (default: the model's own)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30, help="paired rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="dynamo", help="name of the result")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = [{"check of 300, us": check_of_300()}]
    print(rows[-1], flush=True)
    for name in options.networks:
        rows.append(measure(name, options.size, options.batch, options.rounds))
        print(rows[-1], flush=True)
    print(save(options.output, vars(options), rows))


if __name__ == "__main__":
    main()
