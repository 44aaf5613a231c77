"""Language models of ``transformers``, random weights, through the pass, the file and a session."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

import refold
from refold.cli.torchvision_shim import declare_torchvision_ops
from refold.passes import PIPELINES
from refold.passes.shift_add.substitute_shift_add import SubstituteShiftAdd

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

declare_torchvision_ops()
TOKENS = 64


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(input_ids=tokens, use_cache=False).logits


def opt(hidden=256, layers=2, heads=4, vocabulary=512):
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers,
            ffn_dim=4 * hidden, num_attention_heads=heads, word_embed_proj_dim=hidden,
            max_position_embeddings=128, attn_implementation="sdpa",
        )
    )  # fmt: skip


def llama(hidden=256, layers=2, heads=4, vocabulary=512):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers,
            intermediate_size=688, num_attention_heads=heads, num_key_value_heads=heads // 2,
            max_position_embeddings=128, attn_implementation="sdpa",
        )
    )  # fmt: skip


def agreement(got, expected):
    """Whether the first choice is equal where it is decided; the share of decided positions."""
    error = float((got - expected).abs().max())
    best = expected.topk(2, dim=-1).values
    decided = best[..., 0] - best[..., 1] > 2 * error
    equal = got.argmax(-1) == expected.argmax(-1)
    return bool(equal[decided].all()), float(decided.double().mean()), float(equal.double().mean())


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize(("family", "layers"), [(opt, 6), (llama, 7)])
def test_teacher_forced(family, layers, bits, tmp_path, record_property):
    torch.manual_seed(0)
    model = Logits(family()).eval()
    tokens = torch.randint(0, 512, (2, TOKENS))
    item = SubstituteShiftAdd(bits=bits, group_size=64)
    made = refold.compile_for_inference(
        model, tokens, target="ort", pipeline=PIPELINES["default"].with_(item)
    )
    tokens = torch.randint(0, 512, (4, TOKENS))
    with torch.no_grad():
        expected = made.graph_module(tokens)
    got = made(tokens)
    equal, decided, share = agreement(got, expected)
    record_property("decided", decided)
    record_property("equal", share)
    assert equal
    assert decided > 0.5
    file = onnx.load(made.save(tmp_path / "net.onnx"))
    quantised = [n for n in file.graph.node if n.op_type == "DequantizeLinear"]
    assert len(quantised) == 2 * layers
    sums = [
        n for n in file.graph.node if "groups_of" in "".join(n.input) and n.op_type == "Reshape"
    ]
    # Query, key and value read one tensor, and so do a gate and its product.
    assert len(sums) == (8 if bits == 2 else 0)
    assert made.report.artifact_numerics["passed"]
    assert made.report.artifact["bytes"] < sum(4 * p.numel() for p in model.parameters()) / 3
