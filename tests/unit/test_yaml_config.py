"""Reading configs: every fault is answered with its place, name, value and remedy.

The models here are small stand-ins, so that the expected messages do not move with the product's
own settings; two tests at the end use the real `RunConfig`.
"""

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, model_validator

from pipeline.config import DataSection, LoraSection, Positive, Resource, Section
from pipeline.errors import ConfigError
from pipeline.yaml_config import dump_config, read_config


class Optim(Section):
    learning_rate: Positive = Field(1e-3, description="Peak learning rate.")
    steps: int = Field(10, ge=1, description="Optimiser steps.")


class Rollout(Section):
    temperature: float = Field(1.0, gt=0, le=2, description="Sampling temperature.")


class Ppo(Section):
    kl_coef: float = Field(0.05, ge=0, description="Weight of the KL penalty.")
    optim: Optim = Optim()
    rollout: Rollout = Rollout()
    policy: Resource | None = None


class Evaluation(Section):
    temperature: float = 1.0
    reference_column: str | None = None


class Run(Section):
    name: str = Field("run", pattern="^[a-z]+$", description="Name of the run.")
    mixed_precision: Literal["no", "bf16"] = Field("no", description="Autocast.")
    offline: bool = Field(False, description="Whether the Hub is left alone.")
    trackers: tuple[str, ...] = ()


class Config(Section):
    run: Run = Run()
    ppo: Ppo = Ppo()
    data: DataSection = DataSection()
    lora: LoraSection = LoraSection()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _steps_fit(self) -> "Config":
        if self.ppo.optim.steps > 1000:
            raise ValueError(f"ppo.optim.steps is {self.ppo.optim.steps}: at most 1000 fit")
        return self


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes `c.yaml` in the current folder and returns its name, as messages show it."""
    monkeypatch.chdir(tmp_path)

    def writer(content: str | bytes) -> str:
        data = content.encode() if isinstance(content, str) else content
        Path("c.yaml").write_bytes(data)
        return "c.yaml"

    return writer


def message(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(path, overrides, Config)
    return str(caught.value)


def test_alias_is_a_copy_that_overrides_do_not_share(write: Any) -> None:
    path = write("ppo: {optim: &a {steps: 5}}\nlora: {rank: 2}\n")
    text = Path(path).read_text() + "evaluation: {reference_column: &c x}\nrun: {name: *c}\n"
    config = read_config(write(text), ["evaluation.reference_column=z"], Config)
    assert (config.run.name, config.evaluation.reference_column) == ("x", "z")


# --- what is read ---------------------------------------------------------------------------------


def test_reads_values_and_defaults(write: Any) -> None:
    path = write(
        "run: {mixed_precision: no, trackers: [a, b]}\n"
        "ppo:\n  optim:\n    learning_rate: 1e-5\n"
        "evaluation: {reference_column: off}\n"
    )
    config = read_config(path, [], Config)
    assert config.run.mixed_precision == "no"
    assert config.run.trackers == ("a", "b")
    assert config.ppo.optim.learning_rate == 1e-5
    assert config.ppo.optim.steps == 10
    assert config.evaluation.reference_column == "off"


def test_byte_order_mark_is_left_out(write: Any) -> None:
    assert read_config(write(b"\xef\xbb\xbfrun: {name: abc}"), [], Config).run.name == "abc"


def test_overrides_apply_in_order_and_make_sections(write: Any) -> None:
    path = write("ppo: {kl_coef: 0.2}\n")
    config = read_config(
        path,
        [
            "ppo.kl_coef=0.3",
            "ppo.kl_coef=1e-1",
            "run.mixed_precision=no",
            "run.trackers=[x]",
            "data.rankings={path: org/set, limit: 3}",
            "data.rankings.limit=4",
            "ppo.policy=org/name=x",
        ],
        Config,
    )
    assert config.ppo.kl_coef == 0.1
    assert config.run.mixed_precision == "no"
    assert config.run.trackers == ("x",)
    assert config.data.rankings is not None
    assert (config.data.rankings.path, config.data.rankings.limit) == ("org/set", 4)
    assert config.ppo.policy == "org/name=x"  # only the first = divides


def test_relative_paths_are_looked_up_beside_the_file_first(tmp_path: Path, write: Any) -> None:
    folder = tmp_path / "sub"
    folder.mkdir()
    for place in (folder, tmp_path):
        (place / "both.jsonl").touch()
    (tmp_path / "here.jsonl").touch()
    (folder / "c.yaml").write_text(
        "data: {rankings: both.jsonl, prompts: here.jsonl, demonstrations: org/set}\n"
    )
    data = read_config("sub/c.yaml", [], Config).data
    assert data.rankings and data.prompts and data.demonstrations
    assert data.rankings.path == str(folder / "both.jsonl")
    assert data.prompts.path == str(tmp_path / "here.jsonl")
    assert data.demonstrations.path == "org/set"


# --- faults of the file ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "c.yaml: the file is empty: write sections such as run, ppo, data, lora, evaluation"),
        ("# only a comment\n", "c.yaml: the file is empty: write sections such as run, ppo"),
        ("\n- a\n", "c.yaml:2: the file holds a list, not sections: write sections such as run"),
        ("abc\n", "c.yaml:1: the file holds one value, not sections"),
        ("run: {}\nppo: {}\nrun: {}\n", "c.yaml:3: run is given twice (first on line 1): keep one"),
        (
            "ppo:\n  kl_coef: 1\n  optim: {steps: 1, steps: 1}\n  kl_coef: 2\n",
            "2 faults in the configuration:\n"
            "  c.yaml:3: ppo.optim.steps is given twice (first on line 3): keep one\n"
            "  c.yaml:4: ppo.kl_coef is given twice (first on line 2): keep one",
        ),
        ("run:\n\tname: x\n", "c.yaml:2:1: not valid YAML: while scanning for the next token, found"
         " character '\\t' that cannot start any token: indent with spaces"),
        ("run: {name: [x\n", "c.yaml:2:1: not valid YAML: while parsing a flow sequence"),
        ("run: {}\n---\nppo: {}\n", "c.yaml:2:1: not valid YAML: expected a single document"),
        ("run: {}\n# \x01\n", "c.yaml:2: character U+0001 is not allowed in YAML: remove it"),
        ("1: x\n", "c.yaml:1: a key must be text, not '1': put it in quotes"),
        ("true: x\n", "c.yaml:1: a key must be text, not 'true': put it in quotes"),
        ("[a]: x\n", "c.yaml:1: a key must be text, not a list or section: put it in quotes"),
        ("a: &a {}\nrun:\n  <<: *a\n", "c.yaml:3: merge keys (<<) are not read: write the fields"),
        ("run: &a {x: *a}\n", "c.yaml:1: run.x is an alias of itself"),
        ("run: {name: !!python/name:os.system x}\n", "c.yaml:1: run.name has the tag "
         "!!python/name:os.system, which cannot be read here: remove the tag"),
        ("run: !!set {a}\n", "c.yaml:1: run has the tag !!set, which cannot be read here"),
        ("run: {name: !!int x}\n", "c.yaml:1: run.name has the tag !!int, which cannot be read"),
    ],
)  # fmt: skip
def test_faults_of_the_file(write: Any, content: str, expected: str) -> None:
    assert message(write(content)).startswith(expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("run: {}".encode("utf-16"), "c.yaml: the file is UTF-16 or UTF-32: save it as UTF-8"),
        ("run: {}".encode("utf-16-le"), "c.yaml: the file is UTF-16 or UTF-32: save it as UTF-8"),
        (b"run: {}\nppo: \xe9\n", "c.yaml:2: byte 0xe9 is not UTF-8: save the file as UTF-8"),
    ],
)
def test_faults_of_encoding(write: Any, content: bytes, expected: str) -> None:
    assert message(write(content)) == expected


def test_no_such_file_and_folder(tmp_path: Path, write: Any) -> None:
    write("")
    assert message("none.yaml") == f"none.yaml: no such file (current folder: {tmp_path})"
    assert message(".") == ".: cannot be read: Is a directory"


# --- faults of keys and values --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("ppo:\n  kl_coeff: 1\n", "c.yaml:2: unknown key ppo.kl_coeff: did you mean ppo.kl_coef?"),
        ("pppo: {}\n", "c.yaml:1: unknown key pppo: did you mean ppo?"),
        # In another section: under the same top section before a look elsewhere.
        ("ppo: {temperature: 1}\n",
         "c.yaml:1: unknown key ppo.temperature: did you mean ppo.rollout.temperature?"),
        ("kl_coef: 1\n", "c.yaml:1: unknown key kl_coef: did you mean ppo.kl_coef?"),
        ("ppo: {optim: {kl_coef: 1}}\n",
         "c.yaml:1: unknown key ppo.optim.kl_coef: did you mean ppo.kl_coef?"),
        ("run: {reference_colum: x}\n", "c.yaml:1: unknown key run.reference_colum: did you mean "
         "evaluation.reference_column?"),
        ("ppo: {zzz: 1}\n", "c.yaml:1: unknown key ppo.zzz: ppo has kl_coef, optim, "
         "rollout, policy"),
        ("zzz: 1\n", "c.yaml:1: unknown key zzz: the top level has run, ppo, data, "
         "lora, evaluation"),
    ],
)  # fmt: skip
def test_unknown_keys_name_the_nearest_right_one(write: Any, content: str, expected: str) -> None:
    assert message(write(content)) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("run: {offline: yes}", "run.offline is 'yes': must be true or false: write true."),
        ("run: {offline: Off}", "run.offline is 'Off': must be true or false: write false."),
        ("run: {offline: 1}", "run.offline is 1: must be true or false."),
        ("run: {mixed_precision: false}", "run.mixed_precision is false: must be 'no' or 'bf16': "
         "in quotes if the word is meant. Autocast."),
        ("run: {mixed_precision: fp16}", "run.mixed_precision is 'fp16': must be 'no' or 'bf16'."),
        ("run: {name: 7}", "run.name is 7: must be text: put it in quotes if text is meant. Name"),
        ("run: {name: 1e10}", "run.name is 10000000000.0: must be text: put it in quotes"),
        ("run: {name: ../x}", "run.name is '../x': must be text that matches ^[a-z]+$. Name of"),
        ("run: {name: }", "run.name is null: must be text. Name of the run."),
        ("run: {trackers: a}", "run.trackers is 'a': must be a list: write [a]."),
        ("run: {trackers: [a, 2]}", "run.trackers.1 is 2: must be text: put it in quotes if"),
        ("ppo: {kl_coef: -1}", "ppo.kl_coef is -1: must be at least 0. Weight of the KL penalty."),
        ("ppo: {kl_coef: '0.1'}", "ppo.kl_coef is '0.1': must be a number: write 0.1."),
        ("ppo: {kl_coef: '1,5'}", "ppo.kl_coef is '1,5': must be a number. Weight of the KL"),
        ("ppo: {kl_coef: '['}", "ppo.kl_coef is '[': must be a number. Weight of the KL"),
        ("ppo: {kl_coef: low}", "ppo.kl_coef is 'low': must be a number. Weight of the KL"),
        ("ppo: {rollout: {temperature: 0}}", "ppo.rollout.temperature is 0: must be above 0."),
        ("ppo: {rollout: {temperature: 3}}", "ppo.rollout.temperature is 3: must be at most 2."),
        ("ppo: {optim: {steps: 1e3}}", "ppo.optim.steps is 1000.0: must be a whole number: write "
         "1000. Optimiser steps."),
        ("ppo: {optim: {steps: 1_000}}", "ppo.optim.steps is '1_000': must be a whole number: "
         "write 1000. Optimiser steps."),
        ("ppo: {optim: {steps: 2.5}}", "ppo.optim.steps is 2.5: must be a whole number. Optim"),
        ("ppo: {optim: {steps: true}}", "ppo.optim.steps is true: must be a whole number. Optim"),
        ("ppo: {optim: {steps: 2000}}", "ppo.optim.steps is 2000: at most 1000 fit"),
        ("ppo: {optim: {learning_rate: .nan}}", "ppo.optim.learning_rate is NaN: must be a finite"),
        ("ppo: {kl_coef: .inf}", "ppo.kl_coef is Infinity: must be a finite number"),
        ("ppo: {optim: 3}", "ppo.optim is 3: must be a section."),
        ("ppo:", "ppo is an empty section: give it fields, write ppo: {}, or remove the line"),
        ("data: {rankings: {limit: 3}}", "data.rankings.path is missing. Local .jsonl"),
        ("data: {rankings: {path: org/x, limit: 0}}", "data.rankings.limit is 0: must be at least"),
        ("lora: {target_modules: 3}", "lora.target_modules is 3: must be text or a list"),
        ("lora: {target_modules: [1]}", "lora.target_modules.0 is 1: must be text"),
    ],
)  # fmt: skip
def test_faulty_values_say_what_is_allowed(write: Any, content: str, expected: str) -> None:
    text = message(write(f"# a comment\n{content}\n"))
    faults = text.replace("  c.yaml:2: ", "c.yaml:2: ").splitlines()
    assert any(fault.startswith(f"c.yaml:2: {expected}") for fault in faults), text


def test_all_faults_are_listed_with_their_own_lines(write: Any) -> None:
    path = write("run:\n  name: 3\n  offline: no\nppo:\n  optim:\n    stepps: 1\n")
    assert message(path, "ppo.kl_coef=x") == (
        "4 faults in the configuration:\n"
        "  c.yaml:2: run.name is 3: must be text: put it in quotes if text is meant. "
        "Name of the run.\n"
        "  c.yaml:3: run.offline is 'no': must be true or false: write false. "
        "Whether the Hub is left alone.\n"
        "  override 'ppo.kl_coef=x': ppo.kl_coef is 'x': must be a number. "
        "Weight of the KL penalty.\n"
        "  c.yaml:6: unknown key ppo.optim.stepps: did you mean ppo.optim.steps?"
    )


# --- faults of overrides --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("ppo.kl_coef", "write section.field=value, as in ppo.kl_coef=0.1"),
        ("=3", "write section.field=value, as in ppo.kl_coef=0.1"),
        ("ppo..kl_coef=3", "write section.field=value, as in ppo.kl_coef=0.1"),
        ("run.name=", "no value: write null for none, or '' in quotes for empty text"),
        ("run.name=[x", "not valid YAML: while parsing a flow sequence, expected ',' or ']'"),
        ("run.name=@x", "not valid YAML: while scanning for the next token"),
        ("run={name: a, name: b}", "name is given twice: keep one"),
        ("ppo.kl_coeff=1", "unknown key ppo.kl_coeff: did you mean ppo.kl_coef?"),
        ("ppo.optim.steps=0", "ppo.optim.steps is 0: must be at least 1. Optimiser steps."),
        ("ppo.optim={steps: 0}", "ppo.optim.steps is 0: must be at least 1. Optimiser steps."),
        ("ppo.optim.steps=5000", "ppo.optim.steps is 5000: at most 1000 fit"),
        ("data.prompts.limit=3", "data.prompts is 'org/set' (c.yaml:1), which has no fields: "
         "override all of data.prompts, or write it as a section"),
    ],
)  # fmt: skip
def test_faults_of_overrides_name_the_override(write: Any, override: str, expected: str) -> None:
    path = write("data: {prompts: org/set}\n")
    assert message(path, override).startswith(f"override {override!r}: {expected}")


def test_override_replaces_a_faulty_value(write: Any) -> None:
    path = write("ppo: {optim: {steps: x, zzz: 1}}\n")
    assert read_config(path, ["ppo.optim={steps: 7}"], Config).ppo.optim.steps == 7


# --- local paths ----------------------------------------------------------------------------------


def test_missing_local_files_name_both_places(tmp_path: Path, write: Any) -> None:
    write("")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/c.yaml").write_text(
        "data:\n"
        "  rankings: rows.jsonl.gz\n"
        "  prompts: {path: org/set, held_out_path: ./held-out}\n"
        "ppo:\n"
        "  policy: org/model\n"
    )
    beside, here = tmp_path / "sub", tmp_path
    assert message("sub/c.yaml", "ppo.policy=score.py:f") == (
        "3 faults in the configuration:\n"
        "  override 'ppo.policy=score.py:f': ppo.policy is 'score.py:f', which does not exist: "
        f"looked for {beside}/score.py and {here}/score.py\n"
        "  sub/c.yaml:2: data.rankings.path is 'rows.jsonl.gz', which does not exist: "
        f"looked for {beside}/rows.jsonl.gz and {here}/rows.jsonl.gz\n"
        "  sub/c.yaml:3: data.prompts.held_out_path is './held-out', which does not exist: "
        f"looked for {beside}/held-out and {here}/held-out"
    )


def test_one_place_is_named_once(tmp_path: Path, write: Any) -> None:
    text = message(write("ppo: {policy: ./x}\n"))
    assert text == f"c.yaml:1: ppo.policy is './x', which does not exist: looked for {tmp_path}/x"


# --- round trip -----------------------------------------------------------------------------------


def test_dumped_config_reads_back_equal(tmp_path: Path, write: Any) -> None:
    (tmp_path / "한글.jsonl").touch()
    path = write(
        "run: {name: no, trackers: ['1', no, 1e5x]}\n"
        "data: {rankings: 한글.jsonl, split_salt: '1e-5'}\n"
        "ppo: {kl_coef: 1e-7, optim: {learning_rate: 3e-6}}\n"
    )
    config = read_config(path, [], Config)
    text = dump_config(config)
    assert read_config(write(text), [], Config) == config
    assert "한글" in text


def test_dumped_run_config_reads_back_equal(write: Any) -> None:
    """Every field of the product's own config, lists included, survives JSON's strict mode."""
    from stages.config import RunConfig

    path = write("model: {init: config}\nlora: {target_modules: [q_proj, v_proj]}\n")
    config = read_config(path, ["data.prompts=org/set", "ppo.tuning=full"], RunConfig)
    assert read_config(write(dump_config(config)), [], RunConfig) == config


def test_sections_that_contradict_one_another_are_refused(write: Any) -> None:
    from stages.config import RunConfig

    path = write("model:\n  init: config\n  architecture:\n    max_position_embeddings: 600\n")
    with pytest.raises(ConfigError) as caught:
        read_config(path, ["data.max_prompt_tokens=500"], RunConfig)
    assert str(caught.value) == (
        "c.yaml:4: model.architecture.max_position_embeddings is 600 but data.max_prompt_tokens + "
        "data.max_response_tokens = 500 + 512 = 1012 tokens: "
        "raise the first to 1012 or lower the others"
    )
    with pytest.raises(ConfigError, match=r"^override 'sft.tuning=lora': sft.tuning is lora but"):
        read_config(write("model: {init: config}\n"), ["sft.tuning=lora"], RunConfig)
