"""Evaluation: SFT, PPO and best-of-n on the same held-out prompts, with the same sampling noise.

Best-of-n is the honest opponent of PPO: it needs no training, and its KL from the SFT policy is
known, log n - (n - 1) / n, so the two are compared at (nearly) equal KL (Gao et al. 2022,
arXiv:2210.10760). A gold judge, where one is configured, is seen by this stage alone.

Leaves `metrics.json` (keys below), `samples.jsonl` (each prompt with every policy's response and
scores), `report.md` and, where matplotlib is installed, `ppo.png`, in `runs/NAME/evaluation/`.

    rlhf evaluate configs/quickstart.yaml evaluation.prompts=1000

Keys of metrics.json: reward_model {accuracy, ece, n, ceiling?} or null without a reward stage;
policies {sft, ppo, best_of_n?: {score, score_std, scores? (of each of several sources), gold?, kl,
length, eos_rate, distinct_2, rouge_l?, n}}; win_rate {ppo_vs_sft, best_of_n_vs_sft?: {rate, low,
high, n, judge}}; seconds {sft?, reward?, ppo, evaluation}; peak_rss_mb (MiB, of this process so
far); about {the settings behind the numbers, and versions}.
"""

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.codec import PROMPTS_CUT, Codec
from pipeline.errors import DataError, TrainingError
from pipeline.generation import LocalEngine
from pipeline.models.trunk import Handle
from pipeline.records import Prompt, Ranking
from pipeline.reward_list import uses_own
from pipeline.rewards import Completions, FunctionReward, Opener, RewardSource, models_of
from pipeline.runfolder import (
    json_line,
    read_json,
    read_manifest,
    write_json_atomic,
    write_text_atomic,
)
from pipeline.stage import Context, Summary
from stages.evaluation.metrics import nearest_n, order_accuracy, win_rate
from stages.evaluation.policies import Answers, Panel
from stages.evaluation.report import markdown, plot_curves, print_report

# Columns of PPO's metrics.jsonl that the picture shows.
CURVES = {"score": "reward", "kl": "KL, nats", "response_tokens": "tokens", "eos_rate": "ended"}


class EvaluationStage:
    """Compares the policies; trains nothing."""

    name = "evaluation"
    title = "Evaluation"
    samples = True

    def needs(self, config: Any) -> tuple[str, ...]:
        """The stages whose models it compares or asks; what PPO took elsewhere is taken there."""
        sft = () if config.ppo.policy else ("sft",)
        reward = ("reward",) if uses_own(config.ppo.rewards) else ()
        return (*sft, *reward, "ppo")

    def reads(self, config: Any) -> tuple[str, ...]:
        """Prompts to answer; rankings for the gold judge's ceiling."""
        return ("prompts", "rankings") if self._has_ceiling(config) else ("prompts",)

    def resources(self, config: Any) -> Mapping[str, str]:
        """The gold judge's file."""
        gold = config.evaluation.gold
        return {"evaluation.gold": gold} if gold else {}

    def run(self, context: Context) -> Summary:
        """Answer, score, compare and write; returns the win rate, scores and KL of PPO."""
        started = time.monotonic()
        config = context.config
        sft, ppo = self._policies(context)
        gold = FunctionReward(config.evaluation.gold) if config.evaluation.gold else None
        sft.codec.counts.clear()
        rewards = self._rewards(context)
        handles = [sft, ppo, *(m for m in models_of(rewards).values() if isinstance(m, Handle))]
        context.runtime.shard(*(handle.trunk for handle in handles))
        panel = Panel(
            config.evaluation,
            _held_out(context),
            sft.codec,
            LocalEngine(
                config.evaluation.generation_rows, cuda_graphs=context.runtime.run.cuda_graphs
            ),
            context.runtime.seed(self.name),
            rewards,
            gold,
            context.runtime,
        )
        prompts_cut = context.report_cuts(sft.codec).get(PROMPTS_CUT, 0)
        with context.runtime.autocast():
            answers, n = _answers(panel, sft, ppo, context)
        metrics = {
            "reward_model": self._reward_model(context, gold, sft.codec),
            "policies": {name: answer.numbers() for name, answer in answers.items()},
            "win_rate": _win_rates(answers, panel.judge),
            "seconds": _seconds(context, started),
            "peak_rss_mb": _peak_rss_mb(),
            "about": self._about(context, panel, n) | {"prompts_cut": prompts_cut},
        }
        if context.runtime.is_main:
            _write(context, metrics, panel.prompts, answers, sft.codec)
            print_report(metrics, context.console)
        return _summary(metrics)

    # --- parts of the run ---

    def _policies(self, context: Context) -> tuple[Handle, Handle]:
        """The SFT policy, which PPO started from and stayed near, and PPO's."""
        start = context.config.ppo.policy
        sft = (
            context.store.resolve(start, "sft")
            if start
            else context.store.open(context.parents["sft"])
        )
        return sft, context.store.open(context.parents["ppo"])

    def _rewards(self, context: Context) -> RewardSource:
        """What PPO maximised."""
        opener = Opener(
            context.store,
            context.config.model,
            context.config.evaluation.micro_batch_tokens,
            lambda: context.store.open(context.parents["reward"]),
        )
        return opener.open(context.config.ppo.rewards)

    @staticmethod
    def _has_ceiling(config: Any) -> bool:
        return bool(config.evaluation.gold and uses_own(config.ppo.rewards))

    def _reward_model(
        self, context: Context, gold: RewardSource | None, codec: Codec
    ) -> dict[str, Any] | None:
        """The reward stage's held-out numbers; with a gold judge, what they could be at best."""
        if "reward" not in context.parents:
            return None
        report = read_json(context.parents["reward"] / "report.json")["held_out"]
        if not report or not report["pairs"]:
            return None
        found = {"accuracy": report["accuracy"], "ece": report["ece"], "n": report["pairs"]}
        if gold is not None:
            rankings = context.corpus.rankings.held_out
            try:
                found["ceiling"] = ceiling(gold, rankings, _columns(context), codec)
            except TrainingError as error:
                context.console.print(f"[yellow]no ceiling of the reward model: {error}[/]")
        return found

    def _about(self, context: Context, panel: Panel, n: int | None) -> dict[str, Any]:
        config = context.config
        section = config.evaluation
        available = len(context.corpus.prompts.held_out)
        return {
            "seed": config.run.seed,
            "prompts": len(panel.prompts),
            "prompts_wanted": section.prompts,
            "temperature": section.temperature,
            "decoding": {"method": section.method, **section.decoding.model_dump()},
            "max_new_tokens": section.max_new_tokens,
            "rewards": panel.rewards.name,
            "gold": panel.gold and panel.gold.name,
            "best_of_n": n,
            "max_n": section.max_n,
            "n": section.n,
            "chosen_on_the_same_prompts": config.ppo.keep == "best"
            and available < len(panel.prompts) + config.ppo.held_out.num_prompts,
            "versions": _versions(),
        }


def ceiling(
    gold: RewardSource,
    rankings: Sequence[Ranking],
    columns: Mapping[Any, Mapping[str, Any]],
    codec: Codec,
) -> float:
    """Share of held-out pairs that the gold order ranks as the (noisy) labelers did.

    `columns` maps a prompt to the further columns that its row has among the prompts. No reward
    model can be expected to agree with the labelers more than the order they deviate from.
    """
    prompts, pieces = [], []
    for ranking in rankings:
        for response in ranking.responses:
            prompts.append(Prompt(ranking.prompt, columns.get(ranking.prompt, {}), ranking.origin))
            pieces.append((response, *codec.pair_ids(ranking.prompt, response)))
    scored = gold.score(
        Completions(
            prompts=prompts,
            prompt_ids=[prompt for _, prompt, _ in pieces],
            completion_ids=[response for _, _, response in pieces],
            texts=[text for text, _, _ in pieces],
            ended=[True] * len(pieces),  # a response that a person wrote ends where it ends
        )
    )
    rest = iter(scored)
    rows = [[next(rest) for _ in ranking.responses] for ranking in rankings]
    return order_accuracy(rows, [ranking.pairs() for ranking in rankings])[0]


def _held_out(context: Context) -> Sequence[Prompt]:
    """Prompts from the end of the held-out part: PPO chose its best policy on the first ones."""
    held_out = context.corpus.prompts.held_out
    if not held_out:
        raise DataError(
            "there is no held-out prompt to evaluate on: raise data.held_out_fraction "
            f"({context.config.data.held_out_fraction}) or add prompts"
        )
    found: Sequence[Prompt] = held_out[-context.config.evaluation.prompts :]
    return found


def _answers(
    panel: Panel, sft: Handle, ppo: Handle, context: Context
) -> tuple[dict[str, Answers], int | None]:
    """Answers by policy, and best-of-n's n."""
    section = context.config.evaluation
    answers = {}
    with context.console.status("SFT answers"):
        answers["sft"] = panel.answer(sft, sft)
    with context.console.status("PPO answers"):
        answers["ppo"] = panel.answer(ppo, sft)
    if not section.best_of_n or section.method != "sample":  # nothing to choose from
        return answers, None
    n = section.n or nearest_n(answers["ppo"].kl, section.max_n)
    with context.console.status(f"best of {n} answers"):
        answers["best_of_n"] = panel.best_of_n(sft, n)
    return answers, n


def _win_rates(answers: Mapping[str, Answers], judge: str) -> dict[str, Any]:
    def verdicts(answer: Answers) -> list[float]:
        return answer.scores if answer.gold is None else answer.gold

    return {
        f"{name}_vs_sft": asdict(win_rate(verdicts(answer), verdicts(answers["sft"])))
        | {"judge": judge}
        for name, answer in answers.items()
        if name != "sft"
    }


def _columns(context: Context) -> dict[Any, Mapping[str, Any]]:
    prompts = context.corpus.prompts
    return {row.prompt: row.columns for row in (*prompts.train, *prompts.held_out)}


def _seconds(context: Context, started: float) -> dict[str, float]:
    """Wall-clock seconds of each stage, from the manifests; a reused stage's are those it took."""
    manifests = {name: read_manifest(folder) for name, folder in context.parents.items()}
    seconds = {name: manifest.seconds for name, manifest in manifests.items() if manifest}
    return seconds | {"evaluation": round(time.monotonic() - started, 3)}


def _peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "trl")}


def _write(
    context: Context,
    metrics: dict[str, Any],
    prompts: Sequence[Prompt],
    answers: Mapping[str, Answers],
    codec: Codec,
) -> None:
    folder = context.folder.artifact
    write_json_atomic(folder / "metrics.json", metrics)
    write_text_atomic(folder / "report.md", markdown(metrics))
    rows = (
        {
            "prompt": codec.prompt_text(prompt.prompt),
            "origin": prompt.origin,
            **{name: answer.row(index) for name, answer in answers.items()},
        }
        for index, prompt in enumerate(prompts)
    )
    write_text_atomic(folder / "samples.jsonl", "".join(map(json_line, rows)))
    plot_curves(context.run.stage("ppo").metrics_jsonl, folder / "ppo.png", CURVES)


def _summary(metrics: Mapping[str, Any]) -> dict[str, Any]:
    summary = {
        f"{name}_{key}": numbers[key]
        for name, numbers in metrics["policies"].items()
        for key in ("score", "gold")
        if key in numbers
    }
    rates = {name: win["rate"] for name, win in metrics["win_rate"].items()}
    return rates | summary | {"ppo_kl": metrics["policies"]["ppo"]["kl"]}
