"""Pipelines as one string."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import refold
from refold.errors import UsageError
from refold.passes import PASSES, PIPELINES, find_pipeline
from refold.passes.branches.fold_branches import FoldBranches
from refold.passes.prepare.fold_constants import FoldConstants
from refold.passes.shift_add.substitute_shift_add import SubstituteShiftAdd


def test_names_alone_are_what_they_were() -> None:
    for name, pipeline in PIPELINES.items():
        assert find_pipeline(name) is pipeline
    for name, kind in PASSES.items():
        assert find_pipeline(name).passes == (kind(),)


def test_a_pass_is_added_before_what_closes_a_pipeline() -> None:
    text = "default,substitute-shift-add{bits=2 group-size=64}"
    pipeline = find_pipeline(text)
    assert pipeline.name == text
    assert pipeline.names[-1] == "merge-parallel-layers"
    assert pipeline.passes[-2] == SubstituteShiftAdd(bits=2, group_size=64)
    assert (*pipeline.passes[:-2], pipeline.passes[-1]) == PIPELINES["default"].passes


def test_options_of_a_pipeline_reach_the_passes_that_have_them() -> None:
    pipeline = find_pipeline("shift-add{bits=auto average_bits=2.5 max-growth=3}")
    assert pipeline.passes[-1] == SubstituteShiftAdd(bits="auto", average_bits=2.5)
    assert FoldConstants(max_growth=3.0) in pipeline.passes
    assert FoldBranches(max_growth=3.0) in pipeline.passes
    assert pipeline.names == PIPELINES["shift-add"].names
    assert PIPELINES["shift-add"].passes[-1] == SubstituteShiftAdd()


def test_order_is_as_written() -> None:
    pipeline = find_pipeline("clean-up , fold-batch-norm{} , clean-up")
    assert pipeline.names == ("clean-up", "fold-batch-norm", "clean-up")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("defualt", "unknown pipeline or pass 'defualt' (did you mean 'default'?)"),
        ("default,fold-batchnorm", "(did you mean 'fold-batch-norm'?)"),
        (
            "shift-add{bit=2}",
            "no pass of pipeline 'shift-add' has an option 'bit' (did you mean",
        ),
        ("fold-constants{growth=2}", "pass 'fold-constants' has no option 'growth' (did you mean"),
        ("defer-expands{deep}", "pass 'defer-expands' has no option 'deep' (it has none)"),
        ("shift-add{bits=2.5}", "option bits got '2.5', expected an integer or auto"),
        ("shift-add{bits=7}", "bits is 7, expected 2, 3, 4 or 'auto'"),
        ("shift-add{calibration=x}", "it can only be set from Python"),
        ("shift-add{bits=2", "cannot be read at 'shift-add{bits=2'"),
        ("default,", "cannot be read at ''"),
        ("", "cannot be read at ''"),
        ("default{prefer=node}", "option prefer got 'node', expected cost or nodes"),
        ("default;clean-up", "cannot be read at"),
    ],
)
def test_what_is_no_pipeline_says_where(text: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        find_pipeline(text)
    assert words in str(error.value)


def test_the_same_string_from_python_and_in_torch_compile() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(2, 64)
    report = refold.fold(model, x, pipeline="shift-add{bits=2 include=0 group-size=16}").report
    (record,) = (a for p in report.passes for a in p.applied)
    assert record.figures["bits"] == 2
    assert record.figures["group_size"] == 16
    assert report.pipeline == "shift-add{bits=2 include=0 group-size=16}"
    from refold.torch_compile import backend

    assert backend._BackendSettings(pipeline="default,clean-up").passes.names[-2] == "clean-up"
    with pytest.raises(UsageError, match="did you mean 'clean-up'"):
        refold.backend(pipeline="default,clean-upp")
