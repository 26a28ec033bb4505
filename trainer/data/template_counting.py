"""Counting in the syntax tree of a chat template: each loop, macro and block announces how much it
is about to do, and each operator what it is about to read and write.

The additions are filters whose names no template can spell. They return the value that they are
given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

from trainer.data.template_budget import SCAN

SPEND, PASS, WEIGH, SCANNED = "spend steps", "pass it", "weigh it", "scan it"
SEARCH, COPY, HOLD = "search it", "copy it", "hold it"
# Extra steps of a node, measured in jinja2's sandbox.
COSTS = {nodes.Call: 12, nodes.Filter: 6, nodes.Test: 2, nodes.Getattr: 3, nodes.Getitem: 3, nodes.CallBlock: 12}
SHORT_VALUES, SHORT_TEXT = 4, 1000


class Counting(NodeTransformer):
    """A transformer that adds the counting. SecurityError for templates that include others."""

    def __init__(self) -> None:
        self._steps = [0]  # of the surrounding bodies, innermost last

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self._steps[-1] += 1 + COSTS.get(type(node), 0)
        return super().visit(node, *args, **kwargs)

    # -------------------------------------------------------------------- what runs again and again

    def visit_Template(self, node: nodes.Template) -> nodes.Node:
        self._count_body(node)
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        node.iter = self.visit(node.iter)
        node.else_ = self._visited(node.else_)
        if node.test is not None:
            with self._counted() as steps:
                test = self.visit(node.test)
            node.test = _filter(test, PASS, steps[0])
        self._count_body(node)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self._count_body(node, also="defaults")
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node.call)
        self._count_body(node, also="defaults")
        return node

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        self._count_body(node)
        return node

    def _count_body(self, node: Any, also: str = "body") -> None:
        with self._counted() as steps:
            if also != "body":
                setattr(node, also, self._visited(getattr(node, also)))
            body = self._visited(node.body)
        node.body = [nodes.ExprStmt(_filter(nodes.Const(steps[0]), SPEND)), *body]

    def _visited(self, children: list[Any]) -> list[Any]:
        return [self.visit(child) for child in children]

    @contextmanager
    def _counted(self) -> Iterator[list[int]]:
        """Yield a list that holds, after the block, the steps of what was visited in it."""
        steps: list[int] = []
        self._steps.append(1)
        yield steps
        steps.append(self._steps.pop())

    # ---------------------------------------------------------------------------------- what writes

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        self._steps[-1] += len(node.data) >> SCAN
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        node.nodes = [self._written(child) for child in node.nodes]
        return node

    def _written(self, node: Any) -> Any:
        """Return an expression that is written, counted. The result of an addition is counted
        here."""
        if isinstance(node, nodes.Add) and _is_short(node):
            self._steps[-1] += 1
            return _filter(self._operands(node), WEIGH)
        is_counted = isinstance(node, nodes.TemplateData | nodes.Const | nodes.Concat)
        visited = self.visit(node)
        return visited if is_counted else _filter(visited, WEIGH)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        node.nodes = [
            child if isinstance(child, nodes.Const | nodes.TemplateData) else _filter(child, WEIGH)
            for child in self._visited(node.nodes)
        ]
        return node

    def visit_Add(self, node: nodes.Add) -> Any:
        """Count a sum. The result of a short sum is only a few times as large as its operands, so
        it can be counted afterwards."""
        if not _is_short(node):
            return self._added(node, times=0)
        summed = self._operands(node)
        return summed if _has_number(node) else _filter(summed, HOLD)

    def _operands(self, node: Any) -> Any:
        """Return the sum with its operands visited."""
        if not isinstance(node, nodes.Add):
            return self.visit(node)
        self._steps[-1] += 1
        node.left, node.right = self._operands(node.left), self._operands(node.right)
        return node

    def _added(self, node: Any, times: int) -> Any:
        """Return an operand that is copied by `times` additions around it."""
        if isinstance(node, nodes.Add):
            self._steps[-1] += 1
            node.left, node.right = self._added(node.left, times + 1), self._added(node.right, times + 1)
            return node
        if isinstance(node, nodes.Const):
            self._steps[-1] += 1 + (len(str(node.value)) * times >> SCAN)
            return node
        return _filter(self.visit(node), COPY, times)

    # ----------------------------------------------------------------------------------- what reads

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Count a comparison. A comparison with a constant reads no further than the constant,
        except when it searches."""
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        searched = [operand.expr for operand in node.ops if operand.op in ("in", "notin")]
        # Keys are hashed whole.
        has_keys = any(isinstance(operand, nodes.Dict) for operand in operands)
        is_bounded = any(map(_is_constant, operands)) and len(operands) == 2 and not has_keys
        holders: list[Any] = [node, *node.ops]
        for holder in holders:
            bounded = _is_constant(holder.expr) or (is_bounded and not any(holder.expr is one for one in searched))
            name = SEARCH if any(holder.expr is one for one in searched) else SCANNED
            expression = self.visit(holder.expr)
            holder.expr = expression if bounded else _filter(expression, name)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _filter(node, HOLD)
        if not isinstance(node.arg, nodes.Const):
            node.arg = _filter(node.arg, SCANNED)
        return node

    # --------------------------------------------------------------------------------- what is made

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._made(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._made(node) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._made(node)

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _filter(node.key, SCANNED)
        return node

    def _made(self, node: nodes.Expr) -> nodes.Expr:
        constant = _is_constant(node)
        self.generic_visit(node)
        return node if constant else _filter(node, HOLD)

    # ------------------------------------------------------------------------------ what is refused

    def visit_Include(self, node: nodes.Node) -> nodes.Node:
        raise SecurityError("it includes another template")

    visit_Import = visit_FromImport = visit_Extends = visit_Include


def _filter(value: Any, name: str, *arguments: int) -> nodes.Filter:
    return nodes.Filter(value, name, [nodes.Const(one) for one in arguments], [], None, None)


def _is_constant(node: nodes.Node) -> bool:
    """Return whether an expression is written out in the template, all of it."""
    if isinstance(node, nodes.Const):
        return True
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(map(_is_constant, node.items))
    return isinstance(node, nodes.Dict) and all(_is_constant(pair.key) and _is_constant(pair.value) for pair in node.items)


def _is_short(node: nodes.Add) -> bool:
    """Return whether a sum adds few values and little text."""
    waiting: list[nodes.Node] = [node]
    values = characters = 0
    while waiting:
        one = waiting.pop()
        if isinstance(one, nodes.Add):
            waiting += (one.left, one.right)
        elif isinstance(one, nodes.Const):
            characters += len(str(one.value))
        else:
            values += 1
    return values <= SHORT_VALUES and characters <= SHORT_TEXT


def _has_number(node: nodes.Add) -> bool:
    """Return whether a sum adds a number written in the template. It is then a number, and grows no
    further than a count."""
    return any(isinstance(side, nodes.Const) and isinstance(side.value, int) for side in (node.left, node.right))
