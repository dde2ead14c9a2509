"""From what a call brings along to who makes it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

from hvp_service.app.config import ServerConfig
from hvp_service.calls.errors import ServiceError
from hvp_service.calls.names import ALL_PROJECTS
from hvp_service.identity.caller import Identity
from hvp_service.identity.keys import PREFIX, KeyStore
from hvp_service.identity.tokens import TokenVerifier
from hvp_service.storage.troubles import DatabaseBusyError

_SCHEME = "bearer "
_LOOKED_AFTER_S = 2.0


class Authenticator:
    """Finds out who calls, by an API key, a token, a certificate or the lack of all three.

    Credentials that are shown always count: wrong ones are refused where none would have done.
    """

    def __init__(self, config: ServerConfig, keys: KeyStore):
        self._required = config.credentials_required
        self._keys = keys
        self._tokens = None if config.jwt_keys is None else TokenVerifier(config)

    async def identity(
        self, authorization: Sequence[str], certificate: Mapping[str, Iterable[bytes]]
    ) -> Identity:
        """Who calls.

        Args:
            authorization: The call's metadata of that name.
            certificate: gRPC's words on the connection, with the names of a client's certificate.

        Raises:
            ServiceError: CREDENTIALS_MISSING, CREDENTIALS_INVALID, CREDENTIALS_EXPIRED.
                DatabaseBusyError.
        """
        if len(authorization) > 1:
            raise ServiceError("CREDENTIALS_INVALID", "A call shows one key or token, not several.")
        if authorization:
            return await self._bearer(authorization[0])
        if self._required:
            raise ServiceError(
                "CREDENTIALS_MISSING",
                "This server answers whoever shows an API key or a token: give "
                "Client(api_key=...), or set HVP_API_KEY; in gRPC, metadata 'authorization' with "
                "'Bearer ' and the key.",
            )
        for name in ("x509_common_name", "x509_subject_alternative_name"):
            for value in certificate.get(name, ()):
                return Identity(kind="certificate", subject=value.decode(errors="replace"))
        return Identity(kind="local", subject="local")

    async def _bearer(self, authorization: str) -> Identity:
        if authorization[: len(_SCHEME)].lower() != _SCHEME:
            raise ServiceError(
                "CREDENTIALS_INVALID",
                "Metadata 'authorization' is 'Bearer ' with an API key or a token behind it.",
            )
        text = authorization[len(_SCHEME) :].strip()
        if text.startswith(PREFIX) or self._tokens is None:
            key = await self._keys.proven(text)
            return Identity(
                kind="key",
                subject=key.id,
                projects=None if key.project == ALL_PROJECTS else frozenset([key.project]),
                role=key.role,
                expire_time=key.expire_time,
            )
        return self._tokens.identity(text)

    @contextlib.asynccontextmanager
    async def while_believed(self, authorization: Sequence[str]) -> AsyncIterator[None]:
        """End what runs inside soon after its credentials have expired or been revoked.

        Raises:
            ServiceError: CREDENTIALS_INVALID, CREDENTIALS_EXPIRED, out of the block.
        """
        if not authorization:
            yield
            return
        inside = asyncio.current_task()
        assert inside is not None
        lost: list[ServiceError] = []

        async def look() -> None:
            while not lost:
                await asyncio.sleep(_LOOKED_AFTER_S)
                try:
                    await self._bearer(authorization[0])
                except DatabaseBusyError:
                    continue
                except ServiceError as error:
                    lost.append(error)
                    inside.cancel()

        looking = asyncio.create_task(look())
        try:
            yield
        except asyncio.CancelledError:
            if not lost:
                raise
            inside.uncancel()
            raise lost[0] from None
        finally:
            looking.cancel()
