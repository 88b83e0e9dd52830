"""NaN or infinite numbers: no step is taken with them, and their rows are left as texts."""

import json
import math
from pathlib import Path

import pytest
import torch

from pipeline.resume import complete_states
from pipeline.runfolder import verify
from stages.ppo.run import Training, appraise
from stages.reward.trainer import RankingTrainer
from stages.sft.trainer import SftTrainer
from tests.tiny_chain import rlhf, rows, samples


def left(stage: Path, output: str) -> dict:
    """What was left of the rows at fault; the error names the file."""
    path = stage / "not_finite.json"
    assert str(path.relative_to(path.parents[3])) in output
    return json.loads(path.read_text())


def assert_newest_state(stage: Path, step: int) -> None:
    """The last good state is whole, and the one that a run would go on from."""
    found, folder = complete_states(stage / "checkpoints")[0]
    assert found == step
    verify(folder)


@pytest.mark.parametrize(("stage", "trainer"), [("sft", SftTrainer), ("reward", RankingTrainer)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_of_training_leaves_the_rows_of_its_micro_batch(
    place, monkeypatch, stage, trainer, value
):
    own, fault = trainer.loss_sum, {}

    def loss_sum(self, model, batch):
        loss = own(self, model, batch)
        if self.model.training and self.state.global_step == 3 and not fault:
            fault["rows"] = self._step_rows[:1]  # micro-batches of one row: the first is this
            return loss * value
        return loss

    monkeypatch.setattr(trainer, "loss_sum", loss_sum)
    name = [f"{stage}.micro_batch_tokens=1", "run.name=r"]
    arguments = [*name, "--from", "runs/parents"] if stage == "reward" else [*name, "run.seed=2"]
    output = rlhf(stage, *arguments, code=2)
    assert f"the loss is {value} at step 4 of 6" in output
    found = left(place / f"runs/r/{stage}", output)
    assert (found["what"], found["place"]) == ("loss", "step 4 of 6")
    (row,) = found["rows"]
    assert [row["row"]] == fault["rows"]
    source, _, number = row["origin"].rpartition(":")
    line = json.loads(Path(source).read_text().splitlines()[int(number) - 1])
    assert line["prompt"] == row["prompt"]
    assert row["response" if stage == "sft" else "responses"]
    assert_newest_state(place / f"runs/r/{stage}", 2)
    assert "going on after step 2" in rlhf(stage, *arguments)  # the fault is there no more


def test_a_gradient_of_training_leaves_the_rows_of_its_step(place, monkeypatch):
    own = SftTrainer.loss_sum

    def loss_sum(self, model, batch):
        loss = own(self, model, batch)
        if self.state.global_step == 3:
            parameter = next(p for p in self.model.parameters() if p.requires_grad)
            zero = parameter.flatten()[0] - parameter.flatten()[0].detach()
            return loss + zero.sqrt()  # value 0, derivative infinite
        return loss

    monkeypatch.setattr(SftTrainer, "loss_sum", loss_sum)
    output = rlhf("sft", "run.name=r", "run.seed=2", code=2)
    assert "the gradient norm is inf at step 4 of 6" in output
    found = left(place / "runs/r/sft", output)
    assert len(found["rows"]) == 4  # sft.batch_size
    assert all(row["prompt"] and row["response"] for row in found["rows"])
    assert_newest_state(place / "runs/r/sft", 2)


PPO = ["run.name=r", "--from", "runs/parents"]


def test_a_ratio_of_ppo_leaves_the_samples_of_its_micro_batch(place, monkeypatch):
    at_fault: list[int] = []

    def spoilt(rollout, *arguments):
        experience = appraise(rollout, *arguments)
        if rollout.sample_indices[0] == 8:  # iteration 3 of 4 samples each
            experience.advantages[1, 0] = math.nan
            at_fault.append(rollout.sample_indices[1])
        return experience

    monkeypatch.setattr("stages.ppo.run.appraise", spoilt)
    output = rlhf("ppo", *PPO, "ppo.optim.micro_batch_tokens=1", code=2)
    assert "policy_loss is not finite in iteration 3, epoch 0, minibatch" in output
    assert f"among the samples {at_fault}" in output
    assert "The best policy so far (iteration" in output
    found = left(place / "runs/r/ppo", output)
    assert found["place"].startswith("iteration 3, epoch 0, minibatch")
    (row,) = found["rows"]
    assert row["sample_index"] == at_fault[0] and row["advantages"][0] == "nan"
    assert "prompts.jsonl:" in row["origin"] and row["prompt"] and row["response"]
    assert_newest_state(place / "runs/r/ppo", 2)
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert "going on after step 2" in rlhf("ppo", *PPO, "ppo.optim.micro_batch_tokens=1")
    # What was written down is what was sampled: the same iteration again, without the fault.
    (again,) = [s for s in samples(place / "runs/r/ppo") if s["sample_index"] == at_fault[0]]
    assert (again["prompt"], again["response"]) == (row["prompt"], row["response"])


def test_a_gradient_of_ppo_leaves_the_samples_of_its_minibatch(place, monkeypatch):
    own = Training.update

    def update(self, experience, iteration):
        if iteration == 3:
            parameter = self.updater.groups["policy"][0]
            parameter.register_hook(lambda gradient: gradient * math.nan)
        return own(self, experience, iteration)

    monkeypatch.setattr(Training, "update", update)
    output = rlhf("ppo", *PPO, code=2)
    assert "the policy gradient is nan in iteration 3, epoch 0, minibatch 0" in output
    found = left(place / "runs/r/ppo", output)
    assert len(found["rows"]) == 2  # 4 samples in 2 minibatches
    assert all(8 <= row["sample_index"] < 12 and row["prompt"] for row in found["rows"])
    assert_newest_state(place / "runs/r/ppo", 2)


def test_a_language_model_loss_leaves_its_demonstrations(place, monkeypatch):
    own = Training.update

    def update(self, experience, iteration):
        if iteration == 3:
            inner = self.updater.steps.module

            def forward(batch, want, *rest):
                out = inner(batch, want, *rest)
                if not rest:  # demonstrations are read at temperature 1
                    out.logprobs[0, 0] = -math.inf
                return out

            monkeypatch.setattr(self.updater.steps, "module", forward)
        return own(self, experience, iteration)

    monkeypatch.setattr(Training, "update", update)
    output = rlhf("ppo", *PPO, "ppo.optim.ptx_coef=0.1", code=2)
    assert "the language-model loss on demonstrations (ppo.optim.ptx_coef)" in output
    found = left(place / "runs/r/ppo", output)
    assert found["rows"] and all(row["prompt"] and row["response"] for row in found["rows"])


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_reward_leaves_the_responses_that_it_could_not_score(place, value):
    (place / "judge.py").write_text(
        "calls = 0\n"
        "def score(completions, **rest):\n"
        "    global calls; calls += 1\n"
        "    scores = [float(len(text)) for text in completions]\n"
        # Call 1 scores the held-out prompts at the start; with held_out.every=10 the next ones
        # score the rollouts of iterations 1, 2, 3.
        f"    return scores if calls < 4 else [*scores[:-1], float('{value}')]\n"
    )
    output = rlhf("ppo", *PPO, "ppo.held_out.every=10", code=2)
    assert f"ppo, rollouts of iteration 3: reward score returned {value} for 1 of 4" in output
    found = left(place / "runs/r/ppo", output)
    (row,) = found["rows"]
    assert (row["sample_index"], row["score"]) == (11, value)
    assert row["prompt"] and "prompts.jsonl:" in row["origin"] and "response" in row
    assert found["what"] == "score"
    assert_newest_state(place / "runs/r/ppo", 2)
    assert [row["step"] for row in rows(place / "runs/r/ppo")] == [0, 1, 2]


@pytest.mark.parametrize("engine", ["native", "static"])
def test_logits_leave_what_was_written_before_them(place, monkeypatch, engine):
    own = Training.collect
    if engine == "static":
        from pipeline.generation import StaticEngine

        monkeypatch.setattr("pipeline.generation.local.serving", lambda *_: StaticEngine)

    def collect(self, iteration):
        if iteration == 3:
            with torch.no_grad():
                self.updater.groups["policy"][0].fill_(math.nan)
        return own(self, iteration)

    monkeypatch.setattr(Training, "collect", collect)
    output = rlhf("ppo", *PPO, code=2)
    fault = "ppo, rollouts of iteration 3: the model's logits are not finite at response token 0"
    assert fault in output
    found = left(place / "runs/r/ppo", output)
    assert (found["what"], found["place"]) == ("logits", "rollouts of iteration 3")
    assert [row["sample_index"] for row in found["rows"]] == [8, 9, 10, 11]
    assert all(row["prompt"] and row["response"] == "" for row in found["rows"])
    assert_newest_state(place / "runs/r/ppo", 2)


@pytest.mark.parametrize("what", ["ref_logprobs", "values"])
def test_numbers_of_a_rollout_are_named_before_they_spread(place, monkeypatch, what):
    from stages.ppo import interviewer

    own = interviewer.collect

    def collect(*arguments, **settings):
        rollout = own(*arguments, **settings)
        if 8 in rollout.sample_indices and settings["stream"] == 0:
            getattr(rollout, what)[2, 0] = math.nan
        return rollout

    monkeypatch.setattr(interviewer, "collect", collect)
    output = rlhf("ppo", *PPO, code=2)
    assert f"ppo, rollouts of iteration 3: {what} of 1 responses are not finite" in output
    (row,) = left(place / "runs/r/ppo", output)["rows"]
    assert row["sample_index"] == 10 and row[what][0] == "nan"
