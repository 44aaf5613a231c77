"""Training-form networks, each written from the formulas of its paper."""

from __future__ import annotations

from tests.models import adapters, branches, differences, layouts, weights
from tests.models.case import CONV_LIKE, ModelCase, counts
from tests.models.patterns import PATTERNS, Pattern, compute_nodes

MODELS: dict[str, ModelCase] = {
    **branches.MODELS,
    **adapters.MODELS,
    **differences.MODELS,
    **layouts.MODELS,
    **weights.MODELS,
}

__all__ = ["CONV_LIKE", "MODELS", "PATTERNS", "ModelCase", "Pattern", "compute_nodes", "counts"]
