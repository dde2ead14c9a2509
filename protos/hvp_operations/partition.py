"""Partitions of a model's parameters into blocks: by layer, by tensor, or by patterns of names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from hvp_operations.operation import SpecError
from hvp_operations.parameters import globs_of, layer_of, select
from hvp_operations.wording import shown

#: Partitions that have a name.
WORDS = ("layer", "tensor")
MOST_NAMED = 4096  # blocks in a request
#: Blocks that a product can be taken for each of.
MOST_BLOCKS = 128


@final
@dataclass(frozen=True, kw_only=True)
class Block:
    """The parameters of one block.

    Attributes:
        name: Name of the block.
        parameters: Patterns of the parameters' names, as `hvp_operations.parameters` has them.
    """

    name: str
    parameters: tuple[str, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Partition:
    """A rule that puts each parameter into one block.

    Attributes:
        per: `layer` or `tensor`; "" where the blocks are named.
        blocks: The blocks, where `per` is "".
    """

    per: str = ""
    blocks: tuple[Block, ...] = ()

    @classmethod
    def of(cls, by: Any, field: str = "by") -> Partition:
        """The partition that a caller has written.

        Args:
            by: `layer`, `tensor`, or the blocks' patterns. Each block has one pattern or several;
                blocks in a mapping have its names, and blocks in a sequence are named by their
                patterns. A partition, or one as `dataclasses.asdict` writes it, is taken as it is.
            field: Name of the request's field, for errors.

        Raises:
            SpecError: PARAMETERS_INVALID: `by` is something else.
        """
        if isinstance(by, cls):
            found = by
        elif isinstance(by, str):
            found = cls(per=by)
        elif _is_written(by):
            found = cls(
                per=by["per"],
                blocks=tuple(
                    Block(
                        name=str(each.get("name")),
                        parameters=globs_of(each.get("parameters"), field),
                    )
                    for each in by["blocks"]
                ),
            )
        elif isinstance(by, Mapping):
            found = cls(
                blocks=tuple(
                    Block(name=str(name), parameters=globs_of(globs, field))
                    for name, globs in by.items()
                )
            )
        elif isinstance(by, Iterable):
            patterns = [globs_of(globs, field) for globs in by]
            found = cls(
                blocks=tuple(Block(name=", ".join(each), parameters=each) for each in patterns)
            )
        else:
            raise _no_blocks(by, field)
        found._check(field)
        return found

    def __str__(self) -> str:
        return self.per or f"{len(self.blocks)} block{'s' if len(self.blocks) > 1 else ''}"

    def _check(self, field: str) -> None:
        is_word = self.per in WORDS
        if is_word == bool(self.blocks) or (self.per and not is_word):
            raise _no_blocks(self.per or self.blocks, field)
        if len(self.blocks) > MOST_NAMED:
            raise _invalid(
                f"{field} has {len(self.blocks)} blocks, and at most {MOST_NAMED} are possible.",
                field,
            )
        names = set[str]()
        for block in self.blocks:
            globs_of(block.parameters, field)
            if not (block.name and block.name.isprintable()):
                raise _invalid(f"{field}: {shown(block.name)} is no name of a block.", field)
            if block.name in names:
                raise _invalid(
                    f"Two blocks have the same patterns, or the same name: {shown(block.name)}.",
                    field,
                )
            names.add(block.name)

    def divide(self, names: Sequence[str], field: str = "by") -> dict[str, list[str]]:
        """Divide parameters into the blocks, so that each parameter is in one of them.

        Args:
            names: Names of all parameters, in canonical order.
            field: Name of the request's field, for errors.

        Returns:
            The names in each block, in canonical order, by the block's name.

        Raises:
            SpecError: PARAMETERS_NOT_FOUND: a pattern selects nothing. PARAMETERS_INVALID: it is no
                partition, as where a parameter is in two blocks or in none.
        """
        self._check(field)
        if self.per:
            found: dict[str, list[str]] = {}
            for name in names:
                found.setdefault(name if self.per == "tensor" else layer_of(name), []).append(name)
            return found
        block_of: dict[str, str] = {}
        for block in self.blocks:
            for name in select(block.parameters, names, field):
                if name in block_of:
                    raise _invalid(
                        f"Tensor {name} is in two blocks, {shown(block_of[name])} and "
                        f"{shown(block.name)}.",
                        field,
                    )
                block_of[name] = block.name
        left = [name for name in names if name not in block_of]
        if left:
            raise _invalid(
                f"Of the tensors {len(left)} are in no block, {left[0]} among them; restrict the "
                "operator first, or give them a block.",
                field,
            )
        blocks: dict[str, list[str]] = {block.name: [] for block in self.blocks}
        for name in names:
            blocks[block_of[name]].append(name)
        return blocks


def _is_written(by: Any) -> bool:
    """Whether it is a partition as a row of the job store has it."""
    return (
        isinstance(by, Mapping)
        and by.keys() == {"per", "blocks"}
        and isinstance(by["per"], str)
        and isinstance(by["blocks"], (list, tuple))
        and all(isinstance(each, Mapping) for each in by["blocks"])
    )


def _no_blocks(by: Any, field: str) -> SpecError:
    return _invalid(
        f"{field} must be 'layer', 'tensor' or lists of patterns, not {shown(by)}.", field
    )


def _invalid(message: str, field: str) -> SpecError:
    return SpecError("PARAMETERS_INVALID", message, field)
