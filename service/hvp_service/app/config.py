"""Settings of a server, and what they have to satisfy; `settings.py` reads them."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal, Self

from hvp_workers.backend import Compile, Schedule
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from hvp_service.app.logs import Format, Level
from hvp_service.storage.postgres import split_url

MEBIBYTE = 1 << 20


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT` or `[HOST]:PORT`.

    Raises:
        ValueError: `address` has another form.
    """
    host, separator, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"write an IPv6 host in brackets: got {address!r}")
    if not separator or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"an address is HOST:PORT with a port of 0 to 65535: got {address!r}")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class ServerConfig(BaseSettings):
    """The settings of a server; times in seconds.

    Attributes:
        address: HOST:PORT to listen on; port 0 takes a free one. Other machines can reach a server
            only with a certificate, and with credentials or certificates of its clients.
        tls_certificate: PEM file of the server's certificate, with those between it and its
            authority; then connections are encrypted.
        tls_key: PEM file of its private key, without a passphrase.
        tls_client_ca: PEM file of the authorities whose clients are let in; then connections of
            others are refused.
        require_credentials: Whether every call has to show an API key or a token. By default yes,
            unless only this machine, or only clients with certificates, can reach the server.
        jwt_keys: File of the public keys of an issuer of tokens, as a JSON web key set or in PEM
            form; then its tokens are believed beside API keys. It is read again when it changes.
        jwt_issuer: The issuer that tokens must name.
        jwt_audience: The audience that tokens must name.
        audit_log: File of who did what; by default `audit.jsonl` in the state folder.
        metrics_address: HOST:PORT at which Prometheus finds the server's figures, over HTTP without
            encryption or credentials: keep it on this machine or a private network. A port alone is
            one of this machine. Without it there are none.
        state_dir: Folder of uploads, rows and vectors; one server at a time uses it, unless the
            rows are elsewhere.
        database_url: URL of a PostgreSQL database for the rows, which other servers may use at the
            same time, with the same folder. Without it they are in an SQLite file in the folder.
            docs/database.md says more.
        workers: Number of ranks in the worker group.
        device: Device that the ranks compute on.
        backend: `ray` for one process per rank, `inprocess` for one rank in this process.
        compile: Whether the ranks compile a model's blocks at its first product; `auto` on GPUs.
        schedule: How much a product keeps of its forward pass for the backward pass: `lean` keeps
            little, `fast` more, `cached` also keeps it for the next product; `auto` is the fastest
            that memory allows.
        grace_s: Time that running calls have to end after SIGTERM.
        max_chunk_bytes: Largest chunk in an upload; near 1 MiB Python's gRPC is fastest.
        max_message_bytes: gRPC's limit for every method; it bounds the memory of a request.
        max_waiting_calls: Most calls at once that wait for something to happen, as watches of jobs
            do; one more is refused with a delay.
        max_working_calls: Most calls at once that bring bytes or wait for the ranks; one more is
            refused with a delay. Calls that answer at once always have room beside both.
        commit_interval_bytes: An upload loses at most this much to a crash.
        upload_ttl_s: An upload that has not ended after this time is dropped.
        upload_silence_s: How long after its start or its last chunk an upload keeps the room on the
            disk that is set aside for it; later it has to find room again.
        upload_share: Share of the free disk that one project's open uploads may have set aside.
        blob_grace_s: How long a blob of which nothing is made stays after a caller has last been
            told that it is here.
        request_id_ttl_s: How long a request id is remembered.
        session_ttl_s: How long a client's session lives after the client was last heard of, unless
            the client asks for another time; its vectors go with it.
        max_session_ttl_s: Longest such time that a client may ask for.
        vector_ttl_s: How long a vector that was made without a session lives after its last use.
        max_queued_jobs: Number of queued jobs beyond which CreateJob is refused.
        max_attempts: Number of runs of a job that loses its server or ranks each time.
        job_retention_s: How long an ended job is remembered; then it is deleted with its events,
            and with its eigenvectors but for those that are kept.
        lease_s: Age of a running job's lease beyond which the job may be claimed again.
        heartbeat_s: Interval between heartbeats of a watch stream.
        progress_interval_s: Progress is stored at most this often within a stage.
        log_level: Least level of the lines that the log has; libraries' are warnings at least.
        log_format: `json` for one object a line, `console` for people; `auto` is for people where
            the log goes to a terminal.
    """

    model_config = SettingsConfigDict(
        env_prefix="HVP_", env_ignore_empty=True, extra="forbid", frozen=True
    )

    address: str = "127.0.0.1:8471"
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    require_credentials: bool | None = None
    jwt_keys: Path | None = None
    jwt_issuer: str = ""
    jwt_audience: str = ""
    audit_log: Path | None = None
    metrics_address: str | None = None
    state_dir: Path = Path("hvp-state")
    database_url: SecretStr | None = None
    workers: int = Field(default=2, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"
    backend: Literal["ray", "inprocess"] = "ray"
    compile: Compile = "auto"
    schedule: Schedule = "auto"
    grace_s: float = Field(default=10.0, ge=0)
    max_chunk_bytes: int = Field(default=MEBIBYTE, ge=1, le=3 * MEBIBYTE)
    max_message_bytes: int = Field(default=4 * MEBIBYTE, ge=MEBIBYTE)
    max_waiting_calls: int = Field(default=500, ge=1)
    max_working_calls: int = Field(default=500, ge=1)
    commit_interval_bytes: int = Field(default=16 * MEBIBYTE, ge=1)
    upload_ttl_s: float = Field(default=7 * 24 * 3600.0, gt=0)
    upload_silence_s: float = Field(default=300.0, gt=0)
    upload_share: float = Field(default=0.9, gt=0, le=1)
    blob_grace_s: float = Field(default=24 * 3600.0, ge=0)
    request_id_ttl_s: float = Field(default=48 * 3600.0, ge=24 * 3600.0)
    session_ttl_s: float = Field(default=120.0, ge=1)
    max_session_ttl_s: float = Field(default=24 * 3600.0, ge=1)
    vector_ttl_s: float = Field(default=24 * 3600.0, gt=0)
    max_queued_jobs: int = Field(default=1000, ge=1)
    max_attempts: int = Field(default=3, ge=1)
    job_retention_s: float = Field(default=180 * 24 * 3600.0, gt=0)
    lease_s: float = Field(default=60.0, gt=0)
    heartbeat_s: float = Field(default=15.0, gt=0)
    progress_interval_s: float = Field(default=0.2, ge=0)
    log_level: Level = "info"
    log_format: Format = "auto"

    @property
    def credentials_required(self) -> bool:
        """Whether a call without an API key or a token is refused."""
        if self.require_credentials is not None:
            return self.require_credentials
        host, _ = split_address(self.address)
        return self.tls_client_ca is None and not is_loopback(host)

    @field_validator("address")
    @classmethod
    def _well_formed(cls, address: str) -> str:
        split_address(address)
        return address

    @field_validator("metrics_address")
    @classmethod
    def _on_this_machine(cls, address: str | None) -> str | None:
        if address is None:
            return None
        address = f"127.0.0.1:{address}" if ":" not in address else address
        split_address(address)
        return address

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        _, port = split_address(self.address)
        if self.metrics_address is not None and port:
            _, other = split_address(self.metrics_address)
            if other == port:
                raise ValueError(f"address and metrics_address have one port, {port}: give another")
        return self

    @field_validator("database_url")
    @classmethod
    def _a_url(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            split_url(url.get_secret_value())
        return url

    @model_validator(mode="after")
    def _closed_to_strangers(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_certificate"
            raise ValueError(f"a certificate and its key go together: {missing} is missing")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs a server's certificate: set tls_certificate too")
        if self.jwt_keys is not None and not (self.jwt_issuer and self.jwt_audience):
            raise ValueError("jwt_keys needs jwt_issuer and jwt_audience, which tokens must name")
        if self.jwt_keys is None and (self.jwt_issuer or self.jwt_audience):
            raise ValueError("jwt_issuer and jwt_audience need jwt_keys, the issuer's public keys")
        host, _ = split_address(self.address)
        if is_loopback(host):
            return self
        if self.tls_certificate is None:
            raise ValueError(
                f"refusing to listen on {host!r} without TLS: anyone on the way could read models "
                "and credentials. Give tls_certificate and tls_key, or listen on 127.0.0.1 and "
                "reach it through an SSH tunnel"
            )
        if self.tls_client_ca is None and not self.credentials_required:
            raise ValueError(
                f"refusing to listen on {host!r} without credentials: anyone who reaches the port "
                "could read models and run jobs. Leave require_credentials on, or give "
                "tls_client_ca"
            )
        return self

    @model_validator(mode="after")
    def _one_rank_in_process(self) -> Self:
        if self.backend == "inprocess" and self.workers != 1:
            raise ValueError(
                f"the in-process backend has one rank, not {self.workers}: set workers to 1"
            )
        return self
