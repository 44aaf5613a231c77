"""Writes the files of a new pass: ``python tools/scaffold_rule.py branches fold-something``."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

RULE = '''"""TODO one sentence: what becomes what.

TODO the algebra, and the conditions for exactness.

Before::

    %y = todo(%x)

After::

    %y = todo(%x)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from refold.rewrite.build import Builder
from refold.rewrite.context import Context
from refold.rewrite.driver import apply_rules
from refold.rewrite.pattern import Call, Match, Var
from refold.rewrite.result import PassResult
from refold.rewrite.rule import RewriteRule

aten = torch.ops.aten


class {rule}(RewriteRule):
    """TODO ``before`` is ``after``."""

    name = "{id}"
    pattern = Call(aten.neg, Call(aten.neg, Var("x")))

    def check(self, match: Match) -> str | None:
        """Why this match must stay as it is, or ``None``."""
        return None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        """Makes the replacement."""
        result: fx.Node = match["x"]
        return result


@dataclass(frozen=True)
class {cls}:
    """The pass."""

    name: str = "{id}"
    exactness: str = "exact"

    def run(self, gm: fx.GraphModule, context: Context = Context()) -> PassResult:
        """Applies the rule to its fixpoint."""
        return apply_rules(gm, ({rule}(),))
'''

TEST = """from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from refold.graph import printer
from refold.passes.{family}.{module} import {cls}
from refold.rewrite.pipeline import Pipeline
from tests import golden
from tests.folding import Net
from tests.tracing import ops, trace

PIPELINE = Pipeline("test", ({cls}(),))


def model(v):
    return torch.relu(v.neg().neg())  # TODO what the rule is for


def network() -> nn.Module:
    layers = {{"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}}
    return Net(lambda s, v: torch.tanh(s.b(model(s.a(v)))), **layers)


# Wrong versions of the rule are planted here, and verification must refuse them.
PLANTED = {{"{id}": [(network, lambda: torch.randn(4, 8))]}}


def test_golden() -> None:
    graph = trace(model, torch.randn(2, 3))
    before = printer.render(graph)
    PIPELINE.run(graph, debug=True)
    golden.check("{module}", f"before\\n{{before}}\\nafter\\n{{printer.render(graph)}}")


@settings(max_examples=20, deadline=None, print_blob=True)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_it_keeps_the_numbers(sizes) -> None:
    example = torch.randn(sizes, dtype=torch.float64)
    graph = trace(model, example)
    expected = graph(example)
    PIPELINE.run(graph, debug=True)
    assert ops(graph) == {{"relu": 1}}
    torch.testing.assert_close(graph(example), expected, rtol=1e-12, atol=1e-12)


def test_it_declines() -> None:
    graph = trace(lambda v: -v, torch.randn(2, 3))  # TODO what it must leave alone
    (run,) = PIPELINE.run(graph).runs
    assert not run.result.modified
"""


def scaffold(root: Path, family: str, identifier: str) -> list[Path]:
    """Writes a rule of a family, and its test; refuses to overwrite."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", identifier):
        raise SystemExit(f"{identifier!r} is not kebab-case, as in fold-batch-norm")
    module = identifier.replace("-", "_")
    cls = "".join(part.capitalize() for part in identifier.split("-"))
    values = {
        "id": identifier,
        "family": family,
        "module": module,
        "cls": cls,
        "rule": f"{cls}Rule",
    }
    files = {
        root / "refold/passes" / family / f"{module}.py": RULE,
        root / "tests/passes" / family / f"test_{module}.py": TEST,
    }
    taken = [str(path) for path in files if path.exists()]
    if taken:
        raise SystemExit(f"there already: {', '.join(taken)}")
    for path, text in files.items():
        path.write_text(text.format(**values))
    return list(files)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    root = Path(__file__).resolve().parent.parent
    families = sorted(p.parent.name for p in (root / "refold/passes").glob("*/__init__.py"))
    parser.add_argument("family", choices=families, help="the folder of refold/passes")
    parser.add_argument("id", help="id of the pass, in kebab-case")
    options = parser.parse_args(arguments)
    identifier = options.id
    paths = [path.relative_to(root) for path in scaffold(root, options.family, identifier)]
    for path in paths:
        print(f"wrote {path}")
    cls = "".join(part.capitalize() for part in identifier.split("-"))
    module = identifier.replace("-", "_")
    print("now add to refold/passes/__init__.py its place, with the reason for it:")
    print(f"        {cls}(),  # why here")
    print(f"    (from refold.passes.{options.family}.{module} import {cls})")
    print("then run tools/pass_pages.py, which writes its page from its docstring, and")
    print(f"tools/regenerate_goldens.py {paths[-1]}, which writes the golden of its test")


if __name__ == "__main__":
    main(sys.argv[1:])
