"""Finds out who calls, refuses what they may not do, and notes what was done."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from hvp_workers.backend import BackendError

from hvp_service.calls.around import SERVED_PREFIX, AroundInterceptor
from hvp_service.calls.errors import ServiceError
from hvp_service.calls.limits import pool_of
from hvp_service.calls.record import current_call
from hvp_service.identity.audit import AuditLog
from hvp_service.identity.authentication import Authenticator
from hvp_service.identity.caller import Call, Identity, called_by
from hvp_service.identity.roles import role_of


class IdentityInterceptor(AroundInterceptor):
    """Runs each call as somebody's, with their projects and role, and writes the audit log.

    It stands inside of the error interceptor, so that refusals have their details, and outside of
    all others: a stranger takes no place and learns nothing.
    """

    def __init__(self, authenticator: Authenticator, audit: AuditLog):
        self._authenticator = authenticator
        self._audit = audit

    @contextlib.asynccontextmanager
    async def around(
        self, method: str, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[None]:
        """See the class."""
        short = method.removeprefix(SERVED_PREFIX)
        role = role_of(short)
        # gRPC is asked about a connection while there is one: afterwards it ends the process.
        peer = context.peer()
        identity: Identity | None = None
        call: Call | None = None
        outcome = "OK"
        try:
            authorization = [
                value if isinstance(value, str) else value.decode(errors="replace")
                for key, value in context.invocation_metadata() or ()
                if key == "authorization"
            ]
            identity = await self._authenticator.identity(
                authorization, context.auth_context() or {}
            )
            if not identity.may(role):
                raise ServiceError(
                    "ROLE_REQUIRED",
                    f"{short} takes the role {role!r}, and these credentials have "
                    f"{identity.role!r}: ask for others.",
                    metadata={"role": role},
                )
            with called_by(identity) as call:
                if pool_of(method) == "prompt":
                    yield
                else:
                    async with self._authenticator.while_believed(authorization):
                        yield
        except (ServiceError, BackendError) as error:
            outcome = error.reason
            raise
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "CANCELLED"
            raise
        except Exception:
            outcome = "INTERNAL"
            raise
        finally:
            refused = outcome not in ("OK", "CANCELLED")
            if role != "read" or refused:
                self._audit.note(
                    identity,
                    short,
                    peer=peer,
                    names=[] if call is None else list(call.names),
                    outcome=outcome,
                    call_id=current_call().request_id,
                )
