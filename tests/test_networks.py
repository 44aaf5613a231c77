"""Real networks with a deploy form: refold leaves no more than their authors' own conversion."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

import refold
from refold.cli.torchvision_shim import declare_torchvision_ops
from refold.graph import ops
from tests.compare import SINGLE, call, double, fold_double, relative_error
from tests.models import counts
from tests.models.timm_networks import NETWORKS, deploy_form, network, traced

declare_torchvision_ops()
pytest.importorskip("timm")

SMALL = ("lcnetv2_small", "repghostnet_050")

each_network = pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n in SMALL else pytest.mark.sweep)
        for n in NETWORKS
    ],
)


def _unexplained_norms(folded: Any) -> list[str]:
    """Batch norms that are left and that no declined record names."""
    explained = {record.node for record in folded.report.declined}
    graph = folded.graph_module.graph
    left = [n.name for n in graph.nodes if ops.kind(n) == "batch-norm"]
    return [name for name in left if name not in explained]


@each_network
def test_counts_and_float64_equality(name: str) -> None:
    model, image = network(name, NETWORKS[name])
    theirs = counts(traced(deploy_form(model), image))
    folded = fold_double(model, (image,), verify=False)
    found = counts(folded.graph_module)
    for kind in ("conv-like", "batch-norm"):
        assert found.get(kind, 0) <= theirs.get(kind, 0), f"{found}, timm's deploy form {theirs}"
    assert not _unexplained_norms(folded), found


@each_network
def test_float32_and_other_batches(name: str) -> None:
    model, image = network(name, NETWORKS[name], seed=1)
    folded = refold.fold(model, (image[:1],))  # verifies
    oracle = deepcopy(model).double()
    for batch in (image, image[:1]):
        expected = call(oracle, double((batch,)))
        own = relative_error(call(model, (batch,)), expected)
        assert relative_error(call(folded, (batch,)), expected) <= 4 * own + SINGLE
