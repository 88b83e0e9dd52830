"""Padding by lengths, and micro-batches within a budget."""

import random

import pytest
import torch

from pipeline import batches
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


@pytest.mark.parametrize(
    ("lengths", "budget", "parts"),
    [
        # 9 | 9 | 7 | 5 + 5 | 4 + 4 | 2 + 2: no more fits into 10, padding counted
        ([3, 9, 1, 4, 4, 7, 2, 9, 5], 10, [[9], [9], [7], [4, 5], [3, 4], [1, 2]]),
        ([9, 4, 1, 9, 5], 20, [[9, 9], [4, 5], [1]]),  # 15 would fit, but 1 is below 70% of 5
        # 5 is below 70% of 9; 1 joins, as 5 + 5 are less than a quarter of 41
        ([9, 4, 1, 9, 5], 41, [[9, 9], [1, 4, 5]]),
    ],
)
def test_micro_batches_hold_rows_of_like_length(lengths, budget, parts):
    found = micro_batches(lengths, budget)
    assert [sorted(lengths[row] for row in part) for part in found] == parts


def test_rows_of_like_length_need_less_padding(monkeypatch):
    """32 rows of 8 to 128 prompt tokens and up to 64 of response, as in PPO's benchmark."""

    def padding() -> float:
        """Mean share of padding over 200 draws."""
        shares = []
        for seed in range(200):
            draw = random.Random(seed)
            ends = [1 + int(draw.expovariate(0.046)) for _ in range(32)]  # ends with p = 0.045
            lengths = [draw.randint(8, 128) + min(64, end) for end in ends]
            widths = [
                len(part) * max(lengths[row] for row in part)
                for part in micro_batches(lengths, 1024)
            ]
            shares.append(sum(widths) / sum(lengths) - 1)
        return sum(shares) / len(shares)

    assert padding() == pytest.approx(0.14, abs=0.005)
    monkeypatch.setattr(batches, "LIKE_LENGTH", 0.0)
    assert padding() == pytest.approx(0.19, abs=0.005)


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
