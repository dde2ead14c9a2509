"""Spaces of vectors, as requests name them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from hvp_protos.v1 import vector_pb2

from hvp_client._session import Session, new_request_id


@final
@dataclass(frozen=True, kw_only=True)
class VectorSpace:
    """What vectors can be added to.

    Attributes:
        checkpoint: Name of the checkpoint.
        dtype: `float32` or `float64`.
        data_batch: Name of the batch on which they are outputs; "" of parameter space.
    """

    checkpoint: str
    dtype: str
    data_batch: str = ""

    def request(self, session: Session, owner: str) -> vector_pb2.CreateVectorRequest:
        """A request for one of its vectors, without what it is made of."""
        return vector_pb2.CreateVectorRequest(
            parent=session.parent,
            request_id=new_request_id(),
            checkpoint=self.checkpoint,
            dtype=self.dtype,
            session=owner,
            data_batch=self.data_batch,
        )
