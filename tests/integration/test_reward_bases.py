"""The chain with a reward model on another base: a tiny BERT beside a tiny Llama policy."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer

from pipeline.config import DataSection, ModelSection
from pipeline.models import adapters
from pipeline.models.store import ModelStore
from pipeline.resume import States
from pipeline.yaml_config import read_config
from stages.config import RunConfig
from stages.memory import predicted_files, predicted_footprint
from tests.families import WORDS, final_state, plain_model, write_model, write_rows
from tests.tiny_chain import SMALLEST, Killed, assert_same, rlhf, samples
from tests.tiny_encoders import save_encoder
from tests.unit.tiny_policies import generated

CONFIG = f"""{SMALLEST}
sft: {{max_steps: 4, batch_size: 4}}
reward:
  {{base: bert, max_prompt_tokens: 200, max_response_tokens: 56, tuning: full, max_steps: 4,
    batch_size: 4, checkpoint_every: 2, log_every: 1,
    optim: {{learning_rate: 1.0e-3}}, normalisation: {{num_samples: 6, max_new_tokens: 8}}}}
ppo:
  iterations: 2
  rollout: {{prompts_per_iteration: 4, max_new_tokens: 8}}
  optim: {{ppo_epochs: 1, minibatches: 2}}
  held_out: {{every: 1, num_prompts: 3}}
evaluation: {{prompts: 3, max_new_tokens: 4, max_n: 2}}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_encoder("bert", tmp_path / "bert", positions=256)
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_chain_runs_with_a_reward_model_on_an_encoder(place, tuning):
    found = rlhf("check", f"reward.tuning={tuning}")
    assert "reward.base" in found and "bert" in found and "score reads its first token" in found
    assert "256 positions" in found
    rlhf("run", f"reward.tuning={tuning}")
    run = place / "runs" / "r"
    report = json.loads((run / "reward/artifact/report.json").read_text())
    assert report["held_out"]["pairs"] > 0 and report["normalisation"]["responses"] == 6

    # PPO's scores are those of plain transformers on the texts that it sampled.
    store = ModelStore(ModelSection(init="config"), DataSection())
    reward = store.open(run / "reward/artifact")
    head = reward.trunk.heads[reward.role.head]
    adapters.activate(reward.trunk.model, reward.role.adapter)
    tokenizer = AutoTokenizer.from_pretrained(place / "bert")
    drawn = samples(run / "ppo")
    assert len(drawn) == 8
    compared = 0
    for row in drawn:
        pair = tokenizer(row["prompt"], row["response"], return_token_type_ids=True)
        if len(tokenizer(row["prompt"])["input_ids"]) > 200:
            continue  # cut
        inputs = {name: torch.tensor([ids]) for name, ids in pair.items()}
        with torch.no_grad():
            state = reward.trunk.model(**inputs).last_hidden_state[0, 0]
        score = (state @ head.weight + head.bias - head.shift) / head.scale
        assert row["score"] == pytest.approx(float(score), abs=1e-5)
        compared += 1
    assert compared >= 3
    # The value model could not start from an encoder: it stands on the policy's start.
    config = read_config(place / "c.yaml", [f"reward.tuning={tuning}"], RunConfig)
    footprint = predicted_footprint(config, "ppo")
    memory = json.loads((run / "ppo/memory.json").read_text())["measured"]
    assert memory["reward"]["weights"] == footprint["reward"].weights
    assert memory["value"] == vars(footprint["value"])
    assert (run / "export").exists() and (run / "evaluation/metrics.json").exists()
    # A run of its own may name it: it reads text there too.
    rlhf("ppo", f"ppo.rewards={run}", f"ppo.policy={run}", "run.name=other")
    others = samples(place / "runs/other/ppo")
    assert [row["score"] for row in others] == [row["score"] for row in drawn]


@pytest.mark.parametrize("tuning", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_base_may_be_an_encoder_decoder(place, tuning):
    base = write_model("t5", place / "t5")
    write_rows(place / "p.jsonl", [{"prompt": f"say {word}"} for word in WORDS])
    settings = ["reward.base=t5", f"reward.tuning={tuning}", "reward.max_response_tokens=30"]
    settings += ["reward.max_prompt_tokens=30", "data.prompts=p.jsonl"]
    for stage in ("sft", "reward", "ppo"):
        rlhf(stage, *settings)
    artifact = place / "runs/r/reward/artifact"
    head = load_file(artifact / "head.safetensors")
    if tuning == "full":
        model = plain_model(artifact / "model")
    else:
        model = PeftModel.from_pretrained(plain_model(base), artifact / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    compared = 0
    for row in samples(place / "runs/r/ppo"):
        # The prompt's text for the encoder, the response's for the decoder, both closed.
        prompt, response = tokenizer(row["prompt"]).input_ids, tokenizer(row["response"]).input_ids
        if not row["ended"]:
            response = response[:-1]
        if len(prompt) <= 30 and 0 < len(response) <= 30:
            state = final_state(model, prompt, response)
            score = (state @ head["weight"] + head["bias"] - head["shift"]) / head["scale"]
            assert row["score"] == pytest.approx(float(score), abs=1e-4)
            compared += 1
    assert compared >= 3


def test_predicted_memory_and_files_are_those_of_the_run(place):
    config = read_config(place / "c.yaml", [], RunConfig)
    predicted = predicted_footprint(config, "reward")
    rlhf("sft")
    rlhf("reward")
    stage = place / "runs/r/reward"
    measured = json.loads((stage / "memory.json").read_text())["measured"]
    assert measured["reward"] == vars(predicted["reward"])
    files = {file.what: file.size for file in predicted_files(config, ["reward"])}
    saved = [*stage.glob("artifact/model/*.safetensors"), stage / "artifact/head.safetensors"]
    header = 8192  # names and shapes of each file
    assert 0 <= sum(path.stat().st_size for path in saved) - files["artifact"] < 2 * header


def test_check_tries_adapters_where_they_are_trained(place):
    """The reward model is tuned in full here: a BERT needs no layer of the policy's names."""
    targets = "lora.target_modules=[q_proj, v_proj]"
    found = rlhf("check", targets, "ppo.tuning=lora")
    assert "everything is in order" in found
    found = rlhf("check", targets, "reward.tuning=lora", code=2)
    assert "lora.target_modules has 'q_proj', but BertModel has no such layer" in found


def test_check_asks_the_reward_models_base_for_its_classifier(place):
    found = rlhf("check", "export.reward=true", code=2)
    assert "export.reward" in found and "bert is none of the decoders whose classifier" in found


def test_the_best_of_several_is_chosen_by_a_reward_model_that_reads_text(place):
    for stage in ("sft", "reward", "ppo"):
        rlhf(stage)
    write_rows(place / "p.jsonl", [{"prompt": "say good"}])
    one, best = (
        generated("runs/r", "p.jsonl", "--stage", "ppo", *more)
        for more in (("--n", "3"), ("--best-of", "3"))
    )
    assert best[0]["response"] in [row["response"] for row in one]
    assert isinstance(best[0]["score"], float)


def test_without_normalisation_no_policy_is_needed(place):
    rlhf("reward", "reward.normalisation.mode=none")
    assert not (place / "runs/r/sft").exists()


def test_an_interrupted_training_goes_on_to_the_same_weights(place, monkeypatch):
    # dropout is on in a BERT that trains: its numbers go on too
    rlhf("reward", "reward.normalisation.mode=none", "run.name=whole")
    save = States.save

    def save_and_die(self, step, *rest):
        save(self, step, *rest)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(States, "save", save_and_die)
        with pytest.raises(Killed):
            rlhf("reward", "reward.normalisation.mode=none")
    rlhf("reward", "reward.normalisation.mode=none")
    assert_same(place / "runs/r/reward", place / "runs/whole/reward")


def test_rows_are_cut_to_the_positions_of_the_base(place):
    save_encoder("bert", place / "short", positions=24)
    output = rlhf("reward", "reward.normalisation.mode=none", "reward.base=short")
    assert "prompts cut to the limits of reward.base" in output
