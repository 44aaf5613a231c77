from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import refold
from refold.errors import VerificationError
from refold.frontends.export import trace
from refold.graph.copies import copy_sharing_tensors
from refold.ops.bcq_linear import dequantise, pack
from refold.passes.shift_add.substitute_shift_add import SubstituteShiftAdd
from refold.rewrite.pipeline import Pipeline
from refold.verify import codes
from refold.verify.references import references
from tests.examples import few


def rows() -> torch.Tensor:
    return torch.randn(4, 40)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 8), nn.Tanh()).eval()


def shift_add(**options) -> SubstituteShiftAdd:
    return SubstituteShiftAdd(**{"min_features": 16, "group_size": 16, **options})


def judged(change, **options) -> str:
    """What the judge says of a substitution of which ``change`` made the codes say something."""
    program = trace(mlp(), (rows(),))
    whole = copy_sharing_tensors(program.graph_module)
    done = shift_add(**options).run(program.graph_module).approximation
    said = replace(done, codes=[change(code) for code in done.codes])
    return codes.judge(said, whole, references(whole, program), program)


@pytest.mark.parametrize("features", [16, 37, 50])
@pytest.mark.parametrize("scales", [1, 3])
def test_what_is_decoded_is_what_the_operator_computes_with(features: int, scales: int) -> None:
    groups = math.ceil(features / 16)
    planes = pack(torch.randint(0, 2, (3, 5, features)) * 2 - 1)
    alpha = torch.rand(scales, 5, groups).half()
    found = codes.decoded(planes, alpha, features, 16)
    assert torch.equal(found, dequantise(planes, alpha, features, 16, torch.float64))


@pytest.mark.parametrize("calibrated", few([False, True], 1))
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("scales", ["uniform", "bcq", "apot3", "pot"])
def test_codes_of_every_family_pass(scales: str, bits: int, calibrated: bool) -> None:
    calibration = [rows() for _ in range(3)] if calibrated else ()
    chosen = shift_add(scales=scales, bits=bits, calibration=calibration)
    report = refold.fold(mlp(), rows(), pipeline=Pipeline("test", (chosen,))).report
    assert any(note.startswith("2 codes decoded apart: as far") for note in report.notes)


def test_few_inputs_and_channels_that_are_nothing() -> None:
    model = mlp()
    model[0].weight.data[3] = 0.0
    model[0].weight.data[:, 16:32] = 0.25  # what an even grid holds
    for calibration in ((), [torch.randn(1, 40)]):
        chosen = shift_add(calibration=calibration, damping=1e-6)
        refold.fold(model, rows(), pipeline=Pipeline("test", (chosen,)))


def test_half_precision() -> None:
    chosen = shift_add(calibration=[rows().bfloat16() for _ in range(3)])
    model, x = mlp().bfloat16(), rows().bfloat16()
    refold.fold(model, x, pipeline=Pipeline("test", (chosen,)))


def test_what_is_said_must_be_so() -> None:
    calibration = [rows() for _ in range(3)]
    assert "as far from their weights as said" in judged(lambda code: code)
    with pytest.raises(VerificationError, match=r"from its weight .* it is not the code"):
        judged(lambda code: replace(code, weight_error=1.001 * code.weight_error))
    with pytest.raises(VerificationError, match=r"from its outputs .* it is not the code"):
        judged(
            lambda code: replace(code, output_error=1.2 * code.output_error),
            calibration=calibration,
        )


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_error_that_the_user_allows_is_held(calibrated: bool) -> None:
    calibration = [rows() for _ in range(3)] if calibrated else ()
    with pytest.raises(VerificationError, match=r"0 is .* from what it stands for .* 0.001"):
        judged(lambda code: replace(code, limit=1e-3), calibration=calibration)
