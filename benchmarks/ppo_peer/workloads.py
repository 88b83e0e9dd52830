"""What is measured: shapes, lengths, hyperparameters and targets. Imports nothing heavy.

Both programs read the same `Workload`; they get it as JSON.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

SEED = 1


@dataclass(frozen=True)
class Shape:
    """A decoder of transformers: `fields` are those of its config."""

    model_type: str
    vocabulary: int
    fields: dict[str, Any]


# 17M parameters. Phi: its output layer has a bias that survives saving, which sets how often a
# response ends. The activation is Phi's own function, as one kernel instead of six.
PHI_17M = Shape(
    "phi",
    8192,
    {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "hidden_act": "gelu_pytorch_tanh",
    },
)
PHI_TINY = Shape(
    "phi",
    512,
    PHI_17M.fields | {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2},
)
LLAMA_1B = Shape(
    "llama",
    128_256,
    {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
)
OPT_1_3B = Shape(
    "opt",
    50_272,
    {
        "hidden_size": 2048,
        "ffn_dim": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "word_embed_proj_dim": 2048,
    },
)
OPT_350M = Shape(
    "opt",
    50_272,
    {
        "hidden_size": 1024,
        "ffn_dim": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "word_embed_proj_dim": 512,
        "do_layer_norm_before": False,
    },
)


@dataclass(frozen=True)
class Target:
    """What our side must reach against TRL."""

    speed: float  # times TRL's episodes a second, at least
    memory: float | None  # share of TRL's peak, at most


@dataclass(frozen=True)
class Workload:
    """One comparison. An iteration is `prompts` episodes and `ppo_epochs` passes over them."""

    name: str
    title: str
    shape: Shape
    tuning: Literal["full", "lora"]
    prompts: int
    prompt_tokens: tuple[int, int]  # shortest and longest
    response_tokens: int  # at most
    end_probability: float | None  # of every token; None: responses never end
    dtype: str = "float32"
    critic: Shape | None = None  # of the reward and value model; None: the policy's weights
    values: tuple[str, ...] = ("separate", "shared")  # settings of ppo.value that are measured
    targets: dict[str, Target] = field(default_factory=dict)  # by ppo.value
    samples_per_second: float | None = None  # a target without a peer
    against_trl: bool = True
    trl_rollout_rows: int = 64  # TRL's local_rollout_forward_batch_size (its default)
    # Rows that TRL trains at a time: its default, and as fast as all at once, in half the memory.
    # Our side cuts its micro-batches as it does by itself.
    trl_rows: int = 8
    ours: dict[str, Any] = field(
        default_factory=dict
    )  # settings of speed and memory, by `ppo.` path
    # The same on both sides.
    learning_rate: float = 1e-6  # so small that lengths stay as they are
    kl_coef: float = 0.05
    ppo_epochs: int = 4
    rank: int = 16
    alpha: int = 32
    missing_eos_penalty: float = 1.0

    def prompt_lengths(self) -> list[int]:
        """Tokens of each prompt: from shortest to longest, leaning to the long side.

        Of 8 to 128 tokens the mean is 76.
        """
        low, high = self.prompt_tokens
        steps = max(self.prompts - 1, 1)
        return [low + round((high - low) * (i / steps) ** 0.75) for i in range(self.prompts)]

    @property
    def never_ends(self) -> bool:
        """Whether every response has `response_tokens` tokens."""
        return self.end_probability is None

    @property
    def end_id(self) -> int:
        """The id that ends a response: where none may end, one that the model cannot produce."""
        return self.shape.vocabulary if self.never_ends else 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Workload":
        """From what `to_dict` gave."""
        critic = fields["critic"]
        return cls(
            **fields
            | {
                "shape": Shape(**fields["shape"]),
                "critic": Shape(**critic) if critic else None,
                "prompt_tokens": tuple(fields["prompt_tokens"]),
                "values": tuple(fields["values"]),
                "targets": {k: Target(**v) for k, v in fields["targets"].items()},
            }
        )


W1 = Workload(
    name="W1",
    title="full length, 32 x (64+64) tokens, full fine-tuning",
    shape=PHI_17M,
    tuning="full",
    prompts=32,
    prompt_tokens=(64, 64),
    response_tokens=64,
    end_probability=None,
    targets={"separate": Target(1.15, 0.6), "shared": Target(1.6, 0.6)},
)
W2 = replace(
    W1,
    name="W2",
    title="ragged, 32 x (8..128 + up to 64) tokens, full fine-tuning",
    prompt_tokens=(8, 128),
    end_probability=0.045,
    targets={"separate": Target(2.0, 0.55), "shared": Target(3.0, 0.55)},
)
W3 = replace(
    W2,
    name="W3",
    title="ragged, 32 x (8..128 + up to 64) tokens, LoRA r=16 on all linear layers",
    tuning="lora",
    targets={"separate": Target(2.2, 0.35), "shared": Target(3.2, 0.35)},
)
CPU = {workload.name: workload for workload in (W1, W2, W3)}

G1 = Workload(
    name="G1",
    title="Llama-3.2-1B shape, 512 x (256+256) tokens, LoRA r=16 on all linear layers",
    shape=LLAMA_1B,
    tuning="lora",
    prompts=512,
    prompt_tokens=(256, 256),
    response_tokens=256,
    end_probability=None,
    dtype="bfloat16",
    # TRL keeps logits of 8 x 512 x 128,256 numbers several times over: more rows gain it nothing.
    ours={
        "rollout.generation_rows": 512,
        "rollout.micro_batch_tokens": 65536,
        "optim.micro_batch_tokens": 32768,
    },
)
G2 = replace(
    G1,
    name="G2",
    title="Llama-3.2-1B shape, 512 x (256+256) tokens, full fine-tuning",
    tuning="full",
)
G3 = replace(
    G2,
    name="G3",
    title="OPT-1.3B actor, OPT-350M critic, 512 x (256+256) tokens, full fine-tuning, one epoch",
    shape=OPT_1_3B,
    critic=OPT_350M,
    values=("separate",),
    against_trl=False,
    ppo_epochs=1,  # as DeepSpeed-Chat, whose published 6.3 samples/s stand beside it
    samples_per_second=20.0,
)
CUDA = {workload.name: workload for workload in (G1, G2, G3)}


def quick(workload: Workload) -> Workload:
    """The same comparison in a size that shows only that it works."""
    low, high = workload.prompt_tokens
    return replace(
        workload,
        shape=PHI_TINY,
        critic=PHI_TINY if workload.critic else None,
        prompts=8,
        prompt_tokens=(max(low // 8, 2), max(high // 8, 2)),
        response_tokens=8,
        end_probability=workload.end_probability and 0.2,
        ppo_epochs=2,
        trl_rows=4,
        ours={},
        targets={},
        samples_per_second=None,
    )
