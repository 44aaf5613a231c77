"""The one door through which rules and passes change a graph.

An :class:`Edit` is a transaction: what is inserted, replaced, set and removed in it takes effect
together or not at all. What the caller of the model could see, or a later call could depend on,
is checked on the way:

- a value keeps its shape, dtype and device;
- no output comes to share storage with an input, a constant or another output;
- no output gets other strides, and no call that reads strides reads others;
- what the graph writes is read on the side of the write on which it was read;
- where a squeeze drops a dimension in some calls alone, results have the rank that they had;
- what the user excluded stays.

What fails a check raises ``Declined``, and the graph is what it was: nodes, arguments,
metadata, and the tensors that the module holds.

An :class:`Editor` is what one pass needs of it: it makes the transactions, and it keeps what goes
wrong at one candidate from ending the pass (:meth:`Editor.candidate`). A :class:`GraphSnapshot`
undoes a pass as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from refold.errors import Declined, RefoldError, VerifierError
from refold.graph import aliasing, constants, nodes, provenance, ranks
from refold.rewrite.result import Applied, PassResult, applied, declined, failed

WRITTEN = "it reads storage that the graph writes"
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_UNSET: Any = object()
_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # target, args, kwargs


class Editor:
    """Makes the edits of one pass over a graph.

    Args:
        gm: the graph module.
        rule: the id of the rule or pass.
        result: where declined and failed candidates are recorded.
    """

    def __init__(self, gm: fx.GraphModule, rule: str, result: PassResult | None = None) -> None:
        self.gm, self.graph, self.rule = gm, gm.graph, rule
        self.result = PassResult() if result is None else result
        self.failed: set[fx.Node] = set()  # where something went wrong: not to be tried again
        self.writes = constants.mutations(gm.graph)
        self.squeezes = ranks.squeezes(gm.graph)
        self.written = aliasing.mutated(gm.graph) if self.writes else set()

    @contextmanager
    def edit(self, rule: str = "") -> Iterator[Edit]:
        """A transaction: it takes effect where the block ends, and not if the block raises."""
        edit = Edit(self, rule or self.rule)
        try:
            yield edit
            edit.commit()
        except BaseException:
            edit.roll_back()
            raise

    @contextmanager
    def candidate(self, node: fx.Node) -> Iterator[None]:
        """What a pass does at one node: what is refused or fails costs that, and is recorded."""
        try:
            yield
        except Declined as reason:
            self.result.declined.append(declined(self.rule, node, reason))
        except Exception as error:
            if isinstance(error, RefoldError) and not isinstance(error, VerifierError):
                raise  # on purpose, for the user
            self.failed.add(node)
            self.result.declined.append(failed(self.rule, node, error))


class Edit:
    """One transaction; see the module docstring.

    Attributes:
        made: the nodes that it inserted, in the order in which they were.
        gone: once it took effect, the nodes that it removed.
        survivors: once it took effect, the nodes that lost a user but live.
    """

    def __init__(self, editor: Editor, rule: str) -> None:
        self.editor, self.rule = editor, rule
        self.gm, self.graph = editor.gm, editor.graph
        self.made: dict[fx.Node, None] = {}
        self.gone: list[fx.Node] = []
        self.survivors: list[fx.Node] = []
        self._calls: dict[fx.Node, _Call] = {}
        self._metas: dict[fx.Node, dict[str, Any]] = {}
        self._users: dict[fx.Node, list[fx.Node]] = {}
        self._set: dict[fx.Node, Any] = {}  # changed in place: the value that it is said to have
        self._replaced: dict[fx.Node, fx.Node] = {}
        self._remove: dict[fx.Node, None] = {}
        self._sweep: dict[fx.Node, None] = {}
        self._covered: set[fx.Node] = set()
        self._kept: Collection[fx.Node] = ()
        self._open = True

    # --- what a pass does -------------------------------------------------------------------------

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """Inserts what the block makes (with any of the helpers that make nodes) before a node."""
        mark = node.prev
        try:
            with self.graph.inserting_before(node):
                yield
        finally:
            self._take(mark, node)

    def call(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        *,
        sources: Iterable[fx.Node],
        like: fx.Node | None = None,
    ) -> fx.Node:
        """A call at the place of the enclosing :meth:`before`; see :func:`nodes.call`."""
        return nodes.call(
            self.graph, target, args, kwargs, rule=self.rule, sources=sources, like=like
        )

    def constant(self, name: str, data: Any, like: torch.Tensor | None = None) -> fx.Node:
        """A constant at the place of the enclosing :meth:`before`; see :func:`constants.add`."""
        return constants.add(self.gm, name, data, like)

    def replace(
        self,
        old: fx.Node,
        new: fx.Node,
        *,
        beside: Mapping[fx.Node, fx.Node] | None = None,
    ) -> None:
        """Lets every reader of ``old`` read ``new``, but for what ``new`` is made of.

        Args:
            old: the node to replace; :meth:`remove` or :meth:`sweep` says what becomes of it.
            new: a node that stands before the readers.
            beside: what else is replaced in one step, where readers see all of it together.

        Raises:
            Declined: ``new`` may not stand for ``old``.
        """
        users = self._readers(old, new)
        moved: dict[fx.Node, Any] = {}
        reason = self._objection(old, new, users, beside or {}, moved)
        if reason is not None:
            raise Declined(reason)
        for user in users:
            self._remember(user, (old, new))
            user.replace_input_with(old, new)
        for node, value in moved.items():
            self._remember_meta(node)
            node.meta["val"] = value
        self._replaced[old] = new

    def objection(
        self,
        old: fx.Node,
        new: fx.Node,
        *,
        beside: Mapping[fx.Node, fx.Node] | None = None,
    ) -> str | None:
        """Why :meth:`replace` would refuse, or ``None``: for a pass that can do with less."""
        return self._objection(old, new, self._readers(old, new), beside or {}, {})

    def set(
        self,
        node: fx.Node,
        *,
        target: Any = None,
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        value: Any = _UNSET,
    ) -> None:
        """Changes a call in place.

        Args:
            node: the call.
            target: another operator.
            args: other positional arguments.
            kwargs: other keyword arguments.
            value: its fake value from now on, where the pass knows it; else it must stay what it
                was, which is checked when the edit takes effect.
        """
        if nodes.pinned(node):
            raise Declined(f"{node.name} is excluded")
        read = [*node.all_input_nodes]
        new = [n for n in pytree.tree_leaves((args, kwargs)) if isinstance(n, fx.Node)]
        self._remember(node, (*read, *new))
        if target is not None:
            node.target = target
        if args is not None:
            node.args = args
        if kwargs is not None:
            node.kwargs = kwargs
        if value is not _UNSET:
            self._remember_meta(node)
            node.meta["val"] = value
            self._set[node] = value
        elif node not in self.made:
            self._set.setdefault(node, _UNSET)

    def set_arguments(self, node: fx.Node, values: dict[int, Any]) -> None:
        """Sets positional arguments by schema index, filling the ones between with defaults."""
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        bound = nodes.arguments(node)
        last = max(max(values), len(node.args) - 1)
        names = [schema[i].name for i in range(last + 1)]
        args = tuple(values[i] if i in values else bound[name] for i, name in enumerate(names))
        self.set(node, args=args, kwargs={k: v for k, v in node.kwargs.items() if k not in names})

    def set_operand(self, node: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Lets one reader of ``old`` read ``new``."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: new if n is old else n)
        self.set(node, args=args, kwargs=kwargs)

    def stamp(self, node: fx.Node, sources: list[fx.Node], **value: fx.Node | None) -> None:
        """Says where a node comes from, and whose ``value`` it has; see :func:`derive`."""
        if node not in self.made:
            self._remember_meta(node)
        provenance.derive(node, sources, self.rule, **value)

    def learn(self, values: Mapping[fx.Node, Any]) -> None:
        """Says more of what calls give: sizes and numbers that were symbols are known.

        No call gives anything else for it. Who reads a number reads it as a literal from now on;
        excluded readers still read the call.

        Raises:
            Declined: it is not the same value, better known.
        """
        for node, value in values.items():
            reason = difference(node.meta.get("val"), value, same=_agree)
            if reason is not None:
                raise Declined(reason)
            self._remember_meta(node)
            node.meta["val"] = value
            if not isinstance(value, (bool, int, float)):
                continue
            for user in [u for u in node.users if not nodes.pinned(u)]:
                self._remember(user, (node,))
                user.args, user.kwargs = fx.map_arg(
                    (user.args, user.kwargs),
                    lambda n, node=node, value=value: value if n is node else n,  # type: ignore[misc]
                )

    def remove(self, dead: Iterable[fx.Node]) -> None:
        """Removes nodes when the edit takes effect, those that nothing reads any more."""
        self._remove.update(dict.fromkeys(dead))

    def sweep(
        self,
        starts: Iterable[fx.Node],
        covered: Iterable[fx.Node] = (),
        kept: Collection[fx.Node] = (),
    ) -> None:
        """Removes dead nodes upwards from ``starts`` when the edit takes effect.

        Calls that FX takes for impure (``dropout``, even in eval mode) go only where ``covered``;
        what is ``kept`` stays.
        """
        self._sweep.update(dict.fromkeys(starts))
        self._covered.update(covered)
        self._kept = kept

    # --- how it ends ------------------------------------------------------------------------------

    def commit(self) -> None:
        """Takes effect.

        Raises:
            Declined: a check failed; the caller rolls back.
        """
        if not self._open:
            return
        for node, value in self._set.items():
            if node.users:
                if value is not _UNSET or not self._reads_alike(node):
                    self._check_value(node)
                if self.editor.squeezes:
                    self._check_rank(node)
                self._check_sharing(node)
        if self.editor.written:
            self._check_reads()
        self._open = False
        for node in sorted(self._remove, reverse=True):
            if not node._erased and not node.users and not nodes.pinned(node):
                self._erase(node)
        self._erase_dead()

    def roll_back(self) -> None:
        """Makes the graph what it was before the edit."""
        if not self._open:
            return
        self._open = False
        for node, (target, args, kwargs) in self._calls.items():
            if node.target is not target:
                node.target = target
            node.args, node.kwargs = args, kwargs
        for node, meta in self._metas.items():
            node.meta.clear()
            node.meta.update(meta)
        for node in sorted((n for n in self.made if not n._erased), reverse=True):
            self.graph.erase_node(node)
            if _is_own(node):
                delattr(self.gm, str(node.target))
        for node, users in self._users.items():
            if list(node.users) != users and set(node.users) == set(users):
                node.users.clear()
                node.users.update(dict.fromkeys(users))

    def record(self, detail: str = "") -> Applied:
        """The record of an edit that took effect: the calls that went and those that came."""
        calls = [n for n in reversed(self.gone) if n.op == "call_function" and n not in self.made]
        added = [n for n in self.made if not n._erased and n.op != "get_attr"]
        return applied(self.rule, calls, added, detail)

    # --- checks -----------------------------------------------------------------------------------

    def _objection(
        self,
        old: fx.Node,
        new: fx.Node,
        users: list[fx.Node],
        beside: Mapping[fx.Node, fx.Node],
        moved: dict[fx.Node, Any],
    ) -> str | None:
        """Why ``new`` may not take the place of ``old``, or ``None``."""
        if nodes.pinned(old):
            return f"{old.name} is excluded"
        if new is old or any(not new < user for user in users):
            return f"{new.name} cannot stand for {old.name}: it comes after what reads it"
        resized = self._set.get(new, _UNSET) is not _UNSET and all(u in self._set for u in users)
        reason = difference(old.meta.get("val"), new.meta.get("val"))
        if reason is not None:
            return None if resized else reason  # its readers change with it, and are checked
        if self.editor.written and self._is_written(old, new):
            return WRITTEN
        if self.editor.squeezes:
            reason = ranks.objection([old], [new], self._made_of(new))
            if reason is not None:
                return reason
        also = {node: other.meta["val"] for node, other in beside.items()}
        return aliasing.new_sharing(old, new) or aliasing.unsettled_strides(old, new, also, moved)

    def _is_written(self, old: fx.Node, new: fx.Node) -> bool:
        """True if what stands for a value is written, or was computed at another time than it."""
        read = [new] if new in self.made else [new, old, *old.all_input_nodes]
        return any(self.editor.written & aliasing.roots(node) for node in read)

    def _reads_alike(self, node: fx.Node) -> bool:
        """True if a call that was changed in place reads tensors of the kinds that it read.

        A vector where nothing was read is a bias: it changes the kind of no result.
        """
        target, args, kwargs = self._calls[node]
        if node.target is not target:
            return False
        own: Any = node.meta.get("val")
        old, new = (
            {**dict(enumerate(a)), **k} for a, k in ((args, kwargs), (node.args, node.kwargs))
        )
        for key in {**old, **new}:
            before: Any = old.get(key)
            after: Any = new.get(key)
            # literals are copied where arguments are set: they are compared, nodes are themselves
            if before is after or before == after:
                continue
            if not nodes.is_tensor(after):
                if after is None and nodes.is_tensor(before) and nodes.value(before).dim() == 1:
                    continue
                return False
            kind = after.meta["val"]
            if before is None:
                if kind.dim() != 1 or kind.dtype != own.dtype or kind.device != own.device:
                    return False
            elif not nodes.is_tensor(before) or not _alike(before.meta["val"], kind):
                return False
        return True

    def _check_value(self, node: fx.Node) -> None:
        """The value of a call that was changed in place stays what it was, or what is said."""
        declared = self._set[node] is not _UNSET
        before = self._metas[node].get("val") if declared else node.meta.get("val")
        after = node.meta["val"] if declared else nodes.fake_result(node)
        reason = difference(before, after)
        if reason is None:
            reason = aliasing.unsettled(node, before, after)
        elif declared:
            reason = self._unchanged_reader(node)
        if reason is not None:
            raise Declined(reason)

    def _check_rank(self, node: fx.Node) -> None:
        """A call that was changed in place has the rank that it had, in calls of every size."""
        if node not in self._calls or ranks.states_its_rank(node):
            return
        before = pytree.tree_leaves(self._calls[node][1:])
        read = [n for n in before if isinstance(n, fx.Node)]
        reason = ranks.objection(read, node.all_input_nodes, ())
        if reason is not None:
            raise Declined(reason)

    def _check_sharing(self, node: fx.Node) -> None:
        """A view that was changed in place views nothing that the caller has otherwise."""
        if not aliasing.passes(node):
            return
        args, kwargs = self._calls[node][1:]
        held = [n for n in pytree.tree_leaves((args, kwargs)) if isinstance(n, fx.Node)]
        before = {root for operand in held for root in aliasing.roots(operand)}
        fixed = any(root.op == "get_attr" for root in before)

        def after() -> set[fx.Node]:
            found = aliasing.roots(node)
            return {r for r in found if not (fixed and r.op == "get_attr")}

        reason = aliasing.shares_more(node, before, after)
        if reason is not None:
            raise Declined(reason)

    def _unchanged_reader(self, node: fx.Node) -> str | None:
        """Who reads a value of another shape without having been changed with it."""
        for user in node.users:
            known = user in self._set or user in self.made or user in self._remove
            if not known:
                return f"{user.name} reads {node.name}, whose shape would change"
        return None

    def _check_reads(self) -> None:
        """What the edit reads is read before it is written, as it was.

        So it is where it was read: what stands for a call behind a write reads nothing before it.
        """
        last = max(self._replaced, default=None)
        writes = [(w, _written_by(w)) for w in self.editor.writes if not w._erased]
        for node in (*self.made, *self._set):
            known = self._calls[node][1:] if node in self._calls else ()
            held = {n for n in pytree.tree_leaves(known) if isinstance(n, fx.Node)} | {*self.made}
            read = {r for n in node.all_input_nodes if n not in held for r in aliasing.roots(n)}
            until = node if last is None or last < node else last
            if any(write < until and owners & read for write, owners in writes):
                raise Declined(WRITTEN)

    def _readers(self, old: fx.Node, new: fx.Node) -> list[fx.Node]:
        """Who reads ``new`` instead of ``old``: not what it is made of."""
        own = self._made_of(new)
        return [user for user in old.users if user not in own]

    def _made_of(self, node: fx.Node) -> AbstractSet[fx.Node]:
        """What this edit made that a node is computed from, itself too."""
        found, stack = {node} & self.made.keys(), [node]
        while stack:
            for source in stack.pop().all_input_nodes:
                if source in self.made and source not in found:
                    found.add(source)
                    stack.append(source)
        return found

    # --- bookkeeping ------------------------------------------------------------------------------

    def _take(self, mark: fx.Node, node: fx.Node) -> None:
        """Notes what was made between ``mark`` and ``node``."""
        found: list[fx.Node] = []
        current = node.prev
        while current is not mark:
            found.append(current)
            current = current.prev
        self.made.update(dict.fromkeys(reversed(found)))

    def _remember(self, node: fx.Node, touched: Iterable[fx.Node]) -> None:
        if node in self.made:
            return
        self._calls.setdefault(node, (node.target, node.args, dict(node.kwargs)))
        for operand in touched:
            if operand not in self.made:
                self._users.setdefault(operand, list(operand.users))

    def _remember_meta(self, node: fx.Node) -> None:
        if node not in self._metas:
            self._metas[node] = dict(node.meta)

    def _erase(self, node: fx.Node) -> None:
        self.graph.erase_node(node)
        self.gone.append(node)

    def _erase_dead(self) -> None:
        survivors: dict[fx.Node, None] = {}
        stack = list(reversed(self._sweep))
        while stack:
            node = stack.pop()
            if node._erased:
                continue
            stays = node.op == "placeholder" or nodes.pinned(node) or node in self._kept
            if node.users or stays or (node.is_impure() and node not in self._covered):
                survivors[node] = None
                continue
            stack.extend(node.all_input_nodes)
            self._erase(node)
        self.survivors = [n for n in survivors if not n._erased]


class GraphSnapshot:
    """A graph as it was, to return to: cheap to take, for it holds what nodes hold.

    A node that was erased since comes back as itself.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._nodes = [(n, n.target, n.args, dict(n.kwargs), dict(n.meta)) for n in gm.graph.nodes]
        self._tensors = [
            (store, dict(store))
            for module in _modules(gm)
            for store in (module._parameters, module._buffers, module._modules)
        ]
        self._plain = {k: v for k, v in vars(gm).items() if isinstance(v, torch.Tensor)}

    def restore(self) -> None:
        """Makes the graph and the module's tensors what they were."""
        graph = self._gm.graph
        known = {node for node, *_ in self._nodes}
        for node in graph.nodes:
            node.args, node.kwargs = (), {}
        for node in list(graph.nodes):
            if node not in known:
                graph.erase_node(node)
        for node, target, args, kwargs, meta in self._nodes:
            if node._erased:
                node._erased = False
                node._prev = node._next = node  # its old neighbours may be others' by now
                graph._find_nodes_lookup_table.insert(node)
                graph._len += 1
            graph._root.prepend(node)
            node.target, node.args, node.kwargs = target, args, kwargs
            node.meta.clear()
            node.meta.update(meta)
        for store, held in self._tensors:
            store.clear()
            store.update(held)  # type: ignore[arg-type]
        for name in [k for k, v in vars(self._gm).items() if isinstance(v, torch.Tensor)]:
            delattr(self._gm, name)
        vars(self._gm).update(self._plain)


def difference(old: Any, new: Any, same: Callable[[Any, Any], bool] = nodes.same) -> str | None:
    """How a value would differ in kind, shape, dtype or device from what it replaces.

    Args:
        old: a fake value.
        new: another.
        same: whether two sizes or numbers, or the sizes of two tensors, are equal.
    """
    before, after = pytree.tree_leaves(old), pytree.tree_leaves(new)
    if len(before) != len(after):
        return f"the result would have {len(after)} values instead of {len(before)}"
    for a, b in zip(before, after, strict=True):
        if a is b:
            continue
        if isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor):
            return f"the result would be {type(b).__name__}, not {type(a).__name__}"
        if not isinstance(a, torch.Tensor):
            if not same(a, b):
                return f"the result would be {b}, not {a}"
        elif a.dtype != b.dtype:
            return f"the result would be {b.dtype}, not {a.dtype}"
        elif a.device != b.device:
            return f"the result would be on {b.device}, not {a.device}"
        elif not same(a.shape, b.shape):
            return f"the result's shape would be {list(b.shape)}, not {list(a.shape)}"
    return None


def _agree(old: Any, new: Any) -> bool:
    """True if sizes or numbers are equal, or were symbols."""
    if isinstance(old, torch.Size):
        return len(old) == len(new) and all(map(_agree, old, new))
    return isinstance(old, _SYMBOLS) or nodes.same(old, new)


def _modules(root: torch.nn.Module) -> list[torch.nn.Module]:
    """A module and all inside of it; ``modules()`` makes the path of each as well."""
    found = [root]
    for module in found:
        found += [child for child in module._modules.values() if child is not None]
    return found


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return difference(a, b) is None and nodes.same(a.stride(), b.stride())


def _is_own(node: fx.Node) -> bool:
    """True for a constant that :func:`constants.add` registered."""
    return node.op == "get_attr" and "refold_name" in node.meta


def _written_by(write: fx.Node) -> set[fx.Node]:
    return {r for n in write.all_input_nodes for r in aliasing.roots(n)}
