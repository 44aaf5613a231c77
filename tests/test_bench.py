"""The parts of the benchmarks that can be wrong without anyone noticing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.common import interleaved, load, ratio, save
from tools.readme_tables import fill


def test_the_interval_holds_the_ratio() -> None:
    slow = [2.0 + 0.01 * (i % 7) for i in range(40)]
    fast = [1.0 + 0.01 * (i % 5) for i in range(40)]
    found = ratio(slow, fast)
    assert found["low"] <= found["ratio"] <= found["high"]
    assert found["ratio"] == pytest.approx(2.0, abs=0.05)
    assert ratio(slow, slow) == {"ratio": 1.0, "low": 1.0, "high": 1.0}


def test_every_round_runs_everything_once() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = interleaved(runs, rounds=5, warmup=0)
    assert all(len(taken) == 5 for taken in seconds.values())
    rounds = [calls[i : i + 3] for i in range(0, 15, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1


def test_a_run_on_some_networks_leaves_the_rows_of_the_others(tmp_path: Path) -> None:
    rows = [{"network": "a"}, {"network": "b"}]
    whole = save("networks", {}, rows, tmp_path)
    some = save("networks", {}, rows[:1], tmp_path)
    assert load("networks", tmp_path)["rows"] == rows
    assert (whole.name, some.name) == ("networks.json", "networks.part.json")
    assert json.loads(some.read_text())["rows"] == rows[:1]
    again = [{"network": "a", "new": 1}, {"network": "b", "new": 1}]
    assert save("networks", {}, again, tmp_path) == whole
    assert load("networks", tmp_path)["rows"] == again
    assert not some.exists()
    assert save("other", {}, rows[:1], tmp_path).name == "other.json"


def _result(**count: Any) -> dict[str, Any]:
    return {
        "date": "2026-01-01",
        "versions": {"refold": "0"},
        "machine": {"processor": "a processor", "cores": 2},
        "settings": {},
        "rows": [{"pattern": "a || b", "optimum": 1, "left": {"traced": count, "refold": count}}],
    }


def test_tables_are_made_between_their_markers(tmp_path: Path) -> None:
    (tmp_path / "patterns.json").write_text(json.dumps(_result(linear=1, other=0)))
    text = (
        "before\n<!-- table:patterns-summary -->\nstale\n<!-- /table:patterns-summary -->\nafter\n"
    )
    filled = fill(text, tmp_path)
    assert "| refold | 1 of 1 |" in filled
    assert "stale" not in filled
    assert filled.startswith("before\n")
    assert filled.endswith("after\n")
    assert fill(filled, tmp_path) == filled


def test_a_failed_contender_reaches_nothing(tmp_path: Path) -> None:
    (tmp_path / "patterns.json").write_text(json.dumps(_result(error="ValueError")))
    text = "<!-- table:patterns-summary -->\n<!-- /table:patterns-summary -->"
    assert "| refold | 0 of 1 |" in fill(text, tmp_path)


def test_a_table_without_its_result_stays(tmp_path: Path) -> None:
    text = "<!-- table:memory -->\nkept\n<!-- /table:memory -->"
    assert fill(text, tmp_path) == text


def test_a_failure_on_a_target_is_shown_with_its_reason(tmp_path: Path) -> None:
    fine = {"nodes": 9, "bytes": 2e6, "numbers": {"error": 1e-6, "tolerance": 8e-6}}
    cells = {
        "a": {"unfolded": {**fine, "nodes": 12}, "folded": fine},
        "b": {"unfolded": fine, "folded": {"error": "BackendError: no layer for X\n  at y"}},
        "c": {"unfolded": {"error": "lost"}, "folded": {"nodes": 3, "bytes": 1e6}},
    }
    result = {
        **_result(),
        "settings": {"rounds": 5},
        "rows": [{"network": "net", "targets": cells}],
    }
    (tmp_path / "targets.json").write_text(json.dumps(result))
    filled = fill("<!-- table:targets -->\n<!-- /table:targets -->", tmp_path)
    assert "| network | a | b | c |" in filled
    assert "12 -> 9; 2.0 -> 2.0 MB; error 1e-06 (8e-06) |" in filled
    assert "| failed: BackendError: no layer for X |" in filled
    assert "| failed -> 3; failed -> 1.0 MB; not run |" in filled


def test_joined_blocks_are_one_network() -> None:
    """What the benchmark of nodes folds is what a trace of so many blocks would be."""
    from bench.scale import FORMS, exponent, joined, traced
    from refold.passes import PIPELINES

    for form in FORMS:
        program = traced(form)
        block, whole = program.graph_module, joined(program, 3)
        x = program.args[0]
        with torch.no_grad():
            expected = block(block(block(x)))
            torch.testing.assert_close(whole(x), expected, rtol=0, atol=0)
            PIPELINES["default"].run(whole)
            torch.testing.assert_close(whole(x), expected, rtol=1e-4, atol=1e-4)
    assert exponent([(1, 2.0), (10, 20.0), (100, 200.0)]) == pytest.approx(1)
    assert exponent([(1, 1.0), (10, 100.0), (100, 1e4)]) == pytest.approx(2)


def test_mapped_weights_are_those_of_the_file(tmp_path: Path) -> None:
    from bench.scale import mapped

    model = mapped(tmp_path, 0, 64, torch.float16)
    stored = b"".join(
        p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in model.parameters()
    )
    assert (tmp_path / "weights").read_bytes() == stored
    assert model(torch.randn(2, 8, 64).half()).isfinite().all()


def test_rewrites_of_other_compilers() -> None:
    """What a row says: how far the peer gets, whether refold does, and why not."""
    from bench.peers import AS_FAR, LESS, STATED, WRONG, compare, line, summary, verdict
    from tests.models.peer_cases import CASES, PeerCase

    cases = {case.title: case for case in CASES}
    assert len(cases) == len(CASES)
    rows = [
        compare(cases[title])
        for title in (
            "onnxscript: conv, batch norm",
            "TVM: x + zeros_like(layer of x)",
            "OpenVINO: linear of a vector, times features",
            "coremltools: pad, permute, conv",
            "PyTorch freezing: linear of an image, batch norm of its channels",
        )
    ]
    assert [(row["before"], row["refold"], row["peer_leaves"]) for row in rows] == [
        (2, 1, 1), (4, 1, 1), (2, 1, 1), (2, 1, 1), (2, 2, 1),
    ]  # fmt: skip
    assert [row["verdict"] for row in rows] == [AS_FAR] * 4 + [STATED]
    assert "another function" in line(rows[4])
    assert summary(rows[:1]) == "onnxscript: 1 cases: 1 as far"
    demanded = PeerCase("a", "b", 1, cases["onnxscript: conv, batch norm"].make)
    assert verdict(demanded, 2, 1, True) == LESS
    assert verdict(demanded, 1, 1, False) == WRONG


@pytest.mark.slow
def test_no_rewrite_of_another_compiler_goes_wrong() -> None:
    from bench.peers import WRONG, compare
    from tests.models.peer_cases import CASES, PEFT

    once = {case.make: case for case in CASES if case.peer != PEFT}
    assert len(once) > 170
    assert not [case.title for case in once.values() if compare(case)["verdict"] == WRONG]
