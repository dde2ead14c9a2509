"""The stores, settings and ranks that handlers work with, made once when the server starts."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from importlib.metadata import version

from hvp_workers.backend import Backend

from hvp_service.app.config import ServerConfig
from hvp_service.app.drain import Drain
from hvp_service.app.sweeper import Sweeper
from hvp_service.batches.store import BatchStore
from hvp_service.blobs.store import BlobStore
from hvp_service.calls.paging import Pager
from hvp_service.calls.request_log import RequestLog
from hvp_service.checkpoints.store import CheckpointStore
from hvp_service.group.supervisor import GroupSupervisor
from hvp_service.identity.audit import AuditLog
from hvp_service.identity.authentication import Authenticator
from hvp_service.identity.keys import KeyStore
from hvp_service.jobs.dispatcher import Dispatcher
from hvp_service.jobs.sql_store import WORK, SqlJobStore
from hvp_service.jobs.store import JobStore
from hvp_service.operators.activations import Activations
from hvp_service.operators.messages import SYMMETRIC
from hvp_service.operators.resolver import OperatorResolver
from hvp_service.sessions.reaper import Reaper
from hvp_service.sessions.store import SessionStore
from hvp_service.storage.clock import SECOND, now_us
from hvp_service.storage.database import Database, open_database
from hvp_service.storage.state_dir import StateDir
from hvp_service.uploads.store import UploadStore
from hvp_service.vectors.store import VectorStore

# Rows of lost products are kept this long, so that their callers learn what became of them.
LOST_PRODUCT_S = 24 * 3600


@dataclass(frozen=True, kw_only=True)
class Dependencies:
    """Everything a handler may use."""

    config: ServerConfig
    state_dir: StateDir
    database: Database
    request_log: RequestLog
    keys: KeyStore
    authenticator: Authenticator
    audit: AuditLog
    blobs: BlobStore
    uploads: UploadStore
    checkpoints: CheckpointStore
    batches: BatchStore
    vectors: VectorStore
    sessions: SessionStore
    reaper: Reaper
    operators: OperatorResolver
    jobs: JobStore
    dispatcher: Dispatcher
    group: GroupSupervisor
    sweeper: Sweeper
    drain: Drain
    version: str
    start_time: int  # microseconds

    async def close(self) -> None:
        """End the dispatcher, the ranks, uploads' steps and the database, in this order."""
        self.drain.begin()
        await self.reaper.stop()
        await self.sweeper.stop()
        await self.dispatcher.stop(self.config.grace_s)
        await self.group.close()
        await self.vectors.close()
        await self.checkpoints.close()
        await self.uploads.close()
        await self.blobs.close()
        await self.database.close()
        self.audit.close()


async def open_dependencies(
    config: ServerConfig, state_dir: StateDir, backend: Backend
) -> Dependencies:
    """Open the state, settle what an earlier server left, and start the ranks.

    Raises:
        DatabaseRefusedError: The database is not to be had, or another version's.
        ServiceError: STATE_DIR_BUSY, DATABASE_UNAVAILABLE.
        BackendError: The ranks do not start.
    """
    database = await open_database(config.database_url or state_dir.database)
    group = GroupSupervisor(backend)
    audit: AuditLog | None = None
    try:
        if state_dir.is_shared:
            await database.keep_folder(state_dir.identity(), state_dir.root)
        pager = Pager(database.page_token_key)
        blobs = BlobStore(database, state_dir, pager, grace_s=config.blob_grace_s)
        uploads = UploadStore(database, state_dir, blobs, config)
        checkpoints = CheckpointStore(database, state_dir, blobs, pager, group)
        batches = BatchStore(database, blobs, pager)
        vectors = VectorStore(database, state_dir, pager, group, ttl_s=config.vector_ttl_s)
        sessions = SessionStore(database, vectors, config)
        reaper = Reaper(sessions)
        operators = OperatorResolver(
            checkpoints, batches, state_dir, backend.device, Activations(group), SYMMETRIC
        )
        owner = uuid.uuid4().hex
        jobs = SqlJobStore(database, pager, owner=owner, lease_s=config.lease_s)
        request_log = RequestLog(database, owner)
        keys = KeyStore(database)
        authenticator = Authenticator(config, keys)
        audit = AuditLog(config.audit_log or state_dir.audit_log)
        sweeper = Sweeper(config, database, uploads, blobs, checkpoints, request_log, jobs, vectors)
        await sweeper.sweep()
        await sessions.recover()
        await vectors.forget_products(now_us() - LOST_PRODUCT_S * SECOND)
        await group.start()
        await jobs.recover()
        dispatcher = Dispatcher(config, jobs, group, operators, vectors)
        database.signals.call(WORK, dispatcher.notice_work)
        dispatcher.start()
        sweeper.start()
        reaper.start()
    except BaseException:
        await group.close()
        await database.close()
        if audit is not None:
            audit.close()
        raise
    return Dependencies(
        config=config,
        state_dir=state_dir,
        database=database,
        request_log=request_log,
        keys=keys,
        authenticator=authenticator,
        audit=audit,
        blobs=blobs,
        uploads=uploads,
        checkpoints=checkpoints,
        batches=batches,
        vectors=vectors,
        sessions=sessions,
        reaper=reaper,
        operators=operators,
        jobs=jobs,
        dispatcher=dispatcher,
        group=group,
        sweeper=sweeper,
        drain=Drain(),
        version=version("hvp"),
        start_time=now_us(),
    )
