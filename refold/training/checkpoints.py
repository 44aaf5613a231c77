"""Averaging of checkpoints: several trained copies of one network become one.

    uniform   W = (W_1 + ... + W_N) / N
    Fisher    W = (F_1 W_1 + ... + F_N W_N) / (F_1 + ... + F_N), element by element

Checkpoints are read from safetensors files, which hold tensors and nothing that could run, one
tensor of one file at a time, and the result is written as it is computed: memory is a few times the
largest tensor in float64, whatever the number and size of the files. Averages are computed in
float64 as differences from the first file and rounded once; a tensor that is the same in every file
stays so to the last bit.

The running statistics of batch norms belong to the network that they were collected with; their
average belongs to none. They are estimated anew from calibration inputs, before anything is folded.

Source: Wortsman et al., Model soups (ICML 2022); Matena and Raffel, Merging Models with
Fisher-Weighted Averaging (NeurIPS 2022); Izmailov et al., Averaging Weights Leads to Wider Optima
(UAI 2018), section 3.2, for the statistics.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from refold.backends.write import check_output, write_atomically
from refold.errors import MissingDependencyError, UsageError
from refold.graph.program import as_call

Paths = Sequence[str | os.PathLike[str]]

# What torch's norms call their statistics in a state dict: all that a file tells about them.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# Not the 8-bit ones: their numbers mean nothing without a scale that is averaged on its own.
_AVERAGED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AveragedCheckpoint:
    """What :func:`average_checkpoints` wrote: the file, and the names of its tensors by origin.

    Attributes:
        path: the file.
        averaged: averages, weighted by the Fisher information if that was given.
        unweighted: plain means although it was given, because no Fisher file has these tensors.
        unchanged: the same in every checkpoint.
        re_estimated: statistics of batch norms, from the calibration inputs.
    """

    path: Path
    averaged: tuple[str, ...]
    unweighted: tuple[str, ...]
    unchanged: tuple[str, ...]
    re_estimated: tuple[str, ...]


def average_checkpoints(
    checkpoints: Paths,
    output: str | os.PathLike[str],
    *,
    fisher: Paths | None = None,
    model: nn.Module | None = None,
    calibration: Iterable[Any] | None = None,
    force: bool = False,
) -> AveragedCheckpoint:
    """Writes the average of checkpoints of one network.

    Args:
        checkpoints: safetensors files with the same tensors, fine-tuned from one start (the average
            of networks that were trained apart is not a trained network).
        output: the safetensors file to write; it is complete or not there.
        fisher: a safetensors file for each checkpoint with the diagonal of its Fisher information,
            by parameter name. Elements that are zero in all of them are averaged plainly, and so
            are tensors that none of them has, such as buffers.
        model: the network, to estimate the statistics of batch norms whose statistics differ
            between checkpoints. It is copied, not changed.
        calibration: inputs of the network for that: a tensor, a tuple of positional or a dict of
            keyword inputs each, in batches of equal size.
        force: overwrite an existing file.

    Raises:
        UsageError: the checkpoints cannot be averaged, or the output exists. Nothing is written.
        MissingDependencyError: safetensors is not installed.
        BackendError: the output cannot be written.
    """
    if len(checkpoints) < 2:
        raise UsageError(f"an average needs two checkpoints or more, not {len(checkpoints)}")
    if fisher is not None and len(fisher) != len(checkpoints):
        raise UsageError(f"{len(fisher)} Fisher files for {len(checkpoints)} checkpoints: one each")
    if (model is None) != (calibration is None):
        raise UsageError("model= and calibration= go together: statistics are estimated with both")
    inputs = (*checkpoints, *(fisher or ()))
    check_output(output, force=force, inputs=inputs)
    with ExitStack() as stack:
        files = [stack.enter_context(_open(Path(path))) for path in checkpoints]
        fishers = [stack.enter_context(_open(Path(path))) for path in fisher or ()]
        _check_alike(files)
        if fishers:
            _check_fishers(fishers, files[0])
        stale = _stale_statistics(files, model)
        _check_equal_where_no_average(files, set(stale))
        averaged: list[str] = []

        def contents() -> Iterator[tuple[str, torch.Tensor]]:
            for name in files[0].names_in_file_order():
                mean = None if name in stale else _average(name, files, fishers)
                if mean is not None:
                    averaged.append(name)
                yield name, files[0].tensor(name) if mean is None else mean

        def write(folder: Path, name: str) -> None:
            places = _write(folder / name, files[0], _common_metadata(files), contents())
            if stale:
                assert model is not None
                assert calibration is not None
                with _open(folder / name) as soup:
                    found = _estimate(copy.deepcopy(model), soup, stale, calibration)
                _overwrite(folder / name, places, found)

        path = write_atomically(output, write, force=force, inputs=inputs)
        weighted = fishers[0].layout if fishers else files[0].layout
        return AveragedCheckpoint(
            path=path,
            averaged=tuple(sorted(averaged)),
            unweighted=tuple(sorted(set(averaged) - set(weighted))),
            unchanged=tuple(sorted(set(files[0].layout) - set(averaged) - set(stale))),
            re_estimated=tuple(sorted(stale)),
        )


@dataclass(frozen=True)
class _File:
    """An open safetensors file; ``layout`` has its tensors' dtypes, as it calls them, and shapes.

    Tensors are maps of the file: they cost memory only while they are read.
    """

    path: Path
    handle: Any
    layout: Mapping[str, tuple[str, tuple[int, ...]]]

    def tensor(self, name: str) -> torch.Tensor:
        return self.handle.get_tensor(name)

    def names_in_file_order(self) -> list[str]:
        """Larger elements first, as safetensors writes them: each tensor is then aligned."""
        return sorted(self.layout, key=lambda name: (-self.tensor(name).itemsize, name))


@contextmanager
def _open(path: Path) -> Iterator[_File]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise MissingDependencyError(
            "safetensors is not installed: pip install 'refold[checkpoints]'"
        ) from None
    if not path.is_file():
        raise UsageError(f"checkpoint {path} is not there, or not a file")
    try:
        opened = safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise UsageError(
            f"{path} is not a complete safetensors file ({error}). Other formats are not read, "
            "because unpickling can run code: in an environment that trusts the file, load it with "
            "torch.load(..., weights_only=True) and write it with safetensors.torch.save_file"
        ) from None
    with opened as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        layout = {n: (str(s.get_dtype()), tuple(s.get_shape())) for n, s in slices.items()}
        yield _File(path, handle, layout)


def _check_alike(files: Sequence[_File]) -> None:
    first = files[0]
    for file in files[1:]:
        _check_names(file, first.layout.keys() - file.layout.keys(), f"which {first.path} has")
        _check_names(first, file.layout.keys() - first.layout.keys(), f"which {file.path} has")
        for name, (dtype, shape) in file.layout.items():
            expected, expected_shape = first.layout[name]
            if shape != expected_shape:
                raise UsageError(
                    f"{name} has shape {list(shape)} in {file.path} and {list(expected_shape)} in "
                    f"{first.path}: checkpoints of one network are needed"
                )
            if dtype != expected:
                raise UsageError(
                    f"{name} is {dtype} in {file.path} and {expected} in {first.path}: "
                    "save all checkpoints in one dtype"
                )


def _check_fishers(fishers: Sequence[_File], checkpoint: _File) -> None:
    first = fishers[0]
    _check_names(checkpoint, first.layout.keys() - checkpoint.layout.keys(), "a Fisher file has it")
    for file in fishers:
        _check_names(file, first.layout.keys() - file.layout.keys(), f"which {first.path} has")
        _check_names(first, file.layout.keys() - first.layout.keys(), f"which {file.path} has")
        for name, (_, shape) in file.layout.items():
            if shape != checkpoint.layout[name][1]:
                raise UsageError(
                    f"Fisher information of {name} in {file.path} has shape {list(shape)}, "
                    f"the parameter {list(checkpoint.layout[name][1])}"
                )


def _check_names(file: _File, missing: Iterable[str], why: str) -> None:
    names = sorted(missing)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UsageError(f"{file.path} has no {', '.join(names[:3])}{more}, {why}")


def _differs(name: str, files: Sequence[_File]) -> bool:
    first = files[0].tensor(name)
    return not all(torch.equal(first, file.tensor(name)) for file in files[1:])


def _stale_statistics(files: Sequence[_File], model: nn.Module | None) -> dict[str, str]:
    """The statistics of the norms that have others in each checkpoint, with their norm's path.

    Statistics that are the same everywhere are frozen ones: the weights were trained with them.
    """
    norms: dict[str, list[str]] = {}
    for name in files[0].layout:
        path, _, own = name.rpartition(".")
        if own in _STATISTICS:
            norms.setdefault(path, []).append(name)
    found = {path: names for path, names in norms.items() if any(_differs(n, files) for n in names)}
    if found and model is None:
        raise UsageError(
            f"{len(found)} norms have other running statistics in each checkpoint "
            f"({', '.join(list(found)[:3])}), and their average fits none of the networks: pass "
            "model= and calibration= to estimate them for the averaged weights"
        )
    return {name: path for path, names in found.items() for name in names}


def _check_equal_where_no_average(files: Sequence[_File], except_for: set[str]) -> None:
    for name in files[0].layout.keys() - except_for:
        dtype = files[0].tensor(name).dtype
        if dtype not in _AVERAGED_DTYPES and _differs(name, files):
            raise UsageError(
                f"{name} differs between the checkpoints and is {dtype}: only floating-point "
                "weights of 16 bits and more have an average; dequantise them first"
            )


def _average(name: str, files: Sequence[_File], fishers: Sequence[_File]) -> torch.Tensor | None:
    """The average of one tensor, or None if it is the same in every file."""
    if not _differs(name, files):
        return None
    first = _finite(name, files[0])
    offsets = torch.zeros_like(first)  # from the first file: what is equal stays equal exactly
    for file in files[1:]:
        offsets += _finite(name, file).sub_(first)
    mean = offsets.div_(len(files))
    if fishers and name in fishers[0].layout:
        mean = _weighted(name, files, fishers, first, mean)
    return first.add_(mean).to(files[0].tensor(name).dtype)


def _weighted(
    name: str,
    files: Sequence[_File],
    fishers: Sequence[_File],
    first: torch.Tensor,
    mean: torch.Tensor,
) -> torch.Tensor:
    """The Fisher-weighted mean offset from the first file; ``mean`` where no file has a weight."""
    offsets, total = torch.zeros_like(first), torch.zeros_like(first)
    for file, fisher in zip(files, fishers, strict=True):
        information = _finite(name, fisher)
        if (information < 0).any():
            raise UsageError(f"Fisher information of {name} in {fisher.path} is negative somewhere")
        total += information
        offsets += _finite(name, file).sub_(first).mul_(information)
    return torch.where(total > 0, offsets.div_(total), mean)


def _finite(name: str, file: _File) -> torch.Tensor:
    tensor = file.tensor(name).to(torch.float64, copy=True)
    # The extremes are NaN if anything is; isfinite() would allocate several tensors of the size.
    if not all(bound.isfinite() for bound in tensor.aminmax()):
        raise UsageError(f"{name} in {file.path} has values that are NaN or infinite")
    return tensor


def _common_metadata(files: Sequence[_File]) -> dict[str, str]:
    every = [file.handle.metadata() or {} for file in files]
    return {k: v for k, v in every[0].items() if all(other.get(k) == v for other in every)}


def _write(
    path: Path,
    like: _File,
    metadata: Mapping[str, str],
    contents: Iterable[tuple[str, torch.Tensor]],
) -> dict[str, tuple[int, torch.dtype]]:
    """Writes a safetensors file tensor by tensor; returns where each one lies, and its dtype.

    The format: the header's length (8 bytes), a JSON header, the tensors' bytes. safetensors' own
    writer takes all tensors at once.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in like.names_in_file_order():
        dtype, shape = like.layout[name]
        begin, end = end, end + like.tensor(name).nbytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    places: dict[str, tuple[int, torch.dtype]] = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in contents:
            places[name] = (file.tell(), tensor.dtype)
            file.write(_bytes(tensor))
    return places


def _overwrite(
    path: Path, places: Mapping[str, tuple[int, torch.dtype]], tensors: Mapping[str, torch.Tensor]
) -> None:
    with path.open("r+b") as file:
        for name, tensor in tensors.items():
            place, dtype = places[name]
            file.seek(place)
            file.write(_bytes(tensor.to("cpu", dtype)))


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


@torch.no_grad()
def _estimate(
    network: nn.Module, soup: _File, stale: Mapping[str, str], calibration: Iterable[Any]
) -> dict[str, torch.Tensor]:
    """The stale statistics for the weights of the soup. ``network`` is written."""
    network.eval()
    _load(network, soup)
    modules = dict(network.named_modules(remove_duplicate=False))
    norms: dict[str, _BatchNorm] = {}
    for path in stale.values():
        module = modules.get(path)
        if not isinstance(module, _BatchNorm) or module.running_mean is None:
            raise UsageError(
                f"the statistics of {path} differ between the checkpoints, and it is no batch norm "
                "of torch that could estimate them anew"
            )
        norms[path] = module
        module.reset_running_stats()
        module.momentum = None  # the mean over all batches, the first as much as the last
        module.train()  # this norm alone: no dropout, no stochastic depth
    try:
        for batch in calibration:
            args, kwargs = as_call(batch)
            network(*args, **kwargs)
    except OSError as error:  # a data set's; the output is being written meanwhile
        raise UsageError(f"the calibration inputs cannot be read: {error}") from error
    for path, norm in norms.items():
        if not norm.num_batches_tracked:
            raise UsageError(f"batch norm {path} saw no calibration input: give inputs that use it")
    state = network.state_dict()
    for name in stale:
        if not torch.isfinite(state[name]).all():
            raise UsageError(f"{name} is not finite on the calibration inputs: check them for NaN")
    return {name: state[name] for name in stale}


def _load(network: nn.Module, soup: _File) -> None:
    own = network.state_dict()
    try:
        keys = network.load_state_dict({n: soup.tensor(n) for n in soup.layout}, strict=False)
    except RuntimeError as error:
        raise UsageError(f"the checkpoints do not fit the model: {error}") from None
    # A tied tensor is stored under one of its names.
    loaded = {own[name].data_ptr() for name in soup.layout if name in own}
    missing = [n for n in keys.missing_keys if n in own and own[n].data_ptr() not in loaded]
    if missing or keys.unexpected_keys:
        raise UsageError(
            "the checkpoints do not fit the model: "
            f"they lack {', '.join(missing[:3]) or 'nothing'} and have "
            f"{', '.join(keys.unexpected_keys[:3]) or 'nothing'} that it has not"
        )
