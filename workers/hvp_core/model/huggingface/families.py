"""The families of transformers: causal language models, and classifiers of sequences."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast, final

import torch
from hvp_batches.schema import (
    IGNORED,
    POSITIONS,
    ROWS,
    BatchField,
    BatchSchema,
    causal_schema,
)
from hvp_operations.wording import shown
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hvp_core.errors import CurvatureError
from hvp_core.losses.loss import CrossEntropy, Logistic, Loss, MeanSquaredError, OutputHead
from hvp_core.model.chain import Chain, MicroBatch
from hvp_core.model.data import token_batch
from hvp_core.model.family import ModelFacts, ModelFamily, NotAChainError, Way
from hvp_core.model.huggingface import attention
from hvp_core.model.huggingface.architecture import longest_sequence
from hvp_core.model.huggingface.checkpoint import build_empty
from hvp_core.model.huggingface.layered import LANGUAGE, LayeredChain

_TOKENS = ROWS, POSITIONS


class _HuggingFace(ModelFamily):
    """Models that transformers builds."""

    @final
    def build(self, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
        """See ModelFamily.

        Raises:
            CurvatureError: See `build_empty`.
        """
        return build_empty(directory, dtype)

    @property
    @final
    def ways(self) -> Sequence[Way]:
        """Cut at its layers or whole; with attention by a rule or in plain operations."""
        return [
            Way(
                words=words + (", its attention in plain operations" if own else ""),
                one_block=one_block,
                own_attention=own,
            )
            for one_block, words in ((False, "a chain of its layers"), (True, "one block"))
            for own in (False, True)
        ]

    @final
    def chain(
        self,
        model: nn.Module,
        facts: ModelFacts,
        way: Way,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Chain:
        """See ModelFamily."""
        own = cast(PreTrainedModel, model)
        if way.own_attention:
            attention.use(own, "eager")
        chain = LayeredChain(own, dtype, device, one_block=way.one_block, head=facts.head)
        if not (way.one_block or chain.is_cut):
            why = CurvatureError("MODEL_UNSUPPORTED", "the model's layers are not a chain")
            raise NotAChainError(why)
        return chain

    @final
    def own_loss(self, model: nn.Module, facts: ModelFacts, batch: Mapping[str, Tensor]) -> Tensor:
        """See ModelFamily; attention is computed in plain operations, as any architecture can."""
        own = cast(PreTrainedModel, model)
        before = own.config._attn_implementation
        attention.use(own, "eager")
        try:
            return self._loss(own, batch)
        finally:
            attention.use(own, before)

    @abstractmethod
    def _loss(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean loss that the model's forward returns for a batch."""


@final
class CausalLanguageModels(_HuggingFace):
    """Models that predict each token from those before it."""

    def facts(self, model: nn.Module, directory: Path) -> ModelFacts:
        """See ModelFamily."""
        text = cast(PreTrainedModel, model).config.get_text_config()
        longest = longest_sequence(text)
        return ModelFacts(
            task="causal language modelling",
            schema=causal_schema(text.vocab_size, longest),
            head=LANGUAGE,
            vocab_size=text.vocab_size,
            max_positions=longest,
        )

    def micro_batch(self, facts: ModelFacts, batch: Mapping[str, Tensor]) -> MicroBatch:
        """See ModelFamily; labels are shifted here, once and for all."""
        return token_batch(batch["input_ids"], batch.get("labels"), batch.get("attention_mask"))

    def example(self, facts: ModelFacts) -> dict[str, Tensor]:
        """See ModelFamily; without padding, so that every position is seen."""
        return {"input_ids": super().example(facts)["input_ids"]}

    def _loss(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of the two rows; a third one shows that positions do not look ahead.

        The third row is the first but for its last token, and its labels do not count.

        Raises:
            CurvatureError: TASK_UNSUPPORTED: that token changes logits of positions before it.
        """
        ids = batch["input_ids"]
        changed = ids[:1].clone()
        changed[:, -1] = (changed[:, -1] + 1) % (ids.max() + 1)
        three = torch.cat([ids, changed])
        labels = torch.cat([ids, torch.full_like(changed, IGNORED)])
        output = model(input_ids=three, labels=labels, use_cache=False)
        first, same = output.logits[0, :-1].double(), output.logits[2, :-1].double()
        scale = float(first.abs().max())
        tolerance = _SAME * torch.finfo(output.logits.dtype).eps * scale
        if scale - scale == 0 and float((first - same).abs().max()) > tolerance:
            name = type(model).__name__
            raise CurvatureError(
                "TASK_UNSUPPORTED",
                f"{name} looks at the tokens behind a position when it predicts it: it is an "
                "encoder, and its next-token loss would know the answers; set is_decoder in "
                "config.json if it was trained as a causal language model",
                {"class": name, "task": "that of an encoder"},
            )
        loss: Tensor = output.loss
        return loss


#: Roundings, of the largest logit, between logits of the same tokens in another row.
_SAME = 300


@final
class SequenceClassifiers(_HuggingFace):
    """Models that give each sequence a class, several labels, or numbers."""

    def facts(self, model: nn.Module, directory: Path) -> ModelFacts:
        """See ModelFamily."""
        config = cast(PreTrainedModel, model).config
        text = config.get_text_config()
        loss, labels = _labels(config)
        last = text.vocab_size - 1
        fields = [
            BatchField(name="input_ids", kind="integer", dims=_TOKENS, minimum=0, maximum=last),
            labels,
            BatchField(
                name="attention_mask",
                kind="integer",
                dims=_TOKENS,
                required=False,
                minimum=0,
                maximum=1,
            ),
        ]
        types = getattr(text, "type_vocab_size", 0) or 0
        if types and "token_type_ids" in inspect.signature(model.forward).parameters:
            fields.append(
                BatchField(
                    name="token_type_ids",
                    kind="integer",
                    dims=_TOKENS,
                    required=False,
                    minimum=0,
                    maximum=types - 1,
                )
            )
        longest = _longest(model, longest_sequence(text))
        return ModelFacts(
            task="sequence classification",
            schema=BatchSchema(
                fields=tuple(fields),
                outputs=(ROWS, str(config.num_labels)),
                unit=loss.counts,
                longest={} if longest is None else {POSITIONS: longest},
            ),
            head=OutputHead(loss=loss, unit="row"),
            vocab_size=text.vocab_size,
            max_positions=longest,
        )

    def _loss(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss


def _labels(config: PreTrainedConfig) -> tuple[Loss, BatchField]:
    """The loss of a classifier, as transformers chooses it, and what its labels are.

    Raises:
        CurvatureError: CONFIG_INVALID.
    """
    count = config.num_labels
    kind = config.problem_type or ("regression" if count == 1 else "single_label_classification")
    many = (ROWS, str(count))
    if kind == "single_label_classification":
        return CrossEntropy(), BatchField(
            name="labels",
            kind="integer",
            dims=(ROWS,),
            minimum=0,
            maximum=count - 1,
            ignored=IGNORED,
        )
    if kind == "multi_label_classification":
        labels = BatchField(name="labels", kind="number", dims=many, minimum=0, maximum=1)
        return Logistic(), labels
    if kind == "regression":
        dims = (ROWS,) if count == 1 else many
        return MeanSquaredError(), BatchField(name="labels", kind="number", dims=dims)
    raise CurvatureError(
        "CONFIG_INVALID",
        f"config.json has problem_type = {shown(kind)}; transformers knows regression, "
        "single_label_classification and multi_label_classification",
        {"file": "config.json", "key": "problem_type"},
    )


def _longest(model: nn.Module, longest: int | None) -> int | None:
    """The longest sequence, less the rows of a table of positions that are kept for padding."""
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and name.endswith("position_embeddings")
        if longest is not None and is_table and module.padding_idx is not None:
            return min(longest, int(module.num_embeddings) - int(module.padding_idx) - 1)
    return longest
