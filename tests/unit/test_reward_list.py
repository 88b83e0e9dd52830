"""Built-in sources, ensembles and weighted sums: numbers by hand, and how they fail."""

import asyncio
import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

from pipeline.batches import TokenBatch
from pipeline.config import ModelSection
from pipeline.errors import ConfigError, TrainingError
from pipeline.not_finite import NotFinite
from pipeline.records import Prompt
from pipeline.reward_list import Rewards
from pipeline.rewards import (
    Completions,
    FunctionReward,
    ModelReward,
    Opener,
    RewardSource,
    Scores,
    WeightedSum,
    weighted_models,
)
from pipeline.rewards.builtin import length_penalty, repetition_penalty
from pipeline.rewards.weighted_sum import Ensemble, Term, combined
from stages.ppo.config import PpoSection
from stages.ppo.models import build_models
from tests.tiny_ppo import LORA, store, tiny_handle, tiny_reward


def completions(
    texts: list[str], ids: list[list[int]] | None = None, **columns: Any
) -> Completions:
    prompts = [
        Prompt("q", {name: values[row] for name, values in columns.items()}, f"p.jsonl:{row + 1}")
        for row in range(len(texts))
    ]
    ids = ids or [[1, 2]] * len(texts)
    return Completions(prompts, [[1]] * len(texts), ids, texts, [True] * len(texts))


class _Store:
    computes_on = torch.device("cpu")


def opened(rewards: Any) -> RewardSource:
    """What `ppo.rewards` opens, without a model of the run's own."""
    named: Rewards = PpoSection.model_validate({"rewards": rewards}).rewards
    return Opener(_Store(), ModelSection(path="x"), 100, lambda: tiny_handle()).open(named)  # type: ignore[arg-type]


# --- built in ---


def test_length_penalty_by_hand_and_as_dapo_has_it() -> None:
    # 12 tokens over 8 in units of 4: 1; 20: 3, held to 2.
    assert length_penalty(12, 8, 4, None) == -1
    assert length_penalty(20, 8, 4, 2.0) == -2
    assert math.copysign(1, length_penalty(8, 8, 4, None)) == 1  # 0, not -0
    dapo = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    lengths = [0, 79, 80, 81, 90, 99, 100, 101, 500]
    ours = [length_penalty(n, 80, 20, 1.0) for n in lengths]
    assert ours == pytest.approx(dapo([[1] * n for n in lengths]))
    assert ours[4] == -0.5


def test_repetition_penalty_by_hand_and_as_trl_has_it() -> None:
    # a b, b a, a b, b c: 3 different of 4.
    assert repetition_penalty(["a", "b", "a", "b", "c"], 2) == -0.25
    assert repetition_penalty(["a", "b"], 3) == 0
    rows = [[1, 2, 3, 4], [5] * 5, [1, 2, 1, 2, 1], [7]]
    trl = get_repetition_penalty_reward(ngram_size=2)
    assert [repetition_penalty(row, 2) for row in rows] == pytest.approx(trl(completion_ids=rows))


def test_built_in_sources_read_text_and_ids() -> None:
    batch = completions(
        ["나는 간다. 나는 간다!", "yes it is"], [[3] * 6, [4, 5]], ref=["x", "it is, yes"]
    )
    assert opened([{"builtin": "length_penalty", "target": 4}]).score(batch) == [-2, 0]
    # Words whatever the script and punctuation: 나는 간다, 간다 나는, 나는 간다.
    words = opened([{"builtin": "repetition_penalty", "ngram": 2}])
    assert words.score(batch) == pytest.approx([-1 / 3, 0])
    tokens = opened([{"builtin": "repetition_penalty", "ngram": 2, "unit": "tokens"}])
    assert tokens.score(batch) == pytest.approx([-4 / 5, 0])
    regex = opened([{"builtin": "regex", "pattern": r"\A\w+ it", "match": 2, "miss": -1}])
    assert regex.score(batch) == [-1, 2]


def test_rouge_against_a_column() -> None:
    pytest.importorskip("rouge_score")
    batch = completions(["yes it is", "a b"], ref=["It is, yes", "a b"])
    # LCS of (yes it is) and (it is yes) is 2: precision = recall = 2/3. Words: all. Pairs: 1 of 2.
    for variant, value in (("rouge_l", 2 / 3), ("rouge_1", 1.0), ("rouge_2", 1 / 2)):
        source = opened([{"builtin": "rouge", "column": "ref", "variant": variant}])
        assert source.score(batch) == pytest.approx([value, 1])
    with pytest.raises(TrainingError, match=r"reward rouge .* column 'answer'.*p\.jsonl:1.*ref"):
        opened([{"builtin": "rouge", "column": "answer"}]).score(batch)


def test_rouge_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.rouge.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"install rlhf-pipeline\[eval\]"):
        opened([{"builtin": "rouge", "column": "ref"}])


# --- ensembles and sums ---


def test_ensembles_combine_row_by_row() -> None:
    # Mean of 1, 2, 6 is 3; deviations -2, -1, 3: variance (4 + 1 + 9) / 3 = 14/3.
    row = (1.0, 2.0, 6.0)
    assert combined(row, "mean", 1) == 3
    assert combined(row, "minimum", 1) == 1
    assert combined(row, "mean_minus_std", 0.5) == pytest.approx(3 - 0.5 * math.sqrt(14 / 3))
    assert combined((4.0, math.nan), "mean_minus_std", 9) == 4  # who abstains is left out
    assert math.isnan(combined((math.nan, math.nan), "minimum", 1))


FUNCTIONS = """
import asyncio
def length(completions, **rest):
    return [float(len(text)) for text in completions]
def vowels(completions, **rest):
    return [sum(text.count(c) for c in "aeiou") for text in completions]
def korean(completions, **rest):
    return [1.0 if "가" <= text[0] <= "힣" else None for text in completions]
async def meet(completions, **rest):
    asyncio.met = getattr(asyncio, "met", 0) + 1
    while asyncio.met < 4:
        await asyncio.sleep(0.01)
    return [1.0] * len(completions)
def fails(**rest):
    raise ValueError("no")
def nan(completions, **rest):
    return [float("nan")] * len(completions)
"""


@pytest.fixture
def file(tmp_path: Any) -> str:
    path = tmp_path / "f.py"
    path.write_text(FUNCTIONS, encoding="utf-8")
    return str(path)


def test_a_sum_weighs_shifts_and_keeps_each_score(file: str) -> None:
    rewards = opened(
        [
            {"function": f"{file}:length", "weight": 0.5, "shift": 2.0},
            {"function": f"{file}:vowels", "weight": -3.0},
            {
                "ensemble": [
                    {"function": f"{file}:length", "name": "a", "weight": 2.0},
                    {"function": f"{file}:vowels", "name": "b", "shift": -5.0},
                ],
                "combine": "minimum",
                "weight": 10.0,
            },
        ]
    )
    assert isinstance(rewards, WeightedSum)
    scores = rewards.measure(completions(["banana", "sky"]))
    # banana: 0.5 (6 - 2) - 3 x 3 + 10 min(12, 3 + 5) = 2 - 9 + 80
    # sky:    0.5 (3 - 2) - 3 x 0 + 10 min(6, 0 + 5)  = 0.5 + 50
    assert scores.total == [73.0, 50.5]
    assert scores.by_source == {
        "length": [6, 3], "vowels": [3, 0], "ensemble": [8, 5], "a": [6, 3], "b": [3, 0],
    }  # fmt: skip
    assert rewards.names == list(scores.by_source)
    assert rewards.name == "0.5 x length + -3 x vowels + 10 x ensemble"
    assert Scores.of_rows(scores.rows()) == scores


def test_who_abstains_adds_nothing_but_somebody_has_to_score(file: str) -> None:
    both = opened([f"{file}:korean", f"{file}:vowels"])
    assert isinstance(both, WeightedSum)
    scores = both.measure(completions(["가a", "ab"]))
    assert scores.total == [2.0, 1.0]
    assert scores.by_source["korean"][0] == 1 and math.isnan(scores.by_source["korean"][1])
    message = r"none of the rewards korean has a score for 1 of 2 .* 'ab' \(row 1, prompts at p"
    with pytest.raises(TrainingError, match=message):
        opened([f"{file}:korean"]).score(completions(["가a", "ab"]))
    with pytest.raises(TrainingError, match="must return a list of numbers"):
        opened(f"{file}:korean").score(completions(["ab"]))  # as the one source it may not


def test_a_fault_is_told_after_all_sources_were_asked(file: str) -> None:
    """Models whose weights lie over processes are passed by all processes or by none."""
    asked = []

    class Model:
        name = "model"

        def score(self, batch: Completions) -> list[float]:
            asked.append(len(batch))
            return [0.0] * len(batch)

    def term(name: str, source: RewardSource) -> Term:
        return Term(name, 1.0, 0.0, source)

    nan, fails = (FunctionReward(f"{file}:{name}", may_abstain=True) for name in ("nan", "fails"))
    rewards = WeightedSum([term("nan", nan), term("fails", fails), term("model", Model())])
    # A fault that no roll-back helps comes before numbers that are not finite.
    with pytest.raises(TrainingError, match=r"raised ValueError: no \(f\.py, line 15\); rows 0 to"):
        rewards.score(completions(["a", "b"]))
    assert asked == [2]
    with pytest.raises(NotFinite, match="reward nan returned nan for 2 of 2"):
        WeightedSum([term("nan", nan)]).score(completions(["a", "b"]))


def test_only_one_reward_model_that_counts_starts_the_value_model() -> None:
    one, two = (tiny_reward(tiny_handle()) for _ in range(2))

    def term(source: Any, weight: float = 1.0, shift: float = 0.0) -> Term:
        return Term("x", weight, shift, source)

    def models(*terms: Term) -> list[tuple[Any, float, float]]:
        found = weighted_models(WeightedSum(terms))
        return [(model.handle, model.weight, model.shift) for model in found]

    assert models(term(one, 2.0, 1.0)) == [(one.handle, 2.0, 1.0)]
    assert models(term(one), term(two, 0.0)) == [(one.handle, 1.0, 0.0)]  # weight 0 only logs
    pair = Ensemble((term(one, 3.0, 0.5), term(two)), "mean", 1.0)
    assert models(term(pair, 2.0)) == [(one.handle, 6.0, 0.5), (two.handle, 2.0, 0.0)]
    assert [m.handle for m in weighted_models(one)] == [one.handle]
    assert isinstance(one, ModelReward)


def test_a_folded_head_has_the_weight() -> None:
    reward = tiny_reward(tiny_handle())
    head: Any = reward.handle.trunk.heads["reward"]
    hidden = torch.randn(5, head.weight.numel(), dtype=torch.float64)
    wanted = 2.5 * (head(hidden) - 0.7)
    torch.testing.assert_close(head.folded(2.5, 0.7)(hidden), wanted, rtol=1e-12, atol=1e-12)


def test_the_value_model_starts_as_what_the_reward_model_counts_for() -> None:
    start = tiny_handle()
    own = tiny_reward(start)
    other = Term("other", 1.0, 0.0, FunctionReward("math:cos"))
    rewards = WeightedSum([Term("own", 0.5, 0.25, own), other])
    config = SimpleNamespace(ppo=PpoSection(), lora=LORA)
    value = build_models(start, rewards, config, store()).value
    batch = TokenBatch.from_ragged([[5, 6], [7]], [[8, 9, 10], [11, 12]], 0)
    values = value(batch, ["values"]).values
    # Its value before a token is its score of what came before: here of all but the last token.
    shorter = TokenBatch.from_ragged([[5, 6], [7]], [[8, 9], [11]], 0)
    before = own.handle(shorter, ["scores"]).scores
    last = torch.stack([values[0, 2], values[1, 1]])
    torch.testing.assert_close(last, 0.5 * (before - 0.25))
    two = WeightedSum([Term("a", 1.0, 0.0, own), Term("b", 1.0, 0.0, own)])
    zero = build_models(start, two, config, store()).value
    assert not zero(batch, ["values"]).values.any()


# --- async functions and time limits ---


def test_async_functions_of_a_list_wait_together(file: str) -> None:
    """None returns before all have begun: one after the other, the first would wait for ever."""
    entry = {"function": f"{file}:meet", "timeout_seconds": 60.0}
    rewards = opened([{**entry, "name": str(n)} for n in range(4)])
    assert rewards.score(completions(["a", "b"])) == [4.0, 4.0]


def test_async_calls_share_one_event_loop(tmp_path: Any) -> None:
    """Clients with open connections belong to the loop that they were made in."""
    (tmp_path / "g.py").write_text(
        "import asyncio\nloops = set()\n"
        "async def loop(completions, **rest):\n"
        "    loops.add(id(asyncio.get_running_loop()))\n"
        "    return [float(len(loops))] * len(completions)\n"
    )
    source = FunctionReward(f"{tmp_path}/g.py:loop")
    assert [source.score(completions(["a"])) for _ in range(3)] == [[1.0]] * 3


@pytest.mark.parametrize("kind", ["async def", "def"])
def test_a_function_that_takes_too_long_is_named_with_its_rows(tmp_path: Any, kind: str) -> None:
    wait = "await asyncio.sleep(30)" if kind == "async def" else "time.sleep(30)"
    (tmp_path / "h.py").write_text(
        f"import asyncio, time\n{kind} stuck(**rest):\n    {wait}\n"
        f"{kind} own(**rest):\n    raise TimeoutError('mine')\n"
        f"{kind} quick(completions, **rest):\n    return [1.0] * len(completions)\n"
    )
    stuck, own, quick = (
        FunctionReward(f"{tmp_path}/h.py:{name}", 0.2) for name in ("stuck", "own", "quick")
    )
    began = time.monotonic()
    message = r"h\.py:stuck did not return within 0\.2 seconds .*rows 0 to 1, prompts at p\.jsonl:1"
    with pytest.raises(TrainingError, match=message):
        stuck.score(completions(["a", "b"]))
    assert time.monotonic() - began < 5
    with pytest.raises(TrainingError, match="raised TimeoutError: mine"):
        own.score(completions(["a"]))
    assert quick.score(completions(["a"])) == [1.0]
    assert asyncio.run(asyncio.sleep(0, "the loop of others is untouched"))
