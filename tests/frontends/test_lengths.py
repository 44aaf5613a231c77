"""``len(x)`` of a tensor keeps its size dynamic, as ``x.shape[0]`` does."""

from __future__ import annotations

import builtins
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import refold
from refold.cli.torchvision_shim import declare_torchvision_ops
from refold.frontends.export import trace
from tests.folding import Net

BATCHES = (1, 2, 3, 7)


def _queries(s: Net, x: Tensor) -> Tensor:
    tokens = s.l(x).flatten(1, 2)
    queries = s.q.unsqueeze(0).expand(len(tokens), -1, -1)
    return torch.cat([queries, tokens], 1)


def _grown(s: Net, x: Tensor) -> Tensor:
    return s.l(x) + torch.zeros(len(x), 1, 1, 4) * len(x)


def _kept(s: Net, x: Tensor) -> Tensor:
    return s.l(x).reshape(len(x), -1) / len([x, x])


def _net(forward: Callable[[Net, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return Net(forward, l=nn.Linear(4, 4), q=torch.randn(3, 4)).float().eval()


@pytest.mark.parametrize("forward", [_queries, _grown, _kept])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_length_of_a_tensor_varies(
    forward: Callable[[Net, Tensor], Tensor], batch: int
) -> None:
    model = _net(forward)
    compiled = refold.compile_for_inference(model, torch.randn(batch, 5, 2, 4))
    assert not compiled.report.specialised
    for other in BATCHES:
        x = torch.randn(other, 5, 2, 4)
        assert torch.allclose(compiled(x), model(x), atol=1e-6)


def test_a_size_that_the_user_names_may_be_read_as_a_length() -> None:
    model = _net(lambda s, x: s.l(x).reshape(len(x), -1))
    program = trace(model, (torch.randn(4, 3, 4),), dynamic_shapes=({0: Dim("rows", min=2)},))
    assert [program.names.get(str(s), s) for s in program.inputs[0].sizes] == ["rows", 3, 4]


def test_what_loops_over_a_length_is_static_and_says_so() -> None:
    def rows(s: Net, x: Tensor) -> Tensor:
        return torch.stack([s.l(x[i]) for i in range(len(x))])

    model, x = _net(rows), torch.randn(3, 2, 4)
    compiled = refold.compile_for_inference(model, x)
    assert "the batch dimension is static at 3" in compiled.report.specialised[0]
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    with pytest.raises(
        refold.errors.UsageError, match=r"the model fixes dimension 0 .* another one"
    ):
        compiled(torch.randn(5, 2, 4))


def test_a_branch_on_a_length_is_a_guard() -> None:
    model = _net(lambda s, x: s.l(x) if len(x) > 4 else s.l(x) * 2)
    compiled = refold.compile_for_inference(model, torch.randn(3, 2, 4))
    x = torch.randn(2, 2, 4)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    with pytest.raises(refold.errors.UsageError, match="shape"):
        compiled(torch.randn(6, 2, 4))


def _formatted(s: Net, x: Tensor) -> Tensor:
    return s.l(x) * float(f"{len(x):03d}")


def _asserted(s: Net, x: Tensor) -> Tensor:
    assert isinstance(len(x), int)
    return s.l(x)


def _asked(s: Net, x: Tensor) -> Tensor:
    return s.l(x) if isinstance(len(x), int) else -s.l(x)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("forward", [_formatted, _asserted, _asked])
def test_a_length_that_must_be_a_number_is_one(
    forward: Callable[[Net, Tensor], Tensor], verify: bool
) -> None:
    model, x = _net(forward), torch.randn(3, 2, 4)
    compiled = refold.compile_for_inference(model, x, verify=verify)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    assert "the batch dimension is static at 3" in compiled.report.specialised[0]


@pytest.mark.parametrize("forward", [_queries, lambda s, x: s.missing(x)])
def test_nothing_of_python_stays_changed(forward: Callable[[Net, Tensor], Tensor]) -> None:
    before = builtins.len, torch.Tensor.__len__
    try:
        trace(_net(forward), (torch.randn(2, 5, 2, 4),))
    except refold.errors.FrontendError:
        assert forward is not _queries
    assert (builtins.len, torch.Tensor.__len__) == before


@pytest.mark.slow
def test_a_detector_that_reads_its_batch_as_a_length_keeps_it_dynamic() -> None:
    declare_torchvision_ops()
    transformers = pytest.importorskip("transformers")
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1],
        layer_type="basic", out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=32, encoder_in_channels=[32, 64, 128],
        encoder_ffn_dim=64, encoder_attention_heads=2, d_model=32, num_queries=20, num_labels=5,
        decoder_in_channels=[32, 32, 32], decoder_ffn_dim=64, decoder_layers=2,
        decoder_attention_heads=2, num_denoising=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.RTDetrForObjectDetection(config).eval()
    compiled = refold.compile_for_inference(model, torch.randn(1, 3, 128, 128))
    assert not compiled.report.specialised
    for batch in (1, 2, 3):
        x = torch.randn(batch, 3, 128, 128)
        with torch.no_grad():
            expected, got = model(x), compiled(x)
        for name in ("logits", "pred_boxes"):
            assert torch.allclose(got[name], expected[name], atol=1e-4)
