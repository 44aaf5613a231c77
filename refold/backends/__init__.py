"""Targets: what a folded program is lowered to. One file each; ``base`` holds the contract."""

from refold.backends.base import Artifact, Capabilities, Runner, Target
from refold.backends.registry import (
    find_target,
    make_options,
    register_target,
    require,
    target_names,
)

__all__ = [
    "Artifact",
    "Capabilities",
    "Runner",
    "Target",
    "find_target",
    "make_options",
    "register_target",
    "require",
    "target_names",
]
