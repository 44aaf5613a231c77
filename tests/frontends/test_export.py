"""The frontend: what it takes, what it never changes, and what it says when it cannot."""

from __future__ import annotations

import io
import json
import logging
import pickle
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refold.errors import FrontendError
from refold.frontends.eval_copy import eval_copy
from refold.frontends.export import trace
from refold.graph import constants

Pair = namedtuple("Pair", "first second")


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5)
    )


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8)


def calls(program) -> list[str]:
    nodes = program.graph_module.graph.nodes
    return [n.target._schema.name for n in nodes if n.op == "call_function"]


# --- what comes in --------------------------------------------------------------------------------


def test_module_becomes_functional_aten() -> None:
    model = conv_net().eval()
    x = image()
    program = trace(model, (x,))
    assert calls(program) == ["aten::conv2d", "aten::batch_norm", "aten::relu"]
    torch.testing.assert_close(program.graph_module(x), model(x), rtol=0, atol=0)
    assert program.inputs[0].batch == 0
    assert isinstance(program.inputs[0].sizes[0], str)
    assert program.inputs[0].sizes[1:] == (3, 8, 8)
    assert program.specialised == ()
    assert program.notes == ()
    torch.testing.assert_close(program.graph_module(image(5)).shape, torch.Size([5, 4, 8, 8]))


def test_parameters_are_the_callers_own() -> None:
    model = conv_net().eval()
    program = trace(model, (image(),))
    node = next(n for n in program.graph_module.graph.nodes if n.target == "0.weight")
    assert constants.tensor(node).data_ptr() == model[0].weight.data_ptr()


def test_training_mode_is_traced_with_eval_semantics_and_left_alone() -> None:
    model = conv_net().train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = image()
    kept = x.clone()
    program = trace(model, (x,))
    assert any("training mode" in note for note in program.notes)
    assert [m.training for m in model] == [True, False, True, True]
    assert model.training
    torch.testing.assert_close(x, kept, rtol=0, atol=0)
    assert not vars(x)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    got = program.graph_module(x)
    torch.testing.assert_close(got, model.eval()(x), rtol=0, atol=0)


def test_flags_stay_when_tracing_fails() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("not today")

    model = Fails().train()
    with pytest.raises(FrontendError, match="not today"):
        trace(model, (image(),))
    assert model.training
    assert model.inner.training


def test_nested_inputs_and_outputs_and_keywords() -> None:
    class Nested(nn.Module):
        def forward(self, x: dict[str, Tensor], *, scale: Tensor, flag: bool = True) -> Pair:
            return Pair({"sum": x["a"] + x["b"]}, [x["a"] * scale, None, 3])

    args = ({"a": torch.randn(2, 4), "b": torch.randn(2, 4)},)
    kwargs = {"scale": torch.randn(4), "flag": True}
    program = trace(Nested(), args, kwargs)
    got = program.graph_module(*args, **kwargs)
    expected = Nested()(*args, **kwargs)
    assert isinstance(got, Pair)
    assert got.second[1:] == [None, 3]
    torch.testing.assert_close(got.first["sum"], expected.first["sum"])
    assert [s.batch for s in program.inputs] == [0, 0, None, None]
    assert program.inputs[3].constant is True
    assert program.inputs[3].dtype is None


def test_tied_weights_become_one_constant() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.again = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.b(self.a(x)))

    model = Tied()
    program = trace(model, (torch.randn(2, 4),))
    weights = [
        n
        for n in program.graph_module.graph.nodes
        if n.op == "get_attr" and str(n.target).endswith("weight")
    ]
    assert len(weights) == 1
    assert len(weights[0].users) == 3
    x = torch.randn(3, 4)
    torch.testing.assert_close(program.graph_module(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.spectral_norm,
    ],
)
def test_parametrised_modules_in_training_mode(wrap) -> None:
    model = nn.Sequential(wrap(nn.Linear(4, 4)), nn.Dropout()).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 4)
    program = trace(model, (x,))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    torch.testing.assert_close(program.graph_module(x), model.eval()(x), rtol=1e-6, atol=1e-6)


def test_plain_references_to_modules_follow_the_copy() -> None:
    class Refers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9))
            self.listed = [self.body]
            self.method = self.body.forward
            body = self.body
            self.closure = lambda x: body(x)
            self.body[0].register_forward_hook(self.doubled)
            self.factor = 2.0

        def doubled(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
            return out * self.factor

        def forward(self, x: Tensor) -> Tensor:
            return self.listed[0](x) + self.method(x) + self.closure(x)

    model = Refers().train()
    copy = eval_copy(model)
    assert copy.listed[0] is copy.body
    assert copy.body is not model.body
    assert copy.method.__self__ is copy.body
    x = torch.randn(2, 4)
    program = trace(model, (x,))
    assert model.body[1].training
    torch.testing.assert_close(program.graph_module(x), model.eval()(x))


def test_state_made_in_forward_stays_on_the_copy() -> None:
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache: dict[str, Tensor] = {}
            self.seen = 0
            self.mask: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            if self.mask is None:
                self.mask = torch.ones(x.shape[1])
            self.cache["x"] = x
            return x * self.mask

    model = Caches()
    trace(model, (torch.randn(2, 4),))
    assert model.cache == {}
    assert model.seen == 0
    assert model.mask is None


def test_buffer_that_the_model_writes_is_not_the_callers() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x + self.count

    model = Counts()
    program = trace(model, (torch.randn(2, 4),))
    assert any("state" in note for note in program.notes)
    x = torch.zeros(2, 4)
    first, second = program.graph_module(x).clone(), program.graph_module(x).clone()
    assert float(model.count) == 0
    assert float(first[0, 0]) == 1
    assert float(second[0, 0]) == 2


def test_autocast_region_stays_as_it_is() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.fc(x)
            return y.float() + 1

    model = Casts()
    x = torch.randn(2, 4)
    program = trace(model, (x,))
    assert any("autocast" in note for note in program.notes)
    torch.testing.assert_close(program.graph_module(x), model(x))


@pytest.mark.slow
def test_cond_stays_as_it_is() -> None:
    class Chooses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda v: v.sin(), lambda v: v.cos(), (x,))

    program = trace(Chooses(), (torch.randn(2, 4),))
    assert any("cond" in note for note in program.notes)
    for sign in (1.0, -1.0):
        x = sign * torch.rand(3, 4)
        torch.testing.assert_close(program.graph_module(x), Chooses()(x))


# --- batch ----------------------------------------------------------------------------------------


def test_batch_one_example_is_dynamic() -> None:
    model = conv_net().eval()
    program = trace(model, (image(1),))
    assert any("batch 2" in note for note in program.notes)
    assert program.inputs[0].batch == 0
    assert program.args[0].shape[0] == 2
    assert program.example[0][0].shape[0] == 1
    for batch in (1, 2, 3):
        x = image(batch)
        torch.testing.assert_close(program.graph_module(x), model(x), rtol=0, atol=1e-6)


def test_fixed_batch_is_reported() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("b", torch.randn(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b

    program = trace(Fixed(), (torch.randn(2, 4),))
    assert program.inputs[0].sizes == (2, 4)
    assert program.inputs[0].batch is None
    assert "static at 2" in program.specialised[0]
    assert "x" in program.specialised[0]
    assert len(program.specialised) == 1


def test_batch_one_that_cannot_grow_is_static_at_one() -> None:
    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(1, 16)

    program = trace(One(), (torch.randn(1, 4, 4),))
    assert program.inputs[0].sizes == (1, 4, 4)
    assert "static at 1" in program.specialised[0]
    assert program.args[0].shape == (1, 4, 4)


@pytest.mark.parametrize("batch", [1, 2])
def test_model_that_branches_on_batch_one_is_static(batch: int) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.shape[0] == 1 else x * 2

    x = torch.randn(batch, 4)
    program = trace(Branches(), (x,))
    assert "another path at batch 1" in program.specialised[0]
    assert program.inputs[0].batch is None
    torch.testing.assert_close(program.graph_module(x), Branches()(x))


def test_inputs_that_share_the_leading_size_have_a_batch() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor, grid: Tensor) -> Tensor:
            return (x @ grid.T) + y

    program = trace(Two(), (torch.randn(2, 5), torch.randn(2, 7), torch.randn(7, 5)))
    assert [s.batch for s in program.inputs] == [0, 0, None]
    got = program.graph_module(torch.randn(3, 5), torch.randn(3, 7), torch.randn(7, 5))
    assert got.shape == (3, 7)


def test_one_tensor_given_for_two_inputs_stays_two_inputs() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    program = trace(model, (x, x, x))
    args = tuple(torch.randn(4, 3, 8) for _ in range(3))
    got, expected = program.graph_module(*args), model(*args)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(program.graph_module(x, x, x)[0], model(x, x, x)[0])


def test_static_when_asked() -> None:
    program = trace(conv_net().eval(), (image(),), dynamic_batch=False)
    assert program.inputs[0].sizes == (2, 3, 8, 8)
    assert program.specialised == ()


def test_given_dynamic_shapes_decide_and_what_came_out_static_is_said() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, :4] + torch.ones(8, 1)

    auto = torch.export.Dim.AUTO
    program = trace(Half(), (torch.randn(2, 8, 6),), dynamic_shapes=({1: auto, 2: auto},))
    sizes = program.inputs[0].sizes
    assert sizes[0] == 2
    assert sizes[1] == 8
    assert isinstance(sizes[2], str)
    assert len(program.specialised) == 1
    assert "dimension 1" in program.specialised[0]


def test_example_tensors_are_not_poisoned() -> None:
    x = image()
    model = nn.Sequential(nn.Flatten(0), nn.Linear(2 * 3 * 8 * 8, 4))
    dim = torch.export.Dim.DYNAMIC
    with pytest.raises(FrontendError, match="dynamic_shapes"):
        trace(model, (x,), dynamic_shapes=({0: dim},))
    assert not [k for k in vars(x) if "dynamo" in k]
    trace(model, (x,), dynamic_batch=False)


def test_dynamic_shapes_may_leave_the_batch_dynamic_and_another_static() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(4)

    auto = torch.export.Dim.AUTO
    program = trace(Adds(), (torch.randn(2, 4),), dynamic_shapes=({0: auto, 1: auto},))
    assert program.inputs[0].batch == 0
    assert "dimension 1" in program.specialised[0]


def test_a_failed_attempt_leaves_nothing_behind() -> None:
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.mask is None:
                self.mask = torch.ones(x.shape[0], 1)
            return (x * self.mask).reshape(1, 16)

    x = torch.randn(1, 4, 4)
    program = trace(Caches(), (x,))
    assert program.inputs[0].batch is None
    torch.testing.assert_close(program.graph_module(x), x.reshape(1, 16))


@pytest.mark.slow
def test_compiled_module_is_unwrapped() -> None:
    model = conv_net().eval()
    program = trace(torch.compile(model), (image(),))
    assert calls(program) == ["aten::conv2d", "aten::batch_norm", "aten::relu"]


# --- errors ---------------------------------------------------------------------------------------


def test_onnx_is_not_yet() -> None:
    with pytest.raises(FrontendError, match="not yet"):
        trace("model.onnx", ())


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Linear, "pass an instance"),
        ({"weight": 1}, "load_state_dict"),
        (lambda x: x, "Wrap a function"),
        (3, "model is a int"),
    ],
)
def test_not_a_module(model, says: str) -> None:
    with pytest.raises(FrontendError, match=says):
        trace(model, (image(),))


class _Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # line that must be named
            return x
        return -x


def test_data_dependent_branch_names_the_users_line() -> None:
    model = nn.Sequential(nn.Linear(4, 4), _Inner())
    with pytest.raises(FrontendError) as caught:
        trace(model, (torch.randn(2, 4),))
    source = Path(__file__).read_text().splitlines()
    line = next(i for i, text in enumerate(source, 1) if "line that must be named" in text)
    text = str(caught.value)
    assert f"test_export.py:{line}" in text
    assert "module '1'" in text
    assert "torch.where" in text
    assert "data" in text


def test_wrong_shape_names_the_message_and_the_inputs() -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    with pytest.raises(FrontendError) as caught:
        trace(Wrong(), (torch.randn(2, 4),))
    text = str(caught.value)
    assert "float32[2, 4]" in text
    assert "test_export.py" in text
    assert "fix:" in text


def test_missing_argument() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(FrontendError, match="inputs"):
        trace(Two(), (torch.randn(2, 4),))


def test_torchscript_says_what_to_pass() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(FrontendError, match="scripted"):
        trace(scripted, (torch.randn(2, 4),))


def test_torchscript_inside_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(torch.jit.script(nn.Linear(4, 4))))
    with pytest.raises(FrontendError, match=r"holds a TorchScript module \('1\.0'\)"):
        trace(model, (torch.randn(2, 4),))


def test_what_runs_and_cannot_be_traced_is_told_from_what_fails() -> None:
    class Gradient(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.func.vmap(torch.func.grad(lambda row: (row**2).sum()))(x)

    with pytest.raises(FrontendError, match=r"Gradient runs, but torch\.export cannot trace it"):
        trace(Gradient(), (torch.randn(2, 4),))


def test_a_failing_call_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FrontendError, match="same reduction dim"):
        trace(nn.Linear(8, 8), (torch.randn(2, 7),))
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


class ElsewhereOnExport(nn.Module):
    """Takes another path where it is traced, as fused fast paths do."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if torch.compiler.is_exporting() else x


def test_a_trace_that_is_not_the_model_is_said() -> None:
    program = trace(ElsewhereOnExport(), (torch.randn(2, 4),))
    assert any("output 0 of 1 is off by 1 of its largest value" in n for n in program.notes)
    assert program.inputs[0].batch == 0  # what differs at any batch says nothing of batch 1


@pytest.mark.slow
def test_padded_rows_of_a_fused_encoder_are_said() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).eval()
    hidden = torch.tensor([[False, False, True], [False, False, False]])
    args = (torch.randn(2, 3, 8),)
    program = trace(model, args, {"src_key_padding_mask": hidden})
    assert any("the traced program is not the model" in note for note in program.notes)
    program = trace(model, args, {"src_key_padding_mask": torch.zeros_like(hidden)})
    assert program.notes == ()


def test_what_cannot_be_dynamic_is_not_blamed_on_the_copy() -> None:
    class Keywords(nn.Module):
        def forward(self, **inputs: Tensor) -> Tensor:
            return inputs["x"].reshape(1, 8) + 1

    program = trace(Keywords(), (), {"x": torch.randn(2, 4)})
    assert program.specialised
    assert not any("copied" in note for note in program.notes)


def test_nan_weights_are_traced() -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    assert trace(model, (torch.randn(2, 4),)).node_count == 1


# --- exported programs and archives ---------------------------------------------------------------


def exported(model: nn.Module | None = None) -> torch.export.ExportedProgram:
    model = model if model is not None else conv_net().eval()
    with torch.no_grad():
        return torch.export.export(
            model, (image(),), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False
        )


def test_exported_program() -> None:
    program = trace(exported(), ())
    assert calls(program) == ["aten::conv2d", "aten::batch_norm", "aten::relu"]
    assert program.inputs[0].batch == 0


def test_exported_program_refuses_dynamic_shapes_and_wrong_counts() -> None:
    with pytest.raises(FrontendError, match="fixed"):
        trace(exported(), (), dynamic_shapes=({},))
    with pytest.raises(FrontendError, match="takes 1 inputs, 2 were given"):
        trace(exported(), (image(), image()))


def test_exported_in_training_mode_is_said() -> None:
    program = trace(exported(conv_net().train()), ())
    assert any("training mode" in note for note in program.notes)


def test_graph_module() -> None:
    model = conv_net().eval()
    traced = torch.fx.symbolic_trace(model)
    x = image()
    program = trace(traced, (x,))
    torch.testing.assert_close(program.graph_module(x), model(x), rtol=0, atol=0)


def test_unlifted_graph_module() -> None:
    gm = exported().module()
    x = image()
    program = trace(gm, (x,))
    torch.testing.assert_close(program.graph_module(x), gm(x), rtol=0, atol=0)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt2"
    torch.export.save(exported(), path)
    return path


def test_archive(archive: Path) -> None:
    for path in (archive, str(archive)):
        program = trace(path, ())
        assert calls(program) == ["aten::conv2d", "aten::batch_norm", "aten::relu"]
        assert program.inputs[0].batch == 0
        assert program.args[0].shape == (2, 3, 8, 8)


@pytest.mark.slow
def test_archive_of_a_model_with_dynamic_sizes_is_not_refused(tmp_path: Path) -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = F.interpolate(F.pad(x, (1, 2, 1, 2))[:, :, ::2], scale_factor=1.5)
            return F.avg_pool2d(y, 2).flatten(1)

    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        Sizes(), (image(),), dynamic_shapes=({0: auto, 2: auto, 3: auto},), strict=False
    )
    path = tmp_path / "sizes.pt2"
    torch.export.save(program, path)
    assert trace(path, ()).inputs[0].batch == 0


class _Writes:
    """Unpickling it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def _rewrite(path: Path, edits: dict[str, object]) -> None:
    """Replaces entries of an archive: bytes, or a function of the JSON document."""
    with zipfile.ZipFile(path) as old:
        entries = {i.filename: old.read(i) for i in old.infolist()}
    root = next(iter(entries)).split("/")[0]
    for name, edit in edits.items():
        key = f"{root}/{name}"
        if callable(edit):
            document = json.loads(entries[key])
            edit(document)
            entries[key] = json.dumps(document).encode()
        else:
            assert isinstance(edit, bytes)
            entries[key] = edit
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name, data in entries.items():
            new.writestr(name, data)


def _pickle(target: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"x": _Writes(target)}, buffer)
    return buffer.getvalue()


def _ask_for_pickle(document: dict) -> None:
    document["config"]["0.weight"]["use_pickle"] = True


@pytest.mark.parametrize("where", ["weights", "inputs", "object"])
def test_archive_that_unpickles_is_refused(archive: Path, tmp_path: Path, where: str) -> None:
    target = tmp_path / "written"
    config = "data/weights/model_weights_config.json"
    if where == "weights":
        _rewrite(archive, {"data/weights/weight_0": _pickle(target), config: _ask_for_pickle})
    elif where == "inputs":
        _rewrite(archive, {"data/sample_inputs/model.pt": _pickle(target)})
    else:

        def add(document: dict) -> None:
            document["config"]["evil"] = {
                "path_name": "opaque_obj_0", "is_param": False, "use_pickle": True,
                "tensor_meta": None,
            }  # fmt: skip

        data = pickle.dumps(_Writes(target))
        _rewrite(
            archive,
            {
                "data/constants/model_constants_config.json": add,
                "data/constants/opaque_obj_0": data,
            },
        )
    with pytest.raises(FrontendError, match=r"refused.*trust=True"):
        trace(archive, ())
    assert not target.exists()
    # The archive really is hostile: torch's own loader runs what it carries.
    with pytest.raises(FrontendError):
        trace(archive, (), trust=True)
    assert target.exists()


def test_archive_whose_size_is_code_is_refused(archive: Path, tmp_path: Path) -> None:
    target = tmp_path / "written"

    def edit(document: dict) -> None:
        values = document["graph_module"]["graph"]["tensor_values"]
        size = next(s for s in values["input"]["sizes"] if "as_expr" in s)
        size["as_expr"]["expr_str"] = f"__import__('pathlib').Path('{target}').touch()"

    _rewrite(archive, {"models/model.json": edit})
    with pytest.raises(FrontendError, match=r"expression.*refused"):
        trace(archive, ())
    assert not target.exists()


@pytest.mark.parametrize("target", ["torch.hub.load", "torch.load", "torch.os.system"])
def test_archive_that_calls_more_than_operators_is_refused(archive: Path, target: str) -> None:
    def edit(document: dict) -> None:
        document["graph_module"]["graph"]["nodes"][0]["target"] = target

    _rewrite(archive, {"models/model.json": edit})
    with pytest.raises(FrontendError, match="not an operator"):
        trace(archive, ())


def test_archive_that_imports_a_module_is_refused(archive: Path) -> None:
    def edit(document: dict) -> None:
        signature = document["graph_module"]["module_call_graph"][0]["signature"]
        context = json.dumps({"default_factory_module": "antigravity"})
        signature["in_spec"] = json.dumps(
            [1, {"type": "collections.defaultdict", "context": context, "children_spec": []}]
        )

    _rewrite(archive, {"models/model.json": edit})
    with pytest.raises(FrontendError, match="import"):
        trace(archive, ())


def test_archive_with_a_compiled_library_is_refused(archive: Path) -> None:
    with zipfile.ZipFile(archive) as old:
        root = old.namelist()[0].split("/")[0]
    with zipfile.ZipFile(archive, "a") as new:
        new.writestr(f"{root}/data/aotinductor/model/m.so", b"\x7fELF")
    with pytest.raises(FrontendError, match="compiled library"):
        trace(archive, ())


def test_damaged_archives(archive: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.pt2"
    with pytest.raises(FrontendError, match="no such file"):
        trace(missing, ())
    text = tmp_path / "text.pt2"
    text.write_text("hello")
    with pytest.raises(FrontendError, match=r"not a \.pt2 archive"):
        trace(text, ())
    cut = tmp_path / "cut.pt2"
    cut.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(FrontendError, match="cut off"):
        trace(cut, ())
    other = tmp_path / "other.pt2"
    with zipfile.ZipFile(other, "w") as new:
        new.writestr("hello", "world")
    with pytest.raises(FrontendError, match="damaged"):
        trace(other, ())
    _rewrite(archive, {"models/model.json": b"{"})
    with pytest.raises(FrontendError, match="damaged"):
        trace(archive, ())


class _BranchOnAValue(nn.Module):
    def forward(self, x):
        if x.mean() > 0:
            return x * 2
        return x


def test_data_dependent_control_flow_names_the_line():
    with pytest.raises(FrontendError, match=r"test_export\.py:\d+ in forward[\s\S]*torch\.cond"):
        trace(_BranchOnAValue(), (torch.randn(2, 3),), {})
