"""The flags of `hvp serve`: one for each setting, made of the class that holds them."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, final, get_args, get_origin

from hvp_operations.documentation import attributes
from pydantic.fields import FieldInfo

from hvp_service.app.config import ServerConfig

FILE_VARIABLE = "HVP_CONFIG"

_INTRODUCTION = (
    "Serve curvature products over gRPC. SIGTERM or Ctrl-C lets calls end and then ends the "
    "server; a second one ends it at once."
)
_ORDER = (
    "A setting is taken from the first of these that has it: its flag, its variable of the "
    "environment (HVP_ and its name in capitals), the file, its default. The file is TOML, with "
    "the names of settings as keys (state_dir, not state-dir); paths in it begin at its folder."
)


class SettingsError(Exception):
    """Settings that do not do.

    Attributes:
        problems: A sentence for each, which begins with where it was given.
    """

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


@final
@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """What the flags of `hvp serve` say."""

    values: Mapping[str, Any]  # by the names of settings, as they were typed
    file: Path | None
    print_config: bool


def parse_flags(argv: Sequence[str]) -> CommandLine:
    """Read the flags, one for each setting.

    Raises:
        SettingsError: There is no such flag, or its value is missing.
        SystemExit: After printing help.
    """
    parser = _parser()
    known, rest = parser.parse_known_args(list(argv))
    flags = [*map(flag_of, ServerConfig.model_fields), "--config", "--print-config", "--help"]
    unknown = [each.partition("=")[0] for each in rest if each.startswith("--")]
    if unknown:  # what else is left over are their values
        raise SettingsError(
            [f"{each}: there is no such flag{nearest(each, flags)}" for each in unknown]
        )
    if rest:
        raise SettingsError(
            [f"{each}: a value comes behind a flag; see hvp serve --help" for each in rest]
        )
    values = dict(vars(known))
    file, print_config = values.pop("config", None), values.pop("print_config", False)
    return CommandLine(values=values, file=file, print_config=print_config)


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def descriptions() -> dict[str, str]:
    """The words of each setting: those of its attribute in the class."""
    return attributes(ServerConfig)


def shown_default(field: FieldInfo) -> str:
    """A setting's default as one would write it."""
    if field.default is None:
        return "not set"
    if field.default == ():
        return "none"
    return str(field.default).removesuffix(".0")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hvp serve",
        usage="hvp serve [--config FILE] [--print-config] [--SETTING VALUE ...]",
        description=_INTRODUCTION,
        epilog=_ORDER,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=8),
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help=f"TOML file of settings. [{FILE_VARIABLE}]"
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="Print the settings in force and where each came from, and start nothing.",
    )
    group = parser.add_argument_group("settings, each with its default")
    words = descriptions()
    for name, field in ServerConfig.model_fields.items():
        described = f"{words[name]} [{shown_default(field)}]".replace("%", "%%")
        if is_switch(field.annotation):
            group.add_argument(flag_of(name), action=argparse.BooleanOptionalAction, help=described)
            continue
        action = "append" if _is_sequence(field.annotation) else "store"
        group.add_argument(flag_of(name), action=action, metavar=metavar(name), help=described)
    return parser


@final
class _Parser(argparse.ArgumentParser):
    """A parser whose refusals are like those of all settings, without a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError([message.removeprefix("argument ")])


def metavar(name: str) -> str:
    """What stands for the value in the help: its values, or its unit."""
    annotation = ServerConfig.model_fields[name].annotation
    if is_switch(annotation):
        return "true|false"
    choices = [value for value in get_args(annotation) if isinstance(value, str)]
    if choices:
        return "|".join(choices)
    if name.endswith("address"):
        return "HOST:PORT"
    if has_path(annotation):
        return "PATH"
    for ending, unit in (("_bytes", "BYTES"), ("_s", "SECONDS")):
        if name.endswith(ending):
            return unit
    return "NUMBER" if annotation in (int, float) else "TEXT"


def is_switch(annotation: Any) -> bool:
    """Whether a setting of this type is yes or no."""
    return annotation is bool or bool in get_args(annotation)


def _is_sequence(annotation: Any) -> bool:
    return any(
        get_origin(each) in (tuple, list, set, frozenset)
        for each in (annotation, *get_args(annotation))
    )


def has_path(annotation: Any) -> bool:
    """Whether a setting of this type is a path, or several."""
    return annotation is Path or any(map(has_path, get_args(annotation)))


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that names what a word nearly is; "" if it is like nothing."""
    near = difflib.get_close_matches(word, list(known), 1, cutoff=0.5)
    return f"; the nearest is {near[0]}" if near else ""
