"""A bug planted into any rule of any pipeline is refused by verification.

Each rule runs alone on small networks in which it fires, and on three of timm; then one thing that
it made is broken (:mod:`tests.planted`). Every bug that moves the result by more than a thousandth
must be refused, and each rule has at least five such.
``substitute-shift-add`` is wrong on purpose: its bugs are refused as codes that are not those of
the weights (:mod:`refold.verify.codes`).
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import refold.passes
from refold.algebra.binary_coding import BinaryCode
from refold.cli.torchvision_shim import declare_torchvision_ops
from refold.errors import VerificationError
from refold.graph.copies import copy_sharing_tensors
from refold.passes import PASSES, PIPELINES
from refold.passes.branches.fold_branches import FoldBranches
from refold.passes.prepare.clean_up import CleanUp
from refold.passes.scale_shift.absorb_scale_shift import AbsorbScaleShift
from refold.passes.shift_add import codes as layer_codes
from refold.passes.shift_add.substitute_shift_add import SubstituteShiftAdd
from refold.rewrite.pipeline import Pipeline
from refold.rewrite.result import Decline, Pass
from tests.examples import few
from tests.folding import Net
from tests.models.experts import spread
from tests.passes.branches import test_defer_resizes as resizes
from tests.passes.branches import test_merge_parallel_layers as parallel
from tests.passes.experts import test_average_experts as experts
from tests.passes.prepare import test_defer_expands as expands
from tests.passes.prepare import test_drop_zero_channels as dead
from tests.passes.prepare import test_split_constant_tokens as split
from tests.passes.scale_shift import test_fold_attention_biases as attention
from tests.planted import Bench, Only, Outcome, id_of, rules_of
from tests.randomise import randomise

LEAST = 5  # visible bugs of each rule
HIDDEN = 1 / 3  # of the visible ones: how many may move the result too little to count

aten = torch.ops.aten

EVERY: dict[str, Pass] = {
    rule: item
    for pipeline in PIPELINES.values()
    for item in pipeline.passes
    for rule in rules_of(item)
}


# --- where they are planted -----------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A small network in which a rule fires.

    Attributes:
        build: makes it.
        inputs: makes what it is called with.
        before: passes that run first.
        instead: the pass of the rule, where options matter.
        call: a call with its other arguments that is put behind the ReLU, for it does nothing and
            no frontend leaves it.
        read: whether anything reads that call.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    before: tuple[str, ...] = ()
    instead: Pass | None = None
    call: tuple[Any, ...] = ()
    read: bool = True

    def graph(self, original: fx.GraphModule) -> fx.GraphModule:
        """The graph that the rule is run on."""
        gm = copy_sharing_tensors(original)
        Pipeline("before", tuple(PASSES[name]() for name in self.before)).run(gm)
        if self.call:
            (relu,) = gm.graph.find_nodes(op="call_function", target=aten.relu.default)
            with gm.graph.inserting_after(relu):
                idle = gm.graph.call_function(self.call[0], (relu, *self.call[1:]))
            idle.meta["val"] = relu.meta["val"]
            if self.read:
                relu.replace_all_uses_with(idle, lambda reader: reader is not idle)
        return gm


def _image(channels: int = 4, size: int = 8) -> Tensor:
    return torch.randn(2, channels, size, size)


def _net(forward: Callable, **parts: Any) -> nn.Module:
    return Net(lambda s, x: torch.tanh(forward(s, torch.tanh(x))), **parts)


def _conv(i: int = 4, o: int = 4, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def _on_image(forward: Callable, *before: str, instead: Pass | None = None, **parts: Any) -> Case:
    return Case(
        lambda: _net(forward, **{k: v() for k, v in parts.items()}), _image, before, instead
    )


def _idle(forward: Callable[[Any, Tensor], Tensor], **parts: Any) -> Case:
    """Between two layers, something that does nothing."""
    return _on_image(
        lambda s, x: s.d(torch.sigmoid(forward(s, torch.relu(s.c(x))))), c=_conv, d=_conv, **parts
    )


def _gated(y: Tensor, flag: Tensor) -> Tensor:
    gate = flag.to(y.dtype)
    return (y * gate + (gate + 1).log()) / (gate - 3) - torch.where(flag, y, y.cos())


def _flagged(function: Callable[[Tensor, Tensor], Tensor], value: bool) -> Case:
    """Between two layers, a truth value."""
    return _on_image(
        lambda s, x: s.d(function(torch.relu(s.c(x)), torch.full((1,), value))),
        "fold-constants", c=_conv, d=_conv,
    )  # fmt: skip


def _grafted(*call: Any, read: bool = True) -> Case:
    """Between two layers, a call that does nothing."""
    case = _idle(lambda s, x: x.exp())
    return Case(case.build, case.inputs, call=call, read=read)


def _scale() -> Tensor:
    return torch.rand(4, 1, 1) + 0.5


def _shift() -> Tensor:
    return torch.randn(4, 1, 1)


def _gains() -> Tensor:
    return torch.rand(6)


def _weight() -> Tensor:
    return torch.randn(6, 4, 3, 3) / 6


def _upsampling() -> nn.Module:
    return nn.ConvTranspose2d(4, 4, 2, 2)


def _norm() -> nn.Module:
    return nn.BatchNorm2d(4)


def _rows() -> Tensor:
    return torch.randn(4, 32)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8), nn.Tanh())


def _shift_add(**options: Any) -> SubstituteShiftAdd:
    return SubstituteShiftAdd(**{"min_features": 16, "group_size": 16, **options})


CASES: dict[str, tuple[Case, ...]] = {
    "split-constant-tokens": (
        Case(lambda: split.net(lambda s, x: s.f(s.norm(split.prompted(s, x)))), split.tokens),
    ),
    "defer-expands": (
        Case(lambda: expands.net(lambda s, x: s.f(s.norm(expands.expanded(s, x)))), expands.tokens),
    ),
    "fold-constants": (
        Case(lambda: nn.utils.parametrizations.weight_norm(_conv()), _image),
        _on_image(lambda s, x: s.c(x) * (s.g * 2 + s.h), c=_conv, g=_scale, h=_shift),
        _on_image(lambda s, x: F.conv2d(x, s.w[s.g > s.g.mean()]), w=_weight, g=_gains),
    ),
    "clean-up/dropout": (_grafted(aten.dropout.default, 0.3, False),),
    "clean-up/alias": (_grafted(aten.alias.default),),
    "clean-up/add-zero (add)": (_idle(lambda s, x: x + 0),),
    "clean-up/add-zero (sub)": (_idle(lambda s, x: x - 0),),
    "clean-up/mul-one (mul)": (_idle(lambda s, x: x * 1),),
    "clean-up/mul-one (div)": (_idle(lambda s, x: x / 1),),
    "clean-up/leaky-relu-one": (_idle(lambda s, x: F.leaky_relu(x, 1.0)),),
    "clean-up/double-neg": (_idle(lambda s, x: x.neg().neg()),),
    "clean-up/cast": (_grafted(aten.to.dtype, torch.float32),),
    "clean-up/reshape": (_idle(lambda s, x: x.reshape(x.shape)),),
    "clean-up/slice": (_idle(lambda s, x: aten.slice(x, 1, 0, 99)),),
    "clean-up/expand (broadcast_to, expand)": (_idle(lambda s, x: x.expand(x.shape)),),
    "clean-up/expand (add, div)": (
        _idle(lambda s, x: x * s.g.expand(x.shape[0], 4, 8, 8), g=_scale),
    ),
    "clean-up/one-sample": (
        _on_image(lambda s, x: s.c(x[0]), instead=CleanUp(last=True), c=_conv),
        _on_image(lambda s, x: s.c(x[0]), instead=CleanUp(last=True), c=_upsampling),
    ),
    "clean-up/pad": (_idle(lambda s, x: F.pad(x, (0, 0, 0, 0))),),
    "clean-up/cat": (_idle(lambda s, x: torch.cat([x], 1)),),
    "clean-up/reshape-chain": (_idle(lambda s, x: x.reshape(x.shape[0], -1).reshape(-1, 4, 8, 8)),),
    "clean-up/permute-chain": (
        _idle(lambda s, x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2)),
        _idle(lambda s, x: x.permute(0, 2, 3, 1).permute(0, 3, 2, 1)),
    ),
    "clean-up/relu": (_idle(lambda s, x: torch.relu(x)),),
    "clean-up/pad-chain": (
        _on_image(lambda s, x: F.pad(F.pad(x, (1, 0, 2, 0)), (0, 1, 0, 1)), c=_conv),
    ),
    "clean-up/pad-pool": (_on_image(lambda s, x: F.avg_pool2d(F.pad(x, (1,) * 4), 3, 1)),),
    "clean-up/pad-permute": (
        _on_image(lambda s, x: s.c(F.pad(x, (0, 0, 1, 1, 1, 1)).permute(0, 3, 1, 2)),
                  c=lambda: _conv(8, 4, 1)),
    ),
    "clean-up/pow-one": (_idle(lambda s, x: x**1),),
    "clean-up/where (where)": (
        _flagged(lambda y, flag: torch.where(flag, y, y.cos()), True),
    ),
    "clean-up/and-true (__and__, bitwise_and)": (
        _flagged(lambda y, flag: _gated(y, (y > 0.1) & flag), True),
    ),
    "clean-up/or-false (__or__, bitwise_or)": (
        _flagged(lambda y, flag: _gated(y, (y > 0.1) | flag), False),
    ),
    "clean-up/resize": (_idle(lambda s, x: F.interpolate(x, size=(8, 8))),),
    "clean-up/rounded": (_idle(lambda s, x: torch.floor(torch.round(x * 4)) / 4),),
    "clean-up/clamps": (_idle(lambda s, x: x.clamp(0.1, 2).clamp(0.2, 1)),),
    "clean-up/negated-condition": (_idle(lambda s, x: torch.where(~(x > 0.5), x, x.cos())),),
    "clean-up/filled": (_idle(lambda s, x: x * torch.full_like(x.cos(), 0.5)),),
    "clean-up/subtract": (
        _on_image(lambda s, x: s.c(x).sin() + (-x.cos()), instead=CleanUp(last=True), c=_conv),
    ),
    "clean-up/copy": (_grafted(aten.clone.default),),
    "clean-up/stored-slice": (
        _idle(lambda s, x: aten.slice_scatter(x, x[:, 1:3].cos(), 1, 1, 3)),
    ),
    "clean-up/common-subexpression": (_idle(lambda s, x: x.cos() + x.sin() * x.cos()),),
    "clean-up/dead-code": (_grafted(aten.exp.default, read=False),),
    "average-experts": (
        Case(
            lambda: experts.Ensemble(spread(experts.EXPERTS["ffn"](), 2, 0.0)),
            experts.tokens, ("fold-constants",),
        ),
    ),
    "fold-batch-norm": (
        _on_image(lambda s, x: s.b(s.c(x)), c=_conv, b=_norm),
        _on_image(lambda s, x: s.c(s.b(torch.cos(x))), c=lambda: _conv(k=1), b=_norm),
        _on_image(lambda s, x: s.c(torch.sign(s.b(x))), c=lambda: _conv(k=1), b=_norm),
    ),
    "absorb-scale-shift": (
        _on_image(
            lambda s, x: s.c(x) * s.g + s.h, "fold-constants", c=_conv, g=_scale, h=_shift
        ),
        _on_image(lambda s, x: s.c(x.cos() * s.g), "fold-constants", c=_conv, g=_scale),
        _on_image(
            lambda s, x: s.c(x.cos() + s.h), c=lambda: _conv(stride=2), h=_shift,
            instead=AbsorbScaleShift(border_maps=True),
        ),
    ),
    "fold-branches": (
        _on_image(lambda s, x: s.a(x) + s.b(x) + x, a=_conv, b=lambda: _conv(k=1)),
        _on_image(
            lambda s, x: s.b(s.a(x)), a=lambda: _conv(k=1, bias=False), b=_conv,
            instead=FoldBranches(prefer="nodes"),
        ),
        _on_image(lambda s, x: s.a(x + (F.silu(x) - x)), a=_conv),
    ),
    "join-scale-shifts": (_on_image(lambda s, x: s.n(x) + x * s.g, n=_norm, g=_scale),),
    "join-scale-shifts/chain": (
        _on_image(lambda s, x: (x + s.h) * s.g + s.h, g=_scale, h=_shift),
        _on_image(lambda s, x: s.h - (x + 1), h=_shift),
    ),
    "defer-resizes (conv1d, conv2d)": (
        Case(
            lambda: resizes.net(
                lambda s, x: s.f(torch.cat([resizes.up(x), resizes.up(x.exp())], 1)),
                f=resizes.head(),
            ),
            resizes.big,
        ),
    ),
    "defer-resizes (add, sub)": (
        _on_image(
            lambda s, x: F.interpolate(s.c(x), scale_factor=2) + F.interpolate(x, scale_factor=2),
            c=_conv,
        ),
    ),
    "drop-zero-channels": (
        Case(
            lambda: dead.net(
                lambda s, x: s.b(F.gelu(s.a(x))), b=dead.conv(12, 4),
                a=dead.kill(dead.conv(4, 12), dead.DEAD),
            ),
            _image,
        ),
    ),
    "fold-attention-biases": (
        Case(lambda: attention.Attention(attention.fused()), attention.tokens),
    ),
    "merge-parallel-layers": (Case(lambda: parallel.net(parallel.gated), parallel.tokens),),
    "substitute-shift-add": (
        Case(_mlp, _rows, instead=_shift_add()),
        Case(_mlp, _rows, instead=_shift_add(scales="bcq", bits=2)),
        Case(_mlp, _rows, instead=_shift_add(calibration=tuple(_rows() for _ in range(3)))),
        _on_image(
            lambda s, x: s.a(x), a=_conv, instead=_shift_add(convolutions=True, include="a")
        ),
    ),
}  # fmt: skip


def _of_their_own_tests() -> dict[str, tuple[Case, ...]]:
    """The cases that the test file of a pass has: by rule, what makes a network and its input."""
    found: dict[str, tuple[Case, ...]] = {}
    for item in EVERY.values():
        *_, family, stem = type(item).__module__.split(".")
        module = importlib.import_module(f"tests.passes.{family}.test_{stem}")
        for rule, nets in getattr(module, "PLANTED", {}).items():
            found[rule] = tuple(Case(build, inputs) for build, inputs in nets)
    return found


CASES |= _of_their_own_tests()


def planted(rule: str, case: Case, failures: list[Decline]) -> Outcome:
    """The bugs planted into a rule on its network."""
    torch.manual_seed(0)
    bench = Bench.of(case.build().float().eval(), case.inputs().float(), failures)
    return bench.plant(Only(case.instead or EVERY[rule], rule), case.graph(bench.original))


# --- tests ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_rule_of_every_pipeline_has_bugs() -> None:
    """Those that passes give to the driver, and those whose ids they write down."""
    missing = set(EVERY) - set(CASES)
    assert not missing, (
        f"write PLANTED in the test file of these, a network in which each fires: {missing}"
    )
    assert set(CASES) == set(EVERY), "CASES has rules that no pass has"
    written = {
        node.value
        for path in Path(refold.passes.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        and re.fullmatch(f"({'|'.join(PASSES)})/[a-z-]+", node.value)
    }  # fmt: skip
    assert {id_of(rule) for rule in CASES} >= written


@pytest.mark.parametrize(
    ("rule", "at"),
    few([(rule, at) for rule, cases in CASES.items() for at in range(len(cases))], 12),
)
def test_bugs_in_a_rule_are_refused(rule: str, at: int, failures: list[Decline]) -> None:
    found = planted(rule, CASES[rule][at], failures)
    assert found.ids == {id_of(rule)}
    assert found.visible >= LEAST, found
    assert len(found.hidden) <= HIDDEN * found.visible, found
    assert not found.missed


_Breaks = Callable[[BinaryCode], BinaryCode]
# What a slip of the code-maker would do: what it then says of its code is true.
SLIPS: dict[str, _Breaks] = {
    "a channel's sign": lambda c: replace(c, signs=_with(c.signs, 1, -1)),
    "no channel": lambda c: replace(c, alpha=_with(c.alpha, 1, 0)),
    "half of a channel": lambda c: replace(c, alpha=_with(c.alpha, 1, 0.5)),
    "the next channel": lambda c: replace(c, signs=c.signs.roll(1, 1)),
    "a shifted column": lambda c: replace(c, signs=c.signs.roll(1, 2)),
    "planes in another order": lambda c: replace(c, signs=c.signs.flip(0)),
    "the next group": lambda c: replace(c, signs=c.signs.roll(c.group_size, 2)),
}


def _with(values: Tensor, axis: int, factor: float) -> Tensor:
    """The first slice along an axis, times a number."""
    changed = values.clone()
    changed.select(axis, 0).mul_(factor)
    return changed


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("slip", SLIPS)
def test_slips_of_a_code_maker_are_refused(
    slip: str, calibrated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "encode_compensated" if calibrated else "encode"
    made = getattr(layer_codes, name)
    pipeline = Pipeline(
        "test", (_shift_add(calibration=[_rows() for _ in range(3)] if calibrated else ()),)
    )
    model = _mlp().eval()
    refold.fold(model, _rows(), pipeline=pipeline)
    monkeypatch.setattr(layer_codes, name, lambda *a, **k: SLIPS[slip](made(*a, **k)))
    with pytest.raises(VerificationError, match="as far from its weight as plain rounding"):
        refold.fold(model, _rows(), pipeline=pipeline)


# Options, and the rules that fire.
NETWORKS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "mobileone_s0": ({}, {"clean-up/add-zero (add)", "fold-batch-norm", "fold-branches"}),
    "repvgg_a0": ({}, {"fold-batch-norm", "fold-branches"}),
    "vit_tiny_patch16_224": (
        {"img_size": 64, "init_values": 0.1},
        {
            "split-constant-tokens",
            "defer-expands",
            "fold-constants",
            "clean-up/slice",
            "absorb-scale-shift",
            "substitute-shift-add",
        },
    ),
}


def _network(name: str) -> tuple[nn.Module, Tensor]:
    declare_torchvision_ops()
    timm = pytest.importorskip("timm")
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return randomise(timm.create_model(name, **NETWORKS[name][0]), (x,)), x


def _in_pipeline(
    bench: Bench, passes: tuple[Pass, ...]
) -> Iterator[tuple[str, fx.GraphModule, tuple[Pass, ...]]]:
    """Each rule that fires, where it first does: the graph before it, and the passes from there."""
    gm, seen = copy_sharing_tensors(bench.original), set[str]()
    for at, item in enumerate(passes):
        before = copy_sharing_tensors(gm)
        for rule in rules_of(item):
            tried = copy_sharing_tensors(before)
            if rule not in seen and Only(item, rule).run(tried).applied:
                seen.add(rule)
                rest = passes[at:] if id_of(rule) != item.name else passes[at + 1 :]
                yield rule, before, tuple(p for p in rest if p.exactness != "approximate")
        Pipeline("so far", (item,)).run(gm)


@pytest.mark.sweep
@pytest.mark.parametrize("name", NETWORKS)
def test_bugs_in_a_network_are_refused(name: str, failures: list[Decline]) -> None:
    model, x = _network(name)
    bench, fired = Bench.of(model, x, failures), dict[str, Outcome]()
    passes = (*PIPELINES["default"].passes, SubstituteShiftAdd())
    for rule, before, rest in _in_pipeline(bench, passes):
        fired[rule] = bench.plant(Only(EVERY[rule], rule), before, rest, most=2 * LEAST)
    assert set(fired) == NETWORKS[name][1]
    assert not {rule: found for rule, found in fired.items() if found.visible < LEAST}
    assert not {r: f for r, f in fired.items() if len(f.hidden) > f.visible}
    assert not {rule: found.missed for rule, found in fired.items() if found.missed}
