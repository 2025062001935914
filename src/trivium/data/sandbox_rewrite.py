"""Rewrites a parsed chat template so that it pays: for loops, macros, ``+``, ``~``, slices, comparisons and keys.
Also ``{% generation %}``, the block around what an assistant said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.visitor import NodeTransformer

from trivium.data.sandbox_meter import BLOCKS

_RUNS = (nodes.For, nodes.Macro, nodes.CallBlock)


class Generation(Extension):
    """``{% generation %}``: its body is printed as it is, and noted."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("note"), [], [], body).set_lineno(line)

    def note(self, caller: Callable[[], str]) -> str:
        environment: Any = self.environment
        text = caller()
        environment.noted.append((len(environment.pieces), len(text)))
        return text


class Rewriter(NodeTransformer):
    """Puts the meter where Jinja calls nothing: loops, macros, ``+``, ``~``, slices, comparisons, keys, ``*args``."""

    def __init__(self) -> None:
        self.depth = self.kept = 0  # blocks around the node, and those whose text is not printed where they stand
        self.markers = self.lost_markers = self.dates = False

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        self.dates |= node.name == "strftime_now"
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._inside(node, node.recursive)
        tick = _tick(node.body)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        node.test = node.test and nodes.And(tick, node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: Any) -> nodes.Node:
        generation = isinstance(node, nodes.CallBlock) and isinstance(node.call.node, nodes.ExtensionAttribute)
        self.markers |= generation
        self.lost_markers |= generation and self.kept > 0
        self._inside(node)
        node.body.insert(0, nodes.ExprStmt(_tick([*node.body, *node.defaults]), lineno=node.lineno))
        return node

    def visit_AssignBlock(self, node: nodes.Node) -> nodes.Node:
        return self._inside(node)

    def _inside(self, node: nodes.Node, kept: bool = True) -> nodes.Node:
        if self.depth >= BLOCKS:
            raise TemplateSyntaxError(f"more than {BLOCKS} blocks in each other", node.lineno)
        self.depth, self.kept = self.depth + 1, self.kept + kept
        self.generic_visit(node)
        self.depth, self.kept = self.depth - 1, self.kept - kept
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        self.generic_visit(node)
        left: Any = node.left
        terms = (left.node, *left.args) if isinstance(left, nodes.Filter) and left.name == " plus" else (left,)
        return _filter("plus", *terms, node.right)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter("joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _filter("part", node.node, *(nodes.Const(None) if bound is None else bound for bound in bounds))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        sides: list[Any] = [node, *node.ops]
        names = ["sought" if getattr(side, "op", "") in ("in", "notin") else "plain" for side in sides]
        if names == ["plain"] * 2 and any(isinstance(side.expr, nodes.Const) for side in sides):
            return node  # to compare anything with a text or number takes no time
        for side, name in zip(sides, names, strict=True):
            parts = side.expr.items if isinstance(side.expr, (nodes.List, nodes.Tuple)) else (side.expr,)
            if not all(isinstance(part, nodes.Const) for part in parts):
                side.expr = _filter(name, side.expr)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = node.key if isinstance(node.key, nodes.Const) else _filter("plain", node.key)
        return node

    def visit_Call(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.dyn_args = node.dyn_args and _filter("listed", node.dyn_args)
        node.dyn_kwargs = node.dyn_kwargs and _filter("few", node.dyn_kwargs)
        return node

    def visit_Block(self, node: nodes.Node) -> nodes.Node:
        raise TemplateSyntaxError(f"a chat template cannot use {type(node).__name__.lower()}", node.lineno)

    visit_CallBlock = visit_Macro
    visit_FilterBlock = visit_AssignBlock
    visit_Filter = visit_Test = visit_Call
    visit_Extends = visit_Include = visit_Import = visit_FromImport = visit_ScopedEvalContextModifier = visit_Block


def _filter(name: str, node: nodes.Expr, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, f" {name}", list(args), [], None, None, lineno=node.lineno)


def _tick(body: Sequence[nodes.Node]) -> nodes.Filter:
    """Pays for one run of ``body``: what its nodes make at least, in bytes, and 1 for a node that makes nothing."""
    weight, below = 8, list(body)
    while below:
        node = below.pop()
        if isinstance(node, (nodes.List, nodes.Tuple, nodes.Dict)):
            weight += 240 + 72 * len(node.items)  # with a small object for each entry
        elif isinstance(node, nodes.Output):
            weight += 8 * len(node.nodes)
        weight += 800 if isinstance(node, _RUNS) else 1
        # What is inside of a loop or macro is paid for there.
        below.extend(node.iter_child_nodes(exclude=("body",) if isinstance(node, _RUNS) else ()))
    return _filter("spend", nodes.Const(weight, lineno=body[0].lineno if body else 1))
