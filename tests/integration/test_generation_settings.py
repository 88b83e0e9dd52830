"""Stop strings and forbidden tokens through the whole chain, as the command line runs it."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.tiny_chain import rlhf, rows, samples, write_config


def test_every_stage_samples_by_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts end at the string and never hold the token; evaluation and export agree."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    settings = ["generation.stop_strings=[e]", "generation.forbidden_tokens=[' ', t]"]
    rlhf("run", *settings, "ppo.rollout.temperature=0.9", "ppo.checkpoint_every=1")
    run = tmp_path / "runs/r"
    codec = json.loads((run / "ppo/artifact/tokenizer/codec.json").read_text())
    assert codec["stop_strings"] == ["e"]
    tokenizer = AutoTokenizer.from_pretrained(run / "ppo/artifact/tokenizer")
    banned = {tokenizer.encode(text, add_special_tokens=False)[0] for text in (" ", "t")}
    assert set(codec["forbidden_ids"]) == banned
    drawn = samples(run / "ppo")
    by_string = 0
    for row in drawn:
        ids = row["response_ids"]
        assert not banned & set(ids)
        assert "e" not in row["response"]
        assert "e" not in tokenizer.decode(ids[:-1], skip_special_tokens=True)
        if "e" in tokenizer.decode(ids, skip_special_tokens=True):
            assert row["ended"]
            by_string += 1
    assert by_string > 3
    # Nothing was learned yet: the KL of the first iteration is that of equal distributions.
    assert rows(run / "ppo")[1]["kl"] == pytest.approx(0, abs=1e-4)
    for line in (run / "evaluation/samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert all("e" not in row[policy]["text"] for policy in ("sft", "ppo"))
    exported = json.loads((run / "export/adapter/generation_config.json").read_text())
    assert set(exported["suppress_tokens"]) == banned
    assert "stop_strings=['e']" in (run / "export/adapter/README.md").read_text()
    # SFT samples nothing: with another string it is reused, the rest is made anew.
    again = rlhf("run", "generation.stop_strings=[a]")
    assert "sft: finished, reused" in again
    assert "ppo: finished" not in again
