"""Where a client sends to, and what it does about a server that takes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from hvp_client import AsyncClient, Client, InvalidArgumentError, Retry, Timeout, UnavailableError
from hvp_client._address import is_on_this_machine
from hvp_client._channels import Way
from hvp_client._wire import Wire
from hvp_protos.chunks import encoded
from hvp_protos.v1 import blob_pb2

KIB = 1 << 10


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1:8471", "127.9.9.9:1", "localhost:8471", "LOCALHOST:1", "localhost"),
        *("[::1]:8471", "::1", "dns:///localhost:1", "dns:127.0.0.1:1", "ipv4:127.0.0.1:1"),
        *("ipv6:[::1]:1", "unix:/run/hvp.sock", "unix:///run/hvp.sock"),
    ],
)
def test_what_stays_on_this_machine_is_told(address: str) -> None:
    assert is_on_this_machine(address)


@pytest.mark.parametrize(
    "address",
    [
        *("10.1.2.3:8471", "0.0.0.0:1", "example.org:8471", "localhost.example.org:1"),
        *("[2001:db8::1]:1", "dns:///example.org:1", "ipv4:10.0.0.1:1"),
        "dns://127.0.0.1/example.org:1",
    ],
)
def test_an_address_elsewhere_is_refused_before_anything_is_sent(address: str) -> None:
    assert not is_on_this_machine(address)
    for kind in (Client, AsyncClient):
        with pytest.raises(InvalidArgumentError, match="ssh -L") as refusal:
            kind(address)
        assert (refusal.value.reason, refusal.value.field) == ("CLEARTEXT_REFUSED", "address")


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("http://127.0.0.1:8471/", "127.0.0.1:8471"),
        ("localhost", "localhost:8471"),
        ("127.0.0.1", "127.0.0.1:8471"),
        ("[::1]", "[::1]:8471"),
    ],
)
def test_an_address_as_people_have_it_is_read(given: str, address: str) -> None:
    with Client(given) as client:
        assert client.address == address


@pytest.mark.parametrize(
    "address",
    [
        *("", ":1", "8471", "nonsense", "local host:1", "127.0.0.1:", "localhost:99999"),
        *(
            "2001:db8::1",
            "https://",
            "https://a b:1",
            "xds:///127.0.0.1",
            "ipv4:127.0.0.1:1,10.0.0.1:1",
        ),
    ],
)
def test_what_is_no_address_is_called_so(address: str) -> None:
    with pytest.raises(InvalidArgumentError, match="HOST:PORT") as refusal:
        Client(address)
    assert (refusal.value.reason, refusal.value.field) == ("ADDRESS_INVALID", "address")


def test_https_asks_for_encryption_without_certificates_of_ones_own() -> None:
    way = Way.to("https://hvp.example.org:443/", None)
    assert way.address == "hvp.example.org:443"
    assert way.credentials is not None
    assert Way.to("127.0.0.1:1", None).credentials is None


class Sink(grpc.GenericRpcHandler):  # type: ignore[type-arg] # generic in its stubs alone
    """Takes some messages of a stream, and then none for ever or until it is told to."""

    def __init__(self, num_taken: int):
        self.num_taken = num_taken
        self.going_on = asyncio.Event()

    def service(self, handler_call_details: Any) -> Any:
        async def upload(requests: AsyncIterator[bytes], context: Any) -> bytes:
            for _ in range(self.num_taken):
                await anext(aiter(requests))
            await self.going_on.wait()
            async for _ in requests:
                pass
            return blob_pb2.UploadBlobResponse().SerializeToString()

        return grpc.stream_unary_rpc_method_handler(upload)


@pytest.fixture
async def sink() -> AsyncIterator[tuple[Sink, Wire]]:
    server = grpc.aio.server()
    sink = Sink(num_taken=2)
    server.add_generic_rpc_handlers((sink,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    wire = Wire(Way.to(f"127.0.0.1:{port}", None), Timeout(), Retry())
    yield sink, wire
    await wire.close()
    await server.stop(None)


def messages(num: int) -> AsyncIterator[bytes]:
    async def stream() -> AsyncIterator[bytes]:
        for index in range(num):
            yield encoded(blob_pb2.UploadBlobRequest(write_offset=index), bytes(512 * KIB))

    return stream()


async def send(wire: Wire, num: int, silence_s: float, answer_s: float) -> None:
    await wire.client_stream(
        "BlobService/UploadBlob",
        messages(num),
        blob_pb2.UploadBlobResponse,
        silence_s=silence_s,
        answer_s=answer_s,
    )


async def test_an_upload_of_which_the_server_takes_nothing_more_is_broken_off(
    sink: tuple[Sink, Wire],
) -> None:
    _, wire = sink
    with pytest.raises(UnavailableError) as failure:
        await send(wire, 400, silence_s=0.3, answer_s=600.0)
    assert failure.value.reason == "STREAM_SILENT"


async def test_an_upload_that_is_never_answered_is_broken_off(sink: tuple[Sink, Wire]) -> None:
    _, wire = sink
    with pytest.raises(UnavailableError) as failure:
        await send(wire, 2, silence_s=600.0, answer_s=0.3)
    assert failure.value.reason == "STREAM_SILENT"


async def test_an_upload_that_goes_on_is_never_too_long(sink: tuple[Sink, Wire]) -> None:
    server, wire = sink
    server.going_on.set()
    await send(wire, 40, silence_s=60.0, answer_s=60.0)
