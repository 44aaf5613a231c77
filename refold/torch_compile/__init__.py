"""The backend ``refold`` of ``torch.compile``; the function is what torch looks up by that name."""

from refold.torch_compile.backend import compile_graph

__all__ = ["compile_graph"]
