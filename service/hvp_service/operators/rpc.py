"""hvp.v1.OperatorService."""

# ruff: noqa: N802, D102  (gRPC gives the methods their names, the protos their description)

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hvp_protos.v1 import operator_pb2 as pb
from hvp_protos.v1 import operator_pb2_grpc

from hvp_service.app.dependencies import Dependencies
from hvp_service.calls.messages import enum_name
from hvp_service.checkpoints.messages import parameter_message
from hvp_service.operators import service as operators
from hvp_service.operators.messages import operator_message, operator_value
from hvp_service.operators.resolver import ResolvedOperator
from hvp_service.vectors.messages import vector_message
from hvp_service.vectors.rows import Outputs


class OperatorServicer(operator_pb2_grpc.OperatorServiceServicer):
    """The RPCs on operators: losses, gradients, quadratic forms and products."""

    def __init__(self, deps: Dependencies):
        self._deps = deps

    async def DescribeOperator(
        self, request: pb.DescribeOperatorRequest, context: Any
    ) -> pb.DescribeOperatorResponse:
        ref = operator_value(request.operator)
        resolved, micro_batch_size = await operators.describe(self._deps, ref)
        filled = replace(resolved.filled(ref), micro_batch_size=micro_batch_size)
        return pb.DescribeOperatorResponse(
            operator=operator_message(filled),
            num_parameters=resolved.num_parameters,
            domain_shape=_shape(resolved, resolved.domain),
            codomain_shape=_shape(resolved, resolved.codomain),
            parameters=(
                [parameter_message(tensor) for tensor in resolved.parameters]
                if resolved.argument is None
                else []
            ),
        )

    async def EvaluateLoss(
        self, request: pb.EvaluateLossRequest, context: Any
    ) -> pb.EvaluateLossResponse:
        loss = await operators.evaluate_loss(self._deps, operator_value(request.operator))
        return pb.EvaluateLossResponse(loss=loss.value, num_targets=loss.num_targets)

    async def ComputeGradient(
        self, request: pb.ComputeGradientRequest, context: Any
    ) -> pb.ComputeGradientResponse:
        gradient = await operators.compute_gradient(
            self._deps, operator_value(request.operator), request.session
        )
        return pb.ComputeGradientResponse(gradient=vector_message(gradient))

    async def EvaluateForms(
        self, request: pb.EvaluateFormsRequest, context: Any
    ) -> pb.EvaluateFormsResponse:
        values = await operators.evaluate_forms(
            self._deps,
            operator_value(request.operator),
            enum_name(pb.EvaluateFormsRequest.Form, request.form),
            request.vectors,
        )
        return pb.EvaluateFormsResponse(values=values)

    async def EvaluateLossAlong(
        self, request: pb.EvaluateLossAlongRequest, context: Any
    ) -> pb.EvaluateLossAlongResponse:
        losses = await operators.losses_along(
            self._deps,
            operator_value(request.operator),
            request.directions,
            tuple(request.coefficients),
        )
        return pb.EvaluateLossAlongResponse(losses=losses)

    async def ApplyOperator(
        self, request: pb.ApplyOperatorRequest, context: Any
    ) -> pb.ApplyOperatorResponse:
        products = await operators.apply(
            self._deps,
            operator_value(request.operator),
            request.vectors,
            request.session,
            transposed=request.transposed,
        )
        return pb.ApplyOperatorResponse(products=[vector_message(product) for product in products])


def _shape(resolved: ResolvedOperator, space: Outputs | None) -> tuple[int, ...]:
    return (resolved.num_parameters,) if space is None else space.shape
