"""A safetensors file of vectors as the rows of one tensor, written a row at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

_NAMES = {"float32": "F32", "float64": "F64"}


@final
class RowsFile:
    """A file of two tensors: `eigenvalues` (k,) float64 and `eigenvectors` (k, n), row by row.

    It lies beside its place until the block in which it is written has ended without an error, so
    that a file of that name is always a whole one. Memory: one row.

    Args:
        path: The file.
        shape: (k, n).
        dtype: Dtype of the rows, float32 or float64.
        eigenvalues: The numbers (k,).
        metadata: Texts by name, for the file's header.
    """

    def __init__(
        self,
        path: Path,
        *,
        shape: tuple[int, int],
        dtype: np.dtype[Any],
        eigenvalues: NDArray[np.float64],
        metadata: Mapping[str, str],
    ):
        self._path, self._partial = path, path.with_name(f".{path.name}.partial")
        self._dtype = dtype.newbyteorder("<")
        values = np.ascontiguousarray(eigenvalues, "<f8")
        size = shape[0] * shape[1] * dtype.itemsize
        header = json.dumps(
            {
                "__metadata__": dict(metadata),
                "eigenvalues": {
                    "dtype": "F64",
                    "shape": [len(values)],
                    "data_offsets": [0, values.nbytes],
                },
                "eigenvectors": {
                    "dtype": _NAMES[dtype.name],
                    "shape": list(shape),
                    "data_offsets": [values.nbytes, values.nbytes + size],
                },
            }
        ).encode()
        header += b" " * (-len(header) % 8)
        self._begin = len(header).to_bytes(8, "little") + header + values.tobytes()

    def __enter__(self) -> RowsFile:
        self._file = self._partial.open("wb")
        self._file.write(self._begin)
        return self

    def append(self, row: NDArray[Any]) -> None:
        """Write the next row, (n,)."""
        self._file.write(np.ascontiguousarray(row, self._dtype).data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None:
            self._partial.replace(self._path)
        else:
            self._partial.unlink()
