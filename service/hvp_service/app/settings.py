"""The settings of a server that starts: flags, environment and file, and where each came from."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from pydantic import SecretStr, ValidationError
from pydantic_settings import EnvSettingsSource
from pydantic_settings import SettingsError as UnreadableError

from hvp_service.app.config import ServerConfig
from hvp_service.app.flags import (
    FILE_VARIABLE,
    SettingsError,
    flag_of,
    has_path,
    is_switch,
    metavar,
    nearest,
)

PREFIX = "HVP_"
#: Variables that other parts of hvp read, in whose environment a server may be started.
OTHER_VARIABLES = frozenset(
    {
        *(FILE_VARIABLE, "HVP_API_KEY", "HVP_API_KEY_FILE", "HVP_CA", "HVP_CACHE"),
        *("HVP_CLIENT_CERTIFICATE", "HVP_CLIENT_KEY", "HVP_PROJECT", "HVP_SERVER_NAME"),
    }
)
#: Of the variables that a test gives to its own ranks.
_OF_TESTS = "HVP_TEST_"
# Kubernetes gives every container such variables of a Service that is called hvp, or hvp-something.
_SERVICE_LINK = re.compile(
    r"HVP_(\w+_)?(SERVICE_HOST=.*|SERVICE_PORT(_\w+)?=\d+|PORT(_\d+_(TCP|UDP|SCTP))?=\w+://.*"
    r"|PORT_\d+_(TCP|UDP|SCTP)_(PROTO|PORT|ADDR)=.*)"
)
_MASK = "********"
_SECRET = re.compile(r"(^|_)(password|secret|token|tokens|api_key)(_|$)")
# A password in a URL, before its host or in its query.
_IN_URL = re.compile(r"(://[^/@\s:]*:)[^@\s]*(?=@)|([?&](?:password|sslpassword)=)[^&\s]*")


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings in force.

    Attributes:
        config: Their values.
        origins: For each setting the flag, variable or file that it came from, or `default`.
    """

    config: ServerConfig
    origins: Mapping[str, str]

    def lines(self) -> Iterator[str]:
        """The settings as a TOML file with their origins beside them; secrets are masked."""
        for name in ServerConfig.model_fields:
            value = getattr(self.config, name)
            text = f"{name} = {_toml(masked(name, value))}"
            if value is None:
                text = f"# {name} is not set"
            elif masked(name, value) != value:
                text = f"# {text}"
            yield f"{text:<50} # {self.origins[name]}"


def read_settings(flags: Mapping[str, Any], file: Path | None) -> Settings:
    """Put the settings together: flags, then the environment, then the file, then defaults.

    Args:
        flags: Values by the names of settings.
        file: The TOML file; None for that of HVP_CONFIG, if there is one.

    Raises:
        SettingsError: A file cannot be read; a key or a variable is unknown; a value is wrong.
    """
    if file is None and (named := os.environ.get(FILE_VARIABLE)):
        file = Path(named)
    problems = list(_unknown_variables())
    of_file: Mapping[str, Any] = {}
    if file is not None:
        try:
            of_file = _from_file(file)
        except SettingsError as error:
            problems += error.problems
    try:
        of_environment = EnvSettingsSource(ServerConfig)()
    except UnreadableError as error:
        problems.append(f"environment: {error}")
        of_environment = {}
    values = {**of_file, **of_environment, **flags}
    origins = dict.fromkeys(ServerConfig.model_fields, "default")
    origins |= dict.fromkeys(of_file, str(file))
    origins |= {name: f"{PREFIX}{name.upper()}" for name in of_environment}
    origins |= {name: flag_of(name) for name in flags}
    try:
        config = ServerConfig(**values)
    except ValidationError as error:
        problems += [_sentence(each, origins, str(file)) for each in error.errors()]
        raise SettingsError(problems) from None
    if problems:
        raise SettingsError(problems)
    return Settings(config=config, origins=origins)


def masked(name: str, value: Any) -> Any:
    """A setting's value without what is secret in it."""
    if isinstance(value, SecretStr) or (value is not None and _SECRET.search(name)):
        return value if isinstance(value, Path) else _MASK
    if isinstance(value, str):
        return _IN_URL.sub(lambda found: (found[1] or found[2]) + _MASK, value)
    return value


def _from_file(file: Path) -> dict[str, Any]:
    """What a TOML file sets.

    Raises:
        SettingsError: It cannot be read, or has keys that are no settings.
    """
    try:
        values = tomllib.loads(file.read_text())
    except OSError as error:
        raise SettingsError([f"{file}: the file cannot be read: {error.strerror}"]) from None
    except ValueError as error:  # no TOML, no UTF-8
        raise SettingsError([f"{file}: this is no TOML: {error}"]) from None
    fields = ServerConfig.model_fields
    problems = [
        f"{file}: {key}: there is no such setting{nearest(key, fields)}"
        for key in values
        if key not in fields
    ]
    problems += [
        f"{file}: {key}: must be {metavar(key)}, not true or false"
        for key, value in values.items()
        if key in fields and isinstance(value, bool) and not is_switch(fields[key].annotation)
    ]
    if problems:
        raise SettingsError(problems)
    folder = file.absolute().parent
    return {
        key: _placed(value, folder) if has_path(fields[key].annotation) else value
        for key, value in values.items()
    }


def _placed(value: Any, folder: Path) -> Any:
    """Paths of a file that lies in `folder`: a relative one begins there."""
    if isinstance(value, str):
        return str(folder / value)
    return [_placed(each, folder) for each in value] if isinstance(value, list) else value


def _unknown_variables() -> Iterator[str]:
    known = {f"{PREFIX}{name.upper()}" for name in ServerConfig.model_fields} | OTHER_VARIABLES
    for name in sorted(os.environ):
        upper = name.upper()
        if not upper.startswith(PREFIX) or upper in known or upper.startswith(_OF_TESTS):
            continue
        if not _SERVICE_LINK.fullmatch(f"{name}={os.environ[name]}"):
            yield f"{name}: no part of hvp reads this variable{nearest(upper, known)}"


def _sentence(problem: Any, origins: Mapping[str, str], file: str) -> str:
    """One of pydantic's problems: where it was given, the setting, what is wrong."""
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if not problem["loc"]:  # of several settings together, which the message names
        return str(message)
    name = str(problem["loc"][0])
    origin = origins.get(name, name)
    where = f"{origin}: {name}" if origin == file else origin
    given = problem["input"]
    told = problem["type"] == "value_error" or masked(name, given) != given
    return f"{where}: {message}" + ("" if told else f", got {given!r}")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple, set, frozenset)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, (int, float)):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False)
