"""Modules of installed packages as models: registered by entry point, never sent by a client.

A package that is installed where server and ranks run declares

    [project.entry-points."hvp.families"]
    laplacian = "my_package:Laplacian"

with `Laplacian` a subclass of `ModuleFamily`. A checkpoint whose config.json says
`"model_type": "laplacian"` is then built by that class, and its weights are found by the names of
the module's parameters.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from hvp_batches.schema import IGNORED, BatchField, BatchSchema
from hvp_operations.wording import shown
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from hvp_core.blame import working_on
from hvp_core.errors import CurvatureError
from hvp_core.losses.loss import CrossEntropy, Loss, OutputHead, OwnLoss
from hvp_core.model.chain import (
    Chain,
    ModuleChain,
    free_zeros,
    placed,
)
from hvp_core.model.config import config_of, config_refused
from hvp_core.model.declaration import check_declaration
from hvp_core.model.family import ModelFacts, ModelFamily, Way

GROUP = "hvp.families"
_CPU = torch.device("cpu")
_SAME = 1e-6  # relative, between a formula and torch's own derivative


class ModuleFamily(ModelFamily):
    """Modules that one class makes from a config; a package that registers one subclasses this.

    The module takes the fields of a batch in the order that `fields` gives them. Without a `loss`
    it returns the mean loss over the rows that it is given, one number: such a model has a loss, a
    gradient and a Hessian. With a `loss` it returns outputs, and every product is known; the field
    of the targets then goes to the loss and not to the module.

    Attributes:
        loss: The loss of outputs and targets; None where the module returns its own loss.
        targets: Name of the field of the targets, where there is a `loss`.
        outputs: Dimensions of the outputs, where there is a `loss`: symbols of the fields, or
            sizes in digits.
    """

    loss: ClassVar[Loss | None] = None
    targets: ClassVar[str] = ""
    outputs: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def module(self, config: Mapping[str, Any]) -> nn.Module:
        """The module of a config, in eval mode; the values of its parameters are not looked at.

        Args:
            config: The object in config.json.
        """

    @abstractmethod
    def fields(self, config: Mapping[str, Any]) -> Sequence[BatchField]:
        """All fields of a batch; the first one is the module's first input.

        Args:
            config: The object in config.json.
        """

    @final
    def build(self, directory: Path, dtype: torch.dtype) -> nn.Module:
        """See ModelFamily; the module has been run once on an example.

        Raises:
            CurvatureError: CONFIG_INVALID: the class refuses the config. MODEL_UNSUPPORTED: a part
                is in train mode, or the output is no tensor. LOSS_MISMATCH, DTYPE_UNSUPPORTED.
        """
        config = config_of(directory)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with _parameters_on_meta():
                model = self.module(config)
        except Exception as error:  # whatever a stranger's config does to the class
            raise self._config_refused(error) from error
        finally:
            torch.set_default_dtype(before)
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                raise CurvatureError(
                    "DTYPE_UNSUPPORTED",
                    f"{name} is a parameter of {parameter.dtype}; let the module have it as a "
                    "buffer",
                    {"tensor": name},
                )
        model.requires_grad_(False)
        self._try(model, self.facts(model, directory), dtype)
        return model

    def _try(self, model: nn.Module, facts: ModelFacts, dtype: torch.dtype) -> None:
        """Run the module on an example, with zeros for its parameters, and look at its output."""
        chain = self.chain(model, facts, self.ways[0], dtype, _CPU)
        example = self.example(facts)
        batch = placed(self.micro_batch(facts, example), _CPU, dtype)
        zeros = free_zeros(model, dtype, _CPU)
        x, context = chain.first_input(batch), chain.context(batch)
        with torch.no_grad(), working_on(type(model).__name__, "its output on an example"):
            for block in chain.blocks:
                x = block.forward(zeros, x, context)
        facts.head.loss.check(x, batch.targets)
        with working_on(type(model).__name__, "the derivatives of its loss"):
            _check_derivatives(facts.head.loss, x, batch.targets)
        declared = facts.output_shape(example)
        if facts.head.loss.has_outputs and tuple(x.shape) != declared:
            raise CurvatureError(
                "MODEL_UNSUPPORTED",
                f"{type(model).__name__}'s output on an example is {tuple(x.shape)}, and "
                f"{type(self).__name__} declares outputs {facts.schema.outputs}, which is "
                f"{declared} there; correct the declaration",
            )

    @final
    def facts(self, model: nn.Module, directory: Path) -> ModelFacts:
        """See ModelFamily.

        Raises:
            CurvatureError: CONFIG_INVALID; MODEL_UNSUPPORTED: fields, targets or outputs are
                declared that no batch can have.
        """
        config = config_of(directory)
        loss = OwnLoss() if self.loss is None else self.loss
        try:
            declared = list(self.fields(config))
        except Exception as error:  # as of `module`
            raise self._config_refused(error) from error
        check_declaration(
            type(self).__name__,
            declared,
            outputs=self.outputs if loss.has_outputs else None,
            targets=self.targets,
        )
        fields = [replace(each, dims=tuple(each.dims), required=True) for each in declared]
        schema = BatchSchema(
            fields=tuple(
                _target(each, loss, self.outputs) if each.name == self.targets else each
                for each in fields
            ),
            outputs=self.outputs if loss.has_outputs else (),
            unit=loss.counts,
            targets=self.targets if loss.has_outputs else "",
        )
        return ModelFacts(
            task=f"module {config['model_type']}",
            schema=schema,
            head=OutputHead(loss=loss, unit="row"),
        )

    def _config_refused(self, error: Exception) -> CurvatureError:
        called = type(self).__name__
        return config_refused(error, f"correct what {called} reads of it, or {called} itself")

    @property
    def ways(self) -> Sequence[Way]:
        """One way: by its children where it is an `nn.Sequential` of one input; else one block."""
        return (Way(words="the module's own parts"),)

    def chain(
        self,
        model: nn.Module,
        facts: ModelFacts,
        way: Way,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Chain:
        """See ModelFamily."""
        target = facts.schema.targets
        inputs = [each.name for each in facts.schema.fields if each.name != target]
        return ModuleChain(model, facts.head.loss, inputs)

    def own_loss(self, model: nn.Module, facts: ModelFacts, batch: Mapping[str, Tensor]) -> Tensor:
        """See ModelFamily: the loss that the module returns, or the loss of its outputs."""
        whole = self.micro_batch(facts, batch)
        y: Tensor = model(*whole.inputs.values())
        loss = facts.head.loss
        if not loss.has_outputs:
            return y
        return loss.value(y, whole.targets) / loss.weight(whole.targets)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules that are made inside have parameters without memory; what is tied stays tied."""
    register = nn.Module.register_parameter
    made = WeakIdKeyDictionary()  # without memory, by the parameter that it stands for

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            if parameter not in made:
                empty = torch.empty_like(parameter, device="meta")
                made[parameter] = nn.Parameter(empty, parameter.is_floating_point())
            module._parameters[name] = made[parameter]

    nn.Module.register_parameter = on_meta  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _target(wanted: BatchField, loss: Loss, outputs: Sequence[str]) -> BatchField:
    """The field of the targets, with the bounds of its loss: classes are the last dimension."""
    if isinstance(loss, CrossEntropy) and outputs and outputs[-1].isdecimal():
        last = int(outputs[-1]) - 1
        most = last if wanted.maximum is None else min(wanted.maximum, last)
        return replace(wanted, minimum=wanted.minimum or 0, maximum=most, ignored=IGNORED)
    return wanted


def _check_derivatives(loss: Loss, output: Tensor, target: Tensor) -> None:
    """See that a loss' formulas are the derivatives of its value, at random outputs, in float64.

    Raises:
        CurvatureError: LOSS_MISMATCH, naming the formula that is not.
    """
    generator = torch.Generator().manual_seed(0)
    z, v = torch.randn((2, *output.shape), generator=generator, dtype=torch.float64)
    target = target.double() if target.is_floating_point() else target

    def value(z: Tensor) -> Tensor:
        return loss.value(z, target)

    true = torch.func.jvp(torch.func.grad(value), (z,), (v,))
    found = loss.gradient(z.clone(), target), loss.curve(z.clone(), v.clone(), target)
    for name, mine, theirs in zip(("gradient", "curve"), found, true, strict=True):
        error = float((mine - theirs).norm() / theirs.norm().clamp(min=1e-12))
        if not error < _SAME:
            raise CurvatureError(
                "LOSS_MISMATCH",
                f"{loss!r}.{name} differs from the derivative of its value by a relative error of "
                f"{error:.1g}; correct one of them",
                {"loss": repr(loss)},
            )


@cache
def registered(model_type: str) -> ModuleFamily | None:
    """The family that an installed package registers under a name; None where none does.

    Raises:
        CurvatureError: ARCHITECTURE_UNKNOWN: the family cannot be loaded, or two packages register
            one under this name.
    """
    points = list(entry_points(group=GROUP, name=model_type))
    if not points:
        return None
    try:
        (point,) = points
        family = point.load()()
        if not isinstance(family, ModuleFamily):
            raise TypeError(f"{point.value} is no ModuleFamily")
    except Exception as error:  # an installed package fails in every way there is
        raise CurvatureError(
            "ARCHITECTURE_UNKNOWN",
            f"the model_type {shown(model_type)} is registered by "
            f"{', '.join(point.value for point in points)}, which cannot be taken "
            f"({type(error).__name__}: {str(error)[:300]}); correct the package that is installed "
            "beside the server",
            {"model_type": model_type},
        ) from error
    return family
