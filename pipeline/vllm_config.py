"""vLLM: the server that samples rollouts, and the adapters that it takes."""

from pydantic import Field

from pipeline.config import NonNegativeInt, Positive, Section


class VllmSection(Section):
    """A vLLM server that samples rollouts (docs/vllm.md); it runs in an environment of its own."""

    url: str = Field(
        "http://127.0.0.1:8000",
        pattern=r"^https?://[^/\s]+(/[^\s]*)?$",
        description="Address of the server, without `/v1`.",
    )
    model: str | None = Field(
        None,
        description="Name under which the server lists the base model; unset, the base's own path.",
    )
    adapters: str | None = Field(
        None,
        description="Folder in which adapters are handed over, on a disk that the server reads "
        "too; unset, `adapters/` in the stage's folder.",
    )
    adapters_on_server: str | None = Field(
        None, description="The same folder as the server sees it, where it is mounted elsewhere."
    )
    api_key_env: str | None = Field(
        None, description="Environment variable that holds the server's API key."
    )
    timeout_seconds: Positive = Field(600.0, description="Longest wait for one answer, in seconds.")
    retries: NonNegativeInt = Field(
        5, description="Attempts after a lost connection, a timeout or an error 429 or 5xx."
    )


# The values that vLLM's --max-lora-rank takes (vllm/config/lora.py, but for 1).
VLLM_MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Families that vLLM serves without adapters (its table of supported models, column LoRA).
VLLM_WITHOUT_LORA = frozenset(
    {"bloom", "dbrx", "falcon", "gpt2", "gpt_neox", "gptj", "mpt", "olmoe", "stablelm"}
)


def vllm_max_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` under which vLLM loads an adapter of this rank."""
    return next(value for value in VLLM_MAX_RANKS if value >= rank)


def vllm_refusals(rank: int, *, dora: bool, model_type: str | None = None) -> list[str]:
    """Why vLLM would not load an adapter of this shape, with the remedy; empty if it would.

    `model_type` is the base's family, where it is known.
    """
    faults = []
    if model_type in VLLM_WITHOUT_LORA:
        faults.append(f"it serves {model_type} without adapters: take another base")
    if rank > VLLM_MAX_RANKS[-1]:
        faults.append(f"rank {rank} is above {VLLM_MAX_RANKS[-1]}: lower lora.rank")
    if dora:
        faults.append("it has no DoRA: set lora.use_dora to false")
    return faults
