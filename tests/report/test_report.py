import dataclasses
import json
import re

import pytest
import torch

import refold
from refold.errors import UsageError
from refold.report.report import Report
from refold.rewrite.result import Applied, Decline
from tests.small_nets import ConvNet, LateNorm, seeded


@pytest.fixture(scope="module")
def report():
    return refold.fold(seeded(ConvNet()), torch.randn(1, 3, 8, 8)).report


def test_json_is_versioned_and_complete(report):
    data = json.loads(report.to_json())
    assert data["schema"] == 1
    assert data["model"] == "ConvNet"
    assert data["target"] == "torch"
    assert data["pipeline"] == "default"
    assert data["versions"] == {"refold": refold.__version__, "torch": torch.__version__}
    (x,) = data["inputs"]
    assert (x["name"], x["dtype"], x["batch"], x["sizes"][1:]) == ("x", "float32", 0, [3, 8, 8])
    assert isinstance(x["sizes"][0], str)
    assert data["before"]["census"]["batch-norm"] == 1
    assert "batch-norm" not in data["after"]["census"]
    # conv 108, batch norm 4 x 4, linear 20 + 5; the batch counter is not part of the program
    assert data["before"]["parameters"] == 108 + 16 + 25
    assert data["after"]["parameters"] == 108 + 4 + 25
    assert data["after"]["bytes"] == 4 * (108 + 4 + 25)
    fold = next(p for p in data["passes"] if p["name"] == "fold-batch-norm")
    (applied,) = fold["applied"]
    assert applied["kinds"] == ["batch-norm"]
    assert "bn" in applied["modules"]
    assert (fold["nodes_before"], fold["nodes_after"]) == (5, 4)
    assert data["numerics"]["passed"]
    assert data["numerics"]["inputs"] >= 4
    assert set(data["timings"]) == {"trace", "reference", "fold", "verify", "lower"}


def test_json_round_trip(report):
    again = Report.from_json(report.to_json())
    assert again == report
    assert again.render() == report.render()


def test_other_schema_is_refused(report):
    data = report.to_dict() | {"schema": 99}
    with pytest.raises(UsageError, match="schema 99: this version reads schema 1"):
        Report.from_json(json.dumps(data))


def test_terminal_table(report):
    text = report.render(width=80)
    assert "\x1b" not in text
    assert "\x1b[" in report.render(color=True)
    assert "batch-norm 1 -> 0" in text
    assert "nodes 5 -> 4" in text
    assert "x float32 [batch, 3, 8, 8]" in text
    row = next(line for line in text.splitlines() if line.startswith(" fold-batch-norm"))
    assert row.split()[1:3] == ["1", "0"]


def test_declined_come_with_place_reason_and_line():
    text = refold.explain(seeded(LateNorm()), torch.randn(2, 3, 4, 4)).render()
    line = next(line for line in text.splitlines() if line.startswith(" declined"))
    assert line.split()[1:3] == ["module", "bn"]
    assert "every candidate was declined" in text
    assert "tests/small_nets.py:" in text.replace("\n           ", " ")


def test_many_declined_are_grouped_and_cut(report):
    same = [
        Decline("r", f"a{i}", f"one reason: {i}.5 us over add_{i}", f"m{i}", hint="do this")
        for i in range(5)
    ]
    other = [Decline("r", f"b{i}", f"reason {chr(97 + i)}", f"n{i}") for i in range(12)]
    crowded = Report.from_json(report.to_json())
    crowded.declined = (*same, *other)
    text = crowded.render()
    assert "m0 (and 4 like it)  r: one reason" in text
    assert text.count("hint: do this") == 1
    assert "reason i" in text
    assert "reason j" not in text
    assert "... and 3 more, see --json" in text


def test_what_a_push_crossed_is_said(report):
    def pushed(i: int, *crossed: str) -> Applied:
        return Applied(
            "fold-batch-norm", (f"bn_{i}",), ("batch-norm",), (f"conv_{i}",), (f"m{i}",),
            f"batch-norm into conv{', across 1 call: view' if crossed else ''}",
            path=(f"bn_{i}", *crossed, f"conv_{i}"),
            path_kinds=("batch-norm", *("view" for _ in crossed), "conv"), crossed=crossed,
        )  # fmt: skip

    crowded = Report.from_json(report.to_json())
    first = crowded.passes[0]
    records = (pushed(0), pushed(1, "view_1"), pushed(2, "view_2"))
    crowded.passes = (dataclasses.replace(first, applied=records), *crowded.passes[1:])
    read = Report.from_json(crowded.to_json())
    assert read.passes[0].applied == records
    (line,) = [line for line in read.render().splitlines() if line.startswith(" crossed")]
    assert line.split(maxsplit=1)[1] == (
        "module m1 (and 1 like it)  fold-batch-norm: batch-norm into conv, across 1 call: view"
    )
    assert "crossed" not in report.render()


def test_unverified_is_said(report):
    unverified = Report.from_json(report.to_json())
    unverified.numerics = None
    assert "no: verification was switched off" in unverified.render()


@pytest.mark.parametrize("width", [20, 60, 100])
def test_sentences_are_wrapped(width):
    text = refold.explain(seeded(LateNorm()), torch.randn(2, 3, 4, 4)).render(width=width)
    assert all(len(line) <= max(width, 60) + 1 for line in text.splitlines() if ":" in line)


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize("width", [40, 60, 80])
def test_all_of_it_fits_a_narrow_terminal(report, width, color):
    layer = Applied(
        "substitute-shift-add", ("blocks.0.attention.qkv",), (), "", modules=(),
        columns={"bits": "3", "scales": "power-of-two / 128", "bytes": "4.1 kB -> 512 B",
                 "outputs": "1.0e-01"},
    )  # fmt: skip
    run = dataclasses.replace(report.passes[0], name="fold-attention-biases", applied=(layer,))
    wide = dataclasses.replace(report, passes=(run, *report.passes))
    text = re.sub(r"\x1b\[[0-9;]*m", "", wide.render(color=color, width=width))
    assert max(map(len, text.splitlines())) <= width, text
    for word in ("fold-attention-biases", "bits 3" if width < 80 else "bits", "1.0e-01"):
        assert word in text


def test_a_tied_tensor_counts_once_whatever_its_name():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.a(torch.relu(self.b(x)))

    report = refold.explain(Tied().eval(), torch.randn(2, 8))
    assert report.before.parameters == report.after.parameters == 64 + 8 + 8
    assert report.before.bytes == 4 * 80
