"""API keys: rows that prove a secret without holding it."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass

import sqlalchemy as sa

from hvp_service.calls.errors import ServiceError, not_found
from hvp_service.calls.names import ALL_PROJECTS, KINDS, Name, noted
from hvp_service.identity.caller import ROLES, Role
from hvp_service.storage.clock import SECOND, now_us
from hvp_service.storage.database import Database, api_keys
from hvp_service.storage.troubles import DatabaseBusyError

PREFIX = "hvp_"

MAX_LABEL_LENGTH = 128
_SECRET = re.compile(r"hvp_([a-z0-9-]*)_([a-z0-9]{16})_([0-9a-f]{64})")
_REMEMBERED_S = 2.0  # a revoked key is refused everywhere after this time
_MOST_REMEMBERED = 4096
_USE_NOTED_US = 60 * SECOND


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """A key as its row has it, which is without its secret; times in microseconds."""

    project: str  # ALL_PROJECTS: every one
    id: str
    role: Role
    label: str
    sha256: str  # of the secret, hexadecimal
    create_time: int
    expire_time: int | None
    revoke_time: int | None
    use_time: int | None  # of the latest use, to the minute

    @property
    def name(self) -> Name:
        """Resource name."""
        return Name(self.project, "keys", self.id)


class KeyStore:
    """Makes, finds and revokes API keys.

    A secret has 256 random bits and is kept as its SHA-256 alone: there is no weak one, so that a
    slow hash would add nothing. It is shown once, when it is made.
    """

    def __init__(self, database: Database):
        self._database = database
        self._remembered: dict[str, tuple[float, ApiKey | None]] = {}

    async def create(
        self, project: str, role: str, *, label: str = "", ttl_s: float | None = None
    ) -> tuple[ApiKey, str]:
        """Make a key.

        Args:
            project: The project that it opens, or ALL_PROJECTS.
            role: What it may do there.
            label: Words by which people tell it from others.
            ttl_s: Seconds until it expires; None: never.

        Returns:
            The key, and the text that a client shows.

        Raises:
            ServiceError: KEY_INVALID: role, label or time is none.
        """
        if role not in ROLES:
            raise _invalid("role", f"a role is one of {', '.join(ROLES)}; got {role!r}")
        if len(label) > MAX_LABEL_LENGTH or not label.isprintable():
            raise _invalid("label", f"a label is {MAX_LABEL_LENGTH} printable characters at most")
        if ttl_s is not None and not 0 < ttl_s < 1e10:
            raise _invalid("ttl", f"a key lives for a positive number of seconds, not {ttl_s:g}")
        created = now_us()
        identifier, secret = secrets.token_hex(8), secrets.token_hex(32)
        key = ApiKey(
            project=project,
            id=identifier,
            role=role,
            label=label,
            sha256=_digest(secret),
            create_time=created,
            expire_time=None if ttl_s is None else created + int(ttl_s * SECOND),
            revoke_time=None,
            use_time=None,
        )
        async with self._database.writing() as connection:
            await connection.execute(api_keys.insert().values(**vars(key)))
        noted(key.name)
        shown = "" if project == ALL_PROJECTS else project
        return key, f"{PREFIX}{shown}_{identifier}_{secret}"

    async def list(self, project: str) -> list[ApiKey]:
        """The keys of a project, or of ALL_PROJECTS those that open every one; newest first."""
        async with self._database.reading() as connection:
            rows = await connection.execute(
                sa.select(api_keys)
                .where(api_keys.c.project == project)
                .order_by(api_keys.c.create_time.desc(), api_keys.c.id)
            )
            return [ApiKey(**row._mapping) for row in rows]

    async def revoke(self, name: Name) -> ApiKey:
        """Revoke a key for good; once more is no error.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND.
        """
        which = (api_keys.c.project == name.project, api_keys.c.id == name.id)
        async with self._database.writing() as connection:
            await connection.execute(
                api_keys.update()
                .where(*which, api_keys.c.revoke_time.is_(None))
                .values(revoke_time=now_us())
            )
            row = (await connection.execute(sa.select(api_keys).where(*which))).one_or_none()
        self._remembered.pop(name.id, None)
        if row is None:
            raise not_found(str(name), KINDS["keys"])
        return ApiKey(**row._mapping)

    async def proven(self, text: str) -> ApiKey:
        """The key of which `text` has the secret, unless it has expired or been revoked.

        Raises:
            ServiceError: CREDENTIALS_INVALID, CREDENTIALS_EXPIRED. DatabaseBusyError.
        """
        found = _SECRET.fullmatch(text)
        key = await self._find(found[2]) if found else None
        if found is None or key is None or not hmac.compare_digest(key.sha256, _digest(found[3])):
            raise ServiceError(
                "CREDENTIALS_INVALID",
                "This server knows no such API key: see that it is whole, and of this server.",
            )
        if key.revoke_time is not None:
            raise ServiceError(
                "CREDENTIALS_INVALID", f"The API key {key.id} was revoked; ask for another one."
            )
        if key.expire_time is not None and key.expire_time <= now_us():
            raise ServiceError(
                "CREDENTIALS_EXPIRED", f"The API key {key.id} has expired; ask for another one."
            )
        return key

    async def _find(self, identifier: str) -> ApiKey | None:
        now = time.monotonic()
        until, key = self._remembered.get(identifier, (0.0, None))
        if now < until:
            return key
        async with self._database.reading() as connection:
            select = sa.select(api_keys).where(api_keys.c.id == identifier)
            row = (await connection.execute(select)).one_or_none()
        key = None if row is None else ApiKey(**row._mapping)
        if len(self._remembered) >= _MOST_REMEMBERED:
            self._remembered.clear()
        self._remembered[identifier] = (now + _REMEMBERED_S, key)
        if key is not None:
            await self._note_use(key)
        return key

    async def _note_use(self, key: ApiKey) -> None:
        used = now_us()
        if key.use_time is not None and used - key.use_time < _USE_NOTED_US:
            return
        with contextlib.suppress(DatabaseBusyError):  # a note for people, which can wait
            async with self._database.updating() as connection:
                await connection.execute(
                    api_keys.update().where(api_keys.c.id == key.id).values(use_time=used)
                )


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _invalid(field: str, problem: str) -> ServiceError:
    return ServiceError("KEY_INVALID", f"{problem[0].upper()}{problem[1:]}.", field=field)
