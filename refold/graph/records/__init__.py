"""Typed records: how passes read nodes. One reader per operator family, every spelling behind it.

A reader returns ``None`` for a node that it does not describe completely; a pass never looks at
raw arguments. Constants come as float64 lazies (:func:`refold.graph.constants.exact`).
"""
