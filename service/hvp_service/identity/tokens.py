"""JSON web tokens of an identity provider."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from hvp_service.app.config import ServerConfig
from hvp_service.calls.errors import ServiceError
from hvp_service.calls.names import ALL_PROJECTS, PROJECT
from hvp_service.identity.caller import ROLES, Identity
from hvp_service.storage.clock import SECOND

PROJECT_CLAIM = "hvp_project"
ROLE_CLAIM = "hvp_role"

_LEEWAY_S = 30.0  # between two machines' clocks
_LOOKED_AFTER_S = 1.0
_MOST_KEYS = 64
# Signatures alone, by the kind of key: a token cannot choose to be checked by anything weaker.
_ALGORITHMS: dict[type, list[str]] = {
    rsa.RSAPublicKey: ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"],
    ec.EllipticCurvePublicKey: ["ES256", "ES384", "ES512"],
    ed25519.Ed25519PublicKey: ["EdDSA"],
}


class TokenKeysError(ValueError):
    """The file of public keys does not do; the message says why and what to do."""


class TokenVerifier:
    """Believes tokens that one issuer has signed for this server.

    The issuer's public keys are in a file, a JSON web key set or PEM, which is read again when it
    has changed; nothing is fetched.

    Raises:
        TokenKeysError: The file cannot be read, or holds no public key of a kind that is taken.
    """

    def __init__(self, config: ServerConfig):
        assert config.jwt_keys is not None
        self._path: Path = config.jwt_keys
        self._issuer, self._audience = config.jwt_issuer, config.jwt_audience
        self._keys = read_keys(self._path)
        self._stamp = _stamp(self._path)
        self._look_at = time.monotonic() + _LOOKED_AFTER_S

    def identity(self, token: str) -> Identity:
        """Who the token says its bearer is.

        Raises:
            ServiceError: CREDENTIALS_INVALID, CREDENTIALS_EXPIRED.
        """
        claims = self._verified(token)
        named, role = claims.get(PROJECT_CLAIM), claims.get(ROLE_CLAIM)
        projects: list[Any] = named if isinstance(named, list) else [named]
        if not projects or not all(map(_is_project, projects)):
            raise _invalid(
                f"its claim {PROJECT_CLAIM} is to name a project, several in a list, or "
                f"{ALL_PROJECTS!r} for all"
            )
        if role not in ROLES:
            raise _invalid(f"its claim {ROLE_CLAIM} is to be one of {', '.join(ROLES)}")
        return Identity(
            kind="token",
            subject=str(claims["sub"]),
            projects=None if ALL_PROJECTS in projects else frozenset(projects),
            role=role,
            expire_time=int((float(claims["exp"]) + _LEEWAY_S) * SECOND),
        )

    def _verified(self, token: str) -> Mapping[str, Any]:
        self._read_again()
        try:
            wanted = jwt.get_unverified_header(token).get("kid")
        except jwt.InvalidTokenError:
            raise _invalid("it is neither an API key nor a JSON web token") from None
        keys = [key for kid, key in self._keys if wanted is None or kid in (None, wanted)]
        for key in keys:
            try:
                return jwt.decode(
                    token,
                    key,
                    algorithms=_algorithms(key),
                    audience=self._audience,
                    issuer=self._issuer,
                    leeway=_LEEWAY_S,
                    options={"require": ["exp", "iss", "aud", "sub"]},
                )
            except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError):
                continue
            except jwt.ExpiredSignatureError:
                raise ServiceError(
                    "CREDENTIALS_EXPIRED", "The token has expired; get a fresh one."
                ) from None
            except jwt.InvalidTokenError as error:
                raise _invalid(str(error)) from None
        raise _invalid("none of the issuer's keys has signed it")

    def _read_again(self) -> None:
        """Take other keys from the file when it has changed and can be read."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + _LOOKED_AFTER_S
        try:
            stamp = _stamp(self._path)
            if stamp != self._stamp:
                self._keys, self._stamp = read_keys(self._path), stamp
        except (OSError, TokenKeysError):
            return


def read_keys(path: Path) -> list[tuple[str | None, Any]]:
    """Public keys of a file with their ids: a JSON web key set, or one key in PEM form.

    Raises:
        TokenKeysError: There are none, or one of a kind that is not taken.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise TokenKeysError(f"{path} cannot be read: {error.strerror}") from None
    found: list[tuple[str | None, Any]]
    try:
        if text.lstrip().startswith(b"{"):
            entries = json.loads(text)["keys"]
            parsed = [jwt.PyJWK(entry) for entry in entries if entry.get("use", "sig") == "sig"]
            found = [(each.key_id, each.key) for each in parsed]
        else:
            found = [(None, load_pem_public_key(text))]
        for _, key in found:
            _algorithms(key)
    except (ValueError, KeyError, TypeError, AttributeError, jwt.PyJWTError) as error:
        raise TokenKeysError(
            f"{path} holds no public keys that tokens could be checked with, as a JSON web key set "
            f"or in PEM form: {error}"
        ) from None
    if not 0 < len(found) <= _MOST_KEYS:
        raise TokenKeysError(f"{path} holds {len(found)} keys; give 1 to {_MOST_KEYS}")
    return found


def _algorithms(key: Any) -> list[str]:
    for kind, algorithms in _ALGORITHMS.items():
        if isinstance(key, kind):
            return algorithms
    raise ValueError(
        f"a {type(key).__name__} is no public key of RSA, of an elliptic curve or of Ed25519"
    )


def _is_project(value: Any) -> bool:
    return value == ALL_PROJECTS or (
        isinstance(value, str) and PROJECT.fullmatch(value) is not None
    )


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _invalid(why: str) -> ServiceError:
    return ServiceError("CREDENTIALS_INVALID", f"The token is not believed: {why}.")
