"""The systems of the papers: each in its training form, with what folding must leave of it.

A system is added in two steps. Write its network from the paper's formulas (small, but with every
structural feature) in a module of this package that makes a registry, and decorate the builder::

    SYSTEMS = Systems("Adapters")

    @SYSTEMS.add("lora linear", (2, 9, 16), paper="LoRA", there={"linear": 3, "add": 1, "mul": 1},
                 left={"linear": 1}, passes=("fold-branches",))
    def lora_linear() -> nn.Module: ...

Then name the registry in ``REGISTRIES`` below. ``tests/test_systems.py`` checks each entry
(structure before and after, float64 error, the same numbers in ONNX Runtime), and
``tools/coverage.py`` writes its row of ``docs/coverage.md``. The fields are those of
:class:`tests.models.systems.case.System`. What does not work yet keeps its row:
``fails={"structure": "why"}`` turns that check into one that must fail.
"""

from __future__ import annotations

from tests.models.systems import (
    bound,
    detail_networks,
    dynamic,
    generators,
    hypercomplex,
    kernels,
    light,
    low_rank,
    mamba,
    mobile,
    peft_adapters,
    quantisers,
    scale_shift,
    whole,
)
from tests.models.systems.case import (
    CHECKS,
    Check,
    Outcome,
    System,
    Systems,
    examine,
    onnxruntime_error,
    structure_faults,
)

REGISTRIES: tuple[Systems, ...] = (
    mobile.SYSTEMS,
    detail_networks.SYSTEMS,
    mamba.SYSTEMS,
    scale_shift.SYSTEMS,
    light.SYSTEMS,
    dynamic.SYSTEMS,
    whole.SYSTEMS,
    generators.SYSTEMS,
    hypercomplex.SYSTEMS,
    low_rank.SYSTEMS,
    peft_adapters.SYSTEMS,
    kernels.SYSTEMS,
    quantisers.SYSTEMS,
    bound.SYSTEMS,
)

SYSTEMS: dict[str, System] = {
    name: system for registry in REGISTRIES for name, system in registry.items()
}

__all__ = [
    "CHECKS", "REGISTRIES", "SYSTEMS", "Check", "Outcome", "System", "Systems", "examine",
    "onnxruntime_error", "structure_faults",
]  # fmt: skip
