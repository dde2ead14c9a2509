"""Spaces of vectors, as requests name them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

from hvp_protos.v1 import operator_pb2, vector_pb2

from hvp_client._session import Session, new_request_id


@final
@dataclass(frozen=True, kw_only=True)
class VectorSpace:
    """What vectors can be added to.

    Attributes:
        checkpoint: Name of the checkpoint.
        dtype: `float32` or `float64`.
        shape: `(n,)`, or of outputs `(sequences, positions, vocabulary)`, row-major.
        data_batch: Name of the batch on which they are outputs; "" of parameter space.
    """

    checkpoint: str
    dtype: str
    shape: tuple[int, ...]
    data_batch: str = ""

    @property
    def num_elements(self) -> int:
        """The length of its vectors."""
        return math.prod(self.shape)

    @staticmethod
    def of_operator(
        description: operator_pb2.DescribeOperatorResponse,
    ) -> tuple[VectorSpace, VectorSpace]:
        """The domain and the codomain of an operator."""
        spec = description.operator
        of_outputs = spec.kind == operator_pb2.OperatorSpec.KIND_JACOBIAN
        domain = VectorSpace(
            checkpoint=spec.checkpoint, dtype=spec.dtype, shape=tuple(description.domain_shape)
        )
        codomain = replace(
            domain,
            shape=tuple(description.codomain_shape),
            data_batch=spec.data_batch if of_outputs else "",
        )
        return domain, codomain

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
