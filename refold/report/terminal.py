"""The record of a compilation as text for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from refold.diagnose.dead_parameters import DeadParameter
from refold.report.record import InputRecord, Record
from refold.rewrite.result import Applied, Decline, in_bytes

_SHOWN_DECLINES = 10
_SHOWN_CROSSED = 4
_SHOWN_LAYERS = 16
_SHOWN_DEAD = 10
_SHOWN_UNKNOWN = 6
_JOINED = "\N{NO-BREAK SPACE}"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NUMBERED = re.compile(r"\b[a-z]\w*_\d+\b|\d+(\.\d+)?")


class Renderer:
    """The report as text for a terminal."""

    def __init__(self, report: Record, color: bool, width: int) -> None:
        self.report, self.color, self.width = report, color, width
        self.lines: list[str] = []

    def text(self) -> str:
        self._head()
        self._passes()
        self._crossed()
        self._declined()
        self._unknown()
        self._layers()
        self._removed()
        self._numerics()
        self._sizes()
        self._notes()
        return "\n".join(self.lines)

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.color else text

    def _row(self, label: str, text: str, code: str = "") -> None:
        """A labelled sentence, wrapped at the width, continuation lines indented."""
        indent = 11
        words, line, first = text.split(" "), "", True
        for word in words:
            if line and len(line) + 1 + len(word) > self.width - indent:
                self._line(label if first else "", line, code)
                line, first = word, False
            else:
                line = f"{line} {word}" if line else word
        self._line(label if first else "", line, code)

    def _line(self, label: str, text: str, code: str) -> None:
        head = self._paint(f"{label:<10}", "2") if label else " " * 10
        text = text.replace(_JOINED, " ").rstrip()
        self.lines.append(f" {head}{self._paint(text, code) if code else text}".rstrip())

    def _head(self) -> None:
        r = self.report
        parts = [f"refold {r.versions.get('refold', '')}", self._paint(r.model, "1")]
        parts.append(f"target {r.target}" if r.target else "dry run")
        parts += [_shapes(r.inputs), "folded in float64"]
        line, columns = parts[0], _columns(parts[0])
        for part in parts[1:]:
            columns += 2 + _columns(part)
            if columns > self.width:
                self.lines.append(line)
                line, columns = f" {part}", 1 + _columns(part)
            else:
                line = f"{line}  {part}"
        self.lines.append(line)
        for i in r.inputs:
            sizes = ["batch" if d == i.batch else str(s) for d, s in enumerate(i.sizes)]
            self._row("input", f"{i.name} {i.dtype} [{', '.join(sizes)}]")
        for b in r.bound:
            shape = ", ".join(map(str, b.shape))
            self._row("bound", f"{b.name} {b.dtype} [{shape}], no input any more")
        self.lines.append("")

    def _passes(self) -> None:
        rows = [p for p in self.report.passes if p.applied or p.declined]
        if not rows:
            return
        table = [("pass", "applied", "declined", "nodes", "time")]
        for p in rows:
            nodes = f"{p.nodes_before} -> {p.nodes_after}"
            table.append(
                (p.name, str(len(p.applied)), str(len(p.declined)), nodes, _time(p.seconds))
            )
        columns = [max(map(len, column)) for column in zip(*table, strict=True)]
        if 9 + sum(columns[:3]) + 15 + 9 <= self.width:
            columns[3:] = 15, 9  # where there is room, tables of several reports look alike
        while 1 + sum(columns) + 2 * (len(columns) - 1) > self.width:
            columns.pop()  # the time first: what a narrow terminal leaves out is in --json
        for cells in table:
            row = [f"{cells[0]:<{columns[0]}}"]
            row += [f"{cell:>{n}}" for cell, n in zip(cells[1:], columns[1:], strict=False)]
            text = f" {'  '.join(row)}"
            self.lines.append(self._paint(text, "2") if cells is table[0] else text)
        self.lines.append("")

    def _crossed(self) -> None:
        """What was pushed across other calls, those told alike together."""
        groups: dict[tuple[str, str], list[Applied]] = {}
        for record in self.report.applied:
            if record.crossed:
                groups.setdefault((record.rule, record.detail), []).append(record)
        for (rule, detail), (first, *others) in list(groups.items())[:_SHOWN_CROSSED]:
            where = f"module {first.modules[0]}" if first.modules else first.path[0]
            count = f" (and {len(others)} like it)" if others else ""
            self._row("crossed", f"{where}{count}  {rule}: {detail}")
        if len(groups) > _SHOWN_CROSSED:
            rest = sum(len(members) for members in list(groups.values())[_SHOWN_CROSSED:])
            self._row("", f"... and {rest} more, see --json")
        if groups:
            self.lines.append("")

    def _declined(self) -> None:
        r = self.report
        if not r.applied:
            if r.declined:
                self._row("nothing", "was folded: every candidate was declined, see below", "33")
            else:
                self._row("nothing", f"to fold: {_nothing(r.before.census)}", "33")
        shown = 0
        groups = _grouped(r.declined)
        groups.sort(key=lambda group: not group[0].failed)
        for first, members in groups:
            if shown == _SHOWN_DECLINES:
                rest = sum(len(m) for _, m in groups[shown:])
                self._row("", f"... and {rest} more, see --json")
                break
            where = f"module {first.module}" if first.module else first.node or "the pass"
            count = f" (and {len(members) - 1} like it)" if len(members) > 1 else ""
            source = f"  {_short(first.source)}" if first.source else ""
            label, colour = ("failed", "31") if first.failed else ("declined", "33")
            self._row(label, f"{where}{count}  {first.rule}: {first.reason}{source}", colour)
            if first.hint:
                self._row("", f"hint: {first.hint}")
            shown += 1
        if not r.applied or shown:
            self.lines.append("")

    def _unknown(self) -> None:
        """The operators that the table does not have: what stands around them is left as it is."""
        found = [name if n == 1 else f"{name} x {n}" for name, n in self.report.unknown.items()]
        if found:
            some = found[:_SHOWN_UNKNOWN]
            more = f" and {len(found) - len(some)} more, see --json" if found[len(some) :] else ""
            what = "operator" if len(found) == 1 else "operators"
            text = f"{what} {_kept_together(some)}{more}: nothing is folded through"
            self._row("unknown", f"{text} {'it' if len(found) == 1 else 'them'}", "33")

    def _layers(self) -> None:
        """For each approximate pass a table, a row for each layer, of the columns it names."""
        rows: dict[str, list[Applied]] = {}
        for record in self.report.applied:
            if record.columns:
                rows.setdefault(record.rule, []).append(record)
        for records in rows.values():
            self._table(records[:_SHOWN_LAYERS])
            if len(records) > _SHOWN_LAYERS:
                self.lines.append(f" ... and {len(records) - _SHOWN_LAYERS} more, see --json")
            self.lines.append("")

    def _table(self, records: Sequence[Applied]) -> None:
        headings = ["layer", *dict.fromkeys(h for r in records for h in r.columns)]
        cells = [
            [(*r.removed, *r.modules)[-1], *(r.columns.get(h, "") for h in headings[1:])]
            for r in records
        ]
        widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
        if sum(widths) + 2 * len(widths) > self.width:
            for name, *values in cells:
                named = [f"{h} {v}" for h, v in zip(headings[1:], values, strict=True) if v]
                self._row("layer", _kept_together([name, *named]))
            return
        numbers = [all(c.isdigit() for c in column) for column in zip(*cells, strict=True)]
        self.lines.append(self._paint(_line(headings, widths, numbers), "2"))
        self.lines += [_line(row, widths, numbers) for row in cells]

    def _removed(self) -> None:
        before, after = self.report.before.census, self.report.after.census
        kinds = [k for k in _ordered({**before, **after}) if before.get(k, 0) != after.get(k, 0)]
        if kinds:
            changes = [f"{k} {before.get(k, 0)} -> {after.get(k, 0)}" for k in kinds]
            self._row("calls", _kept_together(changes))

    def _numerics(self) -> None:
        r = self.report
        if r.target is None:
            self._row("verified", "no: a dry run changes nothing")
            return
        if r.numerics is None:
            self._row("verified", "no: verification was switched off", "33")
        else:
            self._row("verified", _numbers(r.numerics), _colour(r.numerics))
        if r.artifact_numerics is not None:
            self._row("", f"as {r.target}: {_numbers(r.artifact_numerics)}",
                      _colour(r.artifact_numerics))  # fmt: skip
        if r.divergence is not None:
            self._row("diverges", _divergence(r.divergence), "33")

    def _sizes(self) -> None:
        r = self.report
        self._row(
            "size",
            _kept_together(
                [
                    f"nodes {r.before.nodes} -> {r.after.nodes}",
                    f"parameters {_count(r.before.parameters)} -> {_count(r.after.parameters)}",
                    f"weights {in_bytes(r.before.bytes)} -> {in_bytes(r.after.bytes)}",
                ]
            ),
        )
        if r.artifact and r.target not in (None, "torch"):
            self._row(
                "artifact",
                f"{r.artifact.get('nodes', 0)} nodes, {in_bytes(r.artifact.get('bytes', 0))}",
            )
        if r.timings:
            self._row("time", _kept_together(f"{k} {_time(s)}" for k, s in r.timings.items()))

    def _notes(self) -> None:
        for parameter in self.report.dead[:_SHOWN_DEAD]:
            self._row("dead", _dead(parameter), "33")
        if len(self.report.dead) > _SHOWN_DEAD:
            self._row("", f"... and {len(self.report.dead) - _SHOWN_DEAD} more, see --json")
        for sentence in self.report.warnings:
            self._row("warning", sentence, "33")
        for sentence in [*self.report.specialised, *self.report.notes]:
            self._row("note", sentence)


def _columns(text: str) -> int:
    """How many columns a text takes, colours left out."""
    return len(_COLOURS.sub("", text))


def _dead(parameter: DeadParameter) -> str:
    part = "" if parameter.entries == parameter.of else f"{parameter.entries} of {parameter.of}, "
    return f"{parameter.name}{parameter.where} ({part}no output depends on it): {parameter.reason}"


def _kept_together(items: Iterable[str]) -> str:
    """Items in a row, none of which is broken over two lines."""
    return "   ".join(item.replace(" ", _JOINED) for item in items)


def _shapes(inputs: Iterable[InputRecord]) -> str:
    records = list(inputs)
    if any(i.batch is not None for i in records):
        return "batch dynamic"
    return (
        "shapes dynamic"
        if any(isinstance(s, str) for i in records for s in i.sizes)
        else "shapes static"
    )


def _grouped(declined: Iterable[Decline]) -> list[tuple[Decline, list[Decline]]]:
    """Declines that differ in numbers and node names alone together, by first appearance."""
    groups: dict[tuple[str, str, str], list[Decline]] = {}
    for d in declined:
        reason = _NUMBERED.sub("#", d.reason)
        groups.setdefault((d.rule, reason, d.hint), []).append(d)
    return [(members[0], members) for members in groups.values()]


_FOLDABLE = ("batch-norm", "conv", "conv-transpose", "linear")


def _nothing(census: Mapping[str, int]) -> str:
    present = [f"{census[k]} {k}" for k in _FOLDABLE if census.get(k)]
    found = ", ".join(present) if present else "no conv, linear or batch norm"
    return f"found {found}, but no batch norm, scale, parallel branch or sequence to merge"


def _ordered(census: Mapping[str, int]) -> list[str]:
    first = [*_FOLDABLE, "add", "sub", "mul", "div"]
    return [*(k for k in first if k in census), *sorted(k for k in census if k not in first)]


def _numbers(numerics: Mapping[str, Any]) -> str:
    return str(numerics.get("summary", "done"))


def _divergence(found: Mapping[str, Any]) -> str:
    kind = "held-out" if found["held_out"] else "verification"
    text = f"from the model without approximation by {found['error']:.1e} (relative norm)"
    if found["kl"] == found["kl"]:
        text += f", KL {found['kl']:.1e}, top-1 equal {found['top1']:.1%}"
    return f"{text}, on {found['inputs']} {kind} inputs"


def _colour(numerics: Mapping[str, Any]) -> str:
    return "32" if numerics.get("passed", True) else "31"


def _short(source: str) -> str:
    path, _, line = source.rpartition(":")
    parts = PurePath(path).parts
    return f"{'/'.join(parts[-2:])}:{line}" if path else source


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _count(number: int) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.2f} {unit}"
    return str(number)


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = [
        f"{cell:>{width}}" if to_right else f"{cell:<{width}}"
        for cell, width, to_right in zip(cells, widths, right, strict=True)
    ]
    return f" {'  '.join(padded)}".rstrip()
