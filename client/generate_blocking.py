"""The SDK's blocking side, made of the awaited one: a module of classes for a module of classes.

A public coroutine becomes a method that waits for it, an asynchronous generator an iterator. A
property asks the twin, and so does a plain method that gives a handle. Names, signatures and
docstrings are those of the awaited side. Another plain method, such as `__repr__`, is carried over
as it is, and so are `__aenter__` and `__aexit__`, without their `await`; private methods, functions
and constants stay where they are.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from typing import Any

_HEAD = '''"""The blocking side of `hvp_client.awaited.{name}`: made of it by `make sdk`."""

from __future__ import annotations

from collections.abc import Iterator

from hvp_client.awaited.{name} import {awaited}
from hvp_client.blocking.portal import Portal
from hvp_client.blocking.protocols import Fetched, SymmetricLinearOperator
from hvp_client.blocking.twins import Blocking, twin_of
'''

# What a class also is, by hand, in hvp_client.blocking.protocols.
_PROTOCOLS = {"Vector": "Fetched", "Operator": "SymmetricLinearOperator"}

_RESULT = "ResultT"  # a job's, which may hold vectors
_AWAITED = "hvp_client.awaited."
_RENAMED = {"AsyncGenerator": "Iterator", "__aenter__": "__enter__", "__aexit__": "__exit__"}
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def blocking_module(name: str, text: str) -> str:
    """Make the blocking module of an awaited one.

    Args:
        name: Of the module, as in `vector`.
        text: The awaited module.

    Returns:
        The blocking one, with imports that it may not need, to be sorted and formatted.
    """
    tree = ast.parse(text)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    head = _HEAD.format(name=name, awaited=", ".join(each.name for each in classes))
    parts = [*_imports(tree), *_type_variables(tree), *map(_class, classes)]
    return head + "\n".join(ast.unparse(ast.fix_missing_locations(part)) for part in parts)


def _imports(tree: ast.Module) -> Iterator[ast.stmt]:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            yield node
            # A handle's class has a blocking one, in the module of the same name.
            handles = [alias for alias in node.names if _is_awaited(alias.name)]
            if (node.module or "").startswith(_AWAITED) and handles:
                names = [ast.alias(_blocking(alias.name)) for alias in handles]
                where = (node.module or "").replace(_AWAITED, "hvp_client.blocking.")
                yield ast.ImportFrom(where, names, 0)
        elif isinstance(node, ast.Import) or _is_for_types(node):
            yield node


def _is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _type_variables(tree: ast.Module) -> Iterator[ast.stmt]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == _RESULT:
            yield node


def _class(node: ast.ClassDef) -> ast.ClassDef:
    name = _blocking(node.name)
    bases = [_renamed(base) for base in node.bases]
    if not any(_is_awaited(ast.unparse(base)) for base in node.bases):
        bases.insert(0, ast.Name("Blocking"))
    if name in _PROTOCOLS:
        bases.append(ast.Name(_PROTOCOLS[name]))
    generic = [base for base in node.bases if isinstance(base, ast.Subscript)]
    twin = f"{node.name}[{ast.unparse(generic[0].slice)}]" if generic else node.name
    body: list[ast.stmt] = [node.body[0], *ast.parse(f"_twin: {twin}").body]
    for member in node.body[1:]:
        if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body += _member(node.name, member)
        elif isinstance(member, ast.Assign):
            body.append(member)
    made = copy.copy(node)
    made.name, made.bases, made.body = name, bases, body
    made.keywords = [ast.keyword("twin", ast.Name(node.name))]
    return made


def _member(owner: str, method: _Function) -> list[ast.stmt]:
    """The blocking method, or none."""
    decorators = [ast.unparse(each) for each in method.decorator_list]
    docstring = [method.body[0]] if ast.get_docstring(method) else []
    parameters = [each.arg for each in (*method.args.args, *method.args.kwonlyargs)]
    if method.name == "__init__":
        # A handle is made by its client; the client is made by whoever wants one.
        if "session" in parameters:
            return []
        body = [f"twin = {owner}({_given(method)})", "super().__init__(Portal(twin.close), twin)"]
    elif method.name == "close":
        body = ["self._portal.close()"]
    elif method.name in ("__aenter__", "__aexit__"):
        body = [ast.unparse(_Unawaited().visit(each)) for each in method.body]
    elif method.name.startswith("_") and not method.name.endswith("__"):
        return []
    elif "overload" in decorators:
        body = ["..."]
    elif "property" in decorators:
        handed = f"self._twin.{method.name}"
        names = _names_handle(ast.unparse(method.returns) if method.returns else "")
        body = _typed(method, f"self._blocking({handed})") if names else [f"return {handed}"]
    elif isinstance(method, ast.AsyncFunctionDef) or _is_coroutine(method.returns):
        body = _waiting(method)
    elif _names_handle(ast.unparse(method.returns) if method.returns else ""):
        body = _typed(method, f"self._blocking(self._twin.{method.name}({_given(method)}))")
    else:
        body = [ast.unparse(each) for each in method.body[len(docstring) :]]
    (made,) = ast.parse(f"def {_RENAMED.get(method.name, method.name)}(): ...").body
    assert isinstance(made, ast.FunctionDef)
    made.args, made.returns = _renamed(method.args), _renamed(_result(method.returns))
    made.body = [*docstring, *ast.parse("\n".join(body)).body]
    made.decorator_list = method.decorator_list
    return [made]


def _waiting(method: _Function) -> list[str]:
    call = f"self._twin.{method.name}({_given(method)})"
    returns = ast.unparse(method.returns) if method.returns else "None"
    if returns.startswith("AsyncGenerator"):
        return [f"return self._portal.iterate({call})"]
    if _names_handle(returns):
        return _typed(method, f"self._wait({call})")
    if " | " in returns:  # what it is depends on what is given, of which the types are lost
        return _typed(method, f"self._portal.run({call})")
    return [f"{'' if returns == 'None' else 'return '}self._portal.run({call})"]


def _typed(method: _Function, value: str) -> list[str]:
    """Give back what is of a type that only the method says."""
    found = ast.unparse(_renamed(_result(method.returns)))
    return [f"result: {found} = {value}", "return result"]


def _given(method: _Function) -> str:
    """The arguments as they are handed on."""
    positional = [_handed_on(each) for each in method.args.args[1:]]
    by_name = [f"{each.arg}={_handed_on(each)}" for each in method.args.kwonlyargs]
    more = [f"*{method.args.vararg.arg}"] if method.args.vararg else []
    rest = []
    if method.args.kwarg:
        values = f"{method.args.kwarg.arg}.items()"
        rest = [f"**{{name: twin_of(value) for name, value in {values}}}"]
    return ", ".join([*positional, *more, *by_name, *rest])


def _handed_on(parameter: ast.arg) -> str:
    kind = ast.unparse(parameter.annotation) if parameter.annotation else ""
    return f"twin_of({parameter.arg})" if _names_handle(kind) else parameter.arg


def _names_handle(annotation: str) -> bool:
    """Whether there is a handle in values of this type."""
    return any(
        _is_awaited(node.id) or node.id == _RESULT
        for node in ast.walk(ast.parse(annotation))
        if isinstance(node, ast.Name)
    )


def _is_coroutine(returns: ast.expr | None) -> bool:
    return returns is not None and ast.unparse(returns).startswith("Coroutine[")


def _result(returns: ast.expr | None) -> ast.expr | None:
    """What a caller gets: X of `Coroutine[_, _, X]`, the items of `AsyncGenerator[X, _]`."""
    if not isinstance(returns, ast.Subscript) or not isinstance(returns.slice, ast.Tuple):
        return returns
    kind = ast.unparse(returns.value)
    if kind == "Coroutine":
        return returns.slice.elts[2]
    return (
        ast.Subscript(returns.value, returns.slice.elts[0]) if kind == "AsyncGenerator" else returns
    )


def _is_awaited(name: str) -> bool:
    return name.startswith("Async") and name not in _RENAMED


def _blocking(name: str) -> str:
    return name.removeprefix("Async") if _is_awaited(name) else _RENAMED.get(name, name)


class _Renamed(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(_blocking(node.id), node.ctx)


class _Unawaited(_Renamed):
    def visit_Await(self, node: ast.Await) -> ast.expr:
        awaited: ast.expr = self.visit(node.value)
        return awaited


def _renamed(node: ast.AST | None) -> Any:
    # A copy, for the awaited module is still to be read.
    return None if node is None else _Renamed().visit(copy.deepcopy(node))
