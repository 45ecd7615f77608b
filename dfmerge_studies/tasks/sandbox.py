"""Jinja2 templates that end: a spec is something that people send each other.

Jinja's own sandbox keeps a template from reaching Python.  It may still loop over loops, or write 'x' * 10 ** 9.  Here
every rendering has a budget: characters and items that it makes cost one unit each, turns of a loop and calls more.
Operations that make much of little are measured before they run, all others afterwards.  So a refusal depends on the
template and the row alone, not on the machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any, cast

from jinja2 import StrictUndefined, Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import SandboxedEnvironment

BUDGET = 10_000_000  # units of one rendering, and of compiling
TURN = 100  # units of a turn of a loop, and of a call
LONGEST = 100_000  # characters of a template
_LARGEST = 10_000  # as an argument of a filter or a method: a width, a count
_LARGEST_BITS = 4096  # of an integer
_WIDE = re.compile(r"\d{5}|%[-+ #0]*\*")  # a width of a formatted field

_Size = Callable[..., int]
# Characters that a filter or a method of texts makes, where that can be more than it gets.
_MAKES: Mapping[str, _Size] = {
    "replace": lambda text, old="", new="", *_: len(text) + str(text).count(str(old)) * len(str(new)),
    "indent": lambda text, width=4, *_: (str(text).count("\n") + 1) * (width if isinstance(width, int) else len(width)),
    "expandtabs": lambda text, size=8: str(text).count("\t") * size,
    "join": lambda *parts: _joined_size(*parts),
    "wordwrap": lambda text, width=79, _long=True, wrap="\n", *_: len(text) * len(str(wrap or "\n")),
    "urlize": lambda text, *parts: len(text) * (4 + sum(len(str(part)) for part in parts)),
}


def _joined_size(first: Any, second: Any = "", *_: Any) -> int:
    """Of the filter (items, text between them) or of the method (text, items)."""
    between, items = (first, second) if isinstance(first, str) and not isinstance(second, str) else (second, first)
    if not isinstance(items, (list, tuple, str)):
        return 0  # measured afterwards
    return sum(_size(item) for item in items) + len(items) * len(str(between))


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict, range)) else 1


class BoundedEnvironment(SandboxedEnvironment):
    """A sandbox whose templates take a bounded time and make texts of a bounded size."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
        self._left = BUDGET
        del self.globals["lipsum"]
        self.filters = {name: self._measured(name, function) for name, function in self.filters.items()}
        self.filters |= {"_turns": self._turns, "_joined": self.concat}

    def template(self, source: str) -> Template:
        """Compile a template.

        Raises:
            TemplateError: it is none, or it is too long.
        """
        if len(source) > LONGEST:
            raise SecurityError(f"it has {len(source)} characters, expected at most {LONGEST}")
        self._left = BUDGET
        tree = self.parse(source)
        for loop in tree.find_all(nodes.For):
            if loop.recursive:
                raise SecurityError("loops that call themselves are not known here")
            loop.iter = self._filtered(loop.iter, "_turns")
        for parent in list(tree.find_all(nodes.Node)):
            for field, value in parent.iter_fields():
                if isinstance(value, nodes.Concat):
                    setattr(parent, field, self._concatenated(value))
                elif isinstance(value, list):
                    value[:] = [self._concatenated(v) if isinstance(v, nodes.Concat) else v for v in value]
        return self.from_string(tree)

    def render(self, template: Template, values: Mapping[str, Any]) -> str:
        """Render a template within the budget.

        Raises:
            TemplateError: it fails, or takes more than its budget.
        """
        self._left = BUDGET
        return template.render(values)

    def _filtered(self, node: nodes.Node, name: str) -> nodes.Filter:
        made = nodes.Filter(cast("nodes.Expr", node), name, [], [], None, None, lineno=node.lineno)
        return made.set_environment(self)  # type: ignore[return-value]  # typed as any node

    def _concatenated(self, node: nodes.Concat) -> nodes.Filter:
        return self._filtered(nodes.List(node.nodes, lineno=node.lineno), "_joined")

    def _spend(self, units: int) -> None:
        self._left -= units
        if self._left < 0:
            raise SecurityError(f"it takes more than its budget of {BUDGET} characters and {BUDGET // TURN} steps")

    def _turns(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._spend(TURN)
            yield item

    def concat(self, parts: Iterable[Any]) -> str:
        """Join what a template writes, piece by piece."""
        texts = []
        for part in parts:
            text = str(part)
            self._spend(len(text))
            texts.append(text)
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute a sum, product, power or remainder, once its size is known."""
        self._spend(self._product_size(operator, left, right))
        result = super().call_binop(context, operator, left, right)
        self._spend(_size(result))
        return result

    def _product_size(self, operator: str, left: Any, right: Any) -> int:
        if operator == "%" and isinstance(left, str):
            self._check_arguments([*right] if isinstance(right, tuple) and "*" in left else [], left)
        if operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(items, (str, bytes, list, tuple)) and isinstance(times, int):
                    return len(items) * max(times, 0)
        if isinstance(left, int) and isinstance(right, int) and operator in ("*", "**"):
            bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * abs(right)
            if bits > _LARGEST_BITS:
                raise SecurityError(f"it computes a number of about {bits} bits")
        return 0

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls: names of the signature must not hide those of keywords."""
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps `format`
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        __self._spend(TURN)
        if isinstance(owner, (str, bytes)):
            if name == "translate":
                raise SecurityError("texts are not translated here")
            __self._check_arguments([*args, *kwargs.values()], owner if name.startswith("format") else "")
            __self._spend(_MAKES[name](owner, *args, **kwargs) if name in _MAKES else 0)
        result = super().call(__context, __obj, *args, **kwargs)
        __self._spend(_size(result))
        return result

    def _measured(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose arguments are looked at before, and whose result after it has run."""
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or the context

        @wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            value, *rest = args[skipped:]
            self._spend(TURN)
            self._check_arguments([*rest, *kwargs.values()], value if name == "format" else "")
            self._spend(_MAKES[name](value, *rest, **kwargs) if name in _MAKES else 0)
            result = function(*args, **kwargs)
            self._spend(_size(result))
            return result

        return measured

    @staticmethod
    def _check_arguments(arguments: Iterable[Any], pattern: Any) -> None:
        for argument in arguments:
            if isinstance(argument, int) and abs(argument) > _LARGEST:
                raise SecurityError(f"the number {argument:.3g} is larger than {_LARGEST}")
        if isinstance(pattern, str) and _WIDE.search(pattern):
            raise SecurityError(f"a width in {pattern[:60]!r} is larger than {_LARGEST}, or is not written there")
