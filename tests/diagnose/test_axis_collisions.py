"""A vector along the columns, as long as the channels, is worth a word; others are not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refold
from refold.diagnose.axis_collisions import axis_collisions
from tests.tracing import trace


class Scaled(nn.Module):
    """A convolution, then a vector of 4 numbers in some spelling."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.vector = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.form == "norm":
            return self.norm(y) * self.vector
        if self.form == "reversed":
            return self.vector + 2 * y
        if self.form == "channels":
            return y * self.vector.view(-1, 1, 1)
        if self.form == "channels last":
            return y.permute(0, 2, 3, 1) * self.vector
        if self.form == "linear":
            return F.linear(y.flatten(2).transpose(1, 2)[:, :4], torch.eye(4)) * self.vector
        return y * self.vector


def collisions(form: str, width: int = 4) -> list[str]:
    return axis_collisions(trace(Scaled(form), torch.randn(2, 3, 4, width)).graph)


@pytest.mark.parametrize("form", ["plain", "norm", "reversed"])
def test_columns_instead_of_channels(form: str) -> None:
    (warning,) = collisions(form)
    assert warning.startswith("vector lies along the last axis")
    assert "[-1, 1, 1]" in warning
    assert "test_axis_collisions.py:" in warning


@pytest.mark.parametrize("form", ["channels", "channels last", "linear"])
def test_vectors_that_are_meant(form: str) -> None:
    assert not collisions(form)


def test_the_report_warns() -> None:
    report = refold.explain(Scaled("plain"), torch.randn(2, 3, 4, 4))
    assert len(report.warnings) == 1
    assert "warning" in report.render()
    assert refold.Report.from_json(report.to_json()).warnings == report.warnings
