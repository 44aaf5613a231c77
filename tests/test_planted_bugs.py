"""A bug planted into any rewrite is refused by verification.

Each pass runs on a small network in which it fires; then one thing that it made is broken, as a
slip in its code would: a bias dropped, a channel's sign, scale or neighbour taken, a tap shifted,
an operand or an operation left out. Every bug that moves the result by more than a thousandth
must be refused. ``substitute-shift-add`` is not here: what it replaces is wrong on purpose, its
error is measured and reported, and what lowers it is compared with what it left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from refold.errors import RefoldError
from refold.frontends.export import trace
from refold.frontends.torchvision_shim import declare_torchvision_ops
from refold.graph import constants
from refold.graph.evaluate import Oracle
from refold.graph.kinds import op_name
from refold.passes import PASSES, PIPELINES
from refold.rewrite.pipeline import Pipeline, copy_sharing_tensors
from refold.rewrite.result import Declined, Pass, PassResult
from refold.verify.compare import verify
from refold.verify.references import references
from tests.folding import Net
from tests.models.experts import spread
from tests.passes import test_average_experts as experts
from tests.passes import test_defer_expands as expands
from tests.passes import test_defer_resizes as resizes
from tests.passes import test_drop_zero_channels as dead
from tests.passes import test_fold_attention_biases as attention
from tests.passes import test_merge_parallel_layers as parallel
from tests.passes import test_split_constant_tokens as split
from tests.randomise import randomise

VISIBLE = 1e-3  # of the output's scale: what a bug must move to count as one
LEAST = 5  # bugs planted into each pass
MOST = 14

aten = torch.ops.aten


# --- what is planted ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """A pass, with the ``index``-th of the bugs that can be planted into what it made."""

    inner: Pass
    index: int

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def exactness(self) -> str:
        return self.inner.exactness

    def run(self, gm: fx.GraphModule) -> PassResult:
        before = {n: (n.target, n.args, tuple(n.kwargs.items())) for n in gm.graph.nodes}
        result = self.inner.run(gm)
        made = [
            n
            for n in gm.graph.nodes
            if n.op in ("call_function", "get_attr")
            and before.get(n) != (n.target, n.args, tuple(n.kwargs.items()))
        ]
        # A cheap rewrite may make nothing: what read the old value reads another one now.
        bugs = list(_bugs(gm, made))
        if self.index < len(bugs):
            bugs[self.index][1]()
            gm.recompile()
        PLANTED.append(bugs[self.index][0] if self.index < len(bugs) else "")
        return result


PLANTED: list[str] = []
_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "a channel's sign": lambda t: _with_row(t, -1.0),
    "a channel's scale": lambda t: _with_row(t, 1.5),
    "the next channel's": lambda t: t.roll(1, 0),
    "a shifted tap": lambda t: t.roll(1, -1) if t.ndim > 1 else t.flip(0),
    "the next input's": lambda t: t.roll(1, 1) if t.ndim > 1 else -t,
}


def _with_row(t: Tensor, factor: float) -> Tensor:
    """The largest row scaled."""
    axis = max(range(t.ndim), key=lambda i: t.shape[i]) if t.shape[0] == 1 else 0
    others = [i for i in range(t.ndim) if i != axis]
    row = int((t.abs().amax(others) if others else t.abs()).argmax())
    changed = t.clone()
    changed.select(axis, row).mul_(factor)
    return changed


def _bugs(gm: fx.GraphModule, made: list[fx.Node]) -> Iterator[tuple[str, Callable[[], None]]]:
    floats = [n for n in made if constants.is_get_attr(n) and n.users
              and n.meta["val"].is_floating_point() and n.meta["val"].ndim]  # fmt: skip
    calls = [n for n in made if n.op == "call_function"]
    for name, change in _CHANGES.items():
        for node in floats[:2]:
            yield f"{name} in {node.target}", lambda n=node, c=change: _replace(gm, n, c)
    for node in calls:
        for source in _alike(node):
            yield f"{node.name} left out", lambda n=node, s=source: _forward(n, s)
        if (
            op_name(node) in ("linear", "conv2d")
            and len(node.args) > 2
            and node.args[2] is not None
        ):
            yield f"no bias in {node.name}", lambda n=node: n.update_arg(2, None)
        if op_name(node) == "add":
            yield f"{node.name} subtracts", lambda n=node: setattr(n, "target", aten.sub.Tensor)
        if op_name(node) == "mul":
            yield f"{node.name} adds", lambda n=node: setattr(n, "target", aten.add.Tensor)
    for node in {u: None for n in calls for u in n.users if u.op == "call_function"}:
        for source in _alike(node):
            yield f"{node.name} left out", lambda n=node, s=source: _forward(n, s)
    for node in calls:
        if node.users and isinstance(node.meta["val"], Tensor):
            for kind in ("negated", "flipped", "rolled", "scaled"):
                yield f"{node.name} {kind}", lambda n=node, k=kind: _behind(gm, n, k)


def _alike(node: fx.Node) -> list[fx.Node]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return []
    return [
        n
        for n in node.all_input_nodes
        if isinstance(n.meta.get("val"), Tensor)
        and n.meta["val"].dtype == value.dtype
        and str(n.meta["val"].shape) == str(value.shape)
        and op_name(node) not in ("contiguous", "clone")
    ]


def _forward(node: fx.Node, source: fx.Node) -> None:
    node.replace_all_uses_with(source, propagate_meta=False)


def _replace(gm: fx.GraphModule, node: fx.Node, change: Callable[[Tensor], Tensor]) -> None:
    constants.materialise(node)
    node.meta.pop("refold_exact", None)
    changed = change(constants.tensor(node).detach().clone())
    gm.register_buffer(f"bug_{node.name}", changed)
    node.target = f"bug_{node.name}"


def _behind(gm: fx.GraphModule, node: fx.Node, kind: str) -> None:
    """Something wrong behind a node: a sign, an axis the wrong way, a shift, a scale."""
    users = list(node.users)
    last = node.meta["val"].ndim - 1
    target, args = {
        "negated": (aten.neg.default, ()),
        "flipped": (aten.flip.default, ([last],)),
        "rolled": (aten.roll.default, ([1], [last])),
        "scaled": (aten.mul.Tensor, (1.25,)),
    }[kind]
    with gm.graph.inserting_after(node):
        wrong = gm.graph.call_function(target, (node, *args))
    wrong.meta["val"] = node.meta["val"]
    for user in users:
        user.replace_input_with(node, wrong)


# --- where it is planted --------------------------------------------------------------------------


def _image(channels: int = 4, size: int = 8) -> Tensor:
    return torch.randn(2, channels, size, size)


def _net(forward: Callable, **parts: Any) -> nn.Module:
    return Net(lambda s, x: torch.tanh(forward(s, torch.tanh(x))), **parts)


def _conv(i: int = 4, o: int = 4, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


G, H = torch.rand(4, 1, 1) + 0.5, torch.randn(4, 1, 1)

CASES: dict[str, list[tuple[Callable[[], nn.Module], Callable[[], Tensor]]]] = {
    "split-constant-tokens": [
        (lambda: split.net(lambda s, x: s.f(s.norm(split.prompted(s, x)))), split.tokens),
    ],
    "defer-expands": [
        (lambda: expands.net(lambda s, x: s.f(s.norm(expands.expanded(s, x)))), expands.tokens),
    ],
    "fold-constants": [
        (lambda: nn.utils.parametrizations.weight_norm(_conv()), _image),
        (lambda: _net(lambda s, x: s.c(x) * (s.g * 2 + s.h), c=_conv(), g=G, h=H), _image),
    ],
    "clean-up": [
        (lambda: _net(lambda s, x: s.c((x + 0).relu().relu()).permute(0, 2, 3, 1)
                      .permute(0, 3, 2, 1), c=_conv()), _image),
        (lambda: _net(lambda s, x: s.l(x.reshape(2, -1).view(2, 4, -1).flatten(1)),
                      l=nn.Linear(256, 5)), _image),
    ],
    "average-experts": [
        (lambda: experts.Ensemble(spread(experts.EXPERTS["ffn"](), 2, 0.0)), experts.tokens),
    ],
    "fold-batch-norm": [
        (lambda: _net(lambda s, x: s.b(s.c(x)), c=_conv(), b=nn.BatchNorm2d(4)), _image),
    ],
    "absorb-scale-shift": [
        (lambda: _net(lambda s, x: s.c(x) * s.g + s.h, c=_conv(), g=G, h=H), _image),
    ],
    "fold-branches": [
        (lambda: _net(lambda s, x: s.a(x) + s.b(x) + x, a=_conv(), b=_conv(k=1)), _image),
        (lambda: _net(lambda s, x: s.b(s.a(x)), a=_conv(k=1, o=32), b=_conv(i=32)), _image),
    ],
    "join-scale-shifts": [
        (lambda: _net(lambda s, x: s.n(x) + x * s.g, n=nn.BatchNorm2d(4), g=G), _image),
    ],
    "defer-resizes": [
        (lambda: resizes.net(lambda s, x: s.f(torch.cat([resizes.up(x), resizes.up(x.exp())], 1)),
                             f=resizes.head()), resizes.big),
    ],
    "drop-zero-channels": [
        (lambda: dead.net(lambda s, x: s.b(F.gelu(s.a(x))), b=dead.conv(12, 4),
                          a=dead.kill(dead.conv(4, 12), dead.DEAD)), _image),
    ],
    "fold-attention-biases": [
        (lambda: attention.Attention(attention.fused()), attention.tokens),
    ],
    "merge-parallel-layers": [(lambda: parallel.net(parallel.gated), parallel.tokens)],
}  # fmt: skip
_BEFORE = {"absorb-scale-shift": ("fold-constants",), "average-experts": ("fold-constants",)}


def refused(
    model: nn.Module,
    x: Tensor,
    passes: tuple[Pass, ...],
    at: int,
    failures: list[Declined],
    most: int = MOST,
) -> dict[str, bool]:
    """For each bug that shows, whether it is refused: by verification, or between the passes.

    What the check between the passes refuses is undone, and recorded as a failure of the pass.
    """
    program = trace(model, (x,))
    original = copy_sharing_tensors(program.graph_module)
    known = references(original, program, module=program.module)

    def outcome(inner: tuple[Pass, ...]) -> fx.GraphModule:
        gm = copy_sharing_tensors(original)
        Pipeline("planted", inner).run(gm)
        return gm

    right = outcome(passes)
    assert verify(original, right, known, folded_gm=right).passed
    exact = Oracle(right).run((x,))
    found: dict[str, bool] = {}
    for index in range(60):
        broken = (*passes[:at], Planted(passes[at], index), *passes[at + 1 :])
        PLANTED.clear()
        try:
            gm = outcome(broken)
            if not PLANTED[0]:
                break
            if failures:
                failures.clear()
                found[PLANTED[0]] = True
                continue
            wrong = Oracle(gm).run((x,))
            if wrong.shape == exact.shape:
                apart = (wrong - exact).abs().max() / exact.abs().max()
                if float(apart) < VISIBLE:
                    continue
            verify(original, gm, known, folded_gm=gm)
        except RefoldError:
            found[PLANTED[0]] = True
        except RuntimeError:  # it cannot run: nobody would miss that
            continue
        else:
            found[PLANTED[0]] = False
        if len(found) >= most:
            break
    return found


@pytest.mark.parametrize("name", [name for name in PASSES if name != "substitute-shift-add"])
def test_bugs_in_a_pass_are_refused(name: str, failures: list[Declined]) -> None:
    found: dict[str, bool] = {}
    passes = (*(PASSES[n]() for n in _BEFORE.get(name, ())), PASSES[name]())
    for build, inputs in CASES[name]:
        torch.manual_seed(0)
        model = build().float().eval()
        found |= refused(model, inputs().float(), passes, len(passes) - 1, failures)
    assert len(found) >= LEAST, f"only {list(found)} could be planted"
    assert all(found.values()), [bug for bug, seen in found.items() if not seen]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "options", "fire"),
    [
        ("mobileone_s0", {}, ("fold-batch-norm", "fold-branches", "clean-up")),
        ("repvgg_a0", {}, ("fold-batch-norm", "fold-branches", "clean-up")),
        ("vit_tiny_patch16_224", {"img_size": 64, "init_values": 0.1},
         ("absorb-scale-shift", "fold-attention-biases", "fold-constants")),
    ],
)  # fmt: skip
def test_bugs_in_a_network_are_refused(
    network: str, options: dict[str, Any], fire: tuple[str, ...], failures: list[Declined]
) -> None:
    declare_torchvision_ops()
    timm = pytest.importorskip("timm")
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = randomise(timm.create_model(network, **options), (x,))
    passes = PIPELINES["default"].passes
    names = [p.name for p in passes]
    found = {}
    for name in fire:
        found |= refused(model, x, passes, names.index(name), failures, LEAST)
    assert len(found) >= 2 * LEAST, list(found)
    assert all(found.values()), [bug for bug, seen in found.items() if not seen]
