"""Sharded tensors in a state, read stretch by stretch by any number of processes."""

import pytest
import torch
from safetensors.torch import save_file

from pipeline.saved_rows import SavedRows, rows_path, saved_rows, stretch


def left_by(folder, tensors, processes, *, flat):
    """What so many processes leave: rows, as FSDP2 deals them out, or stretches, as ZeRO does."""
    for rank in range(processes):
        pieces = {}
        for name, tensor in tensors.items():
            source = tensor.flatten() if flat else tensor
            chunks = source.chunk(processes)
            pieces[name] = chunks[rank] if rank < len(chunks) else source[:0]
        save_file({n: x.contiguous() for n, x in pieces.items()}, rows_path(folder, rank))
    return saved_rows(folder)


# 12 processes: more than rows, and rank 10 comes after rank 9, not after rank 1.
@pytest.mark.parametrize("processes", [1, 2, 3, 12])
@pytest.mark.parametrize("flat", [False, True])
def test_every_stretch_is_that_of_the_whole_tensor(tmp_path, processes, flat):
    tensors = {
        "matrix": torch.arange(7 * 3, dtype=torch.float64).reshape(7, 3),
        "bias": torch.arange(5, dtype=torch.bfloat16),
        "cube": torch.arange(4 * 2 * 3).reshape(4, 2, 3),
    }
    found = left_by(tmp_path, tensors, processes, flat=flat)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        saved, size = found[name], tensor.numel()
        assert saved.dtype == tensor.dtype
        assert saved.shape == (tensor.flatten().shape if flat else tensor.shape)
        for start in range(size + 1):
            for stop in range(start, size + 1):
                expected = tensor.flatten()[start:stop]
                assert torch.equal(stretch(saved, start, stop), expected)
                assert torch.equal(stretch(tensor, start, stop), expected)


def test_a_process_may_have_left_nothing(tmp_path):
    """Under ZeRO-2 the first ones have no stretch of the last parameters."""
    for rank, piece in enumerate((torch.empty(0), torch.arange(3.0), torch.empty(0))):
        save_file({"x": piece}, rows_path(tmp_path, rank))
    saved = saved_rows(tmp_path)["x"]
    assert saved.shape == (3,) and saved.dtype == torch.float32
    assert saved.stretch(1, 3).tolist() == [1.0, 2.0] and saved.stretch(3, 3).tolist() == []


class Watched:
    """A slice of a file that counts the rows read."""

    def __init__(self, tensor):
        self.tensor, self.read = tensor, 0

    def get_shape(self):
        return list(self.tensor.shape)

    def __getitem__(self, rows):
        self.read += len(self.tensor[rows])
        return self.tensor[rows]


def test_a_process_reads_its_own_rows_and_no_more():
    """4 processes left 8 rows each; of 2 readers the second needs rows 16 to 31: files 2 and 3."""
    files = [Watched(torch.full((8, 5), float(rank))) for rank in range(4)]
    saved = SavedRows(files)
    found = saved.stretch(16 * 5, 32 * 5).reshape(16, 5)
    assert found[:8].eq(2).all() and found[8:].eq(3).all()
    assert [file.read for file in files] == [0, 0, 8, 8]
    # A stretch within rows: elements 7 to 11 lie in rows 1 and 2.
    assert saved.stretch(7, 12).tolist() == [0.0] * 5
    assert [file.read for file in files] == [2, 0, 8, 8]


def test_a_state_without_sharded_tensors_has_none(tmp_path):
    assert saved_rows(tmp_path) == {}
