"""Runtimes of fixed shapes: what is prepared for them, and what is refused."""

import pytest
import torch
from torch import nn

import refold
from refold.backends import base, registry
from refold.backends.edge.static import StaticProgram, keep_pooled_dims
from refold.errors import BackendError
from refold.frontends.export import trace
from tests.small_nets import ConvNet, seeded


class Means(nn.Module):
    def forward(self, x):
        return (
            x.mean((2, 3)),
            x.mean((-1, 2)),
            x.mean((2, 3), keepdim=True),
            x.mean((1, 2)),
            x.mean((2, 3), dtype=torch.float64),
            x[0].mean((0, 1)),
            x.mean(),
        )


def static_program(model, *inputs, **settings):
    program = trace(model, inputs, {}, **settings)
    return StaticProgram.of(program, program.graph_module, "a runtime")


def test_pooled_means_keep_their_dimensions():
    x = torch.randn(2, 3, 4, 5)
    static = static_program(Means(), x, dynamic_batch=False)
    keep_pooled_dims(static.module.graph)
    static.module.recompile()
    static.module.graph.lint()
    means = static.module.graph.find_nodes(op="call_function", target=torch.ops.aten.mean.dim)
    kept = [n for n in means if len(n.args) > 2 and n.args[2]]
    assert len(kept) == 3
    assert [tuple(n.meta["val"].shape) for n in kept] == [(2, 3, 1, 1)] * 3
    for got, expected in zip(static.module(x), Means()(x), strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def test_notes_say_what_became_static():
    static = static_program(seeded(ConvNet()), torch.randn(1, 3, 8, 8), dynamic_batch=False)
    assert static.notes == ("a runtime needs fixed shapes, the batch's too: x [1, 3, 8, 8]",)


def test_dynamic_dimension_is_refused():
    with pytest.raises(BackendError, match="dimension 0 of x is dynamic: leave dynamic_shapes out"):
        static_program(seeded(ConvNet()), torch.randn(2, 3, 8, 8))


def test_places_name_module_and_line():
    static = static_program(seeded(ConvNet()), torch.randn(1, 3, 8, 8), dynamic_batch=False)
    for text in ("no kernel for aten::conv2d.out", "missing aten_conv2d_default", "aten.conv2d"):
        assert "of module 'conv'" in static.places(text), text
    assert "small_nets.py:" in static.places("aten.relu.default")
    assert static.places("something else went wrong") == ""


def test_static_targets_are_traced_static(monkeypatch):
    class Plain(base.Target):
        name, suffix = "plain-static", ""
        capabilities = base.Capabilities(static=True)

        def lower(self, program, gm, options):
            return base.Artifact(StaticProgram.of(program, gm, "Plain"))

        def load(self, artifact, options):
            static = artifact.content
            return lambda *a, **k: static.signature.rebuild(
                static.module(*static.signature.tensors(a, k))
            )

        def save(self, artifact, folder, name):
            (folder / name).touch()

        def stats(self, artifact):
            return {}

    monkeypatch.setitem(registry._registered, "plain-static", Plain())
    model = seeded(ConvNet())
    compiled = refold.compile_for_inference(model, torch.randn(1, 3, 8, 8), target="plain-static")
    assert compiled.report.inputs[0].sizes == (1, 3, 8, 8)
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(compiled(x), model(x))
    with pytest.raises(refold.RefoldError, match="dimension 0 is 1 in the compiled model, got 2"):
        compiled(torch.randn(2, 3, 8, 8))
