"""Padding by lengths, and micro-batches within a budget."""

import pytest
import torch

from pipeline.batches import TokenBatch, micro_batches, pad_values


def test_ragged_rows_are_padded_and_their_lengths_kept():
    batch = TokenBatch.from_ragged([[1, 2, 3], [4]], [[5], [6, 0]], pad_id=0)
    assert batch.prompt_ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch.response_ids.tolist() == [[5, 0], [6, 0]]
    # The second response ends with a real token that happens to be the pad id.
    assert batch.response_mask.tolist() == [[True, False], [True, True]]


def test_numbers_a_token_are_zero_on_padding():
    assert pad_values([[1.5], [2.0, 3.0]], 3, torch.float64).tolist() == [[1.5, 0, 0], [2, 3, 0]]


@pytest.mark.parametrize("budget", [1, 10, 17, 1000])
def test_micro_batches_hold_every_row_once_within_the_budget(budget):
    lengths = [3, 9, 1, 4, 4, 7, 2, 9, 5]
    batches = micro_batches(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[row] for row in batch)
        assert padded <= budget or len(batch) == 1


def test_micro_batches_are_as_few_as_sorting_allows():
    # 9 | 9 alone (18 > 10 together); 7 alone; 5+4 -> 2 x 5 = 10; 4+3 -> 8; 2+1 -> 4
    lengths = [3, 9, 1, 4, 4, 7, 2, 9, 5]
    assert [sorted(lengths[row] for row in batch) for batch in micro_batches(lengths, 10)] == [
        [9],
        [9],
        [7],
        [4, 5],
        [3, 4],
        [1, 2],
    ]
