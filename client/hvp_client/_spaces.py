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
    """A space of vectors: vectors of one space can be added to each other.

    Attributes:
        checkpoint: Name of the checkpoint.
        dtype: Dtype of the vectors, `float32` or `float64`.
        shape: `(n,)`, or of outputs `(sequences, positions, vocabulary)`, row-major.
        data_batch: Name of the batch whose outputs the vectors have; "" in parameter space.
        parameters: Patterns that select the parameters that the vectors have; () for all.
    """

    checkpoint: str
    dtype: str
    shape: tuple[int, ...]
    data_batch: str = ""
    parameters: tuple[str, ...] = ()

    @property
    def num_elements(self) -> int:
        """Number of elements of a vector of the space."""
        return math.prod(self.shape)

    @staticmethod
    def of_operator(
        description: operator_pb2.DescribeOperatorResponse,
    ) -> tuple[VectorSpace, VectorSpace]:
        """The domain and the codomain of an operator."""
        spec = description.operator
        of_outputs = spec.kind == operator_pb2.OperatorSpec.KIND_JACOBIAN
        domain = VectorSpace(
            checkpoint=spec.checkpoint,
            dtype=spec.dtype,
            shape=tuple(description.domain_shape),
            parameters=tuple(spec.parameters),
        )
        codomain = replace(
            domain,
            shape=tuple(description.codomain_shape),
            data_batch=spec.data_batch if of_outputs else "",
            parameters=() if of_outputs else domain.parameters,
        )
        return domain, codomain

    def request(self, session: Session, owner: str) -> vector_pb2.CreateVectorRequest:
        """A request for a vector of the space, without the source that the vector is made of."""
        return vector_pb2.CreateVectorRequest(
            parent=session.parent,
            request_id=new_request_id(),
            checkpoint=self.checkpoint,
            dtype=self.dtype,
            session=owner,
            data_batch=self.data_batch,
            parameters=self.parameters,
        )
