"""Whether the server of this machine can be used, as an exit status for Docker and Kubernetes.

Kubernetes' own gRPC probes speak clear text alone. This one takes the server's certificate from
its file and believes that one, whoever signed it, so that it needs no authority and no key.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hvp_service.app.config import split_address

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - where a server listens
_ANSWER_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Ask the server of this machine for its health.

    Returns:
        0 if it serves, or with `--alive` if it answers at all, as it does while its ranks start
        anew; 1 otherwise, with the reason on standard error.
    """
    parser = argparse.ArgumentParser(description="Exit with 0 if the server here can be used.")
    parser.add_argument("--address", default=os.environ.get("HVP_ADDRESS", "127.0.0.1:8471"))
    parser.add_argument(
        "--tls-certificate",
        type=Path,
        default=os.environ.get("HVP_TLS_CERTIFICATE"),
        help="the server's own certificate; HVP_CLIENT_CERTIFICATE and HVP_CLIENT_KEY are shown",
    )
    parser.add_argument("--alive", action="store_true", help="any answer will do")
    given = parser.parse_args(argv)
    try:
        status = ask(given.address, given.tls_certificate)
    except (OSError, ValueError, grpc.RpcError) as error:
        words = error.details() if isinstance(error, grpc.Call) else str(error)
        print(f"{given.address}: {words}", file=sys.stderr)
        return 1
    print(status)
    return 0 if given.alive or status == "SERVING" else 1


def ask(address: str, certificate: Path | None) -> str:
    """What a server of this machine says of itself, such as SERVING.

    Args:
        address: HOST:PORT that the server listens on; all of the machine's are reached by its
            loopback.
        certificate: PEM file of the server's certificate, if it has one.

    Raises:
        OSError: A file cannot be read.
        ValueError: The address or the certificate is none.
        grpc.RpcError: There is no answer.
    """
    host, port = split_address(address)
    host = _EVERYWHERE.get(host, host)
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    options: list[tuple[str, int | str]] = [("grpc.enable_http_proxy", 0)]
    if certificate is None:
        channel = grpc.insecure_channel(target, options)
    else:
        own = certificate.read_bytes()
        options.append(("grpc.ssl_target_name_override", _name_in(own)))
        channel = grpc.secure_channel(target, _credentials(own), options)
    with channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=_ANSWER_S
        )
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _credentials(own: bytes) -> grpc.ChannelCredentials:
    shown = [os.environ.get(f"HVP_CLIENT_{part}") for part in ("KEY", "CERTIFICATE")]
    key, chain = [Path(each).read_bytes() if each else None for each in shown]
    return grpc.ssl_channel_credentials(own, key, chain)


def _name_in(certificate: bytes) -> str:
    """A name that a certificate is of, whichever."""
    found = x509.load_pem_x509_certificate(certificate)
    try:
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise ValueError("the certificate names no host (subjectAltName)") from None
    return str(names[0].value)


if __name__ == "__main__":
    sys.exit(main())
