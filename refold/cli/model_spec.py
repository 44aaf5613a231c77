"""Models as the command line names them: ``timm:NAME``, ``package.module:callable``, a ``.pt2``."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import os
import pickle
import re
import sys
import sysconfig
import traceback
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from refold.errors import (
    FrontendError,
    MissingDependencyError,
    RefoldError,
    UsageError,
    did_you_mean,
    first_line,
)
from refold.reading import damaged_zip, memory, unreadable

_DIM = re.compile(r"(?P<size>\d+)|(?P<name>[A-Za-z]\w*)(=(?P<example>\d+))?")
# Where a dynamic leading dimension comes without a size: 2 is the least that does not specialise.
_BATCH = 2


@dataclass(frozen=True)
class NamedModel:
    """A model found by its name.

    Attributes:
        model: a module in eval mode, or the path of a ``.pt2``.
        name: what reports call it.
        input_sizes: the sizes of one example input that the model's maker names, if any.
        files: the user's source files that it was read from.
    """

    model: nn.Module | Path
    name: str
    input_sizes: tuple[int, ...] | None = None
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class InputText:
    """One example input as the command line describes it.

    Attributes:
        sizes: example sizes.
        dynamic: dimensions that were written as a name.
        dtype: of the tensor; ``None`` for the model's own.
        low: smallest integer.
        high: largest integer.
    """

    sizes: tuple[int, ...]
    dynamic: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    low: int = 0
    high: int = 1

    def example(self, dtype: torch.dtype) -> torch.Tensor:
        """A random tensor: normal, or uniform integers from ``low`` to ``high``."""
        wanted = self.dtype or dtype
        text = f"{'x'.join(map(str, self.sizes))} of {str(wanted).removeprefix('torch.')}"
        if math.prod(self.sizes) * wanted.itemsize > memory():
            raise UsageError(f"an input {text} is larger than the memory of this machine")
        try:
            return self._random(wanted)
        except (RuntimeError, ValueError, TypeError) as error:  # torch's own words for a bad range
            range_ = "" if wanted.is_floating_point else f" from {self.low} to {self.high}"
            said = first_line(error)[:200]
            raise UsageError(f"an input {text}{range_} cannot be made: {said}") from error

    def _random(self, wanted: torch.dtype) -> torch.Tensor:
        if wanted is torch.bool:
            return torch.rand(self.sizes) < 0.5
        if wanted.is_floating_point:
            return torch.randn(self.sizes).to(wanted)
        return torch.randint(self.low, self.high + 1, self.sizes, dtype=wanted)


def parse_shape(text: str) -> InputText:
    """Reads ``1x3x224x224``; a name (``Nx3xH=224xW=224``) makes a dimension dynamic."""
    sizes, dynamic = [], []
    for index, part in enumerate(text.split("x")):
        match = _DIM.fullmatch(part)
        if match is None:
            raise UsageError(
                f"shape {text!r}: {part!r} is neither a size nor a name; write 1x3x224x224, or "
                "Nx3xH=224xW=224 for dynamic dimensions"
            )
        if match["size"] is not None:
            sizes.append(int(match["size"]))
            continue
        dynamic.append(index)
        if match["example"] is None and index:
            raise UsageError(
                f"shape {text!r}: a dynamic dimension needs an example size: {part}=224"
            )
        sizes.append(int(match["example"] or _BATCH))
    if 0 in sizes:
        raise UsageError(f"shape {text!r}: sizes must be positive")
    return InputText(tuple(sizes), tuple(dynamic))


def parse_dtype(text: str) -> torch.dtype:
    """Reads ``float16``, ``int64``, ... as PyTorch names them."""
    known = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"]
    if text not in known:
        raise UsageError(f"unknown dtype {text!r}{did_you_mean(text, known)}")
    dtype: torch.dtype = getattr(torch, text)
    return dtype


def parse_input(text: str) -> InputText:
    """Reads ``DTYPE:SHAPE`` or ``DTYPE:SHAPE:LOW..HIGH``, as in ``int64:1x77:0..49407``."""
    parts = text.split(":")
    if len(parts) not in (2, 3):
        raise UsageError(f"input {text!r}: write DTYPE:SHAPE[:LOW..HIGH], as in int64:1x77:0..999")
    dtype, shape = parse_dtype(parts[0]), parse_shape(parts[1])
    low, high = 0, 1
    if len(parts) == 3:
        bounds = re.fullmatch(r"(-?\d+)\.\.(-?\d+)", parts[2])
        if bounds is None or int(bounds[1]) > int(bounds[2]):
            raise UsageError(f"input {text!r}: the range is LOW..HIGH, as in 0..49407")
        low, high = int(bounds[1]), int(bounds[2])
    return InputText(shape.sizes, shape.dynamic, dtype, low, high)


def load_model(spec: str) -> NamedModel:
    """Finds or makes the model that ``spec`` names, in eval mode.

    Args:
        spec: ``timm:NAME`` (random weights: nothing is downloaded), ``package.module:callable``
            (a module, or a class or function without arguments that makes one), or a file.
    """
    if spec.startswith("timm:"):
        return _from_timm(spec.removeprefix("timm:"))
    suffix = Path(spec).suffix
    if suffix in (".pt2", ".onnx"):
        return NamedModel(Path(spec), Path(spec).name)
    if suffix in (".pt", ".pth", ".safetensors"):
        raise UsageError(
            f"{spec} holds weights without the model: name the model and pass --checkpoint {spec}"
        )
    if ":" in spec:
        return _from_module(spec)
    raise UsageError(
        f"cannot tell what model {spec!r} is: write timm:NAME, package.module:callable, "
        "or a .pt2 file"
    )


def parse_binding(text: str) -> tuple[str, Any]:
    """Reads ``NAME=VALUE``: a number, an ``.npy`` file, or a tensor of a ``.safetensors`` file."""
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise UsageError(f"--bind {text!r}: write NAME=VALUE, as in condition=class.npy or t=0.5")
    file = Path(value)
    if file.suffix not in (".npy", ".safetensors"):
        for read in (int, float):
            try:
                return name, read(value)
            except ValueError:
                continue
        raise UsageError(f"--bind {text!r}: {value} is no number, .npy or .safetensors file")
    if reason := unreadable(file):
        raise UsageError(f"--bind {text!r}: {file}: {reason}")
    if file.suffix == ".npy":
        try:
            return name, torch.from_numpy(np.load(file, allow_pickle=False))
        except Exception as error:  # its reader raises whatever the damage leads to
            raise FrontendError(f"--bind {text!r}: {file} cannot be read: {error}") from error
    tensors = read_tensors(file)
    if name not in tensors and len(tensors) != 1:
        raise UsageError(
            f"--bind {text!r}: {file} holds {len(tensors)} tensors, none of them named "
            f"{name!r}{did_you_mean(name, tensors)}"
        )
    return name, tensors.get(name, next(iter(tensors.values())))


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads a state dict from a file into the model; only tensors are read, no code is run."""
    state = read_tensors(Path(path))
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise FrontendError(f"checkpoint {path} does not fit the model: {error}") from error


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Reads the tensors of a checkpoint; no code is run."""
    if reason := unreadable(file):
        raise UsageError(f"checkpoint {file}: {reason}")
    if zipfile.is_zipfile(file) and (reason := damaged_zip(file, checksums=False)):
        raise FrontendError(f"checkpoint {file} cannot be read: {reason}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except ImportError:
        raise MissingDependencyError(
            "safetensors is not installed: pip install safetensors"
        ) from None
    except pickle.UnpicklingError as error:
        raise FrontendError(
            f"checkpoint {file} cannot be read: it is damaged, or holds more than tensors, and "
            "loading that could run any code. Where you trust it, load it yourself and save the "
            "tensors with safetensors.torch.save_file"
        ) from error
    except Exception as error:
        # Readers of damaged or hostile files raise whatever the damage leads to.
        said = first_line(error)[:300]
        raise FrontendError(f"checkpoint {file} cannot be read: {said}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise FrontendError(f"checkpoint {file} holds a {type(state).__name__}, not a state dict")
    odd = next((key for key in state if not isinstance(key, str)), None)
    if odd is not None:
        raise FrontendError(f"checkpoint {file} is no state dict: {odd!r} is no name of a tensor")
    return state


def randomize_batch_norms(model: nn.Module, inputs: Sequence[torch.Tensor]) -> int:
    """Gives each batch norm random scales and shifts and statistics taken from ``inputs``.

    A fresh model's batch norms are all but identities: folding them shows nothing. Statistics come
    from one forward pass, so that activations keep their range, and are then jittered. Returns how
    many there are.
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_var is not None
    ]
    saved = [(m, m.momentum, m.training) for m in norms]
    with torch.no_grad():
        for m in norms:
            if m.affine:
                sign = torch.where(torch.rand(m.num_features) < 0.1, -1.0, 1.0)
                m.weight.copy_(sign * (0.5 + torch.rand(m.num_features)))
                m.bias.copy_(0.2 * torch.randn(m.num_features))
            m.reset_running_stats()
            m.momentum = None
            m.train()
        try:
            model(*inputs)
        finally:
            for m, momentum, training in saved:
                m.momentum = momentum
                m.train(training)
        for m in norms:
            assert m.running_var is not None
            assert m.running_mean is not None
            m.running_var.mul_(0.8 + 0.4 * torch.rand(m.num_features)).clamp_(min=1e-3)
            m.running_mean.add_(0.1 * m.running_var.sqrt() * torch.randn(m.num_features))
    return len(norms)


def _from_timm(name: str) -> NamedModel:
    from refold.cli.torchvision_shim import declare_torchvision_ops

    declare_torchvision_ops()
    try:
        import timm
    except ImportError:
        raise MissingDependencyError("timm is not installed: pip install 'refold[timm]'") from None
    if not timm.is_model(name):
        raise UsageError(f"timm has no model {name!r}{_nearest(name, timm.list_models())}")
    model = timm.create_model(name, pretrained=False).eval()
    config = getattr(model, "default_cfg", None) or {}
    sizes = config.get("input_size")
    return NamedModel(model, f"timm:{name}", (1, *sizes) if sizes else None)


def _nearest(name: str, known: Sequence[str]) -> str:
    # A list of a thousand names is no help.
    hint = did_you_mean(name, known)
    return hint if "did you mean" in hint else ""


def _from_module(spec: str) -> NamedModel:
    module_name, _, path = spec.partition(":")
    if not module_name or module_name.startswith(".") or not path:
        raise UsageError(f"model {spec!r}: write package.module:callable")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    with _their_errors(spec):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise UsageError(f"model {spec!r}: {error}{_at(error)}") from error
        found: Any = module
        for part in path.split("."):
            if not hasattr(found, part):
                names = [n for n in vars(found) if not n.startswith("_")]
                raise UsageError(f"model {spec!r}: no {part!r} there{_nearest(part, names)}")
            found = getattr(found, part)
        if not isinstance(found, nn.Module):
            if not callable(found):
                kind = type(found).__name__
                raise UsageError(f"model {spec!r} is a {kind}, not a model or callable")
            found = _made(spec, found)
        if not isinstance(found, nn.Module):
            raise UsageError(f"model {spec!r} made a {type(found).__name__}, not an nn.Module")
        source = getattr(module, "__file__", None)
        return NamedModel(found.eval(), spec, files=(Path(source),) if source else ())


def _made(spec: str, factory: Any) -> Any:
    try:
        made = factory()
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise  # not of this call, but of one inside
        raise UsageError(f"model {spec!r} must be callable without arguments: {error}") from error
    if inspect.iscoroutine(made):
        made.close()  # nobody will wait for it, and Python would complain
    return made


@contextlib.contextmanager
def _their_errors(spec: str) -> Iterator[None]:
    """Names the user's own line where a model's module or maker fails, or ends the process."""
    try:
        yield
    except (RefoldError, KeyboardInterrupt):
        raise
    except SystemExit as error:
        code = "" if error.code is None else f" with {error.code!r}"
        raise FrontendError(f"model {spec!r} ends the process{code}{_at(error)}") from error
    except BaseException as error:
        kind, said = type(error).__name__, first_line(error)
        said = kind if said == kind else f"{kind}: {said}"
        raise FrontendError(f"model {spec!r} raises {said}{_at(error)}") from error


def _at(error: BaseException) -> str:
    """The last line of the user's own that an error went through, if there is one."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"\n  at {error.filename}:{error.lineno}: {(error.text or '').strip()}"
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    others = tuple(f"{place}{os.sep}" for place in (*places, Path(__file__).parents[1]))
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((*others, "<"))]
    if not own:
        return ""
    last = own[-1]
    return f"\n  at {last.filename}:{last.lineno} in {last.name}: {last.line}"
