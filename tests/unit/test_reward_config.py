"""`ppo.rewards`: what it may hold, how it is refused, and what of it belongs in a key."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import key_values, named_resources
from pipeline.errors import ConfigError
from pipeline.keys import stage_material
from pipeline.reward_list import reward_entries, single_entries, source_names, uses_own
from pipeline.yaml_config import dump_config, read_config
from stages.check_models import check_rewards
from stages.config import RunConfig
from stages.export.run import _steps
from stages.ppo.config import PpoSection
from stages.ppo.run import PpoStage


@pytest.fixture
def read(tmp_path: Path) -> Any:
    (tmp_path / "r.py").write_text("")

    def write(rewards: str) -> RunConfig:
        path = tmp_path / "c.yaml"
        path.write_text(f"model: {{path: org/x}}\nppo:\n  rewards: {rewards}\n")
        config = read_config(path, [], RunConfig)
        again = tmp_path / "again.yaml"
        again.write_text(dump_config(config))
        assert read_config(again, [], RunConfig) == config
        return config

    return write


ALL = """
    - own
    - {model: org/judge, weight: 0.5}
    - {model: org/judge, name: second, shift: 1}
    - r.py:helpful
    - {http: "https://scorer.example:8443/score?v=1", columns: [answer]}
    - {builtin: length_penalty, target: 100, weight: 0.1}
    - {builtin: repetition_penalty}
    - {builtin: regex, pattern: "^a"}
    - {builtin: rouge, column: reference}
    - {ensemble: [own, {model: runs/other/reward/artifact}], combine: minimum}"""


def test_every_kind_is_read_and_named(read: Any, tmp_path: Path) -> None:
    section = read(ALL).ppo
    assert source_names(section.rewards) == [
        "own", "judge", "second", "helpful", "scorer.example", "length_penalty",
        "repetition_penalty", "regex", "rouge", "ensemble", "own-2", "other",
    ]  # fmt: skip
    places = [*(f".{n}" for n in range(9)), ".9.ensemble.0", ".9.ensemble.1"]
    assert uses_own(section.rewards) and list(single_entries(section.rewards)) == places
    assert dict(named_resources(section)) == {
        ("rewards", 1, "model"): "org/judge",
        ("rewards", 2, "model"): "org/judge",
        ("rewards", 3, "function"): f"{tmp_path}/r.py:helpful",  # beside the config file
        ("rewards", 9, "ensemble", 1, "model"): "runs/other/reward/artifact",
    }


@pytest.mark.parametrize(
    ("rewards", "kind", "own"),
    [
        ("null", "ModelEntry", True),
        ("own", "ModelEntry", True),
        ("org/judge", "ModelEntry", False),
        ("r.py:helpful", "FunctionEntry", False),
        ("trl.rewards:think_format_reward", "FunctionEntry", False),
        ("http://127.0.0.1:8000/score", "HttpEntry", False),
    ],
)
def test_one_text_is_one_source(read: Any, rewards: str, kind: str, own: bool) -> None:
    found = read(rewards).ppo.rewards
    (entry,) = reward_entries(found)
    assert type(entry).__name__ == kind and (entry.weight, entry.shift) == (1, 0)
    assert uses_own(found) == own


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{model: own, wieght: 2}", r"c\.yaml:5: ppo\.rewards\.1: unknown key wieght: did you"),
        ("{function: r.py:f, auth_env: X}", "unknown key auth_env: there are .*timeout_seconds"),
        ("{modle: own}", r"names no source .*: did you mean model\?"),
        ("{model: a, function: b}", "names model and function: write an entry for each"),
        ("3", r"write a text or a section, such as \{model: org/name, weight: 0\.5\}"),
        ("length_penalty", r"write \{builtin: length_penalty\}"),
        ("{builtin: length}", r"builtin is 'length': did you mean length_penalty\?"),
        ("{builtin: length_penalty}", r"ppo\.rewards\.1\.target is missing"),
        ("{builtin: regex, pattern: '('}", r"pattern is '\(': it is no regular expression"),
        ("{model: r.py:f}", r"that is no model: write \{function: "),
        ("{function: r.py}", "names no function: write file.py:NAME"),
        ("{function: gone.py:f}", r"ppo\.rewards\.1\.function is 'gone.py:f', which does not"),
        ("{ensemble: [own]}", "must be a list of at least 2"),
        ("{ensemble: [own, {ensemble: [a, b]}]}", "holds sources, no ensembles"),
        ("{ensemble: [own, {model: b, wight: 1}]}", r"ensemble\.1: unknown key wight"),
        ("{ensemble: [own, a], std_coef: 2}", "std_coef is 2 but combine is mean"),
        ("{http: 'https://me:secret@x/y'}", "must hold no password"),
        ("{http: scorer}", "write an address such as https"),
        ("{http: 'http://x', auth_header: X-Key}", "auth_env names no variable"),
        ("{http: 'https://x', ca_file: gone.pem}", "gone.pem', which does not exist"),
        ("{model: own, weight: '2'}", "weight is '2': must be a number: write 2"),
        ("{model: own, weight: .inf}", "must be a finite number"),
    ],
)
def test_refusals_name_the_entry_and_what_to_write(read: Any, entry: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(f"\n    - org/judge\n    - {entry}")


def test_an_empty_list_and_one_name_twice_are_refused(read: Any) -> None:
    with pytest.raises(ConfigError, match="a list of at least 1"):
        read("[]")
    with pytest.raises(ConfigError, match="names two sources 'a'"):
        read("[{model: own, name: a}, {model: org/b, name: a}]")


def material(rewards: Any) -> dict[str, Any]:
    config = RunConfig.model_validate({"model": {"path": "org/x"}, "ppo": {"rewards": rewards}})
    return stage_material(PpoStage(), config, lambda kind: kind, {})


def test_a_key_has_what_changes_scores_and_no_more(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "r.py"
    file.write_text("def f(**rest): return [1.0]\n")
    function = {"function": f"{file}:f"}
    http = {"http": "https://x/score"}
    first = material([function, http])
    assert material([{**function, "name": "g", "timeout_seconds": 3.0}, http]) == first
    quiet = {"auth_env": "KEY", "retries": 9, "batch_rows": 2, "timeout_seconds": 1.0}
    assert material([function, {**http, **quiet}]) == first
    for other in (
        [{**function, "weight": 2.0}, http],
        [function, {**http, "shift": 1.0}],
        [function, {"http": "https://y/score"}],
        [function, {**http, "columns": ("a",)}],
        [{"ensemble": [function, http]}],
        [{"ensemble": [function, http], "combine": "minimum"}],
    ):
        assert material(other) != first
    file.write_text("def f(**rest): return [2.0]\n")
    assert material([function, http]) != first
    assert material(["own"])["resources"] == {}  # it is a parent
    assert PpoStage().needs(_config(["own"])) == ("sft", "reward")
    assert PpoStage().needs(_config([function])) == ("sft",)


def test_the_key_of_one_source_is_what_it_was() -> None:
    """Lists came later: finished work of one source is not done again."""
    for rewards in (None, "org/judge"):
        section = PpoSection.model_validate({"rewards": rewards})
        assert "rewards" not in key_values(PpoSection, section.model_dump(mode="json"))
    assert material("org/judge")["resources"] == {"ppo.rewards": "org/judge"}
    assert material("own") == material(None)


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        (None, "a reward model from ranked responses, and PPO against it"),
        ("org/judge", "PPO against the reward `org/judge`"),
        (["org/judge", "a.b:f"], "PPO against the rewards `judge`, `f`"),
        (["own", "a.b:f"], "from ranked responses, and PPO against the rewards `own`, `f`"),
    ],
)
def test_a_model_card_says_what_the_policy_was_trained_against(rewards: Any, words: str) -> None:
    assert _steps(_config(rewards)).endswith(words)


def test_a_check_looks_at_every_source_it_can(read: Any, monkeypatch: Any) -> None:
    monkeypatch.delenv("SCORER_KEY", raising=False)
    entries = "{http: 'http://x/s', auth_env: SCORER_KEY}, {ensemble: [own, r.py:gone]}"
    findings = list(check_rewards(read(f"[{entries}, 'http://y/s']"), offline=True))
    assert [(f.setting, bool(f.fault)) for f in findings] == [
        ("ppo.rewards.0", True), ("ppo.rewards.1.ensemble.1", True), ("ppo.rewards.2", False)
    ]  # fmt: skip
    assert "SCORER_KEY" in findings[0].fault and "no function 'gone'" in findings[1].fault


def _config(rewards: Any) -> RunConfig:
    return RunConfig.model_validate({"model": {"path": "org/x"}, "ppo": {"rewards": rewards}})
