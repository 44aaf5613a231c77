"""Lets packages that import torchvision (timm) load beside one built for another torch."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch

# torchvision declares these in its compiled part and describes them in its Python part; where the
# compiled part does not load, the Python part finds no operator to describe and its import fails.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None


def declare_torchvision_ops() -> None:
    """Makes ``import torchvision`` work where its compiled operators cannot be loaded.

    Does nothing where torchvision is not installed or works. The declared operators have no
    implementation: calling one is an error, as it is without them.
    """
    global _library
    if _library is not None or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        _library.define(schema)
    importlib.import_module("torchvision")
