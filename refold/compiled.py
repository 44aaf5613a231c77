"""The result of a compilation: callable like the model, with its report and its weights."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from refold.backends.write import write_atomically
from refold.compilation import Compilation, refit
from refold.errors import UsageError
from refold.graph import constants
from refold.report.report import Report
from refold.weights.shared import SharedWeights


class CompiledModel:
    """A compiled model; call it like the model that it came from.

    Made without example inputs, it compiles at the first call, with what that call brings.
    """

    def __init__(self, compile_with: Callable[[tuple[Any, ...], dict[str, Any]], Compilation]):
        self._compile_with: Callable[..., Compilation] | None = compile_with
        self._compilation: Compilation | None = None
        self._shared: SharedWeights | None = None  # if calls read them
        self._lock = threading.Lock()

    def compile(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compiles with these inputs unless it has been compiled already."""
        with self._lock:
            if self._compile_with is not None:
                self._take(self._compile_with(args, kwargs))
                self._compile_with = None  # it holds the caller's model

    def _take(self, done: Compilation) -> None:
        self._shared = done.shared if "calls" in done.target.capabilities.shares_weights else None
        self._compilation = done

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._compilation is None:
            self.compile(args, kwargs)
        done = self._done
        if self._shared is not None:
            self._shared.check()
        args, kwargs = done.check.normalise(args, kwargs)
        done.check.check(args, kwargs)
        with torch.no_grad():
            return done.runner(*args, **kwargs)

    @property
    def _done(self) -> Compilation:
        if self._compilation is None:
            raise UsageError(
                "not compiled yet: call the model once, or pass example_inputs= when compiling"
            )
        return self._compilation

    @property
    def graph_module(self) -> fx.GraphModule:
        """The rewritten graph: functional ATen calls; parameters are ``get_attr`` nodes."""
        return self._done.graph_module

    @property
    def report(self) -> Report:
        """What was folded, what was declined and why, how far the numbers are from exact."""
        return self._done.report

    @property
    def target(self) -> str:
        """The name of the target."""
        return self._done.target.name

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        force: bool = False,
        keep: Sequence[str | os.PathLike[str]] = (),
    ) -> Path:
        """Writes the artifact (``.onnx``, ``.pt2``); the file is complete or not there.

        A recipe goes beside an ONNX file, for ``refold refit``.

        Args:
            path: file to write, a directory for ``trt``; weights too large for one file go beside.
            force: overwrite an existing file, or an existing artifact of the same kind.
            keep: files that are not overwritten even so, such as the checkpoint of the weights. The
                ``.pt2`` that the model came from is one of them anyway.

        Raises:
            UsageError: the file exists and ``force`` is false, the file is one to ``keep``, or
                weights that the compiled model shares with the original were changed.
            BackendError: the directory is missing or not writable, or the disk is full.
        """
        done = self._done
        if "files" in done.target.capabilities.shares_weights:
            done.shared.check()
        return write_atomically(
            path,
            lambda folder, name: self._write(folder, name),
            force=force,
            marker=done.target.capabilities.marker,
            inputs=(*done.inputs, *keep),
        )

    def _write(self, folder: Path, name: str) -> None:
        done = self._done
        done.target.save(done.artifact, folder, name)
        if done.kept is not None:
            done.target.save_recipe(done.artifact, done.kept.recipe, folder, name)

    def refit(
        self,
        weights: Any = None,
        *,
        bind: Mapping[str, Any] | None = None,
        strict: bool = True,
        verify: bool = True,
    ) -> CompiledModel:
        """The model with new weights of the same architecture, without tracing or folding again.

        Needs ``recipe=True`` when compiling. The numbers are those of a compilation with these
        weights, bit for bit; where it would leave another graph, nothing is changed and the error
        says why. This model stays as it is.

        Args:
            weights: a state dict, or a module; by default the weights stay.
            bind: new values of bound inputs; by default they stay.
            strict: all weights that the model is made of must be given; otherwise the others stay.
            verify: compare with the unfolded model in float64, on the example inputs.

        Raises:
            RefitError: keys, shapes or values that do not fit the folded graph.
            VerificationError: the numbers are past the tolerance.
        """
        new = CompiledModel(lambda args, kwargs: done)
        done = refit(self._done, weights, bind, strict=strict, verify=verify)
        new.compile((), {})
        return new

    def state_dict_map(self) -> dict[str, dict[str, Any]]:
        """The folded weights by name: ``tensor``, ``shape``, and where each came ``from``.

        ``from`` lists the original state-dict keys, ``modules`` the module paths and ``rules`` the
        rewrites; an untouched weight comes from its own key, with no rules.
        """
        gm = self._done.graph_module
        tensors = {str(n.target): constants.tensor(n) for n in gm.graph.nodes if n.op == "get_attr"}
        return {
            name: {"tensor": tensors[name], "shape": tuple(tensors[name].shape), **origin}
            for name, origin in self._done.weights.items()
        }

    def eval(self) -> CompiledModel:
        """The model itself: it has eval semantics, always."""
        return self

    def train(self, mode: bool = True) -> CompiledModel:
        """The model itself for ``train(False)``.

        Raises:
            UsageError: it cannot be trained.
        """
        if mode:
            raise UsageError(
                "a compiled model cannot be trained: its weights are folded, and calls record no "
                "gradient. Train the original, then compile it again"
            )
        return self

    def __copy__(self) -> CompiledModel:
        new = CompiledModel(self._compile_with or (lambda args, kwargs: self._done))
        if self._compilation is not None:
            new.compile((), {})
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        """A model with state of its own; weights, which no call writes, are shared."""
        new = copy.copy(self)
        if new._compilation is not None:
            new._take(new._compilation.copied())
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError(
            "a compiled model cannot be pickled: its runtime has no picklable form. Write it with "
            "save(path), or pickle the original and compile it again"
        )

    def __repr__(self) -> str:
        if self._compilation is None:
            return "CompiledModel(not compiled yet: compiles at the first call)"
        return f"CompiledModel({self.report.model}, target={self.target!r})"
