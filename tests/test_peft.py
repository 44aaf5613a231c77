"""Adapters of peft fold to what peft's own ``merge_and_unload`` gives."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.cli.torchvision_shim import declare_torchvision_ops
from tests.compare import EXACT, SINGLE, call, relative_error
from tests.examples import few
from tests.models.systems import peft_adapters

declare_torchvision_ops()  # where torchvision is built for another torch, peft cannot be imported
peft = pytest.importorskip("peft")


@pytest.mark.parametrize("name", few(peft_adapters.SYSTEMS, 2))
def test_equals_merge_and_unload(name: str) -> None:
    model = peft_adapters.SYSTEMS[name].model().double()
    inputs = (torch.randn(2, 5, peft_adapters.WIDTH, dtype=torch.float64),)
    merged = deepcopy(model).merge_and_unload()
    folded = refold.fold(model, inputs)
    assert relative_error(call(folded, inputs), call(merged, inputs)) <= EXACT
    weights = sum(p.numel() for p in merged.parameters())
    assert folded.report.after.parameters <= weights < folded.report.before.parameters


@pytest.mark.slow
def test_lora_on_a_language_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    targets = ["q_proj", "v_proj", "down_proj"]
    lora = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).eval()

    class Logits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(input_ids=ids).logits

    ids = torch.randint(0, 32, (2, 6))
    merged = Logits(deepcopy(adapted).merge_and_unload()).eval()
    folded = refold.fold(Logits(adapted).eval(), ids)
    # Its norms compute in float32 whatever the model's dtype, so float64 proves nothing more.
    assert relative_error(call(folded, (ids,)), call(merged, (ids,))) <= SINGLE
    assert folded.report.before.census["linear"] == 2 * (7 + 2 * len(targets)) + 1
    assert folded.report.after.census["linear"] <= 2 * 7 + 1
