"""A policy that diverges is taken back to the newest state, with smaller steps from there on."""

import json
import math

import pytest

from pipeline.not_finite import NotFinite
from stages.ppo.run import Training
from stages.ppo.update import Updater
from tests.tiny_chain import Killed, assert_same, rlhf, rows, samples, states

PPO = ["--from", "runs/parents", "ppo.stop.action=roll_back", "ppo.kl.controller=adaptive"]


@pytest.fixture
def fails(monkeypatch):
    """Have an iteration's advantages turn NaN, while there were fewer roll-backs than `times`."""

    def fail(iteration: int, times: int) -> None:
        own = Updater.update

        def update(self, experience, number, **settings):
            if number == iteration and self.rate_scale > 0.5**times * 1.001:
                experience.advantages[0, 0] = math.nan
            return own(self, experience, number, **settings)

        monkeypatch.setattr(Updater, "update", update)

    return fail


def kill_before(monkeypatch, iteration: int, call: int = 1) -> None:
    """End the process before it collects that iteration for the `call`-th time."""
    own, calls = Training.collect, [0]

    def collect(self, number):
        calls[0] += number == iteration
        if number == iteration and calls[0] == call:
            raise Killed
        return own(self, number)

    monkeypatch.setattr(Training, "collect", collect)


def test_numbers_that_are_not_finite_lead_back_to_the_newest_state(place, fails):
    fails(5, times=1)
    output = rlhf("ppo", "run.name=r", *PPO)
    assert (
        "ppo goes back to iteration 4, with learning rates times 0.5 (roll-back 1 of 2): ppo: "
        "policy_loss is not finite in iteration 5" in output
    )
    assert json.loads((place / "runs/r/ppo/not_finite.json").read_text())["rows"]
    found = rows(place / "runs/r/ppo")
    assert [row["step"] for row in found] == list(range(7))  # cut back: each iteration once
    assert [row["rollbacks"] for row in found[1:]] == [0, 0, 0, 0, 1, 1]
    rates = [row["learning_rate_policy"] for row in found[1:]]
    # The schedule falls linearly from 2e-2 at iteration 1 to 0 at 7; halved after the roll-back.
    expected = [2e-2 * (6 - n) / 6 * (0.5 if n >= 4 else 1) for n in range(6)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert [s["sample_index"] for s in samples(place / "runs/r/ppo")] == list(range(24))
    manifest = json.loads((place / "runs/r/ppo/artifact/manifest.json").read_text())
    assert manifest["summary"]["rollbacks"] == 1 and "stopped" not in manifest["summary"]


def test_a_state_that_cannot_be_sampled_from_is_not_gone_back_to(place, fails, monkeypatch):
    """The update of iteration 5 fails, then what its state 4 samples: state 3 is the good one."""
    fails(5, times=1)
    own = Training.collect

    def collect(self, number):
        if number == 5 and self.rollbacks == 1:
            raise NotFinite("logits", "the model's logits are not finite")
        return own(self, number)

    monkeypatch.setattr(Training, "collect", collect)
    output = rlhf("ppo", "run.name=r", *PPO, "ppo.checkpoint_every=1")
    assert "ppo goes back to iteration 4, with learning rates times 0.5 (roll-back 1" in output
    assert "ppo goes back to iteration 3, with learning rates times 0.5 (roll-back 2" in output
    assert [row["step"] for row in rows(place / "runs/r/ppo")] == list(range(7))


def test_what_it_goes_back_to_is_the_state_and_nothing_of_after(place, fails):
    """The same iterations 5 and 6 as in a run whose rates were halved at its state 4."""
    fails(6, times=1)  # at iteration 5 moments, weights, KL coefficient, best policy moved on
    rlhf("ppo", "run.name=r", *PPO)
    with pytest.MonkeyPatch.context() as patch:
        own = Updater.update

        def update(self, experience, number, **settings):
            self.rate_scale = 0.5 if number > 4 else 1.0
            return own(self, experience, number, **settings)

        patch.setattr(Updater, "update", update)
        rlhf("ppo", "run.name=other", *PPO)
    fields = ("kl", "score", "kl_coef", "policy_loss", "learning_rate_value", "held_out_reward")
    both = [
        [{name: row.get(name) for name in fields} for row in rows(place / "runs" / name / "ppo")]
        for name in ("r", "other")
    ]
    assert both[0] == both[1]
    assert samples(place / "runs/r/ppo") == samples(place / "runs/other/ppo")
    texts = [(place / "runs" / name / "ppo/texts.jsonl").read_text() for name in ("r", "other")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("iteration", "call", "step"),
    [
        (6, 1, 4),  # after the roll-back, before the next state: it diverges and goes back again
        (8, 1, 6),  # there is a state since: the roll-back is part of it
        (5, 1, 4),  # before it diverged
    ],
)
@pytest.mark.parametrize("background", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_a_killed_run_that_rolled_back_goes_on_as_if_it_had_not_been(
    place, fails, iteration, call, step, background
):
    more = [*PPO, "ppo.iterations=8", f"run.save_in_background={background}"]
    fails(5, times=1)
    rlhf("ppo", "run.name=whole", *more)
    with pytest.MonkeyPatch.context() as patch:
        kill_before(patch, iteration, call)
        with pytest.raises(Killed):
            rlhf("ppo", "run.name=r", *more)
    # The newest state may still be under way in the background when the kill comes.
    steps = [step] if background == "false" else [step, step - 2]
    output = rlhf("ppo", "run.name=r", *more)
    assert any(f"going on after step {number}" in output for number in steps), output
    assert_same(place / "runs/r/ppo", place / "runs/whole/ppo")


def test_before_the_first_state_it_goes_back_to_the_start(place, fails):
    fails(1, times=2)
    output = rlhf("ppo", "run.name=r", *PPO)
    assert output.count("ppo goes back to iteration 0") == 2
    assert [row["step"] for row in rows(place / "runs/r/ppo")] == list(range(7))
    assert [row["rollbacks"] for row in rows(place / "runs/r/ppo")[1:]] == [2] * 6


def test_after_the_last_roll_back_it_ends_as_it_would_without(place, fails):
    fails(5, times=99)
    output = rlhf("ppo", "run.name=r", *PPO, "ppo.stop.max_rollbacks=1", code=2)
    assert output.count("ppo goes back to iteration 4") == 1
    assert "error: ppo: policy_loss is not finite in iteration 5" in output
    assert "The best policy so far (iteration" in output
    assert states(place / "runs/r/ppo") == ["state-2", "state-4"]


def test_a_broken_rule_leads_back_and_no_suspect_state_is_kept(place, monkeypatch):
    """KL explodes from iteration 3 on until rates are smaller; patience 3, a state each."""
    own = Training.stop_reason

    def stop_reason(self, metrics):
        exploded = self.rollbacks == 0
        late = self.experience_iteration >= 3
        return own(self, {**metrics, "kl": 1e3} if exploded and late else metrics)

    own_update = Training.update

    def update(self, experience, iteration):
        self.experience_iteration = iteration
        return own_update(self, experience, iteration)

    monkeypatch.setattr(Training, "stop_reason", stop_reason)
    monkeypatch.setattr(Training, "update", update)
    output = rlhf("ppo", "run.name=r", *PPO, "ppo.checkpoint_every=1")
    # Iterations 3, 4 and 5 broke the rule: they left no states. What 3 sampled came from the policy
    # of state 2, which goes too.
    assert "ppo goes back to iteration 1, with learning rates times 0.5 (roll-back 1" in output
    assert "KL 1000 nats a response > ppo.stop.max_kl = 100, in 3 iterations in a row" in output
    assert [row["rollbacks"] for row in rows(place / "runs/r/ppo")[1:]] == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("action", "rule"),
    [("stop", "max_kl=5"), ("stop", "max_score_drop=0.5"), ("roll_back", "max_kl=5")],
)
def test_a_real_divergence(place, action, rule):
    """Learning rates that make the KL explode and the score fall; a factor of 1e-6 ends that."""
    settings = ["max_kl=null", "max_score_drop=null", rule, "patience=1", "rollback_factor=1e-6"]
    arguments = [f"ppo.stop.{setting}" for setting in [*settings, f"action={action}"]]
    arguments += ["ppo.optim.learning_rate=0.1", "ppo.tuning=full", "ppo.checkpoint_every=1"]
    output = rlhf("ppo", "run.name=r", "--from", "runs/parents", *arguments)
    steps = [row["step"] for row in rows(place / "runs/r/ppo")]
    summary = json.loads((place / "runs/r/ppo/artifact/manifest.json").read_text())["summary"]
    setting = f"ppo.stop.{rule.partition('=')[0]}"
    if action == "stop":
        assert "ppo stopped after iteration" in output and setting in summary["stopped"]
        assert 1 < len(steps) < 7
    else:
        assert output.count("ppo goes back to iteration") == 1 and setting in output
        assert steps == list(range(7)) and "stopped" not in summary
        # The state that came right before the first sign is not it: its policy gave the sign.
        back = int(output.partition("ppo goes back to iteration ")[2].partition(",")[0])
        assert [row["rollbacks"] for row in rows(place / "runs/r/ppo")[1:]].index(1) == back
    assert summary["kept_iteration"] == summary["best_iteration"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("ppo.stop.action=restart", "'stop' or 'roll_back'"),
        ("ppo.stop.max_rollbacks=0", "must be at least 1"),
        ("ppo.stop.rollback_factor=1", "must be below 1"),
        ("ppo.stop.rollback_factor=0", "must be above 0"),
    ],
)
def test_settings_that_cannot_be(place, setting, message):
    output = rlhf("ppo", setting, code=2)
    assert setting.partition("=")[0] in output and message in output
