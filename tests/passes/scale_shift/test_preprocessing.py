"""What a network does to its input before the stem: casts, scales, means and their borders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from refold.frontends.export import trace
from refold.graph.ops import op_name
from refold.passes import PIPELINES
from refold.rewrite.result import Decline
from tests.compare import EXACT, relative_error
from tests.examples import few
from tests.folding import Net, image, left, run

MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])
PLANES = (1, 3, 1, 1)


def pixels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def folded(
    net: nn.Module, x: torch.Tensor, *, dynamic: Any = None
) -> tuple[fx.GraphModule, list[Decline]]:
    """Folds with the default pipeline and compares at three batch sizes, in float64."""
    with torch.no_grad():
        gm = trace(
            net, (x,), {}, dynamic_batch=dynamic is None, dynamic_shapes=dynamic
        ).graph_module
        result = PIPELINES["default"].run(gm, debug=True)
        for batch in (1, 2, 3):
            size = (batch, *x.shape[1:])
            probe = pixels(*size) if x.dtype == torch.uint8 else torch.randn(size, dtype=x.dtype)
            error = relative_error(gm(probe), net(probe))
            assert error <= EXACT, f"relative error {error:.1e}\n{gm.graph}"
    return gm, [d for r in result.runs for d in r.result.declined]


def stem(forward: Callable[..., Any], out: int = 6, kernel: int = 3, **options: Any) -> Net:
    """``relu(bn(conv(forward(x))))`` with a mean and a deviation for ``forward``."""
    return Net(
        lambda s, x: F.relu(s.bn(s.conv(forward(s, x)))),
        conv=nn.Conv2d(3, out, kernel, **options), bn=nn.BatchNorm2d(out),
        mean=MEAN.reshape(PLANES), std=STD.reshape(PLANES),
    )  # fmt: skip


def reasons(declined: list[Decline]) -> str:
    return "\n".join(d.reason for d in declined)


def call(gm: fx.GraphModule, name: str) -> fx.Node:
    (found,) = [n for n in gm.graph.nodes if n.op == "call_function" and op_name(n) == name]
    return found


SPELLINGS: dict[str, Callable[..., Any]] = {
    "cast, /255": lambda s, x: x.double() / 255,
    "/255 alone": lambda s, x: x / s.std.new_tensor(255.0).reshape(1, 1, 1, 1),
    "times 1/255": lambda s, x: x.to(s.conv.weight.dtype) * (1 / 255),
    "normalised": lambda s, x: (x.double() / 255 - s.mean) / s.std,
    "means of 255": lambda s, x: (x - s.mean * 255) / (s.std * 255),
    "scale and shift": lambda s, x: x.double() * (1 / (255 * s.std)) - s.mean / s.std,
    "-1 to 1": lambda s, x: x.double() / 127.5 - 1,
    "1 to -1": lambda s, x: 1 - x.double() / 127.5,
    "in place": lambda s, x: x.double().div_(255).sub_(s.mean).div_(s.std),
    "red and blue change places": lambda s, x: (x.flip(1).double() / 255 - s.mean) / s.std,
}  # fmt: skip


@pytest.mark.parametrize("spelling", few(SPELLINGS, 5))
def test_an_unpadded_stem_takes_all_of_it(spelling: str) -> None:
    gm, _ = folded(stem(SPELLINGS[spelling], stride=2), pixels(2, 3, 11, 10))
    counts = left(gm)
    assert counts.pop("to") == 1
    assert counts == {"conv": 1, "relu": 1}


@pytest.mark.parametrize("spelling", few(SPELLINGS, 5))
def test_a_padded_stem_takes_the_scale(spelling: str) -> None:
    gm, _ = folded(stem(SPELLINGS[spelling], out=32, stride=2, padding=1), pixels(2, 3, 11, 10))
    counts = left(gm)
    shifted = spelling not in ("cast, /255", "/255 alone", "times 1/255")
    assert sum(counts.pop(kind, 0) for kind in ("add", "sub")) == shifted
    assert counts.pop("to", 0) == (spelling != "means of 255")  # there the shift casts
    assert counts == {"conv": 1, "relu": 1}


def test_channels_last_images() -> None:
    x = pixels(2, 11, 10, 3)
    for forward in (
        lambda s, x: (x.permute(0, 3, 1, 2).double() / 255 - s.mean) / s.std,
        lambda s, x: ((x / 255.0 - s.mean.reshape(3)) / s.std.reshape(3)).permute(0, 3, 1, 2),
    ):
        gm, _ = folded(stem(lambda s, x, f=forward: f(s, x).double()), x)
        assert left(gm)["conv"] == 1


def patches(x: torch.Tensor, size: int) -> torch.Tensor:
    b, c, h, w = x.shape
    cells = x.reshape(b, c, h // size, size, w // size, size).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(b, (h // size) * (w // size), c * size * size)


def test_a_patch_embedding_takes_all_of_it() -> None:
    net = Net(
        lambda s, x: F.gelu(s.l(patches((x.double() / 255 - s.mean) / s.std, 4))),
        l=nn.Linear(48, 5), mean=MEAN.reshape(PLANES), std=STD.reshape(PLANES),
    )  # fmt: skip
    gm, _ = folded(net, pixels(2, 3, 12, 8))
    counts = left(gm)
    assert counts.pop("to") == 1
    assert counts == {"linear": 1, "gelu": 1}


def test_every_branch_takes_it() -> None:
    """A stem of branches reads one normalised image; the branches still merge."""
    net = Net(
        lambda s, x: F.relu(s.a(n := (x.double() / 255 - s.mean) / s.std) + s.b(n)),
        a=nn.Conv2d(3, 32, 3, padding=1), b=nn.Conv2d(3, 32, 1),
        mean=MEAN.reshape(PLANES), std=STD.reshape(PLANES),
    )  # fmt: skip
    gm, _ = folded(net, pixels(2, 3, 9, 8))
    assert left(gm) == {"to": 1, "add": 1, "conv": 1, "relu": 1}


def test_a_batch_norm_takes_a_scale_before_it() -> None:
    net = Net(
        lambda s, x: F.relu(s.conv(s.bn(x.double() / 255))),
        conv=nn.Conv2d(3, 32, 3, padding=1), bn=nn.BatchNorm2d(3),
    )  # fmt: skip
    gm, _ = folded(net, pixels(2, 3, 9, 8))
    assert left(gm) == {"to": 1, "batch-norm": 1, "conv": 1, "relu": 1}


# -- borders ---------------------------------------------------------------------------------------


def padded(forward: Callable[..., Any], **options: Any) -> Net:
    """The zeros are written: ``F.pad`` before an unpadded stem."""
    return stem(lambda s, x: F.pad(forward(s, x), (0, 1, 2, 1)), **options)


def test_an_explicit_pad_takes_the_value_that_becomes_zero() -> None:
    gm, _ = folded(padded(lambda s, x: x.double() / 127.5 - 1), pixels(2, 3, 9, 8))
    assert left(gm) == {"to": 1, "pad": 1, "conv": 1, "relu": 1}
    assert call(gm, "pad").args[3] == pytest.approx(127.5, rel=1e-12)


def test_a_pad_of_another_value_takes_its_preimage() -> None:
    net = stem(lambda s, x: F.pad((x - 0.25) * 8, (1, 1, 1, 1), value=4.0))
    gm, _ = folded(net, torch.randn(2, 3, 9, 8, dtype=torch.float64))
    assert left(gm) == {"pad": 1, "conv": 1, "relu": 1}
    assert call(gm, "pad").args[3] == pytest.approx(0.75, rel=1e-12)


def test_a_pad_cannot_take_a_value_for_each_channel() -> None:
    net = padded(lambda s, x: x - s.mean, out=32)
    gm, declined = folded(net, torch.randn(2, 3, 9, 8, dtype=torch.float64))
    assert left(gm) == {"sub": 1, "pad": 1, "conv": 1, "relu": 1}
    assert "would have to pad each channel with another value" in reasons(declined)


def test_integers_are_padded_before_the_cast() -> None:
    gm, _ = folded(
        stem(lambda s, x: (x.double() - 128) / 64, out=32, padding=(2, 1)), pixels(2, 3, 40, 40)
    )
    assert left(gm) == {"pad": 1, "to": 1, "conv": 1, "relu": 1}
    pad = call(gm, "pad")
    assert pad.args[0].op == "placeholder"
    assert pad.args[1:] == ([1, 1, 2, 2], "constant", 128.0)
    assert pad.meta["val"].shape[2:] == (44, 42)


@pytest.mark.parametrize("mean", [127.5, 256.0, -1.0])
def test_integers_cannot_be_padded_with_what_they_are_not(mean: float) -> None:
    gm, declined = folded(
        stem(lambda s, x: (x.double() - mean) / 64, out=32, padding=1), pixels(2, 3, 40, 40)
    )
    assert left(gm) == {"to": 1, "add": 1, "conv": 1, "relu": 1} or left(gm) == {
        "to": 1, "sub": 1, "conv": 1, "relu": 1,
    }  # fmt: skip
    assert "pads with zeros" in reasons(declined)


def shifted(x: torch.Tensor) -> torch.Tensor:
    return (x.double() - 128) / 64


@pytest.mark.parametrize(
    "net",
    [
        stem(lambda s, x: shifted(x), out=32, padding="same"),
        stem(lambda s, x: shifted(x.short()), out=32, padding=1),
        Net(lambda s, x: s.c(shifted(x)), c=nn.ConvTranspose2d(3, 32, 3, padding=1)),
        Net(lambda s, x: (lambda y: s.c(y) + s.d(y).tanh())(shifted(x)),
            c=nn.Conv2d(3, 32, 3, padding=1), d=nn.Conv2d(3, 32, 5, padding=2)),
        Net(lambda s, x: (lambda y: s.c((y - 128) / 64) * y.mean())(x.double()),
            c=nn.Conv2d(3, 32, 3, padding=1)),
        Net(lambda s, x: s.c((x.double() - 128) * s.g),
            c=nn.Conv2d(3, 32, 3, padding=1), g=torch.rand(1, 1, 40, 1) + 0.5),
    ],
    ids=["same", "wider", "transposed", "two layers", "two readers", "rows"],
)  # fmt: skip
def test_integers_stay_unpadded_where_the_pad_would_not_be_the_layers_own(net: Net) -> None:
    """The numbers are compared in ``folded``."""
    gm, _ = folded(net, pixels(2, 3, 40, 40))
    assert "pad" not in left(gm)


def wide(forward: Callable[..., Any], **options: Any) -> Net:
    """A padded stem whose output is much smaller than the image."""
    return stem(forward, out=4, kernel=7, stride=4, padding=3, **options)


def normalise(s: Any, x: torch.Tensor) -> torch.Tensor:
    return (x.double() / 255 - s.mean) / s.std


def test_a_shift_becomes_a_map_of_the_border_where_that_is_cheaper() -> None:
    gm, _ = folded(wide(normalise), pixels(2, 3, 41, 40))
    assert left(gm) == {"to": 1, "conv": 1, "add": 1, "relu": 1}
    conv, add = call(gm, "conv2d"), call(gm, "add")
    assert add.args[0] is conv, "the map is added after the stem"
    assert tuple(add.args[1].meta["val"].shape) == (1, 4, 11, 10)


def test_a_mean_of_every_pixel_becomes_a_map_too() -> None:
    net = Net(
        lambda s, x: F.relu(s.conv((x.double() - s.mean) / 255)),
        conv=nn.Conv2d(3, 4, 4, stride=4), mean=torch.rand(3, 40, 40) * 255,
    )  # fmt: skip
    gm, _ = folded(net, pixels(2, 3, 40, 40))
    assert left(gm) == {"to": 1, "conv": 1, "add": 1, "relu": 1}
    assert call(gm, "add").args[0] is call(gm, "conv2d")


def test_a_transposed_stem_takes_a_map() -> None:
    net = Net(
        lambda s, x: F.relu(s.conv(x - s.mean)),
        conv=nn.ConvTranspose2d(3, 1, 3, padding=1), mean=MEAN.reshape(PLANES),
    )  # fmt: skip
    gm, _ = folded(net, torch.randn(2, 3, 20, 20, dtype=torch.float64))
    assert call(gm, "add").args[0] is call(gm, "conv_transpose2d")


def test_a_map_must_be_cheaper() -> None:
    net = stem(normalise, out=32, stride=2, padding=1)
    gm, declined = folded(net, pixels(2, 3, 40, 40))
    assert call(gm, "conv2d").args[0] is call(gm, "add")
    assert "a map of what it adds would cost" in reasons(declined)


def test_a_shift_that_also_casts_costs_nothing() -> None:
    gm, declined = folded(wide(lambda s, x: x - s.mean * 255), pixels(2, 3, 41, 40))
    assert left(gm) == {"sub": 1, "conv": 1, "relu": 1}
    assert "its input is an integer tensor" in reasons(declined)


def test_a_shift_for_each_sample_stays() -> None:
    net = Net(
        lambda s, x: F.relu(s.conv(x - s.mean)),
        conv=nn.Conv2d(3, 4, 7, stride=4, padding=3), mean=torch.randn(2, 3, 1, 1),
    )  # fmt: skip
    gm, declined = run(PIPELINES["default"].passes, net, image(3, 41, 40), dynamic=False)
    assert left(gm) == {"sub": 1, "conv": 1, "relu": 1}
    assert "varies along another axis than the channels" in reasons(declined)


def test_a_map_needs_fixed_sizes() -> None:
    dims = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    gm, declined = folded(wide(normalise), pixels(2, 3, 41, 40), dynamic=(dims,))
    assert call(gm, "conv2d").args[0] is call(gm, "add")
    assert "needs a fixed height and width" in reasons(declined)


# -- what must stay --------------------------------------------------------------------------------


def test_arithmetic_that_wraps_around_stays() -> None:
    for forward, kind in (
        (lambda s, x: (x - 128).double(), "sub"),
        (lambda s, x: (x * 2).double(), "mul"),
        (lambda s, x: (-x).double() / 255, "neg"),
    ):
        gm, declined = folded(stem(forward), pixels(2, 3, 9, 8))
        assert left(gm)[kind] == 1
        assert "where it wraps around" in reasons(declined)


def test_a_mean_along_the_width_stays() -> None:
    """Three means for three columns: the broadcast axis decides, not the number."""
    net = stem(lambda s, x: x.double() - s.mean.reshape(3), kernel=1, out=32)
    gm, declined = folded(net, pixels(2, 3, 5, 3))
    assert sum(left(gm).get(kind, 0) for kind in ("add", "sub")) == 1
    assert call(gm, "conv2d").args[0].op == "call_function"
    assert "varies along another axis than the channels" in reasons(declined)


def test_a_zero_scale_does_not_pass_a_shift() -> None:
    scale = torch.tensor([0.5, 0.0, 2.0]).reshape(PLANES)
    net = Net(
        lambda s, x: F.relu(s.conv(x.double() * s.g - s.mean)),
        conv=nn.Conv2d(3, 32, 3, padding=1), g=scale, mean=MEAN.reshape(PLANES),
    )  # fmt: skip
    gm, declined = folded(net, pixels(2, 3, 9, 8))
    assert left(gm) == {"to": 1, "mul": 1, "sub": 1, "conv": 1, "relu": 1}
    assert "a zero scale does not pass" in reasons(declined)


@pytest.mark.parametrize("padding", [0, 1])
def test_a_shift_that_undoes_another_leaves_the_scale_alone(padding: int) -> None:
    """``s * x + h`` in one call, then ``- h``: what is left is ``s * x``."""
    net = Net(
        lambda s, x: F.relu(s.conv(torch.addcmul(s.h, x, s.g) - s.h)),
        conv=nn.Conv2d(3, 32, 3, padding=padding),
        g=STD.reshape(PLANES), h=MEAN.reshape(PLANES),
    )  # fmt: skip
    gm, _ = folded(net, torch.randn(2, 3, 9, 8, dtype=torch.float64))
    assert left(gm) == {"conv": 1, "relu": 1}


def test_a_normalised_image_that_is_also_returned_stays() -> None:
    net = Net(
        lambda s, x: (n := (x.double() - s.mean) / s.std, F.relu(s.conv(n))),
        conv=nn.Conv2d(3, 4, 3), mean=MEAN.reshape(PLANES), std=STD.reshape(PLANES),
    )  # fmt: skip
    gm, declined = folded(net, pixels(2, 3, 9, 8))
    assert "output reads it" in reasons(declined)
    assert sum(n for k, n in left(gm).items() if k not in ("to", "conv", "relu")) >= 1


def test_half_precision_keeps_the_order_of_scale_and_shift() -> None:
    """``x + h / s`` may overflow where ``s * x + h`` does not."""
    net = stem(lambda s, x: x * s.std - s.mean, out=32, padding=1).half()
    x = torch.randn(2, 3, 9, 8).half()
    with torch.no_grad():
        gm = trace(net, (x,), {}).graph_module
        result = PIPELINES["default"].run(gm)
    assert left(gm)["mul"] == 1
    declined = [d for r in result.runs for d in r.result.declined]
    assert "could overflow float16" in reasons(declined)


@st.composite
def _stems(draw: st.DrawFn) -> tuple[Net, torch.Tensor]:
    size, kernel = draw(st.integers(5, 9)), draw(st.integers(1, 4))
    groups = draw(st.sampled_from([1, 3]))
    options = {
        "kernel_size": kernel, "stride": draw(st.integers(1, 4)), "groups": groups,
        "padding": draw(st.sampled_from([0, 0, 1, 2])), "bias": draw(st.booleans()),
    }  # fmt: skip
    if options["stride"] == 1 and draw(st.booleans()):
        options["padding"] = "same"
    scale = draw(st.sampled_from([STD, -STD, torch.tensor([0.5, 0.0, 2.0]), torch.ones(3)]))
    shift = draw(st.sampled_from([MEAN, torch.full((3,), -2.0), torch.zeros(3)]))
    first = draw(st.booleans())
    casts, last, pads = draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([0, 1]))

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 3, 1, 2) if last else x
        x = x.double() if casts else x
        x = x * s.g + s.h if first else (x + s.h) * s.g
        return F.relu(s.conv(F.pad(x, (pads, 0, 0, pads))))

    net = Net(
        forward, conv=nn.Conv2d(3, 3 * draw(st.integers(1, 3)), **options),
        g=scale.reshape(PLANES), h=shift.reshape(PLANES),
    )  # fmt: skip
    return net, pixels(2, size, 8, 3) if last else pixels(2, 3, size, 8)


@settings(max_examples=20, deadline=None)
@given(_stems(), st.integers(0, 2**16))
def test_property_any_stem_stays_equal(case: tuple[Net, torch.Tensor], seed: int) -> None:
    torch.manual_seed(seed)
    net, x = case
    for parameter in net.conv.parameters():
        parameter.data.normal_()
    gm, _ = folded(net, x)
    assert "mul" not in left(gm) or bool((net.g == 0).any() | (net.g == 1).all())
