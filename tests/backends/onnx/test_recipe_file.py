"""Recipes and files that are damaged, empty or of another model give no weights."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import refold
from refold.backends.onnx import recipe_file
from refold.backends.onnx.recipe_file import refit_file
from refold.errors import RefitError, RefoldError, UsageError
from tests.randomise import randomise

pytest.importorskip("onnxscript")


class _Net(nn.Module):
    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.linear(x)))


X = torch.randn(2, 3)


def _made(folder: Path, activation: type[nn.Module] = nn.ReLU, seed: int = 0) -> Path:
    model = randomise(_Net(activation), (X,), seed=seed).eval()
    compiled = refold.compile_for_inference(model, (X,), target="onnx", recipe=True, verify=False)
    return compiled.save(folder / "net.onnx")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return _made(tmp_path_factory.mktemp("recipe"))


@pytest.fixture
def net(made: Path, tmp_path: Path) -> Path:
    """An ONNX file with its recipe."""
    for file in made.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / "net.onnx"


def _weights(seed: int = 1) -> dict[str, Tensor]:
    return randomise(_Net(), (X,), seed=seed).eval().state_dict()


def _recipe(net: Path) -> Path:
    return net.with_name("net.onnx.recipe")


def _run(path: Path) -> np.ndarray[Any, Any]:
    from refold.backends.onnx.session import open_session

    return open_session(path).run(None, {"x": X.numpy()})[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: b"hello",
        lambda data: b'{"recipe": {}}',
        lambda data: pickle.dumps({"recipe": "{}"}),
        lambda data: data.replace(b"batch_norm", b"batch_nora").replace(b"aten.", b"atem.", 1),
    ],
    ids=["half", "last byte", "empty", "text", "json", "pickle", "changed"],
)
def test_damaged_recipes(net: Path, damage: Callable[[bytes], bytes]) -> None:
    recipe = _recipe(net)
    recipe.write_bytes(damage(recipe.read_bytes()))
    with pytest.raises(UsageError, match=r"net\.onnx\.recipe is no recipe, or damaged"):
        refit_file(net, _weights(), net.with_name("new.onnx"))
    assert not net.with_name("new.onnx").exists()


def test_other_files_are_no_recipes(net: Path) -> None:
    archive = net.with_name("z.zip")
    with zipfile.ZipFile(archive, "w") as new:
        new.writestr("a", "b")
    checkpoint = net.with_name("weights.pt")
    torch.save(_weights(), checkpoint)
    for other in (archive, checkpoint, net):
        with pytest.raises(UsageError, match="is no recipe, or damaged"):
            refit_file(net, _weights(), net.with_name("new.onnx"), recipe=other)
    for other, message in ((net.parent, "directory"), (net.with_name("none"), "no such file")):
        with pytest.raises(UsageError, match=message):
            refit_file(net, _weights(), net.with_name("new.onnx"), recipe=other)


def _edited(net: Path, edit: Callable[[Any, Any], object]) -> None:
    stored = torch.load(_recipe(net), weights_only=True)
    described = json.loads(stored["recipe"])
    edit(described, stored)
    stored["recipe"] = json.dumps(described)
    torch.save(stored, _recipe(net))


EDITS: dict[str, Callable[[Any, Any], object]] = {
    "no steps": lambda d, s: d.pop("steps"),
    "steps of nothing": lambda d, s: d.update(steps=None),
    "a step cut off": lambda d, s: d["steps"].__setitem__(0, []),
    "a step gone": lambda d, s: d["steps"].pop(0),
    "another operator": lambda d, s: d["steps"][0].__setitem__(0, "aten.mul.Tensor"),
    "an operator of another library": lambda d, s: d["steps"][0].__setitem__(0, "os.system"),
    "an odd operand": lambda d, s: d["steps"][0].__setitem__(1, {"what": 1}),
    "two operands in one": lambda d, s: d["steps"][0].__setitem__(1, {"slot": 1, "tuple": []}),
    "slots that are not there": lambda d, s: d.update(results=dict.fromkeys(d["results"], 9999)),
    "no sources": lambda d, s: d.update(sources={}),
    "no origins": lambda d, s: d.update(origins={}),
    "no shapes": lambda d, s: d.update(shapes={}),
    "a device that is not here": lambda d, s: [
        o.__setitem__(4, "cuda:7") for o in d["origins"].values()
    ],
    "no such device": lambda d, s: [o.__setitem__(4, "zork") for o in d["origins"].values()],
    "more to write": lambda d, s: d["written"].append("none such"),
    "nothing to write": lambda d, s: d.update(written=[]),
    "no program": lambda d, s: s.pop("program"),
    "another program": lambda d, s: s.update(program=torch.full((99,), 7, dtype=torch.uint8)),
    "literals of another kind": lambda d, s: s.update(literals=5),
    "more memory than there is": lambda d, s: d["steps"].insert(
        0,
        ["aten.zeros.default", {"tuple": [[10**6, 10**7]]}, {"dict": {}}, [9999], True, None, ""],
    ),
    "a later format": lambda d, s: d.update(format=99),
    "no format": lambda d, s: d.pop("format"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_edited_recipes(net: Path, edit: Callable[[Any, Any], object]) -> None:
    _edited(net, edit)
    with pytest.raises(RefoldError):
        refit_file(net, _weights(), net.with_name("new.onnx"))
    assert not net.with_name("new.onnx").exists()


@pytest.mark.parametrize("text", ["[]", "null", "5", "[" * 100_000, "{"])
def test_recipes_whose_json_is_of_another_kind(net: Path, text: str) -> None:
    stored = torch.load(_recipe(net), weights_only=True)
    torch.save({**stored, "recipe": text}, _recipe(net))
    with pytest.raises(UsageError, match="is no recipe, or damaged"):
        refit_file(net, _weights(), net.with_name("new.onnx"))


def test_a_recipe_of_another_graph_with_the_same_weights(net: Path, tmp_path: Path) -> None:
    """Names and shapes of all weights fit: only the graph says that it is another."""
    (tmp_path / "other").mkdir()
    other = _made(tmp_path / "other", nn.Sigmoid)
    with pytest.raises(RefitError, match="not what the recipe was written for: its graph"):
        refit_file(net, _weights(), tmp_path / "new.onnx", recipe=_recipe(other))
    # Other weights of the same graph are what recipes are for.
    (tmp_path / "same").mkdir()
    same = _made(tmp_path / "same", seed=5)
    refit_file(net, _weights(), tmp_path / "new.onnx", recipe=_recipe(same))
    model = _Net().eval()
    model.load_state_dict(_weights())
    np.testing.assert_allclose(_run(tmp_path / "new.onnx"), model(X).detach().numpy(), atol=1e-6)


def test_a_refitted_file_is_refitted_again(net: Path, tmp_path: Path) -> None:
    one = refit_file(net, _weights(1), tmp_path / "one.onnx")
    two = refit_file(one, _weights(2), tmp_path / "two.onnx", recipe=_recipe(net))
    straight = refit_file(net, _weights(2), tmp_path / "straight.onnx")
    np.testing.assert_array_equal(_run(two), _run(straight))
    assert not np.array_equal(_run(one), _run(two))


def test_a_recipe_without_a_graph_is_of_an_earlier_version(net: Path, tmp_path: Path) -> None:
    _edited(net, lambda d, s: d.pop("graph"))
    assert refit_file(net, _weights(), tmp_path / "new.onnx").is_file()


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"hello" * 20],
)
def test_damaged_models(net: Path, damage: Callable[[bytes], bytes]) -> None:
    net.write_bytes(damage(net.read_bytes()))
    with pytest.raises(RefoldError, match=r"net\.onnx is not an ONNX file"):
        refit_file(net, _weights(), net.with_name("new.onnx"))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({1: torch.zeros(1)}, "expected tensors by name"),
        ({"linear.weight": 5}, "expected tensors by name"),
        ({"linear.weight": np.zeros((4, 3), "f")}, "expected tensors by name"),
        ({"linear.weight": torch.zeros(4, 3, device="meta")}, "has no values"),
        ({"linear.weight": torch.zeros(4, 3).to_sparse()}, "sparse"),
        ({"linear.weight": torch.zeros(3, 4)}, "another architecture"),
    ],
)
def test_weights_that_are_none(net: Path, weights: Any, message: str) -> None:
    with pytest.raises(RefitError, match=message):
        refit_file(net, {**_weights(), **weights}, net.with_name("new.onnx"))


def test_nothing_that_is_read_is_overwritten(net: Path, run: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    weights, link, hard = (net.with_name(n) for n in ("w.safetensors", "link", "hard"))
    safetensors.save_file(_weights(), weights)
    link.symlink_to(weights)
    hard.hardlink_to(weights)
    before = {p: p.read_bytes() for p in net.parent.iterdir()}
    up = net.parent / ".." / net.parent.name
    for output in (weights, link, hard, up / weights.name, net, _recipe(net), up / net.name):
        code, _, err = run("refit", net, "--weights", weights, "-o", output, "--force")
        assert code == 2, output
        assert "is read to make it" in err
        assert {p: p.read_bytes() for p in net.parent.iterdir()} == before
    code, _, err = run("refit", net, "--weights", weights, "-o", net.with_name("new.onnx"))
    assert code == 0, err


def test_weights_beside_the_model_are_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refold.backends.onnx.export._EXTERNAL_DATA_BYTES", 10)

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(64, 64), nn.BatchNorm1d(64)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x))

    x = torch.randn(2, 64)
    model = randomise(Wide(), (x,)).eval()
    compiled = refold.compile_for_inference(model, (x,), target="onnx", recipe=True)
    net = compiled.save(tmp_path / "net.onnx")
    data = tmp_path / "net.onnx.data"
    before = data.read_bytes()
    assert len(before) == 64 * 64 * 4
    with pytest.raises(UsageError, match=r"net\.onnx\.data, which is read"):
        refit_file(net, model.state_dict(), data, force=True)
    assert data.read_bytes() == before
    refit_file(net, model.state_dict(), tmp_path / "new.onnx")
    assert (tmp_path / "new.onnx.data").read_bytes() == before


def test_weights_outside_of_the_models_directory_are_not_read(net: Path, tmp_path: Path) -> None:
    import onnx

    proto = onnx.load(str(net))
    tensor = proto.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, "../../secret")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    net.write_bytes(proto.SerializeToString())
    with pytest.raises(RefoldError, match="outside of its own directory"):
        refit_file(net, _weights(), tmp_path / "new.onnx")


def test_what_is_wrong_with_an_operator_is_said(net: Path) -> None:
    _edited(net, lambda d, s: d["steps"][0].__setitem__(0, "os.system"))
    with pytest.raises(UsageError, match="operator that a recipe may call"):
        recipe_file.read(_recipe(net))
