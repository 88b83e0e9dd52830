"""The evaluation stage on tiny models: the keys of metrics.json, and the numbers behind them."""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from pipeline.distributed import Runtime
from pipeline.errors import ConfigError, DataError
from pipeline.generation import NativeEngine, Sampling, StaticEngine
from pipeline.records import Ranking
from stages.evaluation.config import EvaluationSection
from stages.evaluation.run import EvaluationStage
from tests.unit.tiny_run import TinyRun, config

POLICY_KEYS = {"score", "score_std", "kl", "length", "eos_rate", "distinct_2", "n"}
GOLD = """
def shortness(prompts, completions, completion_ids, ended, **columns):
    return [-len(text) for text in completions]
"""


def evaluate(run: TinyRun) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """metrics.json and the rows of samples.jsonl."""
    stage = EvaluationStage()
    context = run.context("evaluation", stage.needs(run.config))
    stage.run(context)
    folder = context.folder.artifact
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    samples = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return metrics, [json.loads(line) for line in samples]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, dict[str, Any], list[Any]]:
    """A run with every optional number: gold judge, ROUGE-L, best-of-n."""
    folder = tmp_path_factory.mktemp("judged")
    (folder / "gold.py").write_text(GOLD)
    gold = f"{folder}/gold.py:shortness"
    run = TinyRun(config(folder, gold=gold, reference_column="reference"))
    return run, *evaluate(run)


Judged = tuple[TinyRun, dict[str, Any], list[dict[str, Any]]]


def test_keys_are_exactly_the_fixed_ones(judged: Judged) -> None:
    _, metrics, _ = judged
    assert metrics.keys() == {
        "reward_model", "policies", "win_rate", "seconds", "peak_rss_mb", "about",
    }  # fmt: skip
    assert metrics["reward_model"].keys() == {"accuracy", "ece", "n", "ceiling"}
    assert metrics["policies"].keys() == {"sft", "ppo", "best_of_n"}
    for numbers in metrics["policies"].values():
        assert numbers.keys() == POLICY_KEYS | {"gold", "rouge_l"}
    assert metrics["win_rate"].keys() == {"ppo_vs_sft", "best_of_n_vs_sft"}
    for win in metrics["win_rate"].values():
        assert win.keys() == {"rate", "low", "high", "n", "judge"}
    assert metrics["seconds"].keys() == {"sft", "reward", "ppo", "evaluation"}


def test_optional_keys_are_left_out(tmp_path: Path) -> None:
    run = TinyRun(config(tmp_path, best_of_n=False))
    metrics, _ = evaluate(run)
    assert metrics["reward_model"] == {"accuracy": 0.7, "ece": 0.05, "n": 40}
    assert metrics["policies"].keys() == {"sft", "ppo"}
    assert metrics["policies"]["ppo"].keys() == POLICY_KEYS
    assert metrics["win_rate"].keys() == {"ppo_vs_sft"}
    assert metrics["win_rate"]["ppo_vs_sft"]["judge"] == "reward"


def test_numbers_are_those_of_the_samples(judged: Judged) -> None:
    _, metrics, samples = judged
    assert len(samples) == 8
    for policy, numbers in metrics["policies"].items():
        rows = [sample[policy] for sample in samples]
        assert numbers["n"] == 8
        for key, column in (("score", "score"), ("gold", "gold"), ("length", "tokens"),
                            ("rouge_l", "rouge_l")):  # fmt: skip
            assert numbers[key] == pytest.approx(statistics.fmean(row[column] for row in rows))
        assert all(row["gold"] == -len(row["text"]) for row in rows)
        assert numbers["eos_rate"] == sum(row["ended"] for row in rows) / 8
    pairs = [(sample["ppo"]["gold"], sample["sft"]["gold"]) for sample in samples]
    wins = sum(ours > theirs for ours, theirs in pairs) + 0.5 * sum(a == b for a, b in pairs)
    assert metrics["win_rate"]["ppo_vs_sft"]["rate"] == wins / 8
    assert metrics["win_rate"]["ppo_vs_sft"]["judge"] == "shortness"
    assert metrics["seconds"]["sft"] == 1.5


def test_kl_agrees_with_plain_transformers(judged: Judged) -> None:
    """log p - log p_ref of the sampled tokens, by whole forward passes of plain models."""
    run, metrics, samples = judged
    reference = AutoModelForCausalLM.from_pretrained(run.run.stage("sft").artifact / "model")
    handle = run.store.trainable_copy(run.policy, "merged", "full", run.config.lora)
    policy = handle.trunk.model
    codec = run.policy.codec
    drawn = _redraw(run)
    assert [codec.text(ids) for ids in drawn] == [sample["ppo"]["text"] for sample in samples]
    totals = []
    for prompt, response in zip(run.corpus.prompts.held_out[-8:], drawn, strict=True):
        ids = codec.prompt_ids(prompt.prompt)
        total = 0.0
        for model, sign in ((policy, 1), (reference, -1)):
            with torch.no_grad():
                logits = model(torch.tensor([ids + response])).logits[0, len(ids) - 1 : -1]
            total += sign * torch.log_softmax(logits, -1)[range(len(response)), response].sum()
        totals.append(float(total))
    assert metrics["policies"]["ppo"]["kl"] == pytest.approx(statistics.fmean(totals), abs=1e-4)
    assert metrics["policies"]["sft"]["kl"] == 0.0


def _redraw(run: TinyRun) -> list[list[int]]:
    """PPO's responses once more, one row a call: noise i belongs to prompt i."""
    seed = Runtime(run.config.run).seed("evaluation")
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=seed)
    return [
        NativeEngine()
        .generate(run.policy, [run.policy.codec.prompt_ids(prompt.prompt)], [index], sampling)
        .response_ids[0]
        for index, prompt in enumerate(run.corpus.prompts.held_out[-8:])
    ]


def test_best_of_n_is_at_ppos_kl_and_never_worse_than_its_first_candidate(judged: Judged) -> None:
    _, metrics, samples = judged
    n = metrics["about"]["best_of_n"]
    kls = {k: math.log(k) - (k - 1) / k for k in (1, 2, 3, 4)}
    ppo_kl = metrics["policies"]["ppo"]["kl"]
    assert n == min(kls, key=lambda k: abs(kls[k] - ppo_kl))
    assert n > 1, "otherwise the comparison below is empty"
    assert metrics["policies"]["best_of_n"]["kl"] == pytest.approx(kls[n])
    better = [sample["best_of_n"]["score"] - sample["sft"]["score"] for sample in samples]
    assert min(better) >= -1e-5
    assert max(better) > 0


def test_n_can_be_set(tmp_path: Path) -> None:
    """Whatever PPO's KL; each response is the best of the first candidates of n = 3."""
    run = TinyRun(config(tmp_path, n=3, max_n=2))
    metrics, samples = evaluate(run)
    assert metrics["about"]["best_of_n"] == 3
    assert metrics["policies"]["best_of_n"]["kl"] == pytest.approx(math.log(3) - 2 / 3)
    report = (run.run.stage("evaluation").artifact / "report.md").read_text(encoding="utf-8")
    assert "Best-of-n's n was set (evaluation.n = 3): its KL is 0.43 nats" in report
    assert "not at equal KL" not in report
    assert all(row["best_of_n"]["score"] >= row["sft"]["score"] - 1e-5 for row in samples)


def test_ceiling_is_the_gold_orders_accuracy(judged: Judged) -> None:
    # By shortness: " A lamp." > " Nothing." > " A lamp is gone." and " Nothing." > " Keys lost.".
    # Labelers: gone > lamp (wrong), gone > Nothing (wrong), lamp > Nothing (right); Nothing > Keys
    # (right). 2 of 4.
    assert judged[1]["reward_model"]["ceiling"] == 0.5


def test_ceiling_is_left_out_where_the_gold_judge_cannot_read_rankings(tmp_path: Path) -> None:
    (tmp_path / "gold.py").write_text(
        "def gold(prompts, completions, completion_ids, reference, **columns):\n"
        "    return [float(text == wanted.lower()) for text, wanted in zip(completions, reference)]"
    )
    run = TinyRun(config(tmp_path, gold=f"{tmp_path}/gold.py:gold", best_of_n=False))
    stranger = Ranking("POST: unknown.\nTL;DR:", (" a", " b"), (0, 1))
    split = replace(run.corpus.rankings, held_out=(stranger,))
    run.corpus = replace(run.corpus, rankings=split)
    metrics, _ = evaluate(run)
    assert "ceiling" not in metrics["reward_model"]
    assert "no ceiling of the reward model" in run.screen.getvalue()


def test_an_unchanged_policy_ties_with_sft(tmp_path: Path) -> None:
    run = TinyRun(config(tmp_path))
    with torch.no_grad():
        for name, parameter in run.policy.trunk.model.named_parameters():
            if f"lora_B.{run.policy.role.adapter}" in name:
                parameter.zero_()
    metrics, samples = evaluate(run)
    assert all(sample["ppo"]["text"] == sample["sft"]["text"] for sample in samples)
    assert metrics["win_rate"]["ppo_vs_sft"]["rate"] == 0.5
    assert metrics["policies"]["ppo"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["about"]["best_of_n"] == 1


def test_batch_sizes_do_not_change_the_responses(judged: Judged, tmp_path: Path) -> None:
    _, _, samples = judged
    other = TinyRun(config(tmp_path, generation_rows=64, micro_batch_tokens=80))
    _, again = evaluate(other)
    for policy in ("sft", "ppo", "best_of_n"):
        texts = [sample[policy]["text"] for sample in samples]
        assert [sample[policy]["text"] for sample in again] == texts


def test_evaluation_leaves_the_base_alone(tmp_path: Path) -> None:
    run = TinyRun(config(tmp_path))
    before = run.sft.trunk.base_hash()
    evaluate(run)
    assert run.sft.trunk.base_hash() == before


def test_a_new_process_finds_the_same_numbers(tmp_path: Path) -> None:
    run = TinyRun(config(tmp_path))
    live, _ = evaluate(run)
    run.store = run.fresh_store()
    rebuilt, _ = evaluate(run)
    for policy, numbers in live["policies"].items():
        assert rebuilt["policies"][policy] == pytest.approx(numbers, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "sampling"),
    [
        ({"temperature": 0}, Sampling(12, temperature=0)),
        ({"decoding": {"num_beams": 3}}, Sampling(12, num_beams=3)),
        ({"temperature": 0.9, "decoding": {"top_k": 4, "top_p": 0.8}}, None),
    ],
    ids=["greedy", "beam", "truncated"],
)
def test_the_policies_answer_as_the_settings_say(
    tmp_path: Path, settings: dict[str, Any], sampling: Sampling | None
) -> None:
    run = TinyRun(config(tmp_path, **settings))
    metrics, samples = evaluate(run)
    if sampling is None:
        seed = Runtime(run.config.run).seed("evaluation")
        sampling = Sampling(12, temperature=0.9, seed=seed, top_k=4, top_p=0.8)
    prompts = run.corpus.prompts.held_out[-8:]
    for name, handle in (("sft", run.sft), ("ppo", run.policy)):
        ids = [handle.codec.prompt_ids(prompt.prompt) for prompt in prompts]
        drawn = StaticEngine(1).generate(handle, ids, range(8), sampling)
        texts = [handle.codec.text(response) for response in drawn.response_ids]
        assert [sample[name]["text"] for sample in samples] == texts
    assert ("best_of_n" in metrics["policies"]) == (sampling.top_k > 0)
    report = (run.run.stage("evaluation").artifact / "report.md").read_text(encoding="utf-8")
    note = "not the KL of what was drawn" if sampling.top_k else "nothing to choose from"
    assert note in report


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"temperature": 0.7, "decoding": {"num_beams": 4}},
            r"evaluation\.decoding\.num_beams is 4 but evaluation\.temperature is 0\.7",
        ),
        (
            {"temperature": 0, "decoding": {"num_beams": 4}},
            r"evaluation\.decoding\.num_beams is 4 but evaluation\.temperature is 0,",
        ),
        (
            {"decoding": {"num_beams": 4, "top_p": 0.9}},
            r"decoding\.top_p is 0\.9 but evaluation\.decoding\.num_beams is 4",
        ),
        (
            {"temperature": 0, "decoding": {"top_k": 5}},
            r"decoding\.top_k is 5 but evaluation\.temperature is 0",
        ),
        ({"decoding": {"top_p": 0}}, r"greater than 0"),
    ],
)
def test_settings_that_contradict_are_refused_by_name(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        EvaluationSection(**settings)


def test_a_missing_reference_column_is_named(tmp_path: Path) -> None:
    run = TinyRun(config(tmp_path, reference_column="summary"))
    with pytest.raises(ConfigError, match=r"evaluation\.reference_column is 'summary'.*reference"):
        evaluate(run)


def test_prompts_cut_to_the_limit_are_counted_and_named(tmp_path: Path) -> None:
    settings = config(tmp_path, best_of_n=False)
    limit = 14
    data = settings.data.model_copy(update={"max_prompt_tokens": limit})
    run = TinyRun(settings.model_copy(update={"data": data}))
    encode = run.sft.codec.tokenizer.encode
    cut = sum(len(encode(prompt.prompt)) > limit for prompt in run.corpus.prompts.held_out[-8:])
    assert 0 < cut < 8
    metrics, _ = evaluate(run)
    assert metrics["about"]["prompts_cut"] == cut
    assert f"{cut} prompts cut to data.max_prompt_tokens" in run.screen.getvalue()
    report = run.run.stage("evaluation").artifact / "report.md"
    assert f"{cut} of the 8 prompts are longer than data.max_prompt_tokens" in report.read_text()


def test_samples_are_json_whatever_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "stages.evaluation.policies.rouge_l", lambda texts, _: [math.nan] * len(texts)
    )
    run = TinyRun(config(tmp_path, best_of_n=False, reference_column="reference"))
    metrics, samples = evaluate(run)
    assert metrics["policies"]["ppo"]["rouge_l"] is None
    assert samples[0]["ppo"]["rouge_l"] is None


def test_no_held_out_prompt_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    run = TinyRun(config(tmp_path))
    empty = replace(run.corpus.prompts, held_out=())
    run.corpus = replace(run.corpus, prompts=empty)
    with pytest.raises(DataError, match=r"data\.held_out_fraction"):
        evaluate(run)


def test_rouge_reads_korean() -> None:
    # LCS of (고양이가, 잤다) and (고양이가, 오래, 잤다) is 2: precision 1, recall 2/3, F 0.8.
    pytest.importorskip("rouge_score")
    from stages.evaluation.policies import rouge_l

    assert rouge_l(["고양이가 잤다."], ["고양이가 오래 잤다."]) == [pytest.approx(0.8)]
