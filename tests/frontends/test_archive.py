"""Damaged and hostile ``.pt2`` files: refused by name, or read with the right numbers.

That none of them runs code is in ``test_export.py``.
"""

from __future__ import annotations

import io
import json
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.errors import FrontendError
from refold.frontends import archive
from refold.frontends.export import trace
from tests.randomise import randomise

CONFIG, GRAPH = "data/weights/model_weights_config.json", "models/model.json"
WEIGHT = "data/weights/weight_0"
Edit = Callable[[Any], None]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What torch writes, by name."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    model = randomise(_Net(), (x,)).eval()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    path = tmp_path_factory.mktemp("archive") / "net.pt2"
    torch.export.save(program, path)
    with zipfile.ZipFile(path) as stored:
        return {e.filename.partition("/")[2]: stored.read(e) for e in stored.infolist()}


@pytest.fixture
def write(tmp_path: Path, entries: dict[str, bytes]) -> Callable[..., Path]:
    """Writes the archive with some entries changed: bytes, ``None`` to leave one out, an edit."""

    def written(changes: dict[str, Any], *, deflate: bool = False, more: Any = ()) -> Path:
        changed = dict(entries)
        for name, change in changes.items():
            if callable(change):
                document = json.loads(changed[name])
                change(document)
                change = json.dumps(document).encode()
            changed[name] = change
        path = tmp_path / "changed.pt2"
        kind = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w", kind) as new:
            warnings.simplefilter("ignore")  # of names that come twice
            for name, data in [*changed.items(), *more]:
                if data is not None:
                    new.writestr(f"net/{name}", data)
        return path

    return written


def _refused(path: Path, message: str) -> None:
    with pytest.raises(FrontendError, match=message) as caught:
        refold.compile_for_inference(path)
    assert "changed.pt2" in str(caught.value) or "the exported program" in str(caught.value)


def _result(path: Path) -> Tensor:
    return trace(path, ()).graph_module(torch.ones(2, 3, 8, 8))


def _meta(**changes: Any) -> Edit:
    def edit(document: Any) -> None:
        document["config"]["conv.weight"]["tensor_meta"].update(changes)

    return edit


def _ints(*values: int) -> list[dict[str, int]]:
    return [{"as_int": value} for value in values]


# --- records --------------------------------------------------------------------------------------


def test_a_record_may_be_longer_than_its_tensors(write, entries) -> None:
    """Torch writes the whole storage of a slice; what no tensor reads makes no number."""
    plain = _result(write({}))
    for surplus in (bytes(64), b"\xff" * 64, bytes(5 << 20)):
        torch.testing.assert_close(
            _result(write({WEIGHT: entries[WEIGHT] + surplus})), plain, rtol=0, atol=0
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-64], "out of bounds"),
        (lambda data: data + b"\0", "not a multiple"),
        (lambda data: b"", "record of 'conv.weight'.* is empty"),
        (lambda data: None, "file not found"),
    ],
    ids=["short", "odd", "empty", "missing"],
)
@pytest.mark.parametrize("trust", [False, True])
def test_a_record_that_does_not_hold_its_tensor(write, entries, change, message, trust) -> None:
    path = write({WEIGHT: change(entries[WEIGHT])})
    # Torch tries older formats where the caller trusts the file, and complains of those.
    with pytest.raises(FrontendError, match=r"could not read|is empty" if trust else message):
        trace(path, (), trust=trust)


def test_an_empty_tensor_has_an_empty_record(tmp_path: Path) -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("none", torch.empty(0, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.none.sum()

    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(Empty(), (torch.randn(2),)), path)
    torch.testing.assert_close(trace(path, ()).graph_module(torch.ones(2)), torch.ones(2))


class _Views(nn.Module):
    """Tensors of every layout that an archive has."""

    def __init__(self) -> None:
        super().__init__()
        big = torch.randn(1000, 4)
        self.slice = nn.Parameter(big[10:14])
        self.whole = nn.Parameter(torch.randn(8, 4))
        self.part = nn.Parameter(self.whole.data[:4])
        self.tied = self.whole
        self.every_other = torch.randn(3, 4)[::2]
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.register_buffer("transposed", torch.randn(6, 5).t())
        self.register_buffer("expanded", torch.ones(1).expand(3000))
        self.register_buffer("scalar", torch.tensor(3.0))
        self.register_buffer("wide", torch.randn(4).double())
        self.register_buffer("flags", torch.ones(3, dtype=torch.bool))
        shared = torch.randn(100)
        self.register_buffer("one", shared[10:30])
        self.register_buffer("other", shared[20:50])

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.slice + self.conv(x.new_ones(1, 3, 4, 4)).sum()
        for tensor in (self.whole, self.part, self.tied, self.every_other, self.transposed,
                       self.expanded, self.scalar, self.wide.float(), self.flags, self.one,
                       self.other):  # fmt: skip
            y = y + (tensor * 1.5).sum()
        return y


@pytest.mark.filterwarnings("ignore:No complete tensor")
def test_every_layout_that_torch_writes_is_read(tmp_path: Path) -> None:
    model, x = _Views().eval(), torch.randn(2, 4)
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(model, (x,)), path)
    torch.testing.assert_close(trace(path, ()).graph_module(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_meta(sizes=_ints(3, 4, 3, 3)), r"float32 \[3, 4, 3, 3\].*\[4, 3, 3, 3\]"),
        (_meta(sizes=_ints(-4, 3, 3, 3)), "overflowed"),
        (_meta(sizes=_ints(10**30, 1, 1, 1)), "Overflow"),
        (_meta(sizes=_ints(10**6, 10**6, 1, 1), strides=_ints(0, 0, 0, 0)), "claim 4,000,000,"),
        (_meta(strides=_ints(0, 0, 0, 0)), r"strides \[0, 0, 0, 0\]"),
        (_meta(strides=_ints(1, 4, 12, 36)), r"strides \[1, 4, 12, 36\]"),
        (_meta(strides=_ints(-27, 9, 3, 1)), "[Nn]egative"),
        (_meta(storage_offset={"as_int": 10**6}), "out of bounds"),
        (_meta(storage_offset={"as_int": 1}), "out of bounds"),
        (_meta(storage_offset={"as_int": -1}), "offset"),
        (_meta(dtype=8), "out of bounds"),
        (_meta(dtype=6), "float16.*traced with torch.float32"),
        (_meta(dtype=999), "999"),
        (lambda d: d["config"].pop("conv.weight"), "conv.weight"),
        (
            lambda d: d["config"]["conv.weight"].update(path_name="../../x"),
            "is an object, not a tensor",
        ),
        (lambda d: d.pop("config"), "damaged"),
    ],
)
def test_what_is_said_of_a_tensor_has_to_be_true(write, change, message) -> None:
    _refused(write({CONFIG: change}), message)


def test_a_program_whose_weights_were_exchanged_is_refused() -> None:
    """In memory too: with other shapes than those of its graph it would fail somewhere inside."""
    x = torch.randn(2, 3, 8, 8)
    for weight in (torch.randn(4, 4, 3, 3), torch.randn(4, 3, 3, 3).double()):
        program = torch.export.export(_Net().eval(), (x,))
        program.state_dict["conv.weight"] = nn.Parameter(weight)
        with pytest.raises(FrontendError, match=r"tensor 'conv\.weight' is .*traced with"):
            refold.compile_for_inference(program)


@pytest.mark.parametrize("order", [b"big", b"little", b"pdp"])
def test_byte_order_of_another_machine(write, order, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write({"byteorder": order})
    for trust in (False, True):
        if order.decode() == sys.byteorder:
            assert trace(path, (), trust=trust).inputs
        else:
            with pytest.raises(FrontendError, match=f"byte order '{order.decode()}' of another"):
                trace(path, (), trust=trust)
    monkeypatch.setattr(archive.sys, "byteorder", "big")
    if order == b"little":
        _refused(path, "byte order 'little' of another machine")


def test_archives_from_before_byte_orders_are_read(write) -> None:
    assert trace(write({"byteorder": None}), ()).inputs


def test_weights_that_are_not_finite_are_weights(write, entries) -> None:
    nan = torch.full((len(entries[WEIGHT]) // 4,), float("nan")).numpy().tobytes()
    assert _result(write({WEIGHT: nan})).isnan().all()


# --- the zip file ---------------------------------------------------------------------------------


@pytest.mark.parametrize("trust", [False, True])
def test_a_flipped_bit(write, trust) -> None:
    """Torch looks at no checksum."""
    path = write({})
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as stored:
        at = stored.getinfo(f"net/{WEIGHT}").header_offset + 100
    data[at] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(FrontendError, match=r"damaged.*CRC"):
        trace(path, (), trust=trust)


def test_two_entries_of_one_name(write, entries) -> None:
    _refused(write({}, more=[(WEIGHT, bytes(len(entries[WEIGHT])))]), "same name")
    _refused(write({}, more=[(GRAPH, entries[GRAPH])]), "same name")


def test_archives_that_were_compressed_are_read(write) -> None:
    path = write({})
    torch.testing.assert_close(_result(write({}, deflate=True)), _result(path))


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("name", [WEIGHT, GRAPH, "extra/x"])
def test_archives_that_inflate_a_thousand_times(write, entries, name, trust) -> None:
    data = entries.get(name, b"")
    path = write({name: data + b" " * (40 << 20)}, deflate=True)
    with pytest.raises(FrontendError, match=r"inflates to .* times its size"):
        trace(path, (), trust=trust)


def test_sample_inputs_that_inflate_a_thousand_times(write, entries) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr("model/data.pkl", bytes(40 << 20))
    _refused(write({"data/sample_inputs/model.pt": inner.getvalue()}), "inflates to")


@pytest.mark.parametrize("cut", [0, 1, 30, 1000])
def test_cut_off(write, cut) -> None:
    path = write({})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - cut] if cut else b"")
    _refused(path, "not a .pt2 archive|damaged|cut off")


def test_every_entry_that_is_needed_is_missed(write, entries) -> None:
    optional = {"byteorder", ".data/serialization_id"}
    for name in entries.keys() - optional:
        with pytest.raises(FrontendError, match=r"could not read|damaged"):
            trace(write({name: None}), ())
        with pytest.raises(FrontendError):
            trace(write({name: b""}), ())


# --- descriptions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 200_000 + b"]" * 200_000,
        b'{"a":' * 100_000,
        b"9" * 5_000_000,
        b"null",
        b"[]",
        b"\xff\xfe{}",
        b"{",
    ],
    ids=["deep lists", "deep objects", "a long number", "null", "a list", "no text", "cut off"],
)
@pytest.mark.parametrize("name", [CONFIG, GRAPH])
def test_json_of_another_kind(write, name, text) -> None:
    _refused(write({name: text}), "damaged|could not read")


def test_json_that_memory_does_not_hold(write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write({})
    monkeypatch.setattr(archive, "memory", lambda: 64 * 1000)
    _refused(path, "too many for this machine's memory")


def _size(text: str) -> Edit:
    def edit(document: Any) -> None:
        for size in document["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]:
            if "as_expr" in size:
                size["as_expr"]["expr_str"] = text

    return edit


@pytest.mark.parametrize(
    "text",
    ["9**9**9**9", "2**100000000", "1<<999999999", "Pow(9, Pow(9, Pow(9, 9)))",
     "Pow(Pow(Pow(9, 60), 60), 60)", "Integer(9)**Integer(999999999)", "2**Symbol('s77')",
     "LShift(1, 10000000)", "FallingFactorial(10**9, 10**8)", "factorial(99999999)",
     "TruncToInt(Float('1e99999999'))", "Float('1.5', precision=1000000000)",
     "9" * 4000 + "*s77", "(" * 3000 + "s77" + ")" * 3000],
)  # fmt: skip
def test_sizes_that_take_for_ever_are_not_computed(write, text) -> None:
    _refused(write({GRAPH: _size(text)}), "one of its sizes is the expression")


@pytest.mark.parametrize(
    "text",
    ["Symbol('s77', integer=True, positive=True)", "2*s77 + 1", "s77**2 + s1**2 + s2**2 + s3**2",
     "Pow(Add(Pow(Symbol('s77'), Integer(2)), Integer(1)), Integer(2))",
     "Pow(Symbol('s77'), Integer(-1))", "FloorDiv(Symbol('s77'), Integer(2))",
     "Mul(Rational(1, 2), Symbol('s77'))", "Max(1, floor(s77/2))", "Float('0.5', precision=53)",
     "Pow(Symbol('s77'), Rational(1, 2))", "Mod(s77, 8)", "9223372036854775807"],
)  # fmt: skip
def test_sizes_as_torch_writes_them_are_sizes(text) -> None:
    assert list(archive._size(text)) == []


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            ((torch.randn(2, 5),), {}),
            r"float32 \[s77, 3, 8, 8\], got torch.float32 \[2, 5",
        ),
        (((torch.randn(2, 3, 8, 8).double(),), {}), "got torch.float64"),
        (((5,), {}), "got 5"),
        (((torch.randn(2, 3, 9, 8),), {}), "got torch.float32"),
        (((torch.zeros(1).expand(10**7, 3, 100, 100),), {}), "claim 1,200,"),
        ([1], "could not read"),
        (None, "could not read"),
    ],
)
def test_sample_inputs_of_another_program(write, example, message) -> None:
    stored = io.BytesIO()
    torch.save(example, stored)
    _refused(write({"data/sample_inputs/model.pt": stored.getvalue()}), message)


def test_inputs_of_a_program_are_compared_with_its_own() -> None:
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(_Net().eval(), (x,))
    for given in ((x.double(),), (x[:, :2],), (x[0],), (3,), {"x": x.half()}):
        with pytest.raises(FrontendError, match=r"of the exported program|nested"):
            refold.compile_for_inference(program, given)


def test_keyword_inputs_of_a_program_may_come_in_any_order() -> None:
    class Two(nn.Module):
        def forward(self, *, a: Tensor, b: Tensor) -> Tensor:
            return a @ b

    a, b = torch.randn(2, 3), torch.randn(3, 4)
    program = torch.export.export(Two(), (), {"a": a, "b": b})
    compiled = refold.compile_for_inference(program, {"b": b, "a": a})
    torch.testing.assert_close(compiled(a=a, b=b), a @ b)


def test_a_deep_structure(write) -> None:
    def edit(document: Any) -> None:
        signature = document["graph_module"]["module_call_graph"][0]["signature"]
        signature["in_spec"] = "[" * 100_000

    _refused(write({GRAPH: edit}), "could not read")


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.pt2")
    (tmp_path / "folder.pt2").mkdir()
    for path, message in (
        (tmp_path / "pipe.pt2", "pipe"),
        (tmp_path / "folder.pt2", "directory"),
        (Path("a\0b.pt2"), "no file has such a name"),
        (Path("a" * 5000 + ".pt2"), "too long"),
    ):
        with pytest.raises(FrontendError, match=message):
            trace(path, ())


# --- never over its own model ---------------------------------------------------------------------


def test_the_file_of_the_model_is_not_overwritten(write, tmp_path: Path, monkeypatch) -> None:
    path = write({})
    before = path.read_bytes()
    monkeypatch.chdir(tmp_path)
    compiled = refold.compile_for_inference("changed.pt2", verify=False)
    monkeypatch.chdir("/")  # it is known by where it was
    for force in (True, False):
        with pytest.raises(refold.RefoldError, match="is read to make it"):
            compiled.save(path, force=force)
    other = tmp_path / "checkpoint.pt2"
    other.write_text("mine")
    with pytest.raises(refold.RefoldError, match="is read to make it"):
        compiled.save(other, force=True, keep=[other])
    assert path.read_bytes() == before
    assert other.read_text() == "mine"
    compiled.save(other, force=True)
    assert trace(other, ()).inputs
