"""The vLLM engine with servers that are down, wrong or faulty, and with what it cannot take."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline.codec import Codec
from pipeline.config import key_values
from pipeline.errors import ConfigError, TrainingError
from pipeline.generation import NativeEngine
from pipeline.generation.vllm import read_answer
from pipeline.json_http import JsonServer, ServerFault
from pipeline.models.loading import train_tokenizer
from pipeline.models.trunk import Handle
from pipeline.not_finite import NotFinite
from pipeline.vllm_config import VllmSection
from stages.config import RunConfig
from stages.ppo.config import PpoSection
from tests.tiny_vllm import GREEDY, PROMPTS, engine_of, make_policy
from tests.vllm_stand_in import StandIn


@pytest.fixture
def policy(tmp_path: Path) -> Handle:
    """An adapter, far from zero, on a base that lies in a folder."""
    return make_policy(tmp_path)


@pytest.fixture
def server(policy: Handle):
    with StandIn(Path(policy.trunk.origin.path)) as stand_in:
        yield stand_in


# --- the wrong server ---


def test_a_server_that_is_down(policy: Handle, server: StandIn, tmp_path: Path) -> None:
    engine = engine_of(server, tmp_path)
    server.__exit__()
    with pytest.raises(ConfigError) as caught:
        engine.generate(policy, PROMPTS, range(5), GREEDY)
    text, base = str(caught.value), policy.trunk.origin.path
    assert f"no vLLM server answers at {server.url} (ppo.rollout.vllm.url)" in text
    assert "(tried 3 times)" in text
    # 32 + 8 tokens take three blocks of 16; rank 4 needs the smallest --max-lora-rank, 8.
    assert text.endswith(
        f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {base} --enable-lora "
        "--max-lora-rank 8 --max-model-len 48 --logprobs-mode processed_logprobs "
        "--generation-config vllm"
    )


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"updating": False}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"),
        ({"max_model_len": 39}, r"takes 39 tokens, but data.max_prompt_tokens \+ .* = 40"),
        ({"api_key": "secret"}, r"ppo.rollout.vllm.api_key_env"),
        ({"served_name": "other", "base": Path("/somewhere")}, "serves other, but .* vllm serve"),
    ],
)
def test_a_server_that_does_not_fit(
    knobs: dict, message: str, policy: Handle, server: StandIn, tmp_path: Path
) -> None:
    for name, value in knobs.items():
        setattr(server, name, value)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        engine_of(server, tmp_path).generate(policy, PROMPTS, range(5), GREEDY)


def test_a_base_of_another_name_can_be_named(
    policy: Handle, server: StandIn, tmp_path: Path
) -> None:
    server.served_name, server.base = "my-base", Path("/models/in/a/container")
    engine = engine_of(server, tmp_path, model="my-base")
    assert engine.generate(policy, PROMPTS, range(5), GREEDY).response_ids
    with pytest.raises(ConfigError, match="--served-model-name your-base"):
        engine_of(server, tmp_path, model="your-base").generate(
            policy, PROMPTS, [*range(5)], GREEDY
        )


def test_a_refused_adapter_is_not_asked_again(
    policy: Handle, server: StandIn, tmp_path: Path
) -> None:
    server.max_lora_rank = 2
    with pytest.raises(TrainingError, match=r"LoRA rank 4 is greater .* --max-lora-rank") as caught:
        engine_of(server, tmp_path).generate(policy, PROMPTS, range(5), GREEDY)
    assert str(tmp_path / "ppo/adapters") in str(caught.value)
    assert len(server.asked("/v1/load_lora_adapter")) == 1


def test_a_folder_that_the_server_sees_elsewhere(
    policy: Handle, server: StandIn, tmp_path: Path
) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "mounted").symlink_to(tmp_path / "shared")
    named = {"adapters": str(tmp_path / "shared"), "adapters_on_server": f"{tmp_path}/mounted/"}
    engine = engine_of(server, tmp_path, **named)
    assert engine.generate(policy, PROMPTS, range(5), GREEDY).response_ids
    ((name, path),) = server.loaded.items()
    (own,) = (tmp_path / "shared").iterdir()  # runs that share the folder keep out of one another
    assert path == f"{tmp_path}/mounted/{own.name}/{name}"
    assert (own / name / "adapter_model.safetensors").exists()


def test_a_key_comes_from_the_environment(
    policy: Handle, server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.api_key = "secret"
    monkeypatch.setenv("MY_VLLM_KEY", "secret")
    engine = engine_of(server, tmp_path, api_key_env="MY_VLLM_KEY")
    assert engine.generate(policy, PROMPTS, range(5), GREEDY).response_ids
    monkeypatch.delenv("MY_VLLM_KEY")
    with pytest.raises(ConfigError, match="api_key_env is MY_VLLM_KEY"):
        engine_of(server, tmp_path, api_key_env="MY_VLLM_KEY")


# --- faults on the way ---


@pytest.mark.parametrize(
    ("path", "fault"),
    [(path, fault) for path in ("/v1/completions", "/v1/models") for fault in (500, 503, 429, 0)]
    # But for 500, which is vLLM's answer for an adapter that it cannot load.
    + [("/v1/load_lora_adapter", fault) for fault in (503, 429, 0)],
)
def test_passing_faults_are_survived(
    path: str, fault: int, policy: Handle, server: StandIn, tmp_path: Path
) -> None:
    server.faults[path] = [fault, fault]
    made = engine_of(server, tmp_path).generate(policy, PROMPTS, range(5), GREEDY)
    native = NativeEngine().generate(policy, PROMPTS, range(5), GREEDY)
    assert made.response_ids == native.response_ids


def test_faults_that_stay_are_an_error(policy: Handle, server: StandIn, tmp_path: Path) -> None:
    server.faults["/v1/completions"] = [500] * 50
    with pytest.raises(TrainingError, match=r"sample 0: .*status 500.*tried 3 times") as caught:
        engine_of(server, tmp_path, rows=1).generate(policy, PROMPTS, range(5), GREEDY)
    assert f"{server.url}/v1/completions" in str(caught.value)


def test_bad_requests_are_not_tried_again(policy: Handle, server: StandIn, tmp_path: Path) -> None:
    server.faults["/v1/completions"] = [400]
    with pytest.raises(TrainingError, match="status 400: as the test asked"):
        engine_of(server, tmp_path, rows=1).generate(policy, PROMPTS[:1], [0], GREEDY)
    assert len(server.asked("/v1/completions")) == 1


def test_a_server_that_does_not_answer_in_time(
    policy: Handle, server: StandIn, tmp_path: Path
) -> None:
    server.delay = 1.0
    engine = engine_of(server, tmp_path, timeout_seconds=0.1, retries=0)
    with pytest.raises(TrainingError, match=r"no answer within 0.1 seconds"):
        engine.generate(policy, PROMPTS[:1], [0], GREEDY)


def test_a_restarted_server_is_named(policy: Handle, server: StandIn, tmp_path: Path) -> None:
    engine = engine_of(server, tmp_path)
    engine.generate(policy, PROMPTS, range(5), GREEDY)
    server.loaded.clear()
    with pytest.raises(TrainingError, match=r"no longer knows the policy's adapter .*restarted"):
        engine.generate(policy, PROMPTS, range(5), GREEDY)


def test_pauses_double_up_to_half_a_minute() -> None:
    pauses: list[float] = []
    server = JsonServer("http://127.0.0.1:1", retries=8, sleep=pauses.append)
    with pytest.raises(ServerFault, match="tried 9 times"):
        server.get("/v1/models")
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]


# --- answers that are no samples ---


def spoilt(key: str, value: Any) -> Any:
    def spoil(choice: dict[str, Any]) -> None:
        target = choice["logprobs"] if key == "token_logprobs" else choice
        found = target[key]
        target[key] = value(found) if callable(value) else value

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoilt("token_logprobs", lambda found: found[:-1]), "7 log-probs for 8 tokens"),
        (spoilt("token_logprobs", lambda found: ["-1", *found[1:]]), "no numbers: .'-1'"),
        (spoilt("token_logprobs", lambda found: [None, *found[1:]]), "no numbers: .None"),
        (spoilt("logprobs", None), "vLLM 0.10.2 or newer"),
        (spoilt("token_ids", None), "0 tokens where 1 to 8 were asked for"),
        (spoilt("token_ids", lambda found: [*found, 5]), "9 tokens where 1 to 8"),
        (spoilt("token_ids", lambda found: [10**6, *found[1:]]), "outside the vocabulary of 300"),
        (spoilt("finish_reason", "stop"), "none of the run's stop ids"),
        (spoilt("finish_reason", "abort"), "finished by 'abort'"),
    ],
)  # fmt: skip
def test_answers_that_are_no_samples_are_refused(
    spoil: Any, message: str, policy: Handle, server: StandIn, tmp_path: Path
) -> None:
    policy.codec.stop_ids = frozenset({299})
    server.spoil = spoil
    with pytest.raises(TrainingError, match=message) as caught:
        engine_of(server, tmp_path).generate(policy, PROMPTS, range(5), GREEDY)
    assert server.url in str(caught.value) and "for sample 0" in str(caught.value)


def test_log_probs_that_are_not_finite_name_their_rows(
    policy: Handle, server: StandIn, tmp_path: Path
) -> None:
    calls: list[list[int]] = []  # one request at a time

    def spoil(choice: dict[str, Any]) -> None:
        calls.append(choice["token_ids"])
        if len(calls) in (2, 4):
            choice["logprobs"]["token_logprobs"][3] = -9999.0  # for minus infinity

    server.spoil = spoil
    engine = engine_of(server, tmp_path, rows=1)
    with pytest.raises(NotFinite, match="for 2 of 5 samples, the first of them sample 11") as found:
        engine.generate(policy, PROMPTS, range(10, 15), GREEDY)
    assert server.url in str(found.value) and found.value.what == "logprobs"
    assert [row["row"] for row in found.value.rows] == [1, 3]
    for row in found.value.rows:
        assert row["response"] == policy.codec.text(calls[row["row"]])
        assert [n for n, x in enumerate(row["logprobs"]) if not math.isfinite(x)] == [3]
        assert row["logprobs"][3] == -math.inf


def test_a_policy_of_nan_is_told_from_a_broken_server(
    policy: Handle, server: StandIn, tmp_path: Path
) -> None:
    engine = engine_of(server, tmp_path, retries=1)
    engine.generate(policy, PROMPTS, range(5), GREEDY)
    server.spoil = spoilt("token_logprobs", lambda found: [math.nan, *found[1:]])
    with pytest.raises(TrainingError, match=r"vLLM did not answer for sample 0: .*500") as caught:
        engine.generate(policy, PROMPTS, range(5), GREEDY)
    assert not isinstance(caught.value, NotFinite)
    server.spoil = None
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.fill_(math.nan)
    with pytest.raises(NotFinite, match=r"for 5 of 5 prompts, for which http.* 500") as found:
        engine.generate(policy, PROMPTS, range(5), GREEDY)
    assert [row["row"] for row in found.value.rows] == [0, 1, 2, 3, 4]
    assert all(math.isnan(row["logprobs"][0]) for row in found.value.rows)


def answer(ids: list[int], reason: str = "length") -> dict[str, Any]:
    logprobs = {"token_logprobs": [-1.0] * len(ids)}
    return {"choices": [{"token_ids": ids, "logprobs": logprobs, "finish_reason": reason}]}


def test_ends_are_known_by_ids() -> None:
    stops = Codec(train_tokenizer(["any text"], 258))
    stops.stop_ids = frozenset({2, 3})
    assert read_answer(answer([7, 3], "stop"), stops, 4, 10) == ([7, 3], [-1.0, -1.0], True)
    assert read_answer(answer([7] * 4), stops, 4, 10)[2] is False
    # A stop id as the last token that fits: the native engine calls that ended, too.
    assert read_answer(answer([7, 7, 7, 2]), stops, 4, 10)[2] is True
    for ids, reason, message in (
        ([7, 2, 7, 3], "stop", "went on after a stop id"),
        ([7, 7], "length", "cut after 2 of 4 tokens: raise the server's --max-model-len"),
    ):
        with pytest.raises(ValueError, match=message):
            read_answer(answer(ids, reason), stops, 4, 10)


# --- what cannot be handed over ---


def test_full_fine_tuning_is_refused(policy: Handle, server: StandIn, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"engine = vllm needs ppo.tuning = lora, not full"):
        PpoSection.model_validate({"tuning": "full", "rollout": {"engine": "vllm"}})
    with pytest.raises(ConfigError, match=r"set ppo.tuning to lora"):
        engine_of(server, tmp_path).generate(
            policy.with_role("policy", adapter=None), PROMPTS, range(5), GREEDY
        )


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 513}, "rank 513 is above 512: lower lora.rank"),
        ({"use_dora": True}, "set lora.use_dora to false"),
    ],
)
def test_adapters_that_vllm_cannot_load_are_refused_with_the_config(
    lora: dict, message: str
) -> None:
    given = {"model": {"path": "org/base"}, "lora": lora, "ppo": {"rollout": {"engine": "vllm"}}}
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(given)
    RunConfig.model_validate({**given, "ppo": {}})  # none of the native engine's business


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("use_dora", True, "it has no DoRA"),
        ("bias", "all", "it has biases"),
        ("alpha_pattern", {"q_proj": 4}, "its layers differ in scale"),
        ("modules_to_save", ["lm_head"], "it replaces whole modules"),
    ],
)
def test_adapters_of_other_makings_are_checked(
    field: str, value: Any, message: str, policy: Handle, server: StandIn, tmp_path: Path
) -> None:
    setattr(policy.trunk.model.peft_config["policy"], field, value)
    with pytest.raises(ConfigError, match=message):
        engine_of(server, tmp_path).generate(policy, PROMPTS, range(5), GREEDY)


def test_where_the_server_stands_is_no_part_of_the_key() -> None:
    plain, moved = (
        PpoSection.model_validate({"rollout": {"engine": "vllm", **vllm}})
        for vllm in ({}, {"vllm": {"url": "http://gpu:8000", "api_key_env": "KEY"}})
    )
    assert plain != moved
    keys = [key_values(PpoSection, section.model_dump()) for section in (plain, moved)]
    assert keys[0] == keys[1] and keys[0]["rollout"]["engine"] == "vllm"


@pytest.mark.parametrize("url", ["gpu:8000", "ftp://gpu", "http://", "http://a b"])
def test_urls_are_checked_with_the_config(url: str) -> None:
    with pytest.raises(ValidationError, match="url"):
        VllmSection(url=url)
