"""Runs are repeatable, survive their processes, and fail where a rule or an operator is missed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from refold.cli.exit_codes import ERROR, INTERRUPTED, NUMBERS, OK, USAGE
from refold.fuzz import cases, run
from refold.fuzz.cases import Mix
from refold.fuzz.generate import drawable
from refold.fuzz.outcome import ALARM, CRASH, WRONG, Outcome, Setting

Command = Callable[..., tuple[Any, str, str]]


def outcome(kind: str = "", what: str = "", **more: Any) -> Outcome:
    return Outcome(0, Setting(), kind, what, **more)


def whole() -> run.Summary:
    """A run that was long enough, and reached everything."""
    summary = run.Summary(0)
    rules = tuple(p.name for pipeline in run.PIPELINES.values() for p in pipeline.passes)
    summary.add(outcome(operators=tuple(drawable()), rules=rules))
    summary.cases = run._ROUNDS * len(drawable())
    return summary


def test_a_whole_run_passes() -> None:
    assert not whole().failed
    assert "never exercised" not in str(whole())


def test_a_rule_or_an_operator_that_is_never_exercised_fails_the_run() -> None:
    summary = whole()
    del summary.rules["fold-branches"]
    assert summary.missing_rules == ["fold-branches"]
    assert summary.failed
    summary = whole()
    del summary.operators["relu"]
    assert summary.missing_operators == ["relu"]
    assert summary.failed
    assert "never exercised, operator: relu" in str(summary)


def test_a_short_run_does_not_ask_for_all() -> None:
    summary = run.Summary(0)
    summary.add(outcome(operators=("relu",)))
    assert not summary.failed
    assert "is asked for from" in str(summary)


@pytest.mark.parametrize("kind", [WRONG, CRASH])
def test_one_fault_fails(kind: str) -> None:
    summary = whole()
    summary.add(outcome(kind, "x"))
    assert summary.failed


def test_false_alarms_have_a_rate() -> None:
    summary = whole()
    summary.add(outcome(ALARM, "x", verified=True))
    assert not summary.failed  # one may be, however few were verified
    summary.add(outcome(ALARM, "x", verified=True))
    assert summary.failed
    summary.verified = 2000
    assert not summary.failed


@pytest.mark.slow
def test_processes_find_what_one_finds() -> None:
    one, two = (run.run(40, Mix(), count=6, workers=n) for n in (1, 2))
    assert one.to_dict() | {"seconds": 0} == two.to_dict() | {"seconds": 0}


@pytest.mark.slow
def test_a_process_that_ends_costs_one_case(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "ending"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import os\n"
        "class End:\n"
        "    name, exactness = 'ending', 'exact'\n"
        "    def run(self, gm, context=None):\n"
        "        os._exit(3)\n"
    )
    info = tmp_path / "ending-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ending\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[refold.passes]\nending = ending:End\n")
    monkeypatch.syspath_prepend(str(tmp_path))  # which processes that are started get as well
    summary = run.run(0, Mix(modules=0.0, pipeline="ending"), count=2, workers=1)
    assert summary.cases == 2
    assert {f.what for f in summary.faults} == {run.LOST[0]}


@pytest.mark.slow
def test_faults_are_made_smaller_in_a_process_of_their_own() -> None:
    lost = outcome(CRASH, run.LOST[0])
    (_, none), (record, code) = run.shown([lost, outcome(WRONG, "relative error 1")], Mix())
    assert none == ""
    assert record["repeat"] == "--seed 0 --count 1"
    assert "class Net" in code


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases run in this process."""

    def outcomes(seeds: Any, mix: Mix, workers: int) -> Any:
        yield from (cases.run_case(seed, mix) for seed in seeds)

    def shown(faults: Any, mix: Mix) -> Any:
        repeat = {"kind": WRONG, "what": "x", "repeat": "--seed 3 --count 1"}
        return [(repeat, run.smallest(fault)) for fault in faults]

    monkeypatch.setattr(run, "_outcomes", outcomes)
    monkeypatch.setattr(run, "shown", shown)


def test_the_command(run: Command, here: None) -> None:
    code, out, _ = run("fuzz", "--seed", 3, "--count", 4)
    assert code == OK
    assert out.startswith("4 networks, seeds 3 to 6")
    code, out, _ = run("fuzz", "--seed", 3, "--count", 4, "--json")
    record = json.loads(out)
    assert code == OK
    assert (record["first_seed"], record["cases"], record["faults"]) == (3, 4, [])


def test_a_wrong_case_is_printed_as_a_module(
    run: Command, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(seed: int, network: Any, setting: Setting) -> Outcome:
        return Outcome(seed, setting, WRONG, "relative error 1")

    monkeypatch.setattr(cases, "judge", wrong)
    code, out, _ = run("fuzz", "--seed", 3, "--count", 1)
    assert code == NUMBERS
    assert "# refold fuzz --seed 3 --count 1" in out
    printed = out[out.index("from __future__") :]
    scope: dict[str, Any] = {}
    exec(printed, scope)
    scope["Net"]()(*scope["inputs"])


def test_a_crash_is_an_error(run: Command, here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "judge", lambda seed, n, s: Outcome(seed, s, CRASH, "x"))
    assert run("fuzz", "--seed", 3, "--count", 1)[0] == ERROR


def test_an_interrupt_ends_with_what_was_found(
    run: Command, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second_is_interrupted(seed: int, mix: Mix) -> Outcome:
        if seed == 4:
            raise KeyboardInterrupt
        return outcome(WRONG, "relative error 1")

    monkeypatch.setattr(cases, "run_case", second_is_interrupted)
    code, out, error = run("fuzz", "--seed", 3, "--count", 4)
    assert code == INTERRUPTED
    assert out.startswith("1 networks, seeds 3 to 3")
    assert "relative error 1" in out
    assert "what was found so far" in error


@pytest.mark.parametrize(
    "arguments", [("--count", 0), ("--workers", 0), ("--modules", 2), ("--pipeline", "defualt")]
)
def test_nonsense_is_refused(arguments: tuple[object, ...], run: Command) -> None:
    code, _, error = run("fuzz", *arguments)
    assert code == USAGE
    assert "refold:" in error
