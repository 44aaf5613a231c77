import pytest
import torch

import refold
from refold.errors import BackendError
from refold.frontends.export import trace
from refold.graph.ops import census
from tests.small_nets import (
    ConvNet,
    Structured,
    Unnamed,
    assert_same,
    seeded,
    structured_call,
)


def test_saved_program_has_no_batch_norm_and_the_same_numbers(tmp_path):
    model, x = seeded(ConvNet()), torch.randn(2, 3, 8, 8)
    compiled = refold.compile_for_inference(model, x)
    path = compiled.save(tmp_path / "net.pt2")

    program = torch.export.load(path)
    assert census(program.graph)["batch-norm"] == 0
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(program.module()(x), model(x))


def test_saved_program_keeps_keywords_and_output_structure(tmp_path):
    model = seeded(Structured())
    args, kwargs = structured_call(2)
    folded = refold.compile_for_inference(_Keyword(model), {"x": args[0], **kwargs})
    path = folded.save(tmp_path / "net.pt2")

    again = trace(path, (), {})
    args, kwargs = structured_call(4)
    expected = model(*args, **kwargs)
    assert_same(again.graph_module(x=args[0], **kwargs), expected)


def test_output_type_without_a_serialized_name_is_said(tmp_path):
    class Net(torch.nn.Module):
        def forward(self, x):
            return Unnamed(x + 1)

    compiled = refold.compile_for_inference(Net(), torch.randn(2, 3))
    with pytest.raises(BackendError, match="serialized_type_name"):
        compiled.save(tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []


class _Keyword(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, extra):
        return self.inner(x, extra=extra)


def test_stats_count_calls_and_weights():
    compiled = refold.compile_for_inference(seeded(ConvNet()), torch.randn(2, 3, 8, 8))
    # conv 108 + bias 4, linear 20 + 5 floats; conv, relu, mean, linear
    assert compiled.report.artifact == {"nodes": 4, "bytes": 4 * (108 + 4 + 20 + 5)}
