"""When and how long a client tries again."""

from __future__ import annotations

import asyncio
import socket

import pytest
from hvp_client import (
    AbortedError,
    AsyncClient,
    Client,
    FailedPreconditionError,
    HvpError,
    InvalidArgumentError,
    ResourceExhaustedError,
    Retry,
    ServerUnreachableError,
    Timeout,
    UnavailableError,
)
from hvp_client._wire import Pauses, is_transient


@pytest.fixture
def silent_address() -> str:
    """An address at which nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (UnavailableError("m", reason="SERVER_DRAINING"), True),
        (UnavailableError("m", reason="WORKER_GROUP_LOST", retry_after_s=1), True),
        (ServerUnreachableError("m"), True),
        (ResourceExhaustedError("m", reason="QUEUE_FULL", retry_after_s=1), True),
        (ResourceExhaustedError("m", reason="VECTOR_MEMORY"), False),
        (AbortedError("m", reason="UPLOAD_SUPERSEDED"), False),
        (InvalidArgumentError("m", retry_after_s=1), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error: HvpError, transient: bool) -> None:
    assert is_transient(error) is transient


async def test_pauses_grow_and_end_with_the_last_error_when_patience_is_over() -> None:
    pauses = Pauses(Retry(initial_backoff_s=0.001, max_backoff_s=0.002), patience_s=0.05)
    error = UnavailableError("m")
    tries = 0
    with pytest.raises(UnavailableError) as caught:  # noqa: PT012 (the loop is what is tested)
        while True:
            tries += 1
            await pauses.after(error)
    assert caught.value is error
    assert tries > 5


async def test_a_pause_is_as_long_as_the_server_asks_for_or_there_is_none() -> None:
    pauses = Pauses(Retry(initial_backoff_s=0.001, max_backoff_s=0.002), patience_s=1.0)
    before = asyncio.get_running_loop().time()
    await pauses.after(UnavailableError("m", retry_after_s=0.05))
    assert asyncio.get_running_loop().time() - before >= 0.05
    with pytest.raises(UnavailableError):
        await pauses.after(UnavailableError("m", retry_after_s=60.0))


def test_backoff_doubles_up_to_its_bound() -> None:
    retry = Retry(initial_backoff_s=0.5, max_backoff_s=3.0)
    assert [retry.backoff_s(n) for n in (1, 2, 3, 4, 10_000)] == [0.5, 1.0, 2.0, 3.0, 3.0]


@pytest.mark.parametrize(
    "settings", [{"patience_s": -1}, {"initial_backoff_s": 0}, {"initial_backoff_s": 9}]
)
def test_senseless_retries_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Retry"):
        Retry(**settings)


@pytest.mark.parametrize("name", ["call_s", "compute_s", "silence_s"])
def test_senseless_timeouts_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Timeout(**{name: 0.0})


def test_an_address_where_nobody_answers_is_said_and_how_to_start_a_server(
    silent_address: str,
) -> None:
    with (
        Client(silent_address, retry=Retry(patience_s=0.3)) as client,
        pytest.raises(ConnectionError, match="hvp serve") as caught,
    ):
        client.jobs()
    assert isinstance(caught.value, ServerUnreachableError)
    assert caught.value.metadata == {"address": silent_address}


async def test_the_asynchronous_client_says_the_same(silent_address: str) -> None:
    async with AsyncClient(silent_address, retry=Retry(patience_s=0.0)) as client:
        with pytest.raises(ServerUnreachableError):
            await client.jobs()


def test_a_closed_client_says_that_it_is_closed(silent_address: str) -> None:
    client = Client(silent_address)
    client.close()
    client.close()
    with pytest.raises(FailedPreconditionError, match="closed"):
        client.jobs()
