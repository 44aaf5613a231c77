"""Averages of checkpoints: the numbers, what is refused, and how much is in memory at a time."""

from __future__ import annotations

import copy
import json
import os
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.errors import BackendError, UsageError

safetensors = pytest.importorskip("safetensors")
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file

State = dict[str, Tensor]


def write(folder: Path, *states: State, name: str = "in", **metadata: str) -> list[Path]:
    paths = [folder / f"{name}{index}.safetensors" for index in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        own = {name: value.clone() for name, value in state.items()}
        save_file(own, path, metadata=metadata or None)
    return paths


def average(folder: Path, *states: State, **options) -> State:
    out = folder / "out.safetensors"
    refold.average_checkpoints(write(folder, *states), out, **options)
    return load_file(out)


def some(**changes: Tensor) -> State:
    state = {
        "a.weight": torch.randn(4, 3),
        "a.bias": torch.randn(4).double(),
        "b.scale": torch.randn(2, 2).bfloat16(),
        "h": torch.randn(5).half(),
        "steps": torch.tensor(3),
        "mask": torch.tensor([[0.0, -torch.inf], [0.0, 0.0]]),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
    }
    return state | changes


# ---- numbers


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_uniform_average_is_the_mean_rounded_once(tmp_path, count):
    states = [some() for _ in range(count)]
    out = average(tmp_path, *states)
    assert out.keys() == states[0].keys()
    for name in ("a.weight", "a.bias", "b.scale", "h"):
        every = torch.stack([state[name].double() for state in states])
        assert out[name].dtype == states[0][name].dtype
        expected = every.mean(0).to(out[name].dtype)
        # float64 itself: the mean is summed in another order.
        slack = 1e-15 if name == "a.bias" else 0
        assert (out[name].double() - expected.double()).abs().max() <= slack
    for name in ("steps", "mask", "flags", "empty"):
        assert torch.equal(out[name], states[0][name])


def test_what_is_equal_everywhere_keeps_its_bits_and_the_result_says_so(tmp_path):
    same = torch.tensor([0.1, 0.7, 1e-40])
    states = [{"same": same, "other": torch.randn(2)} for _ in range(3)]
    done = refold.average_checkpoints(write(tmp_path, *states), tmp_path / "out")
    assert torch.equal(load_file(done.path)["same"], same)
    assert done == refold.training.checkpoints.AveragedCheckpoint(
        tmp_path / "out", ("other",), (), ("same",), ()
    )


def test_fisher_information_weighs_each_element(tmp_path):
    states = [{"w": torch.randn(4, 3), "buffer": torch.randn(2)} for _ in range(3)]
    fishers = [{"w": torch.rand(4, 3)} for _ in range(3)]
    for fisher in fishers:
        fisher["w"][0] = 0  # no network cares: the plain mean
        fisher["w"][1] *= 1e-30  # small, and still a weight
    paths = write(tmp_path, *fishers, name="fisher")
    inputs = write(tmp_path, *states)
    done = refold.average_checkpoints(inputs, tmp_path / "out", fisher=paths)
    out = load_file(done.path)
    weights = torch.stack([fisher["w"].double() for fisher in fishers])
    values = torch.stack([state["w"].double() for state in states])
    expected = (weights * values).sum(0) / weights.sum(0)
    expected[0] = values[:, 0].mean(0)
    assert (out["w"] - expected).abs().max() < 2e-7
    assert (out["buffer"] - torch.stack([s["buffer"] for s in states]).mean(0)).abs().max() < 2e-7
    assert done.averaged == ("buffer", "w")
    assert done.unweighted == ("buffer",)


def test_equal_information_gives_the_mean_and_one_hot_information_that_network(tmp_path):
    states = [{"w": torch.randn(4, 3)} for _ in range(3)]
    equal = write(tmp_path, *[{"w": torch.full((4, 3), 0.3)}] * 3, name="equal")
    assert torch.allclose(
        average(tmp_path, *states, fisher=equal)["w"],
        torch.stack([s["w"] for s in states]).mean(0), rtol=0, atol=2e-7,
    )  # fmt: skip
    for chosen in range(3):
        one_hot = [{"w": torch.full((4, 3), float(i == chosen))} for i in range(3)]
        paths = write(tmp_path, *one_hot, name="one")
        out = average(tmp_path, *states, fisher=paths, force=True)
        assert torch.equal(out["w"], states[chosen]["w"])


def test_two_equal_tensors_of_three_still_count_as_two(tmp_path):
    a, b = torch.zeros(3), torch.ones(3)
    fisher = write(tmp_path, *[{"w": torch.tensor([1.0, 2.0, 0.0])}] * 3, name="fisher")
    assert torch.equal(
        average(tmp_path, {"w": a}, {"w": a}, {"w": b})["w"], torch.full((3,), 1 / 3)
    )
    out = average(tmp_path, {"w": a}, {"w": a}, {"w": b}, fisher=fisher, force=True)
    assert torch.equal(out["w"], torch.full((3,), 1 / 3))


# ---- the file


def test_the_file_is_as_safetensors_itself_writes_it(tmp_path):
    states = [some() for _ in range(2)]
    paths = write(tmp_path, *states, format="pt", note="x")
    refold.average_checkpoints(paths, tmp_path / "out")
    again = tmp_path / "again"
    save_file(load_file(tmp_path / "out"), again, metadata={"format": "pt", "note": "x"})
    assert again.stat().st_size == (tmp_path / "out").stat().st_size
    with safetensors.safe_open(tmp_path / "out", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "x"}
    body = (tmp_path / "out").read_bytes()
    start = 8 + int.from_bytes(body[:8], "little")
    header = json.loads(body[8:start])
    assert start % 8 == 0
    for name, tensor in states[0].items():
        begin, end = header[name]["data_offsets"]
        assert begin % tensor.itemsize == 0  # maps of the file are aligned
        assert end - begin == tensor.nbytes


def test_metadata_that_differ_are_dropped(tmp_path):
    one = write(tmp_path, some(), format="pt", step="1")
    two = write(tmp_path, some(), name="two", format="pt", step="2")
    refold.average_checkpoints(one + two, tmp_path / "out")
    with safetensors.safe_open(tmp_path / "out", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_memory_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    states = [{str(i): torch.randn(8) for i in range(6)} for _ in range(4)]
    paths = write(tmp_path, *states)
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0
    real = refold.training.checkpoints._File.tensor

    def watched(file, name):
        nonlocal most
        tensor = real(file, name)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(refold.training.checkpoints._File, "tensor", watched)
    refold.average_checkpoints(paths, tmp_path / "out")
    assert 0 < most <= 3  # the first file's, another's, and the one just written


# ---- batch norms


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.drop = nn.Dropout(0.5)
        self.head = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.body(x).mean((2, 3))))


BATCHES = 3


def trained(steps: int = 2) -> Net:
    """A network whose statistics are those of some inputs."""
    net = Net().train()
    for _ in range(steps):
        net(torch.randn(6, 2, 5, 5) * 2 + 1)
    return net.eval()


def calibration() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 2, 5, 5, generator=generator) for _ in range(BATCHES)]


def test_statistics_are_estimated_for_the_averaged_weights(tmp_path):
    nets = [trained(2), trained(4)]
    model = trained()
    before = copy.deepcopy(model.state_dict())
    paths = write(tmp_path, *(net.state_dict() for net in nets))
    done = refold.average_checkpoints(
        paths, tmp_path / "out", model=model, calibration=iter(calibration())
    )
    soup = Net().eval()
    soup.load_state_dict(load_file(done.path))
    assert torch.equal(
        soup.head[0].weight.double(),
        (torch.stack([n.head[0].weight.double() for n in nets]).mean(0)).float().double(),
    )
    inputs = [soup.body[0](x).transpose(0, 1).flatten(1) for x in calibration()]
    mean = torch.stack([x.mean(1) for x in inputs]).mean(0)
    variance = torch.stack([x.var(1) for x in inputs]).mean(0)
    assert torch.allclose(soup.body[1].running_mean, mean, atol=1e-6)
    assert torch.allclose(soup.body[1].running_var, variance, atol=1e-6)
    assert soup.body[1].num_batches_tracked == BATCHES
    # Without dropout: the second norm's inputs are those that inference will see, but for the
    # first norm, which used each batch's own statistics as in training.
    soup.body[1].train()
    inputs = [soup.head[0](soup.body(x).mean((2, 3))) for x in calibration()]
    mean = torch.stack([x.mean(0) for x in inputs]).mean(0)
    assert torch.allclose(soup.head[1].running_mean, mean, atol=1e-6)
    assert done.re_estimated == tuple(
        f"{norm}.{name}"
        for norm in ("body.1", "head.1")
        for name in ("num_batches_tracked", "running_mean", "running_var")
    )
    assert not set(done.re_estimated) & set(done.averaged)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not model.training


def test_statistics_that_nobody_trained_are_kept(tmp_path):
    frozen = trained()
    nets = [copy.deepcopy(frozen) for _ in range(2)]
    for net in nets:
        nn.init.normal_(net.head[0].weight)
        net.head[1].running_mean.normal_()
    paths = write(tmp_path, *(net.state_dict() for net in nets))
    done = refold.average_checkpoints(
        paths, tmp_path / "out", model=Net(), calibration=[(x,) for x in calibration()]
    )
    out = load_file(done.path)
    assert torch.equal(out["body.1.running_mean"], frozen.body[1].running_mean)
    assert done.re_estimated[0] == "head.1.num_batches_tracked"
    # The frozen norm normalised with its own statistics meanwhile.
    soup = Net().eval()
    soup.load_state_dict(out)
    inputs = [soup.head[0](soup.body(x).mean((2, 3))) for x in calibration()]
    mean = torch.stack([x.mean(0) for x in inputs]).mean(0)
    assert torch.allclose(out["head.1.running_mean"], mean, atol=1e-6)


def test_statistics_that_differ_are_not_averaged(tmp_path):
    states = [trained().state_dict() for _ in range(2)]
    with pytest.raises(UsageError, match=r"2 norms .*\(body\.1, head\.1\).* pass model= and"):
        average(tmp_path, *states)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in0.safetensors", "in1.safetensors"]


class Unused(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class OtherNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body[1] = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)


class Larger(Net):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (Unused, calibration(), r"head\.1 saw no calibration input"),
        (Net, [], r"body\.1 saw no calibration input"),
        (Net, [calibration()[0] * torch.nan], r"not finite on the calibration inputs"),
        (Larger, calibration(), r"lack extra\.weight, extra\.bias"),
        (lambda: Net().body, calibration(), "do not fit the model: .* have body"),
        (lambda: nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2))}), [], "do not fit"),
    ],
    ids=["unused", "no batch", "nan", "larger", "other names", "other shapes"],
)
def test_estimation_that_cannot_be_done_writes_nothing(tmp_path, model, batches, message):
    paths = write(tmp_path, *(trained().state_dict() for _ in range(2)))
    with pytest.raises(UsageError, match=message):
        refold.average_checkpoints(paths, tmp_path / "out", model=model(), calibration=batches)
    assert set(tmp_path.iterdir()) == set(paths)


def test_only_batch_norms_can_be_estimated(tmp_path):
    nets = [OtherNorm(), OtherNorm()]
    for net in nets:
        net.body[1].running_mean.normal_()
    paths = write(tmp_path, *(net.state_dict() for net in nets))
    with pytest.raises(UsageError, match=r"body\.1 .* is no batch norm of torch"):
        refold.average_checkpoints(paths, tmp_path / "out", model=OtherNorm(), calibration=[])


def test_inputs_that_cannot_be_read_are_not_taken_for_an_output_that_cannot_be_written(tmp_path):
    def loader():
        yield calibration()[0]
        raise FileNotFoundError(2, "No such file or directory", "image7.png")

    paths = write(tmp_path, *(trained().state_dict() for _ in range(2)))
    with pytest.raises(UsageError, match=r"calibration inputs cannot be read: .*image7\.png"):
        refold.average_checkpoints(paths, tmp_path / "out", model=Net(), calibration=loader())
    assert set(tmp_path.iterdir()) == set(paths)


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.twin = self.head


def test_tied_tensors_stored_once_fit_their_model(tmp_path):
    states = [trained().state_dict() for _ in range(2)]
    out = average(tmp_path, *states, model=Tied(), calibration=calibration())
    assert out.keys() == states[0].keys()
    assert out["head.1.num_batches_tracked"] == BATCHES


# ---- the documentation


def blocks() -> list[str]:
    page = Path(__file__).parents[2] / "docs" / "checkpoints.md"
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_pages_fisher_information_is_what_the_function_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nets = [nn.Linear(4, 3).double() for _ in range(2)]
    (block,) = (b for b in blocks() if "def fisher_diagonal" in b)
    names = {"model": nets[0], "images": torch.randn(400, 4).double()}
    exec(block, names)
    fisher = load_file("run0.fisher.safetensors")
    # log p(y) has the gradient (onehot(y) - p) x: its mean square over y is p (1 - p) x^2.
    p = nets[0](names["images"]).softmax(-1).detach()
    exact = (p * (1 - p)).T @ names["images"].square() / 400
    assert torch.allclose(fisher["weight"], exact, rtol=0.5)
    save_file(names["fisher_diagonal"](nets[1], names["images"]), "run1.fisher.safetensors")
    paths = write(tmp_path, *(net.state_dict() for net in nets))
    done = refold.average_checkpoints(
        paths, "out", fisher=["run0.fisher.safetensors", "run1.fisher.safetensors"]
    )
    assert done.unweighted == ()
    assert done.averaged == ("bias", "weight")


def test_the_pages_other_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nets = [trained() for _ in range(3)]
    checkpoints = [str(path) for path in write(tmp_path, *(n.state_dict() for n in nets))]
    plain = write(tmp_path, *({"w": torch.randn(3)} for _ in range(3)), name="run")
    reads = {path: float(load_file(path)["w"][0]) for path in plain}
    names = {
        "model": Net(),
        "loader": [(x, None) for x in calibration()],
        "checkpoints": checkpoints,
        "accuracy_of_file": lambda path: reads.get(path, float(load_file(path)["w"][0])),
    }
    first, statistics, greedy = (b for b in blocks() if "average_checkpoints(" in b)
    exec(first, names)
    assert Path("soup.safetensors").exists()
    Path("soup.safetensors").unlink()
    exec(statistics, names)
    assert load_file("soup.safetensors")["body.1.num_batches_tracked"] == BATCHES
    exec(greedy, names | {"refold": refold, "checkpoints": plain})


# ---- what is refused


W = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (({"w": W}, {"w": W.t().contiguous()}), r"w has shape \[3, 2\] in .*in1.* and \[2, 3\] in"),
        (({"w": W}, {"w": W.half()}), "w is F16 in .*in1.* and F32 in .*in0.*: save all"),
        (({"w": W, "v": W}, {"w": W}), "in1.safetensors has no v, which .*in0.safetensors has"),
        (({"w": W}, {"w": W, "v": W}), "in0.safetensors has no v, which .*in1.safetensors has"),
        (
            ({"w": W}, {"w": W} | {f"v{i}": W for i in range(5)}),
            "has no v0, v1, v2 and 2 more",
        ),
        (({"w": W}, {"w": W * torch.nan}), "w in .*in1.* has values that are NaN or infinite"),
        (({"w": W * torch.nan}, {"w": W * torch.nan}), "w in .*in0.* NaN or infinite"),
        (({"w": W}, {"w": W + torch.tensor([0, 0, torch.inf])}), "NaN or infinite"),
        (({"w": W}, {"w": W + torch.tensor([0, torch.nan, 0])}), "NaN or infinite"),
        (({"w": W}, {"w": W - torch.tensor([0, 0, torch.inf])}), "NaN or infinite"),
        (({"n": torch.tensor(1)}, {"n": torch.tensor(2)}), r"n differs .* is torch\.int64"),
        (
            ({"w": W.to(torch.float8_e4m3fn)}, {"w": (W * 2).to(torch.float8_e4m3fn)}),
            r"w differs .* is torch\.float8_e4m3fn.*dequantise",
        ),
        (({"w": W},), "needs two checkpoints or more, not 1"),
    ],
)
def test_checkpoints_that_have_no_average_are_refused(tmp_path, states, message):
    paths = write(tmp_path, *states)
    with pytest.raises(UsageError, match=message):
        refold.average_checkpoints(paths, tmp_path / "out.safetensors")
    assert set(tmp_path.iterdir()) == set(paths)


@pytest.mark.parametrize(
    ("fishers", "message"),
    [
        (({"w": W},), "1 Fisher files for 2 checkpoints"),
        (({"w": W}, {"w": -W}), "of w in .*fisher1.* is negative"),
        (({"w": W}, {"w": W * torch.nan}), "w in .*fisher1.* NaN"),
        (({"w": W}, {"w": W[:1].clone()}), r"w in .*fisher1.* has shape \[1, 3\], .* \[2, 3\]"),
        (({"w": W}, {"v": W}), "fisher1.* has no w"),
        (({}, {"v": W}), "fisher0.* has no v"),
        (({"module.w": W}, {"module.w": W}), "in0.* has no module.w, a Fisher file has it"),
    ],
)
def test_fisher_information_that_does_not_fit_is_refused(tmp_path, fishers, message):
    paths = write(tmp_path, {"w": W, "v": W}, {"w": W * 2, "v": W})
    fisher = write(tmp_path, *fishers, name="fisher")
    with pytest.raises(UsageError, match=message):
        refold.average_checkpoints(paths, tmp_path / "out", fisher=fisher)
    assert set(tmp_path.iterdir()) == {*paths, *fisher}


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_pickles_are_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = write(tmp_path, {"w": W})
    for zipped in (True, False):
        torch.save({"w": Bomb()}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UsageError, match=r"x\.pt is not a complete .* unpickling"):
            refold.average_checkpoints([*paths, tmp_path / "x.pt"], tmp_path / "out")
    assert not (tmp_path / "exploded").exists()


def test_files_that_are_missing_or_torn_are_named(tmp_path):
    paths = write(tmp_path, {"w": W}, {"w": W * 2})
    with pytest.raises(UsageError, match="nowhere is not there"):
        refold.average_checkpoints([paths[0], tmp_path / "nowhere"], tmp_path / "out")
    paths[1].write_bytes(paths[1].read_bytes()[:-3])
    with pytest.raises(UsageError, match=r"in1\.safetensors is not a complete"):
        refold.average_checkpoints(paths, tmp_path / "out")


def test_outputs_are_not_overwritten_unless_told(tmp_path):
    paths = write(tmp_path, {"w": W}, {"w": W * 3})
    out = tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(UsageError, match="exists: pass force=True"):
        refold.average_checkpoints(paths, out)
    assert out.read_text() == "mine"
    refold.average_checkpoints(paths, out, force=True)
    assert torch.equal(load_file(out)["w"], W * 2)
    with pytest.raises(BackendError, match="does not exist"):
        refold.average_checkpoints(paths, tmp_path / "no" / "out")


def test_a_failure_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    paths = write(tmp_path, {"v": W, "w": W}, {"v": W, "w": W * torch.nan})
    out = tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(UsageError, match="NaN"):
        refold.average_checkpoints(paths, out, force=True)
    assert out.read_text() == "mine"
    assert set(tmp_path.iterdir()) == {*paths, out}


def test_model_and_calibration_go_together(tmp_path):
    paths = write(tmp_path, {"w": W}, {"w": W})
    for options in ({"model": Net()}, {"calibration": []}):
        with pytest.raises(UsageError, match="go together"):
            refold.average_checkpoints(paths, tmp_path / "out", **options)
