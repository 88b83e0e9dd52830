"""The points that are measured, and what the mathematics needs at each. Imports nothing heavy."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from benchmarks.ppo_peer.flops import Cost
from benchmarks.ppo_peer.workloads import Shape, Workload

Tuning = Literal["full", "lora"]
HEAD_WIDTH = 32
FLOAT = 4  # bytes
FITTED = 3  # points of an axis, from its upper end, that a slope is fitted to


@dataclass(frozen=True)
class Point:
    """One measurement; every row has the same lengths, and no response ends early."""

    tuning: Tuning
    prompt_tokens: int = 64
    response_tokens: int = 64
    prompts: int = 8
    responses_per_prompt: int = 1
    width: int = 256
    layers: int = 4
    vocabulary: int = 4096
    generation_rows: int = 8  # responses generated at a time: the batch grows past it
    micro_batch_tokens: int | None = None  # of passes with and without gradient; None: the default

    @property
    def rows(self) -> int:
        """Responses of the iteration."""
        return self.prompts * self.responses_per_prompt

    @property
    def tokens(self) -> int:
        """Of one row."""
        return self.prompt_tokens + self.response_tokens

    @property
    def shape(self) -> Shape:
        """The model."""
        fields = {
            "hidden_size": self.width,
            "intermediate_size": self.inner_width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(self.width // HEAD_WIDTH, 1),
            "tie_word_embeddings": True,
        }
        return Shape("llama", self.vocabulary, fields)

    @property
    def inner_width(self) -> int:
        """Of the MLP."""
        return 11 * self.width // 4

    def workload(self) -> Workload:
        """What `ppo_peer.our_side` runs."""
        settings = {
            "rollout.generation_rows": self.generation_rows,
            "rollout.responses_per_prompt": self.responses_per_prompt,
            "rollout.micro_batch_tokens": self.micro_batch_tokens,
            "optim.micro_batch_tokens": self.micro_batch_tokens,
        }
        return Workload(
            name="scaling",
            title="",
            shape=self.shape,
            tuning=self.tuning,
            prompts=self.prompts,
            prompt_tokens=(self.prompt_tokens, self.prompt_tokens),
            response_tokens=self.response_tokens,
            end_probability=None,
            against_trl=False,
            ours=settings,
            ppo_epochs=1,
        )


@dataclass(frozen=True)
class Axis:
    """What is doubled, and what differs from the base point meanwhile."""

    values: tuple[int, ...]
    fixed: dict[str, Any] = field(default_factory=dict)


AXES = {
    "prompt_tokens": Axis((32, 64, 128, 256, 512)),
    "response_tokens": Axis((16, 32, 64, 128, 256)),
    "prompts": Axis((2, 4, 8, 16, 32)),
    "responses_per_prompt": Axis((1, 2, 4, 8, 16), {"prompts": 2}),
    "width": Axis((32, 64, 128, 256, 512)),
    "layers": Axis((1, 2, 4, 8, 16)),
    # Micro-batches with so many response tokens that the largest vocabularies need several chunks.
    "vocabulary": Axis(
        (4096, 8192, 16384, 32768, 65536), {"prompts": 16, "micro_batch_tokens": 2048}
    ),
}
QUICK: dict[str, Any] = {
    "prompts": 4,
    "prompt_tokens": 16,
    "response_tokens": 16,
    "width": 64,
    "layers": 2,
}


def points(name: str, tuning: Tuning, quick: bool) -> list[Point]:
    """The points of an axis; `quick` ones show only that it works."""
    axis = AXES[name]
    base = replace(Point(tuning), **(QUICK if quick else {}) | axis.fixed)
    values = axis.values[:FITTED] if quick else axis.values
    return [replace(base, **{name: value}) for value in values]


def expected_flops(point: Point, model: Cost, adapter: float) -> dict[str, float]:
    """FLOPs by phase: weights and attention, no padding, no logits but a response's.

    `model` is the base, `adapter` the weights of one LoRA adapter (0: full fine-tuning). A prompt's
    keys and values serve all its responses. Training is worth three forward passes, or two through
    frozen weights. Sampling, norms, activations and the optimiser are not counted.
    """
    p, r = point.prompt_tokens, point.response_tokens
    body = model.trunk + 2 * adapter
    prefill = body * p + model.pair * p * (p + 1) / 2
    decode = (body + model.head) * r + model.pair * (r * p + r * (r + 1) / 2)
    attention = model.attention(p, r)
    # Reference, reward and value; then policy and value, trained.
    scoring = 3 * (body * (p + r) + attention) + model.head * r
    trained = 2.0 if adapter else 3.0
    update = 2 * ((trained * model.trunk + 6 * adapter) * (p + r) + 3 * attention)
    update += trained * model.head * r
    return {
        "rollout": point.prompts * prefill + point.rows * decode,
        "scoring": point.rows * scoring,
        "update": point.rows * update,
    }


def decoding_bytes(point: Point, model: Cost, adapter: float) -> float:
    """Bytes that generation reads: each step all weights, and the keys and values so far.

    Tokens of a response come one after another: a step reads the weights once, however few rows
    there are, so that rollouts can follow this where it grows faster than the FLOPs.
    """
    groups = -(-point.rows // point.generation_rows)
    weights = model.trunk / 2 + adapter + model.head / 2
    steps = point.response_tokens
    seen = steps * point.prompt_tokens + steps * (steps + 1) / 2
    cached = 2 * point.layers * point.width * seen
    return FLOAT * (groups * steps * weights + point.rows * cached)


def working_bytes(point: Point, budget: int, trained: int, chunk: int) -> dict[str, float]:
    """Bytes by phase besides weights and AdamW's state.

    `budget`: tokens of a micro-batch; `trained`: bytes of gradients; `chunk`: logits made at a
    time. A Llama layer keeps 10 x width + 4 x inner width numbers a token for the backward pass
    (inputs and outputs of two norms, q, k, v and what attention gives; gate, its activation, up,
    their product); policy and value pass one after the other, and the logits' gradient takes their
    place.
    """
    d, inner = point.width, point.inner_width
    rows = min(max(budget // point.tokens, 1), point.rows)
    generated = min(point.generation_rows, point.rows)
    cache = 2 * point.layers * d * generated * point.tokens
    sampling = 4 * generated * point.vocabulary  # logits, noise, probabilities and their products
    layer = rows * point.tokens * (6 * d + 3 * inner)
    logits = min(rows * point.response_tokens * point.vocabulary, chunk)
    kept = point.layers * rows * point.tokens * (10 * d + 4 * inner)
    return {
        "rollout": FLOAT * (cache + max(sampling, layer * point.prompt_tokens / point.tokens)),
        "scoring": FLOAT * (layer + logits),
        "update": trained + FLOAT * (kept + logits),
    }
