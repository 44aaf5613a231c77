"""Tests against the parser and builder of TensorRT-RTX, which need no GPU: ``make test-rtx``."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what ``test_folding_never_adds_an_engine_layer`` counted."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    rows = [
        value for report in reports for name, value in report.user_properties if name == "layers"
    ]
    if not rows:
        return
    terminalreporter.section("engine layers, compiled without a GPU, not executed")
    terminalreporter.write_line(f"{'network':<16} {'precision':<10} {'unfolded':>8} {'folded':>8}")
    for network, precision, unfolded, folded in sorted(rows):
        terminalreporter.write_line(f"{network:<16} {precision:<10} {unfolded:>8} {folded:>8}")
