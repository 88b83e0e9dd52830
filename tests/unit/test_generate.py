"""`rlhf generate`: rows in order, whatever the batch; all kinds of targets; whole files."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from pipeline.codec import Codec
from stages import generate
from stages.targets import Target
from tests.unit.tiny_policies import generated, make_run, rlhf
from tests.unit.tiny_run import POSTS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Five prompts of unlike lengths, a conversation among them, with columns of their own."""
    rows = [
        {"prompt": POSTS[3], "id": 7},
        {"prompt": "a", "id": 8, "response": "someone's"},
        {"prompt": [{"role": "user", "content": "노란 우산 😀?"}], "id": 9, "tags": ["x", "y"]},
        {"prompt": POSTS[0], "id": 10},
        {"prompt": "lost keys " * 8, "id": 11},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def test_rows_are_the_prompts_in_order_with_their_columns(run: Path, prompts: Path) -> None:
    rows = generated(run, prompts)
    given = [json.loads(line) for line in prompts.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in given]
    assert [row["id"] for row in rows] == [7, 8, 9, 10, 11]
    assert rows[2]["tags"] == ["x", "y"]
    assert rows[1]["prompt_response"] == "someone's"  # beside ours
    assert rows[1]["response"] != "someone's"
    # The run's evaluation samples at most 12 tokens, at temperature 1.
    assert all(row["tokens"] == 12 or row["ended"] for row in rows)
    assert rows[0].keys() == {"prompt", "response", "ended", "tokens", "id"}


def test_the_text_depends_on_the_seed_and_not_on_the_batch(
    run: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = generated(run, prompts)
    assert generated(run, prompts, "--seed", 2) != rows
    monkeypatch.setattr(generate, "ROWS_AT_A_TIME", 2)
    assert generated(run, prompts) == rows
    assert generated(run, prompts, "--limit", 2) == rows[:2]
    several = generated(run, prompts, "--n", 3, "--limit", 3)
    assert [row["sample"] for row in several] == [0, 1, 2] * 3
    assert [row["response"] for row in several[::3]] == [row["response"] for row in rows[:3]]
    assert len({str(row["response"]) for row in several}) == 9


FORMS = ("ppo", "ppo/artifact", "export", "export/adapter", "export/merged")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_policy_writes_its_text(run: Path, prompts: Path, form: str) -> None:
    """Greedy, so that the rounding of merged weights has no say."""
    options = ("--temperature", 0, "--max-new-tokens", 8)
    assert generated(run / form, prompts, *options) == generated(run, prompts, *options)


def test_exports_work_wherever_they_lie(run: Path, prompts: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "export", tmp_path / "moved")
    options = ("--temperature", 0, "--max-new-tokens", 8)
    expected = generated(run, prompts, *options)
    assert generated(tmp_path / "moved/adapter", prompts, *options) == expected
    assert generated(tmp_path / "moved/merged", prompts, *options) == expected
    # No run says how to draw: at temperature 1, up to half of the 256 positions.
    (row,) = generated(tmp_path / "moved", prompts, "--limit", 1)
    sampled = ("--temperature", 1, "--max-new-tokens", 128, "--limit", 1)
    assert [row] == generated(run, prompts, *sampled)


def test_stages_of_a_run_are_other_policies(run: Path, prompts: Path) -> None:
    sft = generated(run, prompts, "--stage", "sft")
    assert sft == generated(run / "sft", prompts)
    assert sft != generated(run, prompts)
    # The adapter's base, by the exported adapter alone.
    assert sft == generated(run / "export/adapter", prompts, "--stage", "base")
    assert sft == generated(run / "export/base", prompts)


def test_a_run_samples_by_its_own_settings(run: Path, prompts: Path, tmp_path: Path) -> None:
    """What config.yaml forbids is written by no policy of the run."""
    other = shutil.copytree(run, tmp_path / "other")
    written = "".join(str(row["response"]) for row in generated(run, prompts, "--stage", "sft"))
    letter = max("etaoinsr", key=written.count)
    assert written.count(letter) >= 3
    settings = yaml.safe_load((other / "config.yaml").read_text())
    settings["generation"]["forbidden_tokens"] = [letter]
    (other / "config.yaml").write_text(yaml.safe_dump(settings))
    # Single letters are tokens; others that hold it stay.
    codec = Codec.load(other / "sft/artifact/tokenizer")
    (id_,) = codec.tokenizer.encode(letter, add_special_tokens=False)
    for stage in ("sft", "ppo"):
        target = Target(str(other), "cpu")
        assert target.policy(stage).codec.forbidden_ids == {id_}
        rows = generated(other, prompts, "--stage", stage)
        assert rows != generated(run, prompts, "--stage", stage)


def test_best_of_n_is_the_best_of_those_n(run: Path, prompts: Path) -> None:
    best = generated(run, prompts, "--best-of", 4)
    drawn = generated(run, prompts, "--n", 4)
    assert len(best) == 5
    assert all(isinstance(row["score"], float) for row in best)
    for place, row in enumerate(best):
        four = [other["response"] for other in drawn[4 * place : 4 * place + 4]]
        assert row["response"] in four
    # Of more candidates the best is no worse.
    more = generated(run, prompts, "--best-of", 8)
    assert all(a["score"] <= b["score"] for a, b in zip(best, more, strict=True))
    assert any(a["score"] < b["score"] for a, b in zip(best, more, strict=True))


def test_decoding_for_readers(run: Path, prompts: Path) -> None:
    greedy = generated(run, prompts, "--temperature", 0)
    assert generated(run, prompts, "--top-k", 1) == greedy
    assert generated(run, prompts, "--beams", 2, "--temperature", 0) != greedy
    assert generated(run, prompts, "--top-p", 0.5) != generated(run, prompts)


def test_files_of_every_kind_and_standard_input(run: Path, tmp_path: Path) -> None:
    texts = ["lost a red lamp", "노란 우산 😀"]
    (tmp_path / "p.txt").write_text("\n".join([texts[0], "", texts[1]]) + "\n", encoding="utf-8")
    (tmp_path / "p.csv").write_text("prompt\n" + "\n".join(texts) + "\n", encoding="utf-8")
    table = pyarrow.table({"prompt": texts})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    rows = generated(run, tmp_path / "p.txt")
    assert [row["prompt"] for row in rows] == texts
    assert generated(run, tmp_path / "p.csv") == generated(run, tmp_path / "p.parquet") == rows
    assert generated(run, "-", stdin="\n".join(texts)) == rows
    lines = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
    assert generated(run, "-", stdin=lines) == rows


def test_long_prompts_are_cut_to_the_positions_and_counted(run: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("word " * 400 + "\nshort\n")
    done = rlhf("generate", run, tmp_path / "p.txt", "--max-new-tokens", 6)
    assert "1 prompts were cut to their last 250 tokens" in done.stderr  # of 256 positions
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("none/here", [], "none/here: no such folder"),
        ("tinny", [], "tiny?"),
        ("", [], "holds no model: name a run, an artifact, an export"),  # the folder of the runs
        ("tiny/reward", [], "holds a reward model, which writes no text"),
        ("tiny", ["--stage", "reward"], "has no policy 'reward': there is ppo and sft"),
        ("tiny/sft", ["--stage", "ppo"], "has no policy 'ppo': there is policy"),
        ("tiny/sft", ["--best-of", "2"], "is no run, so that it has no reward to choose by"),
        ("tiny", ["--best-of", "2", "--n", "2"], "--best-of 2 chooses one response, but --n is 2"),
        ("tiny", ["--n", "2", "--temperature", "0"], "2 responses a prompt would all be the same"),
        ("tiny", ["--max-new-tokens", "256"], "Ask for at most 255 (--max-new-tokens)"),
        ("tiny", ["--top-p", "0"], "--top-p is 0: it is a probability above 0"),
    ],
)
def test_faults_are_one_line_and_exit_code_2(
    run: Path, prompts: Path, target: str, options: list[str], message: str
) -> None:
    done = rlhf("generate", run.parent / target, prompts, *options, code=2)
    assert message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_what_may_be_a_hub_id_is_asked_for_there(prompts: Path) -> None:
    done = rlhf("generate", "someone/model", prompts, code=2)
    assert "neither a local folder nor in the local Hub cache" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": ""}\n', "p.jsonl:2: text is null or blank"),
        ('{"prompt": "a"}\n{"pro', "p.jsonl: line 2, column 2: not valid JSON"),
        ("", "is empty: it has no prompts"),
        ('{"question": "a"}\n', "Column 'prompt' is missing"),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    run: Path, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    done = rlhf("generate", run, tmp_path / "p.jsonl", "--out", tmp_path / "o.jsonl", code=2)
    assert message in done.stderr
    assert not (tmp_path / "o.jsonl").exists()


def test_the_file_of_prompts_is_not_written_over(run: Path, prompts: Path) -> None:
    before = prompts.read_bytes()
    done = rlhf("generate", run, prompts, "--out", prompts, code=2)
    assert "is the file of the prompts: name another" in done.stderr
    assert prompts.read_bytes() == before


def test_a_kill_while_writing_leaves_no_half_file(run: Path, prompts: Path) -> None:
    """SIGKILL between the writing of the new file and its taking the old one's place."""
    out = prompts.parent / "o.jsonl"
    out.write_text("the old rows\n")
    command = [sys.executable, "-m", "tests.killing", "os:replace", "1"]
    command += ["generate", str(run), str(prompts), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    assert out.read_text() == "the old rows\n"
    done_again = rlhf("generate", run, prompts, "--out", out)
    assert "5 responses in" in done_again.stderr
    assert [json.loads(line) for line in out.read_text().splitlines()] == generated(run, prompts)
