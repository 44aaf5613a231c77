"""Folds a trained PyTorch network into the smallest equal one that a runtime can execute."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from refold._version import __version__

if TYPE_CHECKING:
    from refold.backends.base import Target
    from refold.backends.registry import register_target
    from refold.compiled import CompiledModel
    from refold.compiler import compile_for_inference, explain, fold
    from refold.errors import RefoldError
    from refold.report.report import Report
    from refold.rewrite.context import Context
    from refold.rewrite.pipeline import Pipeline
    from refold.rewrite.result import Pass, PassResult
    from refold.rewrite.rule import RewriteRule, rule_from_functions
    from refold.torch_compile.backend import backend
    from refold.training.checkpoints import average_checkpoints
    from refold.training.ewa import EWAMoE, ewa_step_


# Loaded on first use: `import refold` costs nothing that the caller does not ask for.
_HOME = {
    "CompiledModel": "refold.compiled",
    "Context": "refold.rewrite.context",
    "EWAMoE": "refold.training.ewa",
    "Pass": "refold.rewrite.result",
    "PassResult": "refold.rewrite.result",
    "Pipeline": "refold.rewrite.pipeline",
    "RefoldError": "refold.errors",
    "Report": "refold.report.report",
    "RewriteRule": "refold.rewrite.rule",
    "Target": "refold.backends.base",
    "average_checkpoints": "refold.training.checkpoints",
    "backend": "refold.torch_compile.backend",
    "compile_for_inference": "refold.compiler",
    "ewa_step_": "refold.training.ewa",
    "explain": "refold.compiler",
    "fold": "refold.compiler",
    "register_target": "refold.backends.registry",
    "rule_from_functions": "refold.rewrite.rule",
}

__all__ = [
    "CompiledModel",
    "Context",
    "EWAMoE",
    "Pass",
    "PassResult",
    "Pipeline",
    "RefoldError",
    "Report",
    "RewriteRule",
    "Target",
    "__version__",
    "average_checkpoints",
    "backend",
    "compile_for_inference",
    "ewa_step_",
    "explain",
    "fold",
    "register_target",
    "rule_from_functions",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'refold' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
