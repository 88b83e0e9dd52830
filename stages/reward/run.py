"""Stage 2: a reward model from rankings.

A scalar head on the SFT model, trained K-wise (InstructGPT, arXiv:2203.02155, section 3.5, eq. 1):
each of a prompt's K responses is encoded once, and the loss of a prompt is the mean over its
comparable pairs. The head starts at N(0, 1/(d+1)) (Stiennon 2020, arXiv:2009.01325) and reads the
last response token. Deliberate deviation: InstructGPT shifts the score so that labelers'
demonstrations have mean 0; here the SFT policy's own samples do, since PPO starts from those.
With `reward.base` the head is on another base, which may be an encoder (docs/reward-models.md).

    rlhf reward configs/quickstart.yaml
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from statistics import fmean, pstdev
from typing import Any

import torch

from pipeline.errors import DataError, ModelError, TrainingError
from pipeline.generation import LocalEngine, Sampling
from pipeline.hf_trainer import FitSummary
from pipeline.models.encoders import default_pooling
from pipeline.models.heads import ScalarHead
from pipeline.models.store import ModelStore
from pipeline.models.trunk import Handle
from pipeline.records import Prompt, Ranking
from pipeline.rewards import Completions, ModelReward
from pipeline.runfolder import write_json_atomic
from pipeline.stage import Context, Summary
from pipeline.trainer_callbacks import MeasuredMemory
from stages.reward.calibration import calibration_report, scored_pairs
from stages.reward.rankings import EncodedRanking, RankingRows, count_indistinct, encode_rankings
from stages.reward.trainer import RankingTrainer

REPORT = "report.json"


@dataclass(frozen=True)
class Normalisation:
    """The SFT policy's own responses under the trained score, and what was made of them."""

    responses: int
    ended: float  # share that a stop token ended
    mean: float  # of the raw scores
    std: float  # of the raw scores, divided by their count
    shift: float  # the head's, in raw score units
    scale: float  # the head's, in raw score units


class RewardStage:
    """From the SFT model and rankings to a model that scores responses."""

    name = "reward"
    title = "reward model"
    samples = True

    def needs(self, config: Any) -> tuple[str, ...]:
        """The SFT model: to start from, and to sample the responses that set the score's zero."""
        section = config.reward
        starts_here = section.base is None and section.start == "sft"
        return ("sft",) if starts_here or section.normalisation.mode != "none" else ()

    def reads(self, config: Any) -> tuple[str, ...]:
        """Rankings."""
        return ("rankings",)

    def resources(self, config: Any) -> Mapping[str, str]:
        """The base that the reward model starts from; the SFT model is a parent."""
        section, path = config.reward, config.model.path
        if section.base is not None:
            return {"reward.base": section.base}
        return {} if path is None or section.start == "sft" else {"model.path": path}

    def run(self, context: Context) -> Summary:
        """Train, measure on held-out rankings, normalise, and leave model and `report.json`.

        Raises:
            DataError: no ranking to train on.
            TrainingError: a loss, gradient or score is NaN or infinite.
        """
        split, section = context.corpus.rankings, context.config.reward
        if not split.train:
            raise DataError(
                "data.rankings has no row left to train on: all were bad or held out (see "
                "data.json in the run folder). Lower data.held_out_fraction or add rows"
            )
        sft = context.store.open(context.parents["sft"]) if self.needs(context.config) else None
        handle = reward_handle(context, sft)
        handle.codec.counts.clear()
        train = encode_rankings(handle.codec, split.train)
        held_out = encode_rankings(handle.codec, split.held_out)
        cuts = context.report_cuts(handle.codec)
        fit = train_handle(handle, train, held_out[: section.eval_rows], context, sft)
        agreement = measure(handle, split.held_out, held_out, context) if held_out else None
        normalisation = None
        if section.normalisation.mode != "none":
            assert sft is not None
            normalisation = normalise(handle, sft, split.train, context)
        report = {
            "training": {
                "rankings": len(train),
                "responses": sum(len(ranking.ranks) for ranking in train),
                "pairs": sum(len(ranking.pairs()) for ranking in split.train),
                "pairs_of_equal_tokens": count_indistinct(train),
                **cuts,
                **asdict(fit),
            },
            "held_out": agreement,
            "normalisation": asdict(normalisation) if normalisation else None,
        }
        if context.runtime.is_main:
            write_json_atomic(context.folder.artifact / REPORT, report)
        context.save(handle)
        return key_numbers(report, fit)


def reward_handle(context: Context, sft: Handle | None) -> Handle:
    """The model to train: the start's function with weights of its own, and a random head."""
    config, runtime, store = context.config, context.runtime, context.store
    if config.reward.base is not None:
        start = other_base(config, store)
    elif config.reward.start == "sft":
        assert sft is not None
        start = sft
    else:
        start = store.pretrained()
        config.check_positions(f"model.path {config.model.path}", start.trunk.model.config)
    runtime.seed_all("reward")  # here: opening may draw numbers (from files) or not (live)
    handle = store.trainable_copy(start, "reward", config.reward.tuning, config.lora)
    # PPO may open several reward models on one base: the head is named after its adapter.
    head_name = handle.role.adapter or "reward"
    generator = torch.Generator().manual_seed(runtime.seed("reward", "head"))
    handle.trunk.add_head(head_name).init_normal(generator)
    return handle.with_role("reward", head=head_name)


def other_base(config: Any, store: ModelStore) -> Handle:
    """`reward.base` under its own limits, and of an encoder what its score reads.

    Raises:
        ModelError: it cannot be loaded, or `reward.pooling` is set for one that is no encoder.
    """
    section, data = config.reward, config.data
    handle = store.other_base(
        section.base,
        section.base_revision,
        section.max_prompt_tokens or data.max_prompt_tokens,
        section.max_response_tokens or data.max_response_tokens,
    )
    model = handle.trunk.model
    if handle.trunk.is_encoder:
        pooling = section.pooling
        if pooling == "auto":
            pooling = default_pooling(section.base, section.base_revision, model.config)
        return handle.with_role("base", pooling=pooling)
    if section.pooling != "auto":
        raise ModelError(
            f"reward.pooling is {section.pooling} but reward.base {section.base} is no encoder "
            f"({model.config.model_type}): its score reads the last token. Set reward.pooling to "
            "auto"
        )
    return handle


def train_handle(
    handle: Handle,
    train: Sequence[EncodedRanking],
    held_out: Sequence[EncodedRanking],
    context: Context,
    sft: Handle | None = None,
) -> FitSummary:
    """Train the handle's adapter or weights and its head; its trunk is frozen again afterwards.

    `sft` is in memory too, where the stage needs it; it counts in `memory.json`.
    """
    section, pad_id = context.config.reward, handle.codec.pad_id
    records = context.corpus.rankings
    for parameter in handle.parameters():
        parameter.requires_grad_(True)
    handle.trunk.freeze_output_layer()
    context.runtime.shard(handle.trunk, *([] if sft is None else [sft.trunk]))
    trainer = RankingTrainer(
        handle,
        section,
        context.config.run,
        context.folder.root,
        RankingRows(train, pad_id, records.train),
        RankingRows(held_out, pad_id, records.held_out) if held_out else None,
        context.tracker.log,
        context.console,
        context.states,
    )
    roles = {"reward": handle} if sft is None else {"sft": sft, "reward": handle}
    trainer.add_callback(MeasuredMemory(roles, context.folder.memory_json))
    handle.trunk.recompute = section.gradient_checkpointing
    fit = trainer.fit()
    handle.trunk.freeze()
    return fit


def measure(
    handle: Handle,
    rankings: Sequence[Ranking],
    encoded: Sequence[EncodedRanking],
    context: Context,
) -> dict[str, Any]:
    """Agreement and calibration on held-out rankings; before normalisation, scores are logits."""
    flat = Completions(
        prompts=[Prompt(ranking.prompt) for ranking in rankings for _ in ranking.responses],
        prompt_ids=[ranking.prompt_ids for ranking in encoded for _ in ranking.ranks],
        completion_ids=list(chain.from_iterable(ranking.response_ids for ranking in encoded)),
        texts=list(chain.from_iterable(ranking.responses for ranking in rankings)),
        ended=[ids[-1] == handle.codec.end_id for row in encoded for ids in row.response_ids],
    )
    scores = iter(
        context.runtime.divided(len(flat), lambda rows: score(handle, flat.take(rows), context))
    )
    pairs = scored_pairs(
        [list(islice(scores, len(ranking.ranks))) for ranking in encoded],
        [ranking.ranks for ranking in encoded],
        [ranking.response_lengths for ranking in encoded],
        [ranking.annotator for ranking in encoded],
    )
    return {"rankings": len(encoded), **calibration_report(pairs)}


def normalise(
    handle: Handle, sft: Handle, rankings: Sequence[Ranking], context: Context
) -> Normalisation:
    """Set the head's shift (and scale) by the SFT policy's own responses to training prompts.

    One response to each prompt, by its token ids, however many rankings it has. Every process
    samples and scores its share.

    Raises:
        TrainingError: the scores have no spread to scale by.
    """
    section, runtime = context.config.reward.normalisation, context.runtime
    prompts = {tuple(sft.codec.prompt_ids(ranking.prompt)): ranking.prompt for ranking in rankings}
    order = list(prompts)
    random.Random(runtime.seed("reward", "normalisation")).shuffle(order)
    chosen = order[: section.num_samples]
    sampling = Sampling(
        max_new_tokens=section.max_new_tokens or context.config.data.max_response_tokens,
        temperature=section.temperature,
        seed=runtime.seed("reward", "samples"),
    )
    engine = LocalEngine(cuda_graphs=runtime.run.cuda_graphs)

    def write(rows: Sequence[int]) -> Iterable[tuple[list[int], bool]]:
        with runtime.autocast():
            drawn = engine.generate(sft, [chosen[row] for row in rows], list(rows), sampling)
        return zip(drawn.response_ids, drawn.ended, strict=True)

    # Apart from scoring, whose passes through sharded weights all make or none.
    written = runtime.divided(len(chosen), write)
    response_ids, ended = [ids for ids, _ in written], [end for _, end in written]
    drawn = Completions.decode(
        sft.codec, [Prompt(prompts[ids]) for ids in chosen], chosen, response_ids, ended
    )
    scores = runtime.divided(len(chosen), lambda rows: score(handle, drawn.take(rows), context))
    mean, std = fmean(scores), pstdev(scores)
    head = handle.trunk.heads[handle.role.head or ""]
    assert isinstance(head, ScalarHead)
    if section.mode == "shift_and_scale":
        if std < 1e-6:
            raise TrainingError(
                f"the scores of {len(scores)} SFT responses have standard deviation {std:.1e}, "
                "which cannot be scaled to 1: set reward.normalisation.mode to shift, or raise "
                "reward.normalisation.temperature or num_samples"
            )
        head.normalise(mean, std)
    else:
        head.normalise(mean)
    shift, scale = float(head.shift), float(head.scale)
    return Normalisation(len(scores), fmean(ended), mean, std, shift, scale)


def score(handle: Handle, completions: Completions, context: Context) -> list[float]:
    """Scores of completions in the run's precision, dropout off."""
    assert not handle.trunk.training
    with context.runtime.autocast():
        return ModelReward(handle, context.config.reward.micro_batch_tokens).score(completions)


def key_numbers(report: Mapping[str, Any], fit: FitSummary) -> dict[str, float]:
    """What the screen and the manifest say of the stage."""
    held_out, normalisation = report["held_out"], report["normalisation"]
    numbers: dict[str, float] = {}
    if held_out is not None:
        longer = held_out["longer_preferred"]
        numbers |= {
            "accuracy": held_out["accuracy"],
            "ece": held_out["ece"],
            "held_out_pairs": held_out["pairs"],
            "eval_loss": fit.held_out["loss"],
        }
        if longer["pairs"]:
            numbers |= {
                "longer_preferred_data": longer["data"],
                "longer_preferred_model": longer["model"],
            }
    if normalisation is not None:
        numbers |= {"shift": normalisation["shift"], "scale": normalisation["scale"]}
    return numbers | {
        "train_loss": fit.train_loss,
        "steps": fit.steps,
        "kept_step": fit.kept_step,
        "train_rankings": report["training"]["rankings"],
        "train_pairs": report["training"]["pairs"],
        "rankings_per_second": fit.rows / fit.seconds,
    }
