"""The settings that a deployment starts a server with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hvp_service.app.config import ServerConfig


def server_config(arguments: Sequence[str], environment: Mapping[str, str]) -> ServerConfig:
    """The settings of options, `--name=value` or `--name value`, over variables HVP_NAME.

    Raises:
        ValidationError: There is no such setting, or a server would refuse to start with it.
    """
    words = [part for each in arguments for part in each.split("=", 1)]
    names, values = words[::2], words[1::2]
    assert all(name.startswith("--") for name in names), arguments
    given = {
        name.removeprefix("HVP_").lower(): value
        for name, value in environment.items()
        if name.startswith("HVP_")
    }
    given |= {
        name.removeprefix("--").replace("-", "_"): value
        for name, value in zip(names, values, strict=True)
    }
    return ServerConfig.model_validate(given)
