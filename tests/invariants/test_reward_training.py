"""K-wise reward training against a plain loop over unpadded rows, in float64 to 1e-9."""

import copy
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config import RunSection
from pipeline.models.heads import ScalarHead
from pipeline.models.lean_layers import slim
from pipeline.models.origin import BaseOrigin
from pipeline.models.trunk import Handle, Role, Trunk
from pipeline.tensors import scatter
from stages.reward.config import RewardSection
from stages.reward.rankings import EncodedRanking, RankingBatch, RankingRows
from stages.reward.trainer import RankingTrainer, ranking_losses

VOCABULARY = 24
PAD = 0
RUN = RunSection(device="cpu", seed=3)


def tiny_handle(seed: int = 0) -> Handle:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).double()
    slim(model)  # transformers' norms round to float32
    trunk = Trunk(model, BaseOrigin("tiny", "tiny"))
    trunk.freeze()
    trunk.add_head("reward").init_normal(torch.Generator().manual_seed(seed))
    return Handle(trunk, Role("reward", None, "reward"), codec=None)


def random_rankings(count: int, seed: int = 1) -> list[EncodedRanking]:
    """Ragged in everything: K from 2 to 5, prompts of 1 to 9 tokens, ties, ratings on half."""
    rng = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(least, most))]

    rankings = []
    for index in range(count):
        k = rng.randint(2, 5)
        ranks = [0, 1, *(rng.randint(0, 2) for _ in range(k - 2))]
        ratings = tuple(5.0 - 2 * rank for rank in ranks) if index % 2 else None
        responses = [ids(1, 7) for _ in range(k)]
        rankings.append(EncodedRanking(ids(1, 9), responses, tuple(ranks), ratings, None))
    return rankings


def make_trainer(
    handle: Handle, rankings: list[EncodedRanking], folder: Path, **settings: object
) -> RankingTrainer:
    fields = {"batch_size": 4, "epochs": 2, "optim": {"learning_rate": 1e-2, "max_grad_norm": 0.3}}
    section = RewardSection.model_validate(fields | settings)
    for parameter in handle.parameters():
        parameter.requires_grad_(True)
    rows = RankingRows(rankings, PAD)
    return RankingTrainer(handle, section, RUN, folder, rows, None, lambda step, metrics: None)


def weights(handle: Handle) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in handle.parameters()])


def plain_scores(model, head: ScalarHead, ranking: EncodedRanking) -> list[Tensor]:
    """One unpadded forward a response without the trunk: w . h + b at the last hidden state."""
    scores = []
    for response in ranking.response_ids:
        ids = torch.tensor([ranking.prompt_ids + response])
        hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
        scores.append((hidden * head.weight).sum() + head.bias[0])
    return scores


def plain_training(
    handle: Handle, rankings: list[EncodedRanking], steps, learning_rate: float, margin_coef=0.0
) -> tuple[Tensor, list[float]]:
    """Trained weights and losses: loops over prompts and pairs, AdamW, linear decay to 0."""
    handle = copy.deepcopy(handle)
    model, head = handle.trunk.model, handle.trunk.heads["reward"]
    parameters = handle.parameters()
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(parameters, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses = []
    for done, step in enumerate(steps):
        prompts = []
        for row in step:
            ranking = rankings[row]
            scores = plain_scores(model, head, ranking)
            pairs = []
            for i, rank_i in enumerate(ranking.ranks):
                for j, rank_j in enumerate(ranking.ranks):
                    if rank_i < rank_j:
                        margin = 0.0
                        if ranking.ratings is not None:
                            margin = margin_coef * (ranking.ratings[i] - ranking.ratings[j])
                        pairs.append(torch.log1p(torch.exp(scores[j] - scores[i] + margin)))
            prompts.append(sum(pairs) / len(pairs))
        loss = sum(prompts) / len(prompts)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 0.3)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * (len(steps) - done) / len(steps)
        optimiser.step()
    return weights(handle), losses


@pytest.mark.parametrize("micro_batch_tokens", [1, 150, 100_000])
def test_training_equals_the_plain_loop_whatever_the_micro_batch(
    micro_batch_tokens: int, tmp_path: Path
) -> None:
    rankings = random_rankings(6)
    handle = tiny_handle()
    trainer = make_trainer(handle, rankings, tmp_path, micro_batch_tokens=micro_batch_tokens)
    expected, losses = plain_training(handle, rankings, trainer.plan.steps, 1e-2)
    before = weights(handle)
    trainer.fit()
    assert (weights(handle) - before).abs().max() > 1e-3
    assert (weights(handle) - expected).abs().max() < 1e-9
    assert [total / units for total, units, _ in trainer.step_sums] == pytest.approx(
        losses, abs=1e-9
    )


def test_margins_from_ratings_reach_the_training(tmp_path: Path) -> None:
    rankings = random_rankings(4)
    handle = tiny_handle()
    trainer = make_trainer(handle, rankings, tmp_path, margin_coef=0.7)
    expected, _ = plain_training(handle, rankings, trainer.plan.steps, 1e-2, margin_coef=0.7)
    without, _ = plain_training(handle, rankings, trainer.plan.steps, 1e-2)
    trainer.fit()
    assert (weights(handle) - expected).abs().max() < 1e-9
    assert (weights(handle) - without).abs().max() > 1e-6


def test_order_of_rankings_and_of_responses_does_not_matter(tmp_path: Path) -> None:
    # One step holds all rankings, so that their order can only be an order of summation.
    rankings = random_rankings(6)
    shuffled = []
    for ranking in reversed(rankings):
        turned = [list(reversed(list(x))) for x in (ranking.response_ids, ranking.ranks)]
        ratings = ranking.ratings and tuple(reversed(ranking.ratings))
        shuffled.append(
            EncodedRanking(ranking.prompt_ids, turned[0], tuple(turned[1]), ratings, None)
        )
    results = []
    for rows in (rankings, shuffled):
        handle = tiny_handle()
        make_trainer(handle, rows, tmp_path, batch_size=6, margin_coef=0.2).fit()
        results.append(weights(handle))
    assert (results[0] - results[1]).abs().max() < 1e-9


def test_plackett_luce_trains_through_the_same_loop(tmp_path: Path) -> None:
    # For K = 2 it is the Bradley-Terry loss: the plain loop over pairs is its oracle.
    rankings = [
        EncodedRanking(r.prompt_ids, r.response_ids[:2], (1, 0), None, None)
        for r in random_rankings(5)
    ]
    handle = tiny_handle()
    trainer = make_trainer(handle, rankings, tmp_path, loss="plackett_luce")
    expected, _ = plain_training(handle, rankings, trainer.plan.steps, 1e-2)
    trainer.fit()
    assert (weights(handle) - expected).abs().max() < 1e-9


def test_scores_do_not_depend_on_padding_or_its_side() -> None:
    handle = tiny_handle()
    rankings = random_rankings(5)
    batch = RankingRows(rankings, PAD).collate(range(5))
    with torch.no_grad():
        right = handle(batch.rows, {"scores"}).scores
        handle.trunk.joiner.padding_side = "left"
        left = handle(batch.rows, {"scores"}).scores
        model, head = handle.trunk.model, handle.trunk.heads["reward"]
        alone = torch.stack([s for r in rankings for s in plain_scores(model, head, r)])
    assert (right - alone).abs().max() < 1e-9
    assert (left - alone).abs().max() < 1e-9


def test_scores_stand_at_their_response_and_gradients_flow_back() -> None:
    batch = RankingBatch.collate(
        [
            EncodedRanking([1], [[2], [3], [4]], (0, 1, 2), None, None),
            EncodedRanking([1], [[5], [6]], (1, 0), None, None),
        ],
        PAD,
    )
    assert batch.rows.response_ids.flatten().tolist() == [2, 3, 4, 5, 6]
    rows = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], requires_grad=True)
    spread = scatter(rows, batch.mask)
    assert spread.tolist() == [[1, 2, 3], [4, 5, 0]]
    (spread * torch.tensor([[1.0, 2, 3], [4, 5, 6]])).sum().backward()
    assert rows.grad.tolist() == [1, 2, 3, 4, 5]


def test_each_response_is_encoded_once(tmp_path: Path) -> None:
    rankings = [
        EncodedRanking([1, 2], [[n] for n in range(1, 10)], tuple(range(9)), None, None)
        for _ in range(4)
    ]
    handle = tiny_handle()
    tokens: list[int] = []
    handle.trunk.model.get_decoder().register_forward_hook(
        lambda module, args, kwargs, out: tokens.append(kwargs["input_ids"].numel()),
        with_kwargs=True,
    )
    make_trainer(handle, rankings, tmp_path, epochs=1).fit()
    # 2 + 1 tokens each, no padding; expanded to pairs there would be 4 * 36 * 2 responses.
    assert sum(tokens) == 4 * 9 * 3


def test_head_starts_at_one_over_root_d_plus_one() -> None:
    # 40,000 draws: the standard error of their deviation is s / sqrt(80,000) = 0.35% of s.
    head = ScalarHead(40_000, torch.float64)
    head.init_normal(torch.Generator().manual_seed(1))
    expected = 40_001**-0.5
    assert head.weight.std().item() == pytest.approx(expected, rel=0.02)
    assert abs(head.weight.mean().item()) < 4 * expected / 40_000**0.5
    assert head.bias.item() == 0.0


def test_a_separable_task_is_learned(tmp_path: Path) -> None:
    # The response with more tokens 7 is better; 3 responses a prompt with 0, 1 and 2 of them.
    rng = random.Random(0)

    def ranking() -> EncodedRanking:
        prompt = [rng.randrange(8, VOCABULARY) for _ in range(4)]
        responses, ranks = [], []
        for sevens in rng.sample(range(3), 3):
            ids = [rng.randrange(8, VOCABULARY) for _ in range(5 - sevens)] + [7] * sevens
            rng.shuffle(ids)
            responses.append(ids)
            ranks.append(2 - sevens)
        return EncodedRanking(prompt, responses, tuple(ranks), None, None)

    handle = tiny_handle()
    handle.trunk.float()
    logged: list[dict[str, float]] = []
    for parameter in handle.parameters():
        parameter.requires_grad_(True)
    section = RewardSection.model_validate(
        {"batch_size": 16, "epochs": 4, "eval_every": 0.5, "optim": {"learning_rate": 1e-2}}
    )
    train = RankingRows([ranking() for _ in range(160)], PAD)
    held_out = RankingRows([ranking() for _ in range(40)], PAD)
    trainer = RankingTrainer(
        handle, section, RUN, tmp_path, train, held_out, lambda _, row: logged.append(row)
    )
    fit = trainer.fit()
    assert fit.held_out["accuracy"] > 0.95
    assert fit.held_out["loss"] < 0.2  # log 2 = 0.69 at the start
    assert fit.held_out["loss"] == min(row["eval_loss"] for row in logged if "eval_loss" in row)
    # The kept weights are in place: the same loss again, from the module as it is left.
    with torch.no_grad():
        batch = held_out.collate(range(40))
        scores = scatter(handle(batch.rows, {"scores"}).scores, batch.mask)
        again = ranking_losses(scores, batch, section).mean().item()
    assert again == pytest.approx(fit.held_out["loss"], abs=1e-5)


def test_normalised_scores_have_mean_zero_and_deviation_one() -> None:
    handle = tiny_handle()
    head = handle.trunk.heads["reward"]
    batch = RankingRows(random_rankings(8), PAD).collate(range(8)).rows
    with torch.no_grad():
        raw = handle(batch, {"scores"}).scores
        head.normalise(raw.mean().item())
        shifted = handle(batch, {"scores"}).scores
        assert shifted.mean().abs() < 1e-12
        assert (shifted - (raw - raw.mean())).abs().max() < 1e-12
        # A second normalisation starts from the first: the scale is applied after the shift.
        head.normalise(shifted.mean().item(), shifted.std(correction=0).item())
        both = handle(batch, {"scores"}).scores
    assert both.mean().abs() < 1e-12
    assert both.std(correction=0).item() == pytest.approx(1.0, abs=1e-12)
