"""Running passes on small networks and checking them against the original, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from refold.frontends.export import trace
from refold.fuzz.modular import DIFFERENT, judge_graphs
from refold.graph.copies import copy_sharing_tensors
from refold.graph.ops import census
from refold.refit.recipe import record
from refold.rewrite.context import Context
from refold.rewrite.pipeline import Pipeline
from refold.rewrite.result import Decline, Pass
from tests.compare import EXACT, relative_error


class Net(nn.Module):
    """A function of its own parts and an input, in float64, with random norms."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)
        randomise_norms(self)
        self.double().eval()

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def randomise_norms(module: nn.Module) -> None:
    """Statistics and affine parts that no fold can ignore: some scales negative, one zero."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            part.running_mean.normal_(0, 0.5)
            part.running_var.uniform_(0.5, 2.0)
        if hasattr(part, "weight") and "Norm" in type(part).__name__ and part.weight is not None:
            part.weight.data.normal_(0, 1)
            part.weight.data[0] = 0.0
            if getattr(part, "bias", None) is not None:
                part.bias.data.normal_(0, 0.5)


def image(channels: int = 4, height: int = 7, width: int = 6) -> torch.Tensor:
    return torch.randn(2, channels, height, width, dtype=torch.float64)


def run(
    passes: Pass | Sequence[Pass], model: nn.Module, x: torch.Tensor, *, dynamic: bool = True,
    context: Context = Context(),
) -> tuple[fx.GraphModule, list[Decline]]:  # fmt: skip
    """Folds, checks the numbers at several batch sizes, and returns the graph and what declined.

    Beside the numbers it asks the exact judge, which knows no tolerance.
    """
    with torch.no_grad():
        program = trace(model, (x,), {}, dynamic_batch=dynamic)
        gm = copy_sharing_tensors(program.graph_module)
        chosen = tuple(passes) if isinstance(passes, Sequence) else (passes,)
        pipeline = Pipeline("test", chosen)
        result, recipe = record(program, gm, lambda _: pipeline.run(gm, context, debug=True))
        exact = judge_graphs(program.graph_module, gm, recipe.tape, ((x,), {}))
        assert exact.kind != DIFFERENT or result.allowed, f"{exact.reason}\n{gm.graph}"
        for batch in (1, 2, 3) if dynamic else (2,):
            probe = torch.randn(batch, *x.shape[1:], dtype=x.dtype)
            error = relative_error(gm(probe), model(probe))
            assert error <= EXACT, f"relative error {error:.1e}\n{gm.graph}"
    return gm, [d for r in result.runs for d in r.result.declined]


def left(gm: fx.GraphModule) -> dict[str, int]:
    """Calls by kind, layouts left out."""
    return {k: n for k, n in census(gm.graph).items() if k not in ("layout", "sym-size")}
