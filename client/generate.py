"""Write what of the SDK is generated: `python client/generate.py [FOLDER]`.

A question's method has the signature of the operation's spec and its words; the blocking side is
made of the awaited one.
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

from generate_blocking import blocking_module
from hvp_operations.checking import Numbers, Seed, reasons
from hvp_operations.documentation import attributes, paragraphs
from hvp_operations.operation import Operation, load
from hvp_operations.partition import Partition
from hvp_operations.registry import operations

TARGET = Path(__file__).parent / "hvp_client"
_RUFF = str(Path(sys.executable).with_name("ruff"))

#: What a question's input can be given as: one vector, or several.
_GIVEN = (
    "A vector on the server, or real numbers (n,), which travel.",
    "A vector on the server or a sequence of them, or real numbers (n,) or (n, k), which travel.",
)

#: What a partition of the parameters can be given as.
_PARTITION = "str | Sequence[Any] | Mapping[str, Any]"

_HEAD = '''"""The questions that operators answer: made of their declarations by `make sdk`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

{imports}
from hvp_client.awaited.job import AsyncJob
from hvp_client.awaited.vector import AsyncVector
'''

_CLASS = '''

class {name}(ABC):
    """Every question about {what}, as a job."""

    @abstractmethod
    async def _ask(
        self, operation: str, values: Mapping[str, Any], labels: Mapping[str, str] | None
    ) -> AsyncJob[Any]: ...
'''

#: The class of the questions that are asked of a kind of operator, and what that is.
_CLASSES = {
    "matrix": ("AsyncQuestions", "a symmetric matrix"),
    "jacobian": ("AsyncJacobianQuestions", "a Jacobian"),
}


def questions() -> str:
    """The awaited module of questions."""
    declared = operations().values()
    records = sorted(each.record.split(":") for each in declared)
    imports = "\n".join(f"from {where} import {what}" for where, what in records)
    parts = [_HEAD.format(imports=imports)]
    for asked_of, (name, what) in _CLASSES.items():
        parts.append(_CLASS.format(name=name, what=what))
        parts += [_method(each) for each in declared if each.asked_of == asked_of]
    return "".join(parts)


def _method(operation: Operation[Any]) -> str:
    parameters = list(inspect.signature(operation.spec).parameters.values())
    names = ["self"]
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in names:
            names.append("*")
        names.append(_parameter(operation, parameter))
    if "*" not in names:
        names.append("*")
    names.append("labels: Mapping[str, str] | None = None")
    record = load(operation.record)
    generic = getattr(record, "__parameters__", ())
    found = f"{record.__name__}[AsyncVector]" if generic else record.__name__
    lines = [
        f"async def {operation.name}(",
        *(f"    {name}," for name in names),
        f") -> AsyncJob[{found}]:",
        *textwrap.indent(_docstring(operation), "    ").splitlines(),
        "    return await self._ask(",
        f'        "{operation.name}",',
        "        {" + ", ".join(f'"{each.name}": {each.name}' for each in parameters) + "},",
        "        labels,",
        "    )",
    ]
    return "\n" + textwrap.indent("\n".join(lines), "    ") + "\n"


def _parameter(operation: Operation[Any], parameter: inspect.Parameter) -> str:
    if parameter.name in {each.field for each in operation.inputs}:
        default = "" if parameter.default is parameter.empty else " = None"
        return f"{parameter.name}: AsyncVector | Sequence[AsyncVector] | Any{default}"
    hint = typing.get_type_hints(operation.spec)[parameter.name]
    if hint is Partition:
        return f'{parameter.name}: {_PARTITION} = "{parameter.default}"'
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    return f"{parameter.name}: {_hint(hint)}{default}".replace("'", '"')


def _hint(hint: Any) -> str:
    if hint is Seed:
        return "int"
    if hint == Numbers:
        return "Sequence[float]"
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return " | ".join(_hint(each) for each in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return f"Literal[{', '.join(map(repr, typing.get_args(hint)))}]"
    return "None" if hint is type(None) else str(hint.__name__)


def _docstring(operation: Operation[Any]) -> str:
    told = attributes(operation.spec)
    for each in operation.inputs:
        told[each.field] += f" {_GIVEN[each.most > 1]}"
        if each.taken_from:
            told[each.field] += f" A result stands for its `{each.taken_from}`."
    told["labels"] = "Kept with the job."
    refused = ", ".join(f"`{reason}`" for reason in sorted(reasons(operation)))
    missing = ", `INPUT_MISSING`" if operation.inputs else ""
    sections = {
        "Args": [f"{name}: {text}" for name, text in told.items()],
        "Returns": ["The job, queued; `result()` waits for it."],
        "Raises": [
            f"InvalidArgumentError: {refused}.",
            *(["NotFoundError: A vector is gone."] if operation.inputs else []),
            f"FailedPreconditionError: `INSUFFICIENT_CLUSTER_MEMORY`{missing}.",
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


_RECORDS = '''"""What the SDK gives of each question: made of their declarations by `make sdk`."""

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
    """Write everything that is generated into a folder."""
    files = {"_records.py": records(), "awaited/questions.py": questions()}
    for name in sorted(path.stem for path in (TARGET / "awaited").glob("[!_]*.py")):
        awaited = f"awaited/{name}.py"
        text = files.get(awaited) or (TARGET / awaited).read_text()
        files[f"blocking/{name}.py"] = blocking_module(name, text)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(_tidied(text, TARGET / name))


def _tidied(text: str, path: Path) -> str:
    """Without imports that are not needed, sorted and formatted as everything is."""
    for command in ("check --fix --select F401", "check --fix --select I", "format"):
        text = subprocess.run(  # noqa: S603 - the project's own tool
            [_RUFF, *command.split(), "--quiet", "--stdin-filename", str(path), "-"],
            input=text,
            cwd=TARGET,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return text


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET)
