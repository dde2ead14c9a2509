"""Real text that every Python installation carries: the language reference of `help()`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt


def python_reference() -> str:
    """The topics of `pydoc_data`, in the order of their names, joined by blank lines."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def token_batch(
    checkpoint_dir: Path, text: str, *, num_sequences: int, sequence_length: int
) -> dict[str, npt.NDArray[np.int64]]:
    """Cut a text into sequences of equal length with the checkpoint's own tokenizer.

    The sequences are spread evenly over the text, so that a small batch still sees more than its
    first page.

    Args:
        checkpoint_dir: A folder with tokenizer files.
        text: At least `num_sequences * sequence_length` tokens long.
        num_sequences: Number of rows.
        sequence_length: Tokens in a row.

    Returns:
        `input_ids` and `labels`, int64 of shape (num_sequences, sequence_length); labels equal
        ids, as the loss shifts them.

    Raises:
        ValueError: A size below the least, or a text that is too short.
    """
    if num_sequences < 1 or sequence_length < 2:
        raise ValueError("at least 1 sequence of at least 2 tokens is needed")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
    # Said in advance, or the tokenizer warns that the whole text is longer than the model's window.
    tokenizer.model_max_length = len(text)
    tokens = np.asarray(tokenizer(text)["input_ids"], dtype=np.int64)
    if tokens.size < num_sequences * sequence_length:
        raise ValueError(
            f"the text has {tokens.size} tokens, "
            f"{num_sequences} sequences of {sequence_length} need more"
        )
    starts = np.linspace(0, tokens.size - sequence_length, num_sequences).astype(np.int64)
    ids = np.stack([tokens[start : start + sequence_length] for start in starts])
    return {"input_ids": ids, "labels": ids.copy()}
