"""Certificates for tests."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import final

import trustme
from hvp_client import Tls

YESTERDAY = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)


@final
@dataclass
class Files:
    """Certificates of two authorities, as files.

    Attributes:
        folder: Where they are.
        ours: The authority of the server and of the clients that it lets in.
        other: Another one.
    """

    folder: Path
    ours: trustme.CA
    other: trustme.CA

    def of(
        self, ca: trustme.CA, name: str, *, valid_until: datetime.datetime | None = None
    ) -> tuple[Path, Path]:
        """Files of a new certificate of an authority, and of its key."""
        issued = ca.issue_cert(name, "127.0.0.1", "localhost", not_after=valid_until)
        made = len(list(self.folder.iterdir()))
        chain, key = self.folder / f"{made}.pem", self.folder / f"{made}.key"
        chain.write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
        key.write_bytes(issued.private_key_pem.bytes())
        return chain, key

    def authority(self, ca: trustme.CA) -> Path:
        """File of an authority's certificate."""
        path = self.folder / f"ca-{id(ca)}.pem"
        path.write_bytes(ca.cert_pem.bytes())
        return path

    def client(
        self, ca: trustme.CA, believed: trustme.CA, *, valid_until: datetime.datetime | None = None
    ) -> Tls:
        """Settings of a client with a certificate of one authority that believes another one."""
        chain, key = self.of(ca, "someone.example", valid_until=valid_until)
        return Tls(ca=self.authority(believed), certificate=chain, key=key)
