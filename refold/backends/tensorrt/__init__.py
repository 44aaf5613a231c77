"""Target ``trt``: NVIDIA TensorRT and TensorRT-RTX, through a portable artifact directory.

``target`` lowers, ``artifact`` is the directory, ``check`` and ``ops`` say what a version accepts,
``precision`` casts the graph, ``library`` holds all that the two Python packages have in common,
``build`` makes and keeps engines, ``runner`` runs one, ``verify`` judges one.
"""
