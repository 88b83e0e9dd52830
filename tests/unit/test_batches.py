"""Padding by lengths, and micro-batches within a budget."""

import pytest
import torch

from pipeline.batches import TokenBatch, micro_batches
from pipeline.inference import infer


def test_ragged_rows_are_padded_and_their_lengths_kept():
    batch = TokenBatch.from_ragged([[1, 2, 3], [4]], [[5], [6, 0]], pad_id=0)
    assert batch.prompt_ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch.response_ids.tolist() == [[5, 0], [6, 0]]
    # The second response ends with a real token that happens to be the pad id.
    assert batch.response_mask.tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("budget", [1, 10, 17, 1000])
def test_micro_batches_hold_every_row_once_within_the_budget(budget):
    lengths = [3, 9, 1, 4, 4, 7, 2, 9, 5]
    batches = micro_batches(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[row] for row in batch)
        assert padded <= budget or len(batch) == 1


def test_micro_batches_hold_rows_of_like_length():
    # 9 | 9 alone (18 > 10 together)
    lengths = [3, 9, 1, 4, 4, 7, 2, 9, 5]
    assert [sorted(lengths[row] for row in batch) for batch in micro_batches(lengths, 10)] == [
        [9],
        [9],
        [7],
        [5],  # 4 is below 85% of 5
        [4, 4],
        [3],
        [1, 2],  # 2 tokens are below a quarter of the budget: not left alone
    ]


def test_taken_rows_are_no_wider_than_they_need():
    batch = TokenBatch.from_ragged([[1, 2, 3], [4], [5, 6]], [[7], [8, 9], [7, 7, 7]], pad_id=0)
    assert batch.lengths == [4, 3, 5]
    taken = batch.take([1, 0])
    assert taken.prompt_ids.tolist() == [[4, 0, 0], [1, 2, 3]]
    assert taken.response_ids.tolist() == [[8, 9], [7, 0]]
    assert taken.lengths == [3, 4]


@pytest.mark.parametrize("token_budget", [1, 9, 1000])
def test_inference_is_in_the_order_of_the_batch_whatever_the_budget(make_handle, token_budget):
    handle = make_handle()
    handle.trunk.add_head("h").init_normal(torch.Generator().manual_seed(0))
    handle = handle.with_role("r", head="h")
    prompts, responses = [[5, 6, 7], [8], [9, 10]], [[11], [12, 13, 14], [15, 16]]
    batch = TokenBatch.from_ragged(prompts, responses, pad_id=0)
    found = infer(handle, batch, ["logprobs", "scores"], token_budget, temperature=0.7)
    with torch.no_grad():
        for row in range(3):
            alone = handle(batch.take([row]), {"logprobs", "scores"}, 0.7)
            width = len(responses[row])
            torch.testing.assert_close(
                found["logprobs"][row, :width], alone.logprobs[0], rtol=0, atol=1e-12
            )
            assert not found["logprobs"][row, width:].any()
            assert found["scores"][row] == pytest.approx(alone.scores[0].item(), abs=1e-12)


def test_packed_micro_batches_count_tokens_only():
    lengths = [5, 9, 2, 8, 1]
    assert micro_batches(lengths, 17) == [[1], [3], [0], [2, 4]]  # 9; 8; 5; 2 x 2
    assert micro_batches(lengths, 17, packed=True) == [[1, 3], [0, 2, 4]]  # 9 + 8; 5 + 2 + 1
    assert micro_batches(lengths, 4, packed=True) == [[1], [3], [0], [2, 4]]
