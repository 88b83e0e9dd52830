"""PPO's options by two processes (gloo), by DDP and by FSDP2, against one process, in float64.

Nine prompts and four demonstrations a step do not divide by two, a minibatch has rollouts of one
dataset alone now and then, and each process averages its own rows of the policy.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.test_pipeline_ranks import CONFIG, ENVIRONMENT, FORMS, LAUNCHES, rlhf
from tests.tiny_chain import ROOT, assert_close_stage

pytestmark = pytest.mark.slow

OPTIONS = [
    "data.prompts=prompts.jsonl",
    "data.pretraining=text.jsonl",
    "ppo.ema_decay=0.7",
    "ppo.optim.ptx_rows=1",  # one process has none
    "ppo.optim.pretraining_coef=0.1",
    "ppo.optim.pretraining_rows=5",
    "ppo.advantage.value_lambda=1.0",
    "ppo.advantage.length_adaptive_alpha=0.4",
    "ppo.advantage.reference_length=8",
    "ppo.kl.column=source",
    "ppo.kl.controller=adaptive",
    "ppo.kl.targets={long: 0.5}",
    "ppo.kl.horizon=100",
    "ppo.curriculum={column: words, start_share: 0.3, iterations: 3}",
    "ppo.checkpoint_every=1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the data, and the SFT and reward models of `runs/parents`."""
    folder = tmp_path_factory.mktemp("options")
    (folder / "c.yaml").write_text(CONFIG)
    found = []
    for line in (ROOT / "data/quickstart/prompts.jsonl").read_text().splitlines()[:60]:
        prompt = json.loads(line)["prompt"]
        words = len(prompt.split())
        found.append(
            {"prompt": prompt, "words": words, "source": "short" if words < 20 else "long"}
        )
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    text = [{"text": row["prompt"] * 3} for row in found[:20]]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    return folder


def run(folder: Path, verb: str, *arguments: str) -> str:
    done = rlhf(folder, verb, "c.yaml", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def one(folder: Path):
    """The arguments of PPO of a form, and the folder of its run by one process."""
    made: dict[str, list[str]] = {}

    def make(form: str) -> tuple[list[str], Path]:
        name = f"one-{form}"
        if form not in made:
            own = [x for x in FORMS[form] if not x.startswith("ppo.keep")] + ["ppo.keep=last"]
            for stage in ("sft", "reward"):
                run(folder, stage, *own, f"run.name=parents-{form}")
            made[form] = [*own, *OPTIONS, "--from", f"runs/parents-{form}"]
            run(folder, "ppo", *made[form], f"run.name={name}")
        return made[form], folder / "runs" / name / "ppo"

    return make


@pytest.mark.parametrize(
    ("form", "strategy"),
    [
        ("lora", "DDP"),
        ("full", "FSDP2"),
        ("full-shared", "DDP"),
        ("lora-shared", "FSDP2"),
    ],
)
def test_two_processes_compute_what_one_does(folder, one, form, strategy):
    arguments, whole = one(form)
    name = f"two-{form}"
    run(folder, "ppo", *arguments, f"run.name={name}", *LAUNCHES[strategy])
    assert_close_stage(folder / "runs" / name / "ppo", whole)


@pytest.mark.parametrize(("form", "strategy"), [("lora", "DDP"), ("full", "FSDP2")])
def test_a_killed_run_goes_on_in_two_processes_and_in_one(folder, one, form, strategy):
    """The average comes back with its rows where they lie now."""
    arguments, whole = one(form)
    killing = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    killing += ["-m", "tests.killing", "stages.ppo.run:Training.update", "3", "ppo", "c.yaml"]
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if strategy == "FSDP2" else {}
    for name, launch in (("k2", LAUNCHES[strategy]), ("k1", [])):
        name = f"{name}-{form}"
        subprocess.run(
            [*killing, *arguments, f"run.name={name}", "run.device=cpu"],
            cwd=folder, env=ENVIRONMENT | asked, capture_output=True, timeout=120,
        )  # fmt: skip
        output = run(folder, "ppo", *arguments, f"run.name={name}", *launch)
        assert "going on after step 2" in output
        assert_close_stage(folder / "runs" / name / "ppo", whole)
