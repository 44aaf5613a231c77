"""The passes and the ordered pipelines: one rule a file, one line here, with the reason."""

from __future__ import annotations

from refold.passes.batch_norm.fold_batch_norm import FoldBatchNorm
from refold.passes.branches.defer_resizes import DeferResizes
from refold.passes.branches.fold_branches import FoldBranches
from refold.passes.branches.merge_parallel_layers import MergeParallelLayers
from refold.passes.experts.average_experts import AverageExperts
from refold.passes.prepare.clean_up import CleanUp
from refold.passes.prepare.defer_expands import DeferExpands
from refold.passes.prepare.drop_zero_channels import DropZeroChannels
from refold.passes.prepare.fold_constants import FoldConstants
from refold.passes.prepare.split_constant_tokens import SplitConstantTokens
from refold.passes.scale_shift.absorb_scale_shift import AbsorbScaleShift
from refold.passes.scale_shift.fold_attention_biases import FoldAttentionBiases
from refold.passes.scale_shift.join_scale_shifts import JoinScaleShifts
from refold.passes.shift_add.substitute_shift_add import SubstituteShiftAdd
from refold.rewrite import spec
from refold.rewrite.pipeline import Pipeline
from refold.rewrite.result import Pass


def _ordered(branches: FoldBranches) -> tuple[Pass, ...]:
    return (
        SplitConstantTokens(),  # what the two that follow may then see as constant
        DeferExpands(),  # what all samples share is constant only in front of its expansion
        FoldConstants(),  # early: a generated weight must be a constant before anything reads it
        CleanUp(),  # an add(x, 0) or a dropout between two layers hides them from each other
        AverageExperts(),  # equal experts are one; before other folds make them differ
        DropZeroChannels(),  # on the weights as they were trained; all that follows is smaller
        FoldBatchNorm(),  # into producers while each still has one user
        AbsorbScaleShift(),  # likewise; what stays are scales that no producer takes
        DeferResizes(),  # norms are in the products; what is resized may merge with what makes it
        branches,  # reads what is left as affine maps; merged branches free new producers
        JoinScaleShifts(),  # what no branch took in; one scale-shift may go where a sum could not
        DeferResizes(),  # products that were several branches
        FoldBatchNorm(),  # a norm after a merged block now has one producer
        AbsorbScaleShift(border_maps=True),  # likewise for scales; a map ends what branches merge
        FoldAttentionBiases(),  # nothing but layouts is left between projections and products
        CleanUp(last=True),  # what the folds left without a reader
    )


def _merged(branches: FoldBranches) -> tuple[Pass, ...]:
    return (
        *_ordered(branches),
        MergeParallelLayers(),  # last: all others look for layers one by one
    )


PIPELINES: dict[str, Pipeline] = {
    "default": Pipeline("default", _merged(FoldBranches())),
    "min-nodes": Pipeline("min-nodes", _merged(FoldBranches(prefer="nodes"))),
    "shift-add": Pipeline(
        "shift-add",
        (
            *_ordered(FoldBranches()),  # exact, so it goes first
            SubstituteShiftAdd(),  # approximate: after all that is exact, on the weights it leaves
        ),
    ),
}

# Passes that run where somebody names them, and in no pipeline: approximations of one layer.
BY_NAME: tuple[type[Pass], ...] = ()

PASSES: dict[str, type] = {
    item.name: type(item) for pipeline in PIPELINES.values() for item in pipeline.passes
} | {kind().name: kind for kind in BY_NAME}


def find_pipeline(text: str) -> Pipeline:
    """The pipeline of a name, or of a :mod:`string <refold.rewrite.spec>` of passes and options.

    Raises:
        UsageError: there is no such pipeline, pass or option.
    """
    return spec.parse(text, PASSES, PIPELINES)
