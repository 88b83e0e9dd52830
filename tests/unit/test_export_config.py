"""What cannot be exported is refused with the config, or by `rlhf check` where it takes files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pipeline.config import ArchitectureSection
from pipeline.errors import ConfigError
from pipeline.keys import stage_material
from pipeline.models.loading import build_from_config, train_tokenizer
from pipeline.yaml_config import read_config
from stages.cli import app
from stages.config import RunConfig
from stages.export.run import ExportStage

SMALL = "model: {init: config, architecture: {hidden_size: 8, num_attention_heads: 2}}"


def read(tmp_path: Path, *overrides: str, head: str = SMALL) -> RunConfig:
    (tmp_path / "c.yaml").write_text(head)
    return read_config(tmp_path / "c.yaml", list(overrides), RunConfig)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["export.adapters=[]"], "nothing would be written: set one of them"),
        (["export.hub_revision=x"], "but export.push_to_hub is unset"),
        (["export.push_to_hub=name"], "export.push_to_hub"),
        (["export.dtype=float16"], "export.dtype"),
        (
            ["export.vllm=true", "ppo.tuning=full"],
            "the policy has no adapter: vLLM serves `merged/`",
        ),
        (
            ["export.vllm=true", "lora.use_dora=true"],
            "it has no DoRA: set lora.use_dora to false, or set export.vllm to false and "
            "export.merged to true",
        ),
        (["export.vllm=true", "lora.rank=513"], "rank 513 is above 512: lower lora.rank"),
        (
            ["export.vllm=true", "model.architecture.model_type=gpt_neox"],
            "it serves gpt_neox without adapters",
        ),
        (["export.adapters=[policy,sft]"], "export.adapters has sft but sft.tuning is full"),
        (
            ["export.adapters=[reward]", "reward.tuning=full"],
            "so it has no adapter: take reward out of export.adapters and set export.reward",
        ),
        (["export.reward=true", "ppo.rewards=judge.py:f"], "so the run trains none"),
        (
            ["export.reward=true", "model.architecture.model_type=olmoe"],
            "no classifier of transformers is known to give its scores on olmoe",
        ),
    ],
)
def test_values_that_conflict_are_refused(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, *overrides)
    assert message in str(caught.value)


def test_an_sft_adapter_of_a_run_without_sft_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ppo\.policy is 'org/policy', so PPO starts"):
        overrides = ["export.adapters=[sft]", "sft.tuning=lora", "ppo.policy=org/policy"]
        read(tmp_path, *overrides, head="model: {path: org/base}")


def test_needs_are_what_is_exported(tmp_path: Path) -> None:
    stage = ExportStage()
    assert stage.needs(read(tmp_path)) == ("ppo", "evaluation")
    reward = read(tmp_path, "export.reward=true")
    assert stage.needs(reward) == ("reward", "ppo", "evaluation")
    overrides = ["export.adapters=[policy,sft,reward]", "sft.tuning=lora", "reward.tuning=lora"]
    both = read(tmp_path, *overrides, head="model: {path: org/base}")
    assert stage.needs(both) == ("sft", "reward", "ppo", "evaluation")


def test_pushing_is_no_part_of_the_key(tmp_path: Path) -> None:
    """So that another `rlhf export` only pushes; the converter's content is, as what it writes."""

    def material(*overrides: str) -> dict[str, Any]:
        return stage_material(ExportStage(), read(tmp_path, *overrides), str, {"ppo": "p"})

    plain = material()
    pushes = ["export.push_to_hub=me/mine", "export.hub_private=false", "export.hub_revision=two"]
    assert material(*pushes) == plain
    converter = tmp_path / "convert_hf_to_gguf.py"
    converter.write_text("1")
    one = material(f"export.gguf={converter}")
    converter.write_text("2")
    assert one != material(f"export.gguf={converter}") != plain


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small GPT-NeoX whose pad token is its end token."""
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(["some text"], 300)
    shape = ArchitectureSection(
        model_type="gpt_neox", hidden_size=8, num_attention_heads=2, intermediate_size=16
    )
    build_from_config(shape, tokenizer, torch.float32).save_pretrained("base")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained("base")
    return tmp_path / "base"


def check(*overrides: str) -> tuple[int, str]:
    head = """
model: {path: base}
data: {prompts: prompts.jsonl, demonstrations: prompts.jsonl, rankings: rankings.jsonl}
"""
    Path("c.yaml").write_text(head)
    prompts = [f'{{"prompt": "p {i}", "response": "r"}}\n' for i in range(40)]
    Path("prompts.jsonl").write_text("".join(prompts))
    rankings = [f'{{"prompt": "p {i}", "chosen": "a", "rejected": "b"}}\n' for i in range(40)]
    Path("rankings.jsonl").write_text("".join(rankings))
    done = CliRunner().invoke(app, ["check", "c.yaml", *overrides], env={"COLUMNS": "300"})
    return done.exit_code, done.output


def test_check_asks_whether_others_would_load_it(base: Path) -> None:
    code, said = check("export.reward=true")
    assert code == 0
    assert "export.reward" in said and "a plain classifier scores it, padded with <|pad|>" in said
    code, said = check("export.vllm=true", "sft.tuning=lora", f"export.gguf={base}")
    assert code == 2
    assert "export.vllm: vLLM cannot load the policy's adapter: it serves" in said
    assert "which is no file: name convert_hf_to_gguf.py" in said
