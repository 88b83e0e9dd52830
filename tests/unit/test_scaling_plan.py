"""The plan on paper for many GPUs, against numbers worked out by hand."""

import pytest

from benchmarks.ppo_scaling import plan_tables
from benchmarks.ppo_scaling.plan import (
    BF16,
    BUCKET,
    LLAMA_8B,
    LLAMA_70B,
    Cluster,
    Job,
    Model,
    communication,
    compute_seconds,
    forward_flops,
    gathered_each_step,
    peaks,
    split_decoding,
    static,
    working,
)
from benchmarks.ppo_scaling.ring import sent

# Keys and values have 4 numbers. A layer: 2 x 64 + 2 x 32 + 3 x 128 + 16 = 592 weights; output
# layer 80; all: 2 x 592 + 8 + 2 x 80 = 1,352. LoRA of rank 1: 2 x (4 x 8 + 2 x 12 + 3 x 24) = 256.
TINY = Model("tiny", layers=2, width=8, inner=16, heads=4, kv_heads=2, vocabulary=10)
SIZES = {
    "prompts": 8,
    "prompt_tokens": 2,
    "response_tokens": 2,
    "minibatches": 2,
    "micro_batch_tokens": 4,
}
FULL = Job(TINY, "full", **SIZES)
LORA = Job(TINY, "lora", rank=1, **SIZES)
FOUR = Cluster(4, flops=1000, reads=1000, reached_flops=1, reached_reads=1, spared=0)
LOGITS = 4 * 2 * 2**24


def test_weights_are_those_that_are_published() -> None:
    """Of Llama 3.1 8B and 70B."""
    assert LLAMA_8B.weights == 8_030_261_248
    assert LLAMA_70B.weights == 70_553_706_496
    assert (TINY.layer, TINY.weights, TINY.adapter(1)) == (592, 1352, 256)


def test_sent_in_a_ring() -> None:
    """Of 400 bytes and 4 processes: 3 shares of 100 a round; a reduction is handed round twice."""
    assert sent("all_gather", 400, 4) == sent("reduce_scatter", 400, 4) == 300
    assert sent("all_reduce", 400, 4) == 600
    assert sent("all_reduce", 400, 1) == 0


def test_links() -> None:
    """Inside a node its wires; between nodes as much as all cards of a node carry."""
    assert Cluster(8).link == 450e9 * 0.8
    assert Cluster(64).link == 8 * 50e9 * 0.8
    assert Cluster(64, gpus_per_node=2).link == 2 * 50e9 * 0.8


def test_weights_and_moments_of_all_roles() -> None:
    """LoRA: a bfloat16 base and four float32 adapters. Full: four models, one without output."""
    lora, full = static(LORA), static(FULL)
    assert (lora.frozen, lora.trained) == (2 * 1352 + 2 * 1024, 2 * 1024)
    assert lora.moments == 2 * 2048
    assert (full.frozen, full.trained) == (2 * 4 * 1352, 4 * (2 * 1352 - 80))
    assert full.moments == 2 * 10_496
    half = static(Job(TINY, "full", weight_bytes=BF16, **SIZES))
    assert (half.frozen, half.trained, half.moments) == (5408, 5248, 10_496)


def test_strategies_divide() -> None:
    """DDP keeps gradients twice; ZeRO-2 divides gradients and moments, FSDP2 weights too."""
    full = static(FULL)
    weights = 10_816 + 10_496
    whole = {"gradients": 10_496, "buckets": 10_496, "moments": 20_992}
    assert full.of("ddp", 4) == {"weights": weights, **whole}
    divided = {"gradients": 2624, "buckets": BUCKET, "moments": 5248}
    assert full.of("zero2", 4) == {"weights": weights, **divided}
    assert full.of("fsdp2", 4) == {"weights": weights / 4, **divided}


def test_working_memory() -> None:
    """2 rows of 4 tokens a process, one row a micro-batch; bfloat16 copies of 2 x 1,352 bytes."""
    # Keys and values: 2 rows x 4 tokens x 2 layers x 2 x 4 numbers x 2 bytes.
    found = working(FULL, FOUR, "ddp")
    assert found["rollout"] == 256 + 2704
    # A layer's numbers: (10 x 8 + 4 x 16) x 2 bytes a token, 4 tokens.
    assert found["scoring"] == LOGITS + 4 * 288 + 2 * 2704
    # And states before 2 layers of 2 models: 8 float32 numbers a token.
    assert found["update"] == LOGITS + 4 * (288 + 4 * 32) + 2 * 2704
    # FSDP2 gathers 2 layers of 592 in bfloat16 and 168 other weights in float32; the output layer
    # of 80 alone is copied.
    sharded = working(FULL, FOUR, "fsdp2")
    assert sharded["rollout"] == 256 + 2 * 2 * 592 + 4 * 168 + 2 * 80
    assert sharded["scoring"] == LOGITS + 4 * 288 + 2 * 2 * 592 + 4 * 160 + 2 * 2 * 80
    update = LOGITS + 4 * (288 + 4 * 32) + 2 * 2 * 592 + 4 * 160 + 2 * 2 * 80
    assert sharded["update"] == update
    lora = working(LORA, FOUR, "ddp")
    assert lora["rollout"] == 256
    assert lora["update"] == LOGITS + 4 * (288 + 4 * 16)


def test_peaks_add_up() -> None:
    """Gradients count in updates alone."""
    found, parts = peaks(FULL, FOUR, "ddp"), working(FULL, FOUR, "ddp")
    resting = 21_312 + 20_992 + 10_496  # weights, moments, buckets
    assert found["rollout"] == parts["rollout"] + resting
    assert found["update"] == parts["update"] + resting + 10_496


def test_bytes_that_a_process_sends() -> None:
    """2 steps of one micro-batch, 2 micro-batches without gradient; 3 of 4 shares pass by."""
    nothing = {"rollout": 0, "scoring": 0}
    assert communication(FULL, FOUR, "ddp") == {**nothing, "update": 2 * 2 * 0.75 * 10_496}
    assert communication(FULL, FOUR, "zero2") == {**nothing, "update": 2 * 2 * 0.75 * 10_496}
    gather = 0.75 * (2 * 2 * 592 + 4 * 168)
    assert communication(FULL, FOUR, "fsdp2") == {
        "rollout": gather,
        "scoring": 4 * 2 * gather,
        "update": 2 * (4 * gather + 0.75 * 10_496),
    }
    # A prefill and two steps of one group of rows.
    assert gathered_each_step(FULL, FOUR) == 3 * gather
    assert communication(LORA, FOUR, "ddp")["update"] == 2 * 2 * 0.75 * 2048
    assert communication(LORA, FOUR, "fsdp2")["rollout"] == 0.75 * 2 * (1352 + 1024)


def test_seconds() -> None:
    """1,000 FLOPs and 1,000 bytes a second."""
    # 4 tokens: 2 x 2 x 592 each, logits 2 x 80 of 2, and 10 pairs of 4 x 2 x 8.
    assert forward_flops(TINY, 2, 2) == 9472 + 320 + 640
    # Prefill of 2 rows: 2 tokens, logits of one, 3 pairs. Decoding reads 2 x 1,352 bytes of weights
    # and 2 rows x 3.5 tokens of 32 bytes, twice.
    prefill = 2 * (4736 + 160 + 192) / 1000
    assert compute_seconds(FULL, FOUR) == {
        "rollout": pytest.approx(prefill + 2 * (2704 + 224) / 1000),
        "scoring": pytest.approx(4 * 2 * 10.432),
        "update": pytest.approx(2 * 4 * 2 * 10.432),  # forward twice, backward worth two
    }
    assert compute_seconds(LORA, FOUR)["update"] == pytest.approx(2 * 3 * 2 * 10.432)


def test_decoding_split_over_a_node() -> None:
    """A fourth of the weights, and 8 rows' states of 16 bytes all-reduced 4 times a token."""
    node = Cluster(
        4, gpus_per_node=4, flops=1000, reads=1000, nvlink=1000,
        reached_flops=1, reached_reads=1, reached_links=1,
    )  # fmt: skip
    prefill = 2 * (4736 + 160 + 192) / 1000
    step = (2704 / 4 + 224 + 4 * 1.5 * 8 * 16) / 1000
    assert split_decoding(FULL, node) == pytest.approx(prefill + 2 * step)


def test_tables_name_what_does_not_fit() -> None:
    """70B in float32 is written by no GPU here; 8B with LoRA by all of them."""
    lines = plan_tables.memory_table().splitlines()
    assert all("**" in line for line in lines if line.startswith("| 70B | full, float32 |"))
    assert not any("**" in line for line in lines if line.startswith("| 8B | LoRA |"))
    timed = plan_tables.time_table()
    assert "| 70B | LoRA | 8 | 512 | fsdp2 (each step) |" in timed
    # Rollouts gathered at every step are the only ones that fit, and updates on 64 GPUs alone.
    assert "| 70B | full, float32 | 64 | 512 | fsdp2 (each step) |" in timed
    assert "| 70B | full, float32 | 8 |" not in timed
    assert len({line.count("|") for line in timed.splitlines()}) == 1
