"""Forms of an export: adapters of all roles, types, vLLM, GGUF, reward models, and their cards."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.batches import TokenBatch
from pipeline.errors import ModelError
from pipeline.models.trunk import Handle
from pipeline.vllm_config import vllm_max_rank
from stages.config import RunConfig
from stages.export.card import on_hub
from tests.unit.test_export import assert_same_policy, export, load
from tests.unit.tiny_run import POSTS, TinyRun, config

# Stands in for llama.cpp's script: keeps what it was called with, and what the folder held.
CONVERTER = """
import json, pathlib, sys
model, file = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[3])
found = {"argv": sys.argv[2:], "python": sys.executable,
         "files": sorted(path.name for path in model.iterdir()),
         "dtype": json.loads((model / "config.json").read_text())["dtype"]}
file.write_text(json.dumps(found))
"""
FAILING = """
import sys
print("loading", file=sys.stderr)
raise SystemExit("the pre-tokenizer was not recognized")
"""


def with_export(settings: RunConfig, **fields: Any) -> RunConfig:
    export = settings.export.model_copy(update={"merged": False, **fields})
    return settings.model_copy(update={"export": export})


def on_users_base(tmp_path: Path, **lora: Any) -> TinyRun:
    """A run whose SFT, reward and policy adapters all stand on a base that it did not make."""
    first = TinyRun(config(tmp_path / "first"))
    shutil.copytree(first.run.stage("sft").artifact / "model", tmp_path / "base")
    settings = config(tmp_path)
    model = settings.model.model_copy(update={"init": "pretrained", "path": str(tmp_path / "base")})
    sft = settings.sft.model_copy(update={"tuning": "lora"})
    reward = settings.reward.model_copy(update={"tuning": "lora"})
    changed = settings.model_copy(update={"model": model, "sft": sft, "reward": reward})
    changed = changed.model_copy(update={"lora": changed.lora.model_copy(update=lora)})
    return TinyRun(with_export(changed, adapters=("policy", "sft", "reward")))


def pairs(handle: Handle) -> list[tuple[list[int], list[int]]]:
    return [handle.codec.pair_ids(post, " A lamp, 우산.") for post in POSTS[:3]]


def our_logprobs(handle: Handle, prompt: list[int], response: list[int]) -> torch.Tensor:
    batch = TokenBatch.from_ragged([prompt], [response], handle.codec.pad_id)
    with torch.no_grad():
        found = handle(batch, {"logprobs"}).logprobs
    assert found is not None
    return found[0]


def their_logprobs(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1)[range(len(response)), response]


def our_score(handle: Handle, prompt: list[int], response: list[int]) -> torch.Tensor:
    batch = TokenBatch.from_ragged([prompt], [response], handle.codec.pad_id)
    with torch.no_grad():
        scores = handle(batch, {"scores"}).scores
    assert scores is not None
    return scores[0]


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    _, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(header), text


def code_of(folder: Path) -> dict[str, Any]:
    """What the names in the card's Python are, once it has run."""
    names: dict[str, Any] = {}
    exec(card_of(folder)[1].split("```python\n")[1].split("```")[0], names)
    return names


# --- adapters ---


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_adapters_of_all_roles_load_in_plain_peft(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stages' own `artifact/adapter`, and what is exported of them, on the plain base."""
    run = on_users_base(tmp_path, **({} if kind == "lora" else {f"use_{kind}": True}))
    out = export(run)
    monkeypatch.chdir(out)
    reward = run.store.open(run.run.stage("reward").artifact)
    of_stage = {"sft": run.sft, "ppo": run.policy, "reward": reward}
    exported = {"sft": "sft_adapter", "ppo": "adapter"}
    for stage, handle in of_stage.items():
        folders = [run.run.stage(stage).artifact / "adapter"]
        folders += [out / exported[stage]] if stage in exported else []
        for folder in folders:
            base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
            model = PeftModel.from_pretrained(base, str(folder)).eval()
            settings = model.peft_config["default"]
            assert (settings.use_dora, settings.use_rslora) == (kind == "dora", kind == "rslora")
            for prompt, response in pairs(handle):
                ours = our_logprobs(handle, prompt, response)
                theirs = their_logprobs(model, prompt, response)
                torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    names = code_of(out / "reward_adapter")
    scores = names["score"]([(post, " A lamp, 우산.") for post in POSTS[:3]])
    ours = torch.stack([our_score(reward, *pair) for pair in pairs(reward)])
    torch.testing.assert_close(scores, ours, rtol=0, atol=1e-5)


def test_one_base_serves_the_adapters_of_all_roles(tmp_path: Path) -> None:
    run = TinyRun(with_export(config(tmp_path), adapters=("policy", "reward"), vllm=True))
    out = export(run)
    record = json.loads((out / "export.json").read_text())
    assert record["forms"] == ["base", "adapter", "vllm", "reward_adapter"]
    for form in ("adapter", "vllm", "reward_adapter"):
        settings = json.loads((out / form / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == "./base"
    assert not any(path.is_dir() and path.name.startswith(".") for path in out.iterdir())


# --- types ---


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_merged_weights_are_rounded_once(tmp_path: Path, tuning: Any) -> None:
    """bfloat16: the float32 sums W + (alpha / r) B A, each rounded; alpha / r = 8 / 4 = 2."""
    run = TinyRun(with_export(config(tmp_path, tuning), merged=True, dtype="bfloat16"))
    out = export(run)
    merged = load_file(out / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert json.loads((out / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert 'dtype="bfloat16"' in card_of(out / "merged")[1]
    name = "model.layers.1.mlp.down_proj"
    if tuning == "full":
        trained = load_file(run.run.stage("ppo").artifact / "model" / "model.safetensors")
        expected = trained[f"{name}.weight"]
        assert run.policy.trunk.model.dtype == torch.float32  # the live model stays as it was
    else:
        base = load_file(run.run.stage("sft").artifact / "model" / "model.safetensors")
        lora = load_file(out / "adapter" / "adapter_model.safetensors")
        key = f"base_model.model.{name}.lora_"
        update = lora[f"{key}B.weight"] @ lora[f"{key}A.weight"]
        expected = base[f"{name}.weight"] + 2 * update
    assert torch.equal(merged[f"{name}.weight"], expected.bfloat16())


def test_a_half_precision_base_is_merged_in_single(tmp_path: Path) -> None:
    settings = config(tmp_path)
    model = settings.model.model_copy(update={"dtype": "bfloat16"})
    run = TinyRun(
        with_export(settings.model_copy(update={"model": model}), merged=True, dtype="float32")
    )
    before = run.sft.trunk.base_hash()
    out = export(run)
    assert run.sft.trunk.base_hash() == before
    merged = load_file(out / "merged" / "model.safetensors")
    base = load_file(run.run.stage("sft").artifact / "model" / "model.safetensors")
    lora = load_file(out / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    key = f"base_model.model.{name}.lora_"
    expected = base[f"{name}.weight"].float()
    expected += 2 * lora[f"{key}B.weight"] @ lora[f"{key}A.weight"]
    torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=0, atol=1e-6)


# --- vLLM ---


def test_the_folder_for_vllm_holds_what_its_reader_takes(tmp_path: Path) -> None:
    run = TinyRun(with_export(config(tmp_path), adapters=(), vllm=True))
    out = export(run)
    names = load_file(out / "vllm" / "adapter_model.safetensors").keys()
    assert names and all(
        name.startswith("base_model.model.model.layers.")
        and name.endswith((".lora_A.weight", ".lora_B.weight"))
        for name in names
    )
    settings = json.loads((out / "vllm" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["bias"]) == (4, 8, "none")
    assert settings["modules_to_save"] is None and not settings["use_dora"]
    header, text = card_of(out / "vllm")
    assert header["library_name"] == "vllm"
    # Rank 4 fits the smallest maximum that vLLM has.
    command = (
        "vllm serve ./base --tokenizer ./vllm --generation-config ./vllm \\\n"
        "    --enable-lora --max-lora-rank 8 --lora-modules policy=./vllm\n"
    )
    assert f"```sh\n{command}```" in text
    stops = json.loads((out / "vllm" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == sorted(run.policy.codec.stop_ids)


def test_ranks_under_which_vllm_loads() -> None:
    asked = (1, 8, 9, 257, 321, 512)
    assert [vllm_max_rank(rank) for rank in asked] == [8, 8, 16, 320, 512, 512]


def dora(settings: RunConfig) -> RunConfig:
    lora = settings.lora.model_copy(update={"use_dora": True})
    return settings.model_copy(update={"lora": lora})


@pytest.mark.parametrize("kind", ["use_dora", "use_rslora"])
def test_other_kinds_of_adapters_are_merged(tmp_path: Path, kind: str) -> None:
    settings = config(tmp_path)
    lora = settings.lora.model_copy(update={kind: True})
    run = TinyRun(with_export(settings.model_copy(update={"lora": lora}), merged=True))
    out = export(run)
    for form in ("merged", "adapter"):
        assert_same_policy(run, load(out, form), out / form)


def embeddings(settings: RunConfig) -> RunConfig:
    lora = settings.lora.model_copy(update={"target_modules": ("q_proj", "embed_tokens")})
    return settings.model_copy(update={"lora": lora})


@pytest.mark.parametrize(
    ("change", "message"),
    [(dora, "no DoRA: set lora.use_dora to false"), (embeddings, "out of lora.target_modules")],
)
def test_what_vllm_does_not_take_is_refused_first(
    tmp_path: Path, change: Callable[[RunConfig], RunConfig], message: str
) -> None:
    """Also where the adapter is not of this config, as with `ppo.policy`."""
    run = TinyRun(with_export(change(config(tmp_path)), vllm=True))
    with pytest.raises(ModelError, match=message) as caught:
        export(run)
    assert "or set export.vllm to false and export.merged to true" in str(caught.value)
    assert list(run.run.stage("export").artifact.iterdir()) == []


# --- GGUF ---


@pytest.mark.parametrize("merged", [True, False])
def test_the_named_converter_gets_the_merged_policy(tmp_path: Path, merged: bool) -> None:
    converter = tmp_path / "convert_hf_to_gguf.py"
    converter.write_text(CONVERTER)
    settings = with_export(
        config(tmp_path), merged=merged, gguf=str(converter), gguf_outtype="q8_0", dtype="bfloat16"
    )
    out = export(TinyRun(settings))
    file = out / "gguf" / "policy-q8_0.gguf"
    found = json.loads(file.read_text())
    assert found["argv"] == ["--outfile", str(file), "--outtype", "q8_0"]
    assert found["python"] == sys.executable
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found["files"])
    assert found["dtype"] == "bfloat16"
    # What was merged only for the converter is gone.
    assert (out / "merged").exists() == merged
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []
    header, text = card_of(out / "gguf")
    assert header["library_name"] == "gguf"
    assert "llama-cli -m ./gguf/policy-q8_0.gguf" in text
    assert "Responses end at `<|end|>` (the file names one of them" in text


def test_a_converter_that_fails_says_why(tmp_path: Path) -> None:
    converter = tmp_path / "convert_hf_to_gguf.py"
    converter.write_text(FAILING)
    with pytest.raises(ModelError, match="was not recognized") as caught:
        export(TinyRun(with_export(config(tmp_path / "a"), gguf=str(converter))))
    said = "convert_hf_to_gguf.py ended with code 1. Its last lines:\nloading\nthe pre-tokenizer"
    assert said in str(caught.value)
    converter.write_text("")  # ends well and writes nothing
    with pytest.raises(ModelError, match="wrote no "):
        export(TinyRun(with_export(config(tmp_path / "b"), gguf=str(converter))))
    with pytest.raises(ModelError, match=r"which is no file: name convert_hf_to_gguf\.py"):
        export(TinyRun(with_export(config(tmp_path / "c"), gguf="elsewhere.py")))


# --- the reward model ---


TURNS = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "system_prompt"),
    [(None, None), (TURNS, None), (TURNS, 'Be "kind" {always}.')],
    ids=["texts", "turns", "system turn"],
)
def test_the_card_of_the_reward_model_scores_as_we_do(
    tmp_path: Path,
    template: str | None,
    system_prompt: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = TinyRun(with_export(config(tmp_path), adapters=(), reward=True))
    artifact = run.run.stage("reward").artifact
    trained = run.store.open(artifact)
    trained.trunk.heads["reward"].normalise(mean=0.7, std=3.0)
    trained.codec.tokenizer.chat_template = template
    trained.codec.template_source = "plain" if template is None else "tokenizer"
    trained.codec.system_prompt = system_prompt
    run._finish("reward", trained)
    run.store = run.fresh_store()
    reward = run.store.open(artifact)
    assert reward.codec.lead == " "
    before = reward.trunk.base_hash()
    out = export(run)
    assert reward.trunk.base_hash() == before
    monkeypatch.chdir(out)
    scores = code_of(out / "reward")["score"]([(post, " A lamp, 우산.") for post in POSTS[:3]])
    ours = torch.stack([our_score(reward, *pair) for pair in pairs(reward)])
    assert ours.std() > 1e-3
    torch.testing.assert_close(scores, ours, rtol=0, atol=1e-5)
    header, text = card_of(out / "reward")
    assert header["pipeline_tag"] == "text-classification"
    assert "score of this run's reward model is logit - `reward_shift`" in text
    assert ("were given this one" in text) == (system_prompt is not None)
    settings = json.loads((out / "reward" / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForSequenceClassification"]
    assert settings["reward_shift"] == pytest.approx((0.7 - 0.0) / 3, abs=1e-6)
    assert not (out / "reward" / "generation_config.json").exists()


def test_a_fully_tuned_reward_model_is_exported_as_it_is(tmp_path: Path) -> None:
    settings = with_export(config(tmp_path, "full"), reward=True, dtype="bfloat16")
    run = TinyRun(settings)
    whole = run.store.trainable_copy(run.sft, "reward", "full", settings.lora)
    whole.trunk.add_head("reward").init_normal(torch.Generator().manual_seed(1))
    run._finish("reward", whole.with_role("reward", head="reward"))
    out = export(run)
    model = AutoModelForSequenceClassification.from_pretrained(out / "reward", dtype="auto")
    assert model.dtype == torch.bfloat16
    name = "model.layers.0.mlp.up_proj.weight"
    theirs = load_file(out / "reward" / "model.safetensors")
    ours = load_file(run.run.stage("reward").artifact / "model" / "model.safetensors")
    assert torch.equal(theirs[name], ours[name].bfloat16())


# --- cards on the Hub ---


def test_cards_load_from_the_hub(tmp_path: Path) -> None:
    run = TinyRun(with_export(config(tmp_path), merged=True, vllm=True))
    out = export(run)
    card = (out / "adapter" / "README.md").read_text(encoding="utf-8")
    changed = on_hub(card, "me/mine", "merged", None)
    assert 'from_pretrained("me/mine", subfolder="base", dtype="float32")' in changed
    assert 'PeftModel.from_pretrained(base, "me/mine", subfolder="adapter")' in changed
    assert "From the Hub:" in changed and "./base" not in changed
    merged = on_hub((out / "merged" / "README.md").read_text(), "me/mine", "merged", None)
    assert 'AutoTokenizer.from_pretrained("me/mine")' in merged
    served = on_hub((out / "vllm" / "README.md").read_text(), "me/mine", "merged", "two")
    assert "After `hf download me/mine --revision two --local-dir .`:" in served
    assert "vllm serve ./base" in served
