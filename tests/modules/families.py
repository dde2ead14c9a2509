"""The families of that package: one that gives its own loss, one with outputs, and wrong ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from hvp_batches.schema import BatchField
from hvp_core.losses.loss import CrossEntropy, Loss
from hvp_core.model.modules import ModuleFamily
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Chain(nn.Module):
    """½ Σ (θᵢ − θᵢ₊₁)² with zeros at both ends: the 1-D Laplacian is its Hessian."""

    def __init__(self, length: int):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(length))

    def forward(self, x: Tensor) -> Tensor:
        ends = self.theta[0].square() + self.theta[-1].square()
        return ((self.theta[1:] - self.theta[:-1]).square().sum() + ends) / 2


class Laplacian(ModuleFamily):
    """Rows carry nothing: the loss is of the parameters alone."""

    def module(self, config: Mapping[str, Any]) -> nn.Module:
        return Chain(config["length"]).eval()

    def fields(self, config: Mapping[str, Any]) -> Sequence[BatchField]:
        return [BatchField(name="x", kind="number", dims=("n",))]


class Net(nn.Module):
    """Logits of two inputs; a buffer is part of the checkpoint."""

    shift: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, 3)
        self.register_buffer("shift", torch.zeros(width))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        hidden: Tensor = self.first(x) * scale[:, None] + self.shift
        logits: Tensor = self.last(torch.tanh(hidden))
        return logits


class OwnNet(Net):
    """The same, with the loss inside."""

    def forward(self, x: Tensor, scale: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return cross_entropy(super().forward(x, scale), y)


class ScaledMlp(ModuleFamily):
    """Cross-entropy of logits."""

    loss: ClassVar[Loss | None] = CrossEntropy()
    targets = "y"
    outputs = ("n", "3")
    net: type[nn.Module] = Net

    def module(self, config: Mapping[str, Any]) -> nn.Module:
        return self.net(config["width"]).eval()

    def fields(self, config: Mapping[str, Any]) -> Sequence[BatchField]:
        return [
            BatchField(name="x", kind="number", dims=("n", "4")),
            BatchField(name="scale", kind="number", dims=("n",)),
            BatchField(name="y", kind="integer", dims=("n",), minimum=0, maximum=2, ignored=-100),
        ]


class OwnMlp(ScaledMlp):
    """The loss inside, and every row counts."""

    loss = None
    net = OwnNet

    def fields(self, config: Mapping[str, Any]) -> Sequence[BatchField]:
        return [replace(each, ignored=None) for each in super().fields(config)]


class Tied(Net):
    """One matrix, used twice."""

    def __init__(self, width: int):
        super().__init__(width)
        self.middle, self.again = nn.Linear(width, width), nn.Linear(width, width)
        self.again.weight = self.middle.weight

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        hidden: Tensor = torch.tanh(self.first(x) * scale[:, None] + self.shift)
        logits: Tensor = self.last(torch.tanh(self.again(torch.tanh(self.middle(hidden)))))
        return logits


class TiedMlp(ScaledMlp):
    net = Tied


class OfTokensNames(ScaledMlp):
    """Whose fields have the names of a language model's, and hold nothing of the kind."""

    targets = "labels"

    def fields(self, config: Mapping[str, Any]) -> Sequence[BatchField]:
        names = ("input_ids", "attention_mask", "labels")
        fields = super().fields(config)
        return [replace(each, name=name) for name, each in zip(names, fields, strict=True)]


class InTrainMode(ScaledMlp):
    def module(self, config: Mapping[str, Any]) -> nn.Module:
        return Net(config["width"])


class _OfADict(Net):
    def forward(self, x: Tensor, scale: Tensor) -> Any:
        return {"logits": super().forward(x, scale)}


class OfADict(ScaledMlp):
    net = _OfADict


class _OfNoRows(Net):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x, scale).mean(0)


class OfNoRows(ScaledMlp):
    net = _OfNoRows


class _OfWhatCounts(OwnNet):
    def forward(self, x: Tensor, scale: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return cross_entropy(Net.forward(self, x, scale), y, ignore_index=-100)


class OfWhatCounts(OwnMlp):
    """A mean over the labels that count where one over rows is asked for."""

    net = _OfWhatCounts

    def fields(self, config: Mapping[str, Any]) -> Sequence[BatchField]:
        return ScaledMlp.fields(self, config)


class OfWhatCountsUnsaid(OfWhatCounts):
    """The same, with a field that does not say that anything is ignored."""

    def fields(self, config: Mapping[str, Any]) -> Sequence[BatchField]:
        x, scale, y = super().fields(config)
        return [x, scale, replace(y, ignored=None, minimum=None)]


@dataclass(frozen=True)
class Bent(Loss):
    """Whose curvature is three times what it should be."""

    def weight(self, target: Tensor) -> float:
        return target.numel()

    def value(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum(dtype=torch.float64)

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        return 2 * (output - target)

    def curve(self, output: Tensor, tangent: Tensor, target: Tensor) -> Tensor:
        return 6 * tangent

    def by_target(self, values: Tensor) -> Tensor:
        return values


class OfBent(ScaledMlp):
    loss = Bent()

    def fields(self, config: Mapping[str, Any]) -> Sequence[BatchField]:
        x, scale, _ = super().fields(config)
        return [x, scale, BatchField(name="y", kind="number", dims=("n", "3"))]


class _OfASum(OwnNet):
    def forward(self, x: Tensor, scale: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, scale, y) * len(x)


class OfASum(OwnMlp):
    """A sum over rows where their mean is asked for."""

    net = _OfASum


class _ThatRaises(Net):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        raise ValueError("rows are too few")


class ThatRaises(ScaledMlp):
    net = _ThatRaises


class OfASpacedName(ScaledMlp):
    """Whose second field has a name that no field can have."""

    def fields(self, config: Mapping[str, Any]) -> Sequence[BatchField]:
        x, scale, y = super().fields(config)
        return [x, replace(scale, name="the scale"), y]


class OfAStrangeDimension(ScaledMlp):
    """Whose first field has a size that no row can have."""

    def fields(self, config: Mapping[str, Any]) -> Sequence[BatchField]:
        x, scale, y = super().fields(config)
        return [replace(x, dims=("n", "-4")), scale, y]
