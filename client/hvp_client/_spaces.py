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
        module: Submodule whose output the vectors have; "" for the model's own outputs.
        of_input: They have what the submodule is given.
    """

    checkpoint: str
    dtype: str
    shape: tuple[int, ...]
    data_batch: str = ""
    parameters: tuple[str, ...] = ()
    module: str = ""
    of_input: bool = False

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
        parameters = VectorSpace(
            checkpoint=spec.checkpoint,
            dtype=spec.dtype,
            shape=tuple(description.domain_shape),
            parameters=tuple(spec.parameters),
        )
        if spec.kind != operator_pb2.OperatorSpec.KIND_JACOBIAN:
            return parameters, replace(parameters, shape=tuple(description.codomain_shape))
        codomain = replace(
            parameters,
            shape=tuple(description.codomain_shape),
            data_batch=spec.data_batch,
            parameters=(),
            module=spec.output_module,
        )
        domain = parameters
        if spec.own_input or spec.input_module:
            domain = replace(
                codomain,
                shape=tuple(description.domain_shape),
                module=spec.input_module or spec.output_module,
                of_input=spec.own_input,
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
            module=self.module,
            of_input=self.of_input,
        )
