"""Settings of the export: in which forms the run's models leave its folder (docs/export.md)."""

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config import NOT_IN_KEY, Resource, Section

# Families whose classifier in transformers has a `score` without bias and finds the end of a row by
# its pad id; each is held to our scores by a test.
CLASSIFIED = frozenset(
    {
        *("bloom", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral"),
        *("mixtral", "opt", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe"),
    }
)
AdapterOf = Literal["policy", "sft", "reward"]


class ExportSection(Section):
    """What `runs/NAME/export/` holds: folders that other programs load."""

    adapters: tuple[AdapterOf, ...] = Field(
        ("policy",),
        description="Roles whose LoRA adapters are written for plain PEFT: `policy` to `adapter/`, "
        "`sft` and `reward` to `sft_adapter/` and `reward_adapter/`, with `base/` beside them "
        "where a run made the base; a fully tuned policy has no adapter.",
    )
    merged: bool = Field(
        False,
        description="Writes `merged/`, the policy as one plain transformers model; a fully tuned "
        "policy is always written there.",
    )
    vllm: bool = Field(
        False,
        description="Writes `vllm/`, the policy's adapter for a vLLM server, after checking that "
        "vLLM takes it.",
    )
    gguf: Resource | None = Field(
        None,
        description="llama.cpp's `convert_hf_to_gguf.py` on this machine, which writes `gguf/` "
        "from the merged policy; unset, no GGUF.",
    )
    gguf_outtype: Literal["f32", "f16", "bf16", "q8_0"] = Field(
        "f16", description="Type of the weights in the GGUF file."
    )
    reward: bool = Field(
        False,
        description="Writes `reward/`, the reward model as a plain "
        "`AutoModelForSequenceClassification`.",
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Type of the weights of `merged/` and `reward/`; unset, the base's."
    )
    max_shard_size: str = Field(
        "5GB",
        pattern=r"^[1-9][0-9]*(KB|MB|GB)$",
        description="Largest weight file of `merged/` and `reward/`, such as 500MB or 5GB.",
    )
    push_to_hub: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$",
        description="Hub repository (`owner/name`) that gets the finished export; unset, nothing "
        "leaves this machine.",
        json_schema_extra=NOT_IN_KEY,
    )
    hub_private: bool = Field(
        True,
        description="Whether a repository that `export.push_to_hub` creates is private.",
        json_schema_extra=NOT_IN_KEY,
    )
    hub_revision: str | None = Field(
        None,
        description="Branch that `export.push_to_hub` commits to, made if it is not there; unset, "
        "`main`.",
        json_schema_extra=NOT_IN_KEY,
    )

    @property
    def asks_for_reward(self) -> bool:
        """Whether a form of the reward model is written."""
        return self.reward or "reward" in self.adapters

    @model_validator(mode="after")
    def _something(self) -> "ExportSection":
        if not (self.adapters or self.merged or self.vllm or self.gguf or self.reward):
            raise ValueError(
                "export.adapters is empty and export.merged, vllm, gguf and reward are off, so "
                "nothing would be written: set one of them"
            )
        return self

    @model_validator(mode="after")
    def _where_to_push(self) -> "ExportSection":
        if self.hub_revision is not None and self.push_to_hub is None:
            raise ValueError(
                f"export.hub_revision is {self.hub_revision!r} but export.push_to_hub is unset: "
                "name the repository there, or remove export.hub_revision"
            )
        return self
