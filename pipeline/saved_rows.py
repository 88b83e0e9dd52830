"""Sharded tensors in a state: each process left its rows, and any number of processes read them.

A process reads the stretch that it needs and no more: N processes read a state once, not N times.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROWS = "rows-"


def rows_path(folder: Path, rank: int) -> Path:
    """Where a process leaves its rows of all sharded tensors of a state."""
    return folder / f"{ROWS}{rank}.safetensors"


def saved_rows(folder: Path) -> "dict[str, SavedRows]":
    """The sharded tensors of a state, of which nothing is read yet."""
    from safetensors import safe_open

    paths = folder.glob(f"{ROWS}*.safetensors")
    ranks = sorted(paths, key=lambda path: int(path.stem.removeprefix(ROWS)))
    files = [safe_open(path, framework="pt") for path in ranks]
    return {
        name: SavedRows([file.get_slice(name) for file in files])
        for name in (files[0].keys() if files else ())
    }


class SavedRows:
    """A tensor whose rows (or stretches of its elements, if it is flat) lie in files, in order."""

    def __init__(self, pieces: list[Any]) -> None:
        self.pieces = pieces
        shapes = [piece.get_shape() for piece in pieces]
        self.shape = torch.Size([sum(shape[0] for shape in shapes), *shapes[0][1:]])
        self.dtype: torch.dtype = pieces[0][:0].dtype

    def stretch(self, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the flattened tensor, (stop - start,), read from files."""
        row, at = prod(self.shape[1:]), 0
        found = [torch.empty(0, dtype=self.dtype)]
        for piece in self.pieces:
            rows = piece.get_shape()[0]
            first, last = max(start - at, 0), min(stop - at, rows * row)
            if first < last:
                # Whole rows are read; what the stretch does not begin or end with is cut off.
                whole = piece[first // row : -(-last // row)].flatten()
                found.append(whole[first - first // row * row :][: last - first])
            at += rows * row
        return torch.cat(found)


def stretch(full: Any, start: int, stop: int) -> Tensor:
    """Elements `start` to `stop` of a flattened tensor, whether it is in memory or in files."""
    if isinstance(full, SavedRows):
        return full.stretch(start, stop)
    own: Tensor = full.flatten()[start:stop]
    return own


Saved = Mapping[str, Tensor | SavedRows]
