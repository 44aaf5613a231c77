"""Runs an engine over torch tensors.

Written against the programming interface that 10.3 to 11.4 and TensorRT-RTX share, and executed
nowhere but on the machines where ``refold verify`` has been run.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch

from refold.backends.tensorrt import build as builds
from refold.backends.tensorrt import library as libraries
from refold.errors import BackendError, UsageError


@dataclass(frozen=True)
class _Recorded:
    """Launches for inputs of some shapes, and the memory that they read and write."""

    shapes: dict[str, torch.Size]
    inputs: dict[str, torch.Tensor]
    results: list[torch.Tensor]
    graph: torch.cuda.CUDAGraph


class Engine:
    """A built engine; call it with the tensors of its inputs, in their order.

    Results lie on the device of the first input. Work goes to a stream of its own, which waits for
    the caller's and is waited for by it; calls of one engine take turns.

    Args:
        built: what :func:`refold.backends.tensorrt.build.build` made.
        cuda_graph: record the launches at the first call, and again when shapes change, and replay
            them: less work for the host. Inputs are copied to the place that was recorded.

    Raises:
        BackendError: no GPU, a damaged engine, or one of another library, version or GPU.
    """

    def __init__(self, built: builds.Built, *, cuda_graph: bool = False) -> None:
        opened = builds.open_engine(built)
        self._opened = opened  # the runtime has to outlive the engine
        self._trt = opened.library.module
        self._log = opened.log
        self._engine = engine = opened.engine
        self._context = engine.create_execution_context()
        if self._context is None:
            reasons = "; ".join(self._log.errors)
            raise BackendError(f"{opened.library} cannot run {built.path}: {reasons}")
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        mode = self._trt.TensorIOMode
        self.inputs = tuple(n for n in names if engine.get_tensor_mode(n) == mode.INPUT)
        self.outputs = tuple(n for n in names if engine.get_tensor_mode(n) == mode.OUTPUT)
        known = libraries.torch_dtypes(opened.library)
        self._dtypes = {n: known[engine.get_tensor_dtype(n)] for n in names}
        self._stream = torch.cuda.Stream()
        self._cuda_graph = cuda_graph
        self._recorded: _Recorded | None = None
        self._lock = threading.Lock()

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        device = tensors[0].device if tensors else self._stream.device
        given = dict(zip(self.inputs, tensors, strict=True))
        with self._lock, torch.cuda.device(self._stream.device), torch.no_grad():
            placed = {n: self._place(n, t) for n, t in given.items()}
            results = self._replay(placed) if self._cuda_graph else self._enqueue(placed)
        return [r.to(device) for r in results]

    def _place(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype != self._dtypes[name]:
            raise UsageError(
                f"input {name!r}: expected dtype {self._dtypes[name]}, got {tensor.dtype}"
            )
        return tensor.detach().to(self._stream.device).contiguous()

    def _enqueue(self, placed: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        results = self._bind(placed)
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        self._execute()
        current.wait_stream(self._stream)
        return [r() if callable(r) else r for r in results]

    def _replay(self, placed: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        shapes = {name: tensor.shape for name, tensor in placed.items()}
        if self._recorded is None or self._recorded.shapes != shapes:
            self._recorded = None  # its memory goes before the new one's comes
            self._recorded = self._record(placed)
        recorded = self._recorded
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for name, tensor in placed.items():
                recorded.inputs[name].copy_(tensor)
            recorded.graph.replay()
            results = [r.clone() for r in recorded.results]
        current.wait_stream(self._stream)
        for result in results:
            result.record_stream(current)  # made on one stream, read on the other
        return results

    def _record(self, placed: dict[str, torch.Tensor]) -> _Recorded:
        inputs = {name: tensor.clone() for name, tensor in placed.items()}
        results = self._bind(inputs)
        if any(callable(r) for r in results):
            raise UsageError(
                "the data decide the size of an output, so the launches cannot be recorded: leave "
                "cuda_graph out"
            )
        self._stream.wait_stream(torch.cuda.current_stream())
        self._execute()  # what is done once for these shapes must not be recorded
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._execute()
        except RuntimeError as error:
            raise BackendError(
                f"the engine's launches cannot be recorded ({error}): leave cuda_graph out"
            ) from error
        return _Recorded({n: t.shape for n, t in inputs.items()}, inputs, results, graph)

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise self._failure("the engine failed")

    def _bind(self, placed: dict[str, torch.Tensor]) -> list[Any]:
        """Sets shapes and addresses; returns tensors, or calls that give them afterwards."""
        context = self._context
        for name, tensor in placed.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                low, _, high = self._engine.get_tensor_profile_shape(name, 0)
                raise UsageError(
                    f"input {name!r} is {list(tensor.shape)}; the engine takes {list(low)} to "
                    f"{list(high)}: export again with another profile"
                )
        for name, tensor in placed.items():
            # An empty tensor has no address, and TensorRT takes none that is null.
            if not context.set_tensor_address(name, tensor.data_ptr() or 256):
                raise self._failure(f"cannot read input {name!r}")
        unknown = context.infer_shapes()
        if unknown:
            raise self._failure(f"the shapes of {', '.join(unknown)} are not known")
        return [self._result(name) for name in self.outputs]

    def _result(self, name: str) -> Any:
        """A tensor for an output, or a call that gives it once its size is known."""
        shape = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            allocator = _allocator(self._trt, self._dtypes[name], self._stream)
            if not self._context.set_output_allocator(name, allocator):
                raise self._failure(f"cannot allocate output {name!r}")
            return allocator.result
        result = torch.empty(shape, dtype=self._dtypes[name], device=self._stream.device)
        if not self._context.set_tensor_address(name, result.data_ptr() or 256):
            raise self._failure(f"cannot write output {name!r}")
        return result

    def _failure(self, what: str) -> BackendError:
        reasons = "; ".join(self._log.errors)
        return BackendError(f"{what}{f': {reasons}' if reasons else ''}")


def _allocator(trt: Any, dtype: torch.dtype, stream: torch.cuda.Stream) -> Any:
    class Allocator(trt.IOutputAllocator):
        """Memory for an output whose size the data decide."""

        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self._memory = torch.empty(0, dtype=torch.uint8, device=stream.device)
            self._shape: tuple[int, ...] = ()

        def reallocate_output(self, name: str, memory: int, size: int, alignment: int) -> int:
            with torch.cuda.stream(stream):
                self._memory = torch.empty(max(size, 1), dtype=torch.uint8, device=stream.device)
            return self._memory.data_ptr()

        def reallocate_output_async(
            self, name: str, memory: int, size: int, alignment: int, stream_handle: int
        ) -> int:
            return self.reallocate_output(name, memory, size, alignment)

        def notify_shape(self, name: str, shape: Any) -> None:
            self._shape = tuple(shape)

        def result(self) -> torch.Tensor:
            # The size is known to the host once the work is done.
            stream.synchronize()
            count = int(torch.Size(self._shape).numel())
            flat = self._memory[: count * dtype.itemsize].view(dtype)
            return flat.reshape(self._shape).clone()

    return Allocator()
