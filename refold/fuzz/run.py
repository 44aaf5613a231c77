"""Runs many cases in several processes, and adds up what they found.

A case is a seed: the same seed draws the same network and the same setting anywhere, whatever ran
before it. A process that ends, or hangs, costs the case that it was at, which is counted as a
crash.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any

import torch

from refold.fuzz import cases
from refold.fuzz.cases import Mix
from refold.fuzz.generate import callable_alone, drawable
from refold.fuzz.network import DrawnNetwork
from refold.fuzz.outcome import ALARM, CRASH, REFUSED, UNJUDGED, WRONG, Outcome, Setting
from refold.fuzz.shrink import shrunk
from refold.fuzz.source import code_of
from refold.passes import PIPELINES

FAULTS = (WRONG, CRASH, ALARM)
LOST = ("the process ended", "no end")  # what is said of cases whose process did not answer
_PATIENCE = 300.0  # seconds for one case
_GRACE = 5.0  # seconds for a process that has nothing to do to end
_ALARMS = 1e-3  # the share of verified cases that verification may refuse wrongly
# Operators are drawn in turn, so that these many rounds over the table reach each.
_ROUNDS = 3
_APPROXIMATE = {"substitute-shift-add"}  # only modules take it, and only with its pipeline


@dataclass
class Summary:
    """What a run found.

    Attributes:
        cases: how many there were.
        kinds: by outcome.
        ways: by how they were compiled.
        verified: how many went through verification.
        exact: what the exact judge said, by verdict.
        operators: in how many networks each was called.
        rules: how often each was applied.
        refusals: why cases were not compiled, or not judged.
        faults: the cases that are wrong, crashed, or were refused by verification.
        seconds: of the whole run.
        first: the first seed.
        interrupted: whether somebody stopped it.
    """

    first: int
    cases: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)
    verified: int = 0
    exact: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    faults: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    def add(self, outcome: Outcome) -> None:
        self.cases += 1
        self.kinds[outcome.kind or "right"] += 1
        self.ways[_way(outcome.setting)] += 1
        self.verified += outcome.verified
        if outcome.exact:
            self.exact[outcome.exact] += 1
        if outcome.kind in FAULTS:
            self.faults.append(outcome)
        if outcome.kind in (REFUSED, UNJUDGED):
            self.refusals[outcome.what[:60]] += 1
        if outcome.kind not in (REFUSED, CRASH):
            self.operators.update(set(outcome.operators))
            self.rules.update(outcome.rules)

    @property
    def missing_operators(self) -> list[str]:
        """What has a row in the table, can be drawn, and was in no network that was judged."""
        missing = drawable().keys() - self.operators.keys()
        return sorted(name for name in missing if callable_alone(name))

    @property
    def missing_rules(self) -> list[str]:
        """Passes of the pipelines that were never applied."""
        known = {p.name for pipeline in PIPELINES.values() for p in pipeline.passes}
        applied = {rule.partition("/")[0] for rule in self.rules}
        return sorted(known - _APPROXIMATE - applied)

    @property
    def covers(self) -> bool:
        """Whether the run is long enough to reach every operator and every rule."""
        return self.cases >= _ROUNDS * len(drawable())

    @property
    def alarms_allowed(self) -> float:
        return max(1.0, _ALARMS * self.verified)

    @property
    def failed(self) -> bool:
        if any(o.kind != ALARM for o in self.faults):
            return True
        if self.kinds[ALARM] > self.alarms_allowed:
            return True
        return self.covers and bool(self.missing_operators or self.missing_rules)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        last = self.first + self.cases - 1
        yield f"{self.cases} networks, seeds {self.first} to {last}, in {self.seconds:.0f} s"
        names = {"right": "right", WRONG: "wrong", CRASH: "crashed", UNJUDGED: "not judged",
                 REFUSED: "not compiled"}  # fmt: skip
        for kind, text in names.items():
            yield f"  {text:<14}{self.kinds[kind]:>8}"
        yield (f"  verification refused {self.kinds[ALARM]} of {self.verified} that are right"
               " (false alarms)")  # fmt: skip
        if self.exact:
            said = ", ".join(f"{n} {kind}" for kind, n in self.exact.most_common())
            yield f"  modulo a prime: {said}"
        yield f"  operators {len(self.operators)}, rules {len(self.rules)}"
        if not self.covers:
            least = _ROUNDS * len(drawable())
            yield f"  every operator and rule is asked for from {least} networks on"
            return
        for what, missing in (("operator", self.missing_operators), ("rule", self.missing_rules)):
            if missing:
                yield f"  never exercised, {what}: {', '.join(missing)}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "first_seed": self.first,
            "interrupted": self.interrupted,
            "cases": self.cases,
            "seconds": round(self.seconds, 1),
            "outcomes": dict(self.kinds),
            "ways": dict(self.ways),
            "verified": self.verified,
            "exact": dict(self.exact),
            "operators": dict(sorted(self.operators.items())),
            "rules": dict(sorted(self.rules.items())),
            "missing_operators": self.missing_operators if self.covers else None,
            "missing_rules": self.missing_rules if self.covers else None,
            "not_judged": dict(self.refusals.most_common()),
            "faults": [
                {"seed": o.seed, "kind": o.kind, "what": o.what, "setting": str(o.setting)}
                for o in self.faults
            ],
        }


def _way(setting: Setting) -> str:
    if setting.way == "module":
        return f"module, {setting.target}, {setting.pipeline}"
    sizes = "dynamic" if setting.dynamic else "static"
    return f"graph, {str(setting.dtype).removeprefix('torch.')}, {sizes}, {setting.pipeline}"


def run(
    first: int,
    mix: Mix,
    *,
    count: int | None = None,
    seconds: float | None = None,
    workers: int = 1,
    progress: Callable[[Summary], None] | None = None,
) -> Summary:
    """Runs cases from a first seed on. An interrupt ends it with what was found so far.

    Args:
        first: the first seed; the others follow it.
        mix: the settings to draw from.
        count: how many cases; without it, as many as the time allows.
        seconds: when to stop.
        workers: how many processes.
        progress: called after each case.
    """
    summary, start = Summary(first), time.monotonic()

    def seeds() -> Iterator[int]:
        at = first
        while (count is None or at < first + count) and (
            seconds is None or time.monotonic() - start < seconds
        ):
            yield at
            at += 1

    try:
        for outcome in _outcomes(seeds(), mix, workers):
            summary.add(outcome)
            summary.seconds = time.monotonic() - start
            if progress is not None:
                progress(summary)
    except KeyboardInterrupt:
        summary.interrupted = True
    return summary


# --- processes ------------------------------------------------------------------------------------


class _Worker:
    """A process that runs one case at a time."""

    def __init__(self, mix: Mix) -> None:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, mix), daemon=True)
        self.process.start()
        theirs.close()
        self.seed: int | None = None
        self.since = 0.0

    def give(self, seed: int) -> None:
        self.seed, self.since = seed, time.monotonic()
        self.pipe.send(seed)

    def end(self) -> None:
        """Ends the process: one that waits for a seed sees that none will come."""
        self.pipe.close()
        self.process.join(_GRACE if self.seed is None else 0)
        self.process.kill()
        self.process.join()


def _work(pipe: Any, mix: Mix) -> None:
    """Answers seeds with what their cases find, and faults with smaller ones."""
    quiet()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends this one
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        pipe.send(smallest(asked) if isinstance(asked, Outcome) else cases.run_case(asked, mix))


def quiet() -> None:
    """One thread, and no warnings of operators that are called with whatever fits."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    torch.set_warn_always(False)
    logging.disable(logging.CRITICAL)


def _outcomes(seeds: Iterator[int], mix: Mix, count: int) -> Iterator[Outcome]:
    workers = [_Worker(mix) for _ in range(count)]
    try:
        for worker in workers:
            _next(worker, seeds)
        while any(w.seed is not None for w in workers):
            busy = [w for w in workers if w.seed is not None]
            ready = connection.wait([w.pipe for w in busy], timeout=5)
            for worker in busy:
                done = None
                if worker.pipe in ready:
                    try:
                        done = worker.pipe.recv()
                    except EOFError:
                        done = _lost(worker.seed, mix, LOST[0])
                elif time.monotonic() - worker.since > _PATIENCE:
                    done = _lost(worker.seed, mix, f"{LOST[1]} after {_PATIENCE:.0f} s")
                if done is None:
                    continue
                if done.what.startswith(LOST):
                    worker.end()
                    workers[workers.index(worker)] = worker = _Worker(mix)
                yield done
                _next(worker, seeds)
    finally:
        for worker in workers:
            worker.end()


def _next(worker: _Worker, seeds: Iterator[int]) -> None:
    seed = next(seeds, None)
    worker.seed = None
    if seed is not None:
        worker.give(seed)


def _lost(seed: int | None, mix: Mix, what: str) -> Outcome:
    assert seed is not None
    return Outcome(seed, cases.setting_of(seed, mix), CRASH, what)


# --- what is shown of a fault ---------------------------------------------------------------------


def shown(faults: Sequence[Outcome], mix: Mix) -> list[tuple[dict[str, str], str]]:
    """What is said of faults, with the smallest modules that show them.

    They are made smaller in a process of its own: what ends it costs the smaller module alone.
    """
    found, worker = [], _Worker(mix)
    for fault in faults:
        code = ""
        if not fault.what.startswith(LOST):
            worker.pipe.send(fault)
            with contextlib.suppress(EOFError):
                code = worker.pipe.recv() if worker.pipe.poll(_PATIENCE) else ""
            if not code:
                worker.end()
                worker = _Worker(mix)
        record = {
            "kind": fault.kind,
            "what": fault.what,
            "setting": str(fault.setting),
            "repeat": f"--seed {fault.seed} --count 1{mix.arguments}",
        }
        found.append((record, code))
    worker.end()
    return found


def smallest(outcome: Outcome) -> str:
    """The network of a fault as Python, made smaller while it fails in the same way."""
    setting = outcome.setting
    first_words = outcome.what[:24]

    def fails(network: DrawnNetwork) -> bool:
        found = cases.judge(outcome.seed, network, setting)
        same = found.kind == outcome.kind
        return same and (found.kind == WRONG or found.what[:24] == first_words)

    return code_of(shrunk(cases.network_for(outcome.seed, setting), fails))
