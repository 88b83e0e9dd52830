"""PPO's options by the command line, all of them at once: metrics, and going on exactly."""

import json
from pathlib import Path

import pytest

from pipeline.not_finite import NotFinite
from stages.ppo.run import Training
from tests.tiny_chain import ROOT, Killed, assert_same, rlhf, rows, samples

EMA = ["ppo.ema_decay=0.7"]
OPTIONS = [
    *EMA,
    "data.prompts=prompts.jsonl",
    "data.pretraining=text.jsonl",
    "ppo.optim.ptx_coef=0.2",
    "ppo.optim.ptx_rows=3",
    "ppo.optim.pretraining_coef=0.1",
    "ppo.optim.pretraining_rows=8",
    "ppo.optim.dual_clip=3.0",
    "ppo.advantage.value_lambda=1.0",
    "ppo.advantage.length_adaptive_alpha=0.4",
    "ppo.advantage.reference_length=8",
    "ppo.kl.column=source",
    "ppo.kl.coefs={short: 0.2}",
    "ppo.kl.controller=adaptive",
    "ppo.kl.targets={long: 0.5}",
    "ppo.kl.horizon=100",
    "ppo.curriculum={column: words, start_share: 0.3, iterations: 4}",
]


@pytest.fixture
def data(place: Path) -> Path:
    """Prompts with two columns, and plain text."""
    found = []
    for line in (ROOT / "data/quickstart/prompts.jsonl").read_text().splitlines()[:40]:
        prompt = json.loads(line)["prompt"]
        words = len(prompt.split())
        found.append(
            {"prompt": prompt, "words": words, "source": "short" if words < 30 else "long"}
        )
    assert {row["source"] for row in found} == {"short", "long"}
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    text = [{"text": row["prompt"] * 3} for row in found[:20]]
    (place / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    return place


def ppo(name: str, *arguments: str, code: int = 0) -> str:
    return rlhf("ppo", f"run.name={name}", "--from", "runs/parents", *arguments, code=code)


def test_all_options_log_what_they_say(data):
    ppo("r", *OPTIONS)
    stage = data / "runs/r/ppo"
    found = rows(stage)
    sources = ("short", "long")
    for row in found[1:]:
        assert {"ptx_loss", "pretraining_loss", "curriculum_share"} <= row.keys()
        assert 0 < row["gae_lambda"] < 1
        asked = [name for name in sources if f"kl/{name}" in row]
        assert sum(row[f"responses/{name}"] for name in asked) == row["responses"] == 4
        for of in ("score", "kl", "kl_coef"):
            mean = sum(row[f"{of}/{name}"] * row[f"responses/{name}"] for name in asked) / 4
            assert mean == pytest.approx(row[of], abs=1e-6)
    # 0.3, then 0.7 / 3 more each time; of the prompts that there are.
    train = json.loads((stage.parent / "data.json").read_text())["prompts"]["kept"]["train"]
    shares = [row["curriculum_share"] for row in found[1:]]
    expected = [min(0.3 + 0.7 / 3 * i, 1.0) for i in range(6)]
    assert shares == pytest.approx(expected, abs=1 / train)
    # The shortest prompts were asked first.
    prompts = [json.loads(line) for line in (data / "prompts.jsonl").read_text().splitlines()]
    words = {row["prompt"]: row["words"] for row in prompts}
    first = [words[s["prompt"]] for s in samples(stage) if s["iteration"] == 1]
    easy = sorted(words.values())[: round(0.3 * len(words)) + 3]
    assert max(first) <= easy[-1]
    report = json.loads((stage.parent / "data.json").read_text())["pretraining"]
    assert report["rows"] == 20 and sum(report["kept"].values()) == 20


def kill_before(monkeypatch, iteration: int) -> None:
    own = Training.collect

    def collect(self, number):
        if number == iteration:
            raise Killed
        return own(self, number)

    monkeypatch.setattr(Training, "collect", collect)


@pytest.mark.parametrize("tuning", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_exactly_with_all_options(data, tuning):
    arguments = [*OPTIONS, f"ppo.tuning={tuning}"]
    ppo("whole", *arguments)
    with pytest.MonkeyPatch.context() as patch:
        kill_before(patch, 4)
        with pytest.raises(Killed):
            ppo("r", *arguments)
    assert "going on after step 2" in ppo("r", *arguments)
    assert_same(data / "runs/r/ppo", data / "runs/whole/ppo")


def test_a_roll_back_takes_average_and_coefficients_back(data, monkeypatch):
    own, failed = Training.update, []
    states: dict[str, list] = {"ema": [], "kl": []}

    def update(self, experience, iteration):
        average = {name: x.clone() for name, x in self.average.state().items()}
        if iteration == 5:
            states["ema"].append(average)
            states["kl"].append(self.kl.state())
            if not failed:
                own(self, experience, iteration)  # moves both
                assert self.kl.state() != states["kl"][0]
                failed.append(iteration)
                raise NotFinite("made up", "made up is not finite", [])
        return own(self, experience, iteration)

    monkeypatch.setattr(Training, "update", update)
    output = ppo("r", *OPTIONS, "ppo.stop.action=roll_back")
    assert "ppo goes back to iteration 4" in output
    before, after = states["ema"]
    assert before.keys() == after.keys() and all((before[n] == after[n]).all() for n in before)
    assert states["kl"][0] == states["kl"][1]


def test_the_artifact_is_the_average(data):
    """Of the policies that the iterations left: by hand, from the states."""
    from safetensors.torch import load_file

    keep = ["ppo.keep=last", "ppo.checkpoint_every=1", "ppo.iterations=2", "ppo.held_out.every=2"]
    recorded = []
    own = Training.update

    def update(self, experience, iteration):
        weights = lambda: {  # noqa: E731
            name: x.detach().clone() for name, x in self.updater.steps.weights("policy").items()
        }
        if not recorded:
            recorded.append(weights())
        metrics = own(self, experience, iteration)
        recorded.append(weights())
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "update", update)
        ppo("r", *EMA, *keep)
    found = load_file(data / "runs/r/ppo/artifact/adapter/adapter_model.safetensors")
    # 0.7^2 of the start, 0.3 x 0.7 of the first iteration's policy, 0.3 of the second's.
    expected = {
        name: 0.49 * recorded[0][name] + 0.21 * recorded[1][name] + 0.3 * recorded[2][name]
        for name in recorded[0]
    }
    plain = {name.replace("base_model.model.", ""): x for name, x in found.items()}
    for name, weight in expected.items():
        (match,) = [x for n, x in plain.items() if n in name.replace(".policy.", ".")]
        assert (match - weight).abs().max() < 1e-6, name
        assert (match - recorded[2][name]).abs().max() > 1e-4 or not weight.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ppo.curriculum.column=words"], "`words` (ppo.curriculum.column) is missing"),
        (["ppo.kl.column=source"], "`source` (ppo.kl.column) is missing"),
        (
            ["data.prompts=prompts.jsonl", "ppo.kl.column=source", "ppo.kl.coefs={shrt: 1.0}"],
            "ppo.kl.coefs names 'shrt', but the values of ppo.kl.column = 'source' are long, "
            "short. Did you mean 'short'?",
        ),
        (
            ["ppo.optim.pretraining_coef=0.1"],
            "data.pretraining is missing: ppo.optim.pretraining_coef is 0.1",
        ),
    ],
)
def test_what_the_data_lack_is_said_before_a_model_is_opened(data, arguments, message):
    output = ppo("r", *arguments, code=2)
    assert message in output
