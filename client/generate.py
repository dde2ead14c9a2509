"""Write the SDK's methods from the declarations: `python client/generate.py [FOLDER]`.

The blocking methods wait for the awaited ones; both have the signature of the spec and its words.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
import typing
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from hvp_operations.checking import Seed, reasons
from hvp_operations.documentation import attributes, paragraphs
from hvp_operations.operation import Operation, load
from hvp_operations.registry import operations

TARGET = Path(__file__).parent / "hvp_client"

_HEAD = '''"""The questions that an operator answers: made from their declarations by `make sdk`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

{imports}

from hvp_client._async_job import AsyncJob
from hvp_client._async_vector import AsyncVector
from hvp_client._job import Job
from hvp_client._vector import Vector
'''

_CLASS = '''

class {name}(ABC):
    """Every question, as {what}."""

    @abstractmethod
    {definition} _ask(
        self, operation: str, values: Mapping[str, Any], labels: Mapping[str, str] | None
    ) -> {job}[Any]: ...
'''


def module() -> str:
    """The whole module."""
    declared = operations().values()
    records = sorted(each.record.split(":") for each in declared)
    parts = [
        _HEAD.format(imports="\n".join(f"from {where} import {what}" for where, what in records)),
        _CLASS.format(
            name="Questions", what="a job to be awaited", definition="async def", job="AsyncJob"
        ),
        *(_method(each, blocking=False) for each in declared),
        _CLASS.format(name="BlockingQuestions", what="a job", definition="def", job="Job"),
        *(_method(each, blocking=True) for each in declared),
    ]
    return "".join(parts)


def _method(operation: Operation[Any], *, blocking: bool) -> str:
    parameters = list(inspect.signature(operation.spec).parameters.values())
    names = ["self"]
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in names:
            names.append("*")
        names.append(_parameter(operation.spec, parameter))
    if "*" not in names:
        names.append("*")
    names.append("labels: Mapping[str, str] | None = None")
    record = load(operation.record)
    vector = "Vector" if blocking else "AsyncVector"
    found = (
        f"{record.__name__}[{vector}]" if getattr(record, "__parameters__", ()) else record.__name__
    )
    job = f"{'Job' if blocking else 'AsyncJob'}[{found}]"
    lines = [
        f"{'def' if blocking else 'async def'} {operation.name}(",
        *(f"    {name}," for name in names),
        f") -> {job}:",
        *textwrap.indent(_docstring(operation), "    ").splitlines(),
        f"    return {'' if blocking else 'await '}self._ask(",
        f'        "{operation.name}",',
        "        {" + ", ".join(f'"{each.name}": {each.name}' for each in parameters) + "},",
        "        labels,",
        "    )",
    ]
    return "\n" + textwrap.indent("\n".join(lines), "    ") + "\n"


def _parameter(spec: type, parameter: inspect.Parameter) -> str:
    hint = typing.get_type_hints(spec)[parameter.name]
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    return f"{parameter.name}: {_hint(hint)}{default}".replace("'", '"')


def _hint(hint: Any) -> str:
    if hint is Seed:
        return "int"
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return " | ".join(_hint(each) for each in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return f"Literal[{', '.join(map(repr, typing.get_args(hint)))}]"
    return "None" if hint is type(None) else str(hint.__name__)


def _docstring(operation: Operation[Any]) -> str:
    told = attributes(operation.spec)
    told["labels"] = "Kept with the job."
    refused = ", ".join(f"`{reason}`" for reason in sorted(reasons(operation)))
    sections = {
        "Args": [f"{name}: {text}" for name, text in told.items()],
        "Returns": ["The job, queued; `result()` waits for it."],
        "Raises": [
            f"InvalidArgumentError: {refused}.",
            "FailedPreconditionError: `INSUFFICIENT_CLUSTER_MEMORY`.",
            "ResourceExhaustedError: `QUEUE_FULL`.",
        ],
    }
    first, *others = paragraphs(operation.spec)
    lines = [f'"""{first}', ""]
    for paragraph in others:
        lines += [*textwrap.wrap(paragraph, 88), ""]
    for title, entries in sections.items():
        lines.append(f"{title}:")
        for entry in entries:
            lines += textwrap.wrap(
                entry,
                88,
                initial_indent="    ",
                subsequent_indent="        " if title != "Returns" else "    ",
            )
        lines.append("")
    return "\n".join([*lines[:-1], '"""'])


_RECORDS = '''"""What the SDK gives of each question: made from their declarations by `make sdk`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
{imports}

__all__ = [{names}]

_WHERE = {{{where}}}


def __getattr__(name: str) -> Any:
    # numpy takes its time to import, which `hvp --help` need not spend.
    if name not in _WHERE:
        raise AttributeError(f"module {{__name__!r}} has no attribute {{name!r}}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
'''


def records() -> str:
    """The module of the results' names."""
    found = sorted(each.record.split(":")[::-1] for each in operations().values())
    return _RECORDS.format(
        imports="\n".join(f"    from {where} import {name} as {name}" for name, where in found),
        names=", ".join(f'"{name}"' for name, _ in found),
        where=", ".join(f'"{name}": "{where}"' for name, where in found),
    )


def generate(folder: Path) -> None:
    """Write `_questions.py` and `_records.py` into a folder, formatted as everything is."""
    files = {"_questions.py": module(), "_records.py": records()}
    for name, text in files.items():
        (folder / name).write_text(text)
    ruff = [str(Path(sys.executable).with_name("ruff")), "format", "--quiet"]
    configuration = ["--config", str(Path(__file__).parent.parent / "pyproject.toml")]
    command = [*ruff, *configuration, *(str(folder / name) for name in files)]
    subprocess.run(command, check=True)  # noqa: S603 - the project's own tool


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET)
