"""The vLLM engine against a stand-in server that really loads the adapters it is handed."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.batches import TokenBatch
from pipeline.errors import ConfigError, TrainingError
from pipeline.generation import NativeEngine, Sampling
from pipeline.generation.vllm import row_seed
from pipeline.json_http import ServerFault
from pipeline.models.trunk import Handle
from stages.ppo.experience import rollout_metrics
from stages.ppo.learning_config import KlSection
from tests.tiny_ppo import TinyPpo
from tests.tiny_vllm import GREEDY, PROMPTS, engine_of, make_policy, step
from tests.vllm_stand_in import StandIn


@pytest.fixture
def policy(tmp_path: Path) -> Handle:
    """An adapter, far from zero, on a base that lies in a folder."""
    return make_policy(tmp_path)


@pytest.fixture
def server(policy: Handle):
    with StandIn(Path(policy.trunk.origin.path)) as stand_in:
        yield stand_in


def test_each_update_is_handed_over(policy: Handle, server: StandIn, tmp_path: Path) -> None:
    """Greedy text equals the native engine's, before an update and after: the weights are new."""
    engine, seen = engine_of(server, tmp_path), []
    for update in range(3):
        made = engine.generate(policy, PROMPTS, range(5), GREEDY)
        native = NativeEngine().generate(policy, PROMPTS, range(5), GREEDY)
        assert made.response_ids == native.response_ids
        assert made.ended == native.ended
        for ours, theirs in zip(made.logprobs, native.logprobs, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
        seen.append(made.response_ids)
        step(policy, seed=update + 2)
    assert seen[0] != seen[1] != seen[2]
    assert not made.exact and made.values is None and made.entropy is None
    assert not engine.deterministic
    names = [body["lora_name"] for body in server.asked("/v1/load_lora_adapter")]
    assert len(set(names)) == 3  # a name that comes again would be read from vLLM's prefix cache
    assert list(server.loaded) == names[-1:]  # old versions were unloaded ...
    folders = [path.name for path in (tmp_path / "ppo/adapters").iterdir()]
    assert folders == names[-1:]  # ... and deleted


def test_an_unchanged_policy_is_handed_over_once(
    policy: Handle, server: StandIn, tmp_path: Path
) -> None:
    engine = engine_of(server, tmp_path)
    for _ in range(3):
        engine.generate(policy, PROMPTS, range(5), GREEDY)
    assert len(server.asked("/v1/load_lora_adapter")) == 1
    assert len(server.asked("/v1/models")) == 1


def test_close_takes_the_adapter_off(policy: Handle, server: StandIn, tmp_path: Path) -> None:
    engine = engine_of(server, tmp_path)
    engine.generate(policy, PROMPTS, range(5), GREEDY)
    engine.close()
    assert server.loaded == {} and list((tmp_path / "ppo/adapters").iterdir()) == []
    engine.close()  # nothing left to do


def test_leftovers_of_a_killed_process_are_swept(
    policy: Handle, server: StandIn, tmp_path: Path
) -> None:
    killed = engine_of(server, tmp_path)
    killed.generate(policy, PROMPTS, range(5), GREEDY)
    (left,) = server.loaded
    server.loaded["policy-of-another-run"] = "/elsewhere/policy-of-another-run"
    engine_of(server, tmp_path).generate(policy, PROMPTS, range(5), GREEDY)
    assert left not in server.loaded
    assert server.asked("/v1/unload_lora_adapter") == [{"lora_name": left}]  # not the other's
    assert not (tmp_path / "ppo/adapters" / left).exists()


def test_samples_follow_seed_stream_and_index(
    policy: Handle, server: StandIn, tmp_path: Path
) -> None:
    engine = engine_of(server, tmp_path)
    sampling = Sampling(max_new_tokens=8, seed=3, stream=1)
    whole = engine.generate(policy, PROMPTS * 2, range(10), sampling)
    assert whole.response_ids[:5] != whole.response_ids[5:]  # one prompt, two indices
    # The same rows in another order and other company: the same samples, in the order asked for.
    again = engine.generate(policy, PROMPTS[::-1], [4, 3, 2, 1, 0], sampling)
    assert again.response_ids[::-1] == whole.response_ids[:5]
    for other in (replace(sampling, seed=4), replace(sampling, stream=2)):
        assert (
            engine.generate(policy, PROMPTS, range(5), other).response_ids
            != (whole.response_ids[:5])
        )
    seeds = {row_seed(replace(sampling, seed=s, stream=t), i)
             for s in range(3) for t in range(3) for i in range(50)}  # fmt: skip
    assert len(seeds) == 450 and all(0 <= seed < 2**63 for seed in seeds)


def test_requests_run_at_once_but_no_more_than_asked(
    policy: Handle, server: StandIn, tmp_path: Path
) -> None:
    server.delay = 0.05
    engine_of(server, tmp_path, rows=3).generate(policy, PROMPTS * 3, range(15), GREEDY)
    assert server.most_at_once == 3


def test_no_rows_ask_nothing(policy: Handle, server: StandIn, tmp_path: Path) -> None:
    made = engine_of(server, tmp_path).generate(policy, [], [], GREEDY)
    assert made.response_ids == [] and server.asked("/v1/completions") == []


def test_responses_end_at_the_runs_stop_ids(
    policy: Handle, server: StandIn, tmp_path: Path
) -> None:
    first = NativeEngine().generate(policy, PROMPTS, range(5), GREEDY).response_ids[0]
    policy.codec.stop_ids = frozenset({first[3], policy.codec.end_id})
    made = engine_of(server, tmp_path).generate(policy, PROMPTS, range(5), GREEDY)
    native = NativeEngine().generate(policy, PROMPTS, range(5), GREEDY)
    assert made.response_ids == native.response_ids and made.ended == native.ended
    assert made.ended[0] and made.response_ids[0] == first[: first.index(first[3]) + 1]


def test_the_servers_sampling_defaults_are_overridden(
    policy: Handle, server: StandIn, tmp_path: Path
) -> None:
    sampling = Sampling(max_new_tokens=8, seed=3)
    plain = engine_of(server, tmp_path).generate(policy, PROMPTS, range(5), sampling)
    server.defaults = {"top_k": 1, "repetition_penalty": 3.0, "temperature": 0.1}
    again = engine_of(server, tmp_path).generate(policy, PROMPTS, range(5), sampling)
    assert again.response_ids == plain.response_ids


# --- log-probs ---


def test_logprobs_at_a_temperature_are_the_training_forwards(
    policy: Handle, server: StandIn, tmp_path: Path
) -> None:
    server.logprobs_mode = "processed_logprobs"
    sampling = Sampling(max_new_tokens=8, temperature=0.6, seed=1)
    made = engine_of(server, tmp_path).generate(policy, PROMPTS, range(5), sampling)
    batch = TokenBatch.from_ragged(PROMPTS, made.response_ids, 0)
    with torch.no_grad():
        ours = policy(batch, ["logprobs"], 0.6).logprobs
    for row, logprobs in enumerate(made.logprobs):
        assert ours[row, : len(logprobs)].tolist() == pytest.approx(logprobs, abs=1e-4)


def test_raw_logprobs_at_a_temperature_are_refused(
    policy: Handle, server: StandIn, tmp_path: Path
) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=0.6, seed=1)
    with pytest.raises(ConfigError, match="--logprobs-mode processed_logprobs") as caught:
        engine_of(server, tmp_path).generate(policy, PROMPTS, range(5), sampling)
    assert "ppo.rollout.temperature is 0.6" in str(caught.value)


def test_another_base_under_the_same_name_is_refused(policy: Handle, tmp_path: Path) -> None:
    """A server that was started before SFT ran again: the same path, older weights."""
    with StandIn(Path(policy.trunk.origin.path)) as server:
        with torch.no_grad():
            policy.trunk.model.get_output_embeddings().weight.mul_(-1)
        with pytest.raises(TrainingError, match=r"differ from the policy's by \d+\.\d+ nats"):
            engine_of(server, tmp_path).generate(policy, PROMPTS, range(5), GREEDY)


def test_rounding_of_other_kernels_is_accepted(
    policy: Handle, server: StandIn, tmp_path: Path
) -> None:
    server.noise = 0.03
    engine_of(server, tmp_path).generate(policy, PROMPTS, range(5), Sampling(8, seed=1))


def test_the_first_process_hands_over_for_all(
    policy: Handle, server: StandIn, tmp_path: Path
) -> None:
    """Rank 1 neither writes nor loads; it takes the name, or the error, that rank 0 found."""
    first = engine_of(server, tmp_path)
    first.generate(policy, PROMPTS, range(5), GREEDY)
    (name,) = server.loaded
    told: list[Any] = [(name, None)]

    def gather(own: list[Any]) -> list[Any]:
        """Of the rest rank 0 has nothing to tell: faults in asking, how far log-probs differ."""
        return [*(told if isinstance(own[0], tuple) else []), *own]

    rank1 = SimpleNamespace(is_main=False, world_size=2, gather_objects=gather, any_of=bool)
    second = engine_of(server, tmp_path, runtime=rank1)
    made = second.generate(policy, PROMPTS[2:], range(2, 5), GREEDY)
    whole = first.generate(policy, PROMPTS, range(5), GREEDY)
    assert made.response_ids == whole.response_ids[2:]
    assert len(server.asked("/v1/load_lora_adapter")) == 1
    told[:] = [("", ServerFault("refused", 500))]
    with pytest.raises(TrainingError, match="refused"):
        second.generate(policy, PROMPTS, range(5), GREEDY)


def test_rslora_scales_alike(tmp_path: Path) -> None:
    policy = make_policy(tmp_path, use_rslora=True)
    with StandIn(Path(policy.trunk.origin.path)) as server:
        made = engine_of(server, tmp_path).generate(policy, PROMPTS, range(5), GREEDY)
    native = NativeEngine().generate(policy, PROMPTS, range(5), GREEDY)
    assert made.response_ids == native.response_ids


def test_importance_weights_are_logged_over_real_tokens() -> None:
    # Weights 1.5 on every token but two: one at the cap 2, and a 0.5. Padding is NaN.
    rollout = TinyPpo().collect()
    weights = torch.full_like(rollout.logprobs, 1.5).masked_fill(~rollout.mask, torch.nan)
    weights[0, 0], weights[1, 0] = 2.0, 0.5
    weighted = replace(rollout, importance=weights)
    metrics = rollout_metrics(weighted, KlSection(), lambda x: x, importance_cap=2.0)
    tokens = int(rollout.mask.sum())
    assert metrics["importance_mean"] == pytest.approx((1.5 * (tokens - 2) + 2.5) / tokens)
    assert metrics["importance_capped"] == pytest.approx(1 / tokens)
    assert "importance_mean" not in rollout_metrics(rollout, KlSection(), lambda x: x, 2.0)
