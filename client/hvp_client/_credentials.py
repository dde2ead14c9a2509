"""The API key, or the token of an identity provider, that a client shows at every call."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from hvp_client._exceptions import InvalidArgumentError

#: An API key as text, or what gives one that is valid now.
KeySource = str | Callable[[], str]

DEFAULT_PROJECT = "default"
_PREFIX = "hvp_"


@final
@dataclass(frozen=True)
class Credentials:
    """Where the key comes from; it is asked for at each call, so that it may be exchanged."""

    source: KeySource = field(repr=False)

    @classmethod
    def given(cls, source: KeySource | None) -> Credentials | None:
        """The key that a caller gives, or that HVP_API_KEY or HVP_API_KEY_FILE names.

        Args:
            source: Text, or a function that gives it; None leaves it to the environment.

        Returns:
            None where there is none.

        Raises:
            InvalidArgumentError: `API_KEY_INVALID`.
        """
        file = os.environ.get("HVP_API_KEY_FILE")
        if source is None:
            source = os.environ.get("HVP_API_KEY") or (_reader(file) if file else None)
        if source is None:
            return None
        key = cls(source)
        key.text()  # a wrong one is better known now than at the first call
        return key

    def text(self) -> str:
        """The key at present.

        Raises:
            InvalidArgumentError: `API_KEY_INVALID`: it is no text that a call could carry.
        """
        found = self.source() if callable(self.source) else self.source
        found = found.strip() if isinstance(found, str) else found
        if not isinstance(found, str) or not found.isascii() or not found.isprintable():
            raise _invalid("an API key is a line of ASCII characters, and this is not")
        if not found or " " in found:
            raise _invalid("an API key is one word; give it as the server's operator sent it")
        return found

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call carries along."""
        return (("authorization", f"Bearer {self.text()}"),)

    def project(self) -> str | None:
        """The project that the key opens, if it says so: for a token, None."""
        text = self.text()
        if not text.startswith(_PREFIX):
            return None
        return text.removeprefix(_PREFIX).partition("_")[0] or None


def project_for(project: str | None, key: Credentials | None) -> str:
    """The project of a client: as given, by HVP_PROJECT, by its key, or the default one."""
    return (
        project
        or os.environ.get("HVP_PROJECT")
        or (key.project() if key is not None else None)
        or DEFAULT_PROJECT
    )


def _reader(path: str) -> Callable[[], str]:
    def read() -> str:
        try:
            return Path(path).read_text()
        except (OSError, ValueError) as error:
            raise _invalid(f"HVP_API_KEY_FILE={path} cannot be read: {error}") from None

    return read


def _invalid(problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(problem, reason="API_KEY_INVALID", field="api_key")
