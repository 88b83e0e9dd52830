"""Exported folders: plain libraries load them, moved or not, to the policy's own numbers."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.batches import TokenBatch
from pipeline.errors import ModelError
from pipeline.generation import NativeEngine, Sampling
from pipeline.generation_config import GenerationSection
from pipeline.stop_strings import StopStrings
from stages.export.run import ExportStage
from tests.unit.tiny_run import POSTS, TinyRun, config

REPORT = "# Evaluation\n\nTwelve prompts.\n\n| policy | KL |\n| --- | ---: |\n| PPO | 1.25 |\n"
ABOUT = {"about": {"versions": {"torch": "2.13.0"}}}


def export(run: TinyRun) -> Path:
    """Run the stage after an evaluation that left a report; returns its folder."""
    context = run.context("export", ExportStage().needs(run.config))
    folder = context.parents["evaluation"]
    folder.mkdir()
    (folder / "report.md").write_text(REPORT, encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(ABOUT), encoding="utf-8")
    ExportStage().run(context)
    return context.folder.artifact


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, Path]:
    run = TinyRun(config(tmp_path_factory.mktemp("lora")))
    return run, export(run)


def load(folder: Path, form: str) -> Any:
    """As the card of `form` says, from `folder`."""
    if form == "merged":
        return AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    return PeftModel.from_pretrained(base, str(folder / "adapter")).eval()


def assert_same_policy(run: TinyRun, model: Any, folder: Path) -> None:
    """The same log-probs of a response (fp32), and the same greedy text."""
    policy = run.policy
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine, sampling = NativeEngine(), Sampling(max_new_tokens=12, temperature=0.0)
    for post in POSTS[:4]:
        prompt = tokenizer.encode(post)
        assert prompt == policy.codec.prompt_ids(post)
        response = policy.codec.response_ids(" A lamp, 우산.")
        batch = TokenBatch.from_ragged([prompt], [response], policy.codec.pad_id)
        with torch.no_grad():
            ours = policy(batch, {"logprobs"}).logprobs
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        theirs = torch.log_softmax(logits, -1)[range(len(response)), response]
        assert ours is not None
        torch.testing.assert_close(theirs, ours[0], rtol=0, atol=1e-5)
        own = engine.generate(policy, [prompt], [0], sampling).response_ids[0]
        # No stop id is passed: the exported generation config has to know it.
        plain = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False
        )[0, len(prompt) :]
        assert plain.tolist() == own


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_plain_libraries_give_the_policys_numbers(lora: tuple[TinyRun, Path], form: str) -> None:
    run, folder = lora
    assert_same_policy(run, load(folder, form), folder / form)


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_moved_folder_gives_them_too(
    lora: tuple[TinyRun, Path], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = lora
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    assert_same_policy(run, load(moved, form), moved / form)
    if form == "adapter":  # by the name that the adapter itself has for its base
        monkeypatch.chdir(moved)
        model = AutoPeftModelForCausalLM.from_pretrained("./adapter").eval()
        assert_same_policy(run, model, moved / form)


def test_the_policy_is_not_its_base(lora: tuple[TinyRun, Path]) -> None:
    """Otherwise the tests above would pass on an adapter that does nothing."""
    run, folder = lora
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    ids = torch.tensor([run.policy.codec.prompt_ids(POSTS[0])])
    with torch.no_grad():
        difference = (base(ids).logits - load(folder, "adapter")(ids).logits).abs().max()
    assert difference > 1e-2


def test_export_leaves_the_shared_base_alone(tmp_path: Path) -> None:
    run = TinyRun(config(tmp_path))
    before = run.sft.trunk.base_hash()
    export(run)
    assert run.sft.trunk.base_hash() == before


def test_the_adapter_has_no_extra_modules(lora: tuple[TinyRun, Path]) -> None:
    from safetensors import safe_open

    _, folder = lora
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "./base"
    assert settings["modules_to_save"] is None


def test_the_base_is_named_with_its_hash(lora: tuple[TinyRun, Path]) -> None:
    _, folder = lora
    digest = hashlib.sha256((folder / "base" / "model.safetensors").read_bytes()).hexdigest()
    record = json.loads((folder / "export.json").read_text())
    assert record["base"]["files"] == {"model.safetensors": digest}
    assert record.keys() == {"policy", "forms", "base"}  # and no name of a run
    assert record["forms"] == ["base", "adapter", "merged"]
    assert digest in (folder / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("form", ["adapter", "base", "merged"])
def test_cards_state_data_numbers_and_limits(lora: tuple[TinyRun, Path], form: str) -> None:
    run, folder = lora
    card = (folder / form / "README.md").read_text(encoding="utf-8")
    _, header, text = card.split("---\n", 2)
    library = "peft" if form == "adapter" else "transformers"
    assert yaml.safe_load(header)["library_name"] == library
    assert yaml.safe_load(header)["datasets"] == ["someone/posts"]  # Hub ids only
    assert "base_model" not in header
    assert "| demonstrations | someone/posts | 3 | 12 |" in text
    assert "| rankings | r.jsonl | 3 | 12 |" in text
    assert "| prompts | the prompts of the other data | 24 | 12 |" in text
    assert "| PPO | 1.25 |" in text
    assert "no safety evaluation" in text
    assert "Prompts in plain text are used as they stand. Responses end at `<|end|>`" in text
    assert str(folder) not in card
    assert run.config.run.name not in card  # another run may take the folder over


def test_the_cards_code_runs(lora: tuple[TinyRun, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run, folder = lora
    monkeypatch.chdir(folder)
    for form in ("adapter", "merged"):
        card = (folder / form / "README.md").read_text(encoding="utf-8")
        code = card.split("```python\n")[1].split("```")[0]
        names: dict[str, Any] = {}
        exec(code, names)
        assert_same_policy(run, names["model"].eval(), folder / form)


def test_a_fully_tuned_policy_has_one_form(tmp_path: Path) -> None:
    run = TinyRun(config(tmp_path, "full"))
    folder = export(run)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["merged"]
    assert "tuned in full" in run.screen.getvalue()
    assert_same_policy(run, load(folder, "merged"), folder / "merged")


def test_an_adapter_on_a_users_own_base_names_that_base(tmp_path: Path) -> None:
    first = TinyRun(config(tmp_path / "first"))
    base = tmp_path / "my-base"
    shutil.copytree(first.run.stage("sft").artifact / "model", base)
    settings = config(tmp_path)
    model = settings.model.model_copy(update={"init": "pretrained", "path": str(base)})
    sft = settings.sft.model_copy(update={"tuning": "lora"})
    run = TinyRun(settings.model_copy(update={"model": model, "sft": sft}))
    assert run.sft.role.adapter is not None
    folder = export(run)
    assert not (folder / "base").exists()
    # The policy's adapter began as a copy of the SFT adapter: it alone is right on the base.
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()
    assert loaded.peft_config["default"].base_model_name_or_path == str(base)
    assert_same_policy(run, loaded, folder / "adapter")
    assert_same_policy(run, load(folder, "merged"), folder / "merged")


def test_tied_embeddings_are_never_untied(tmp_path: Path) -> None:
    settings = config(tmp_path)
    lora = settings.lora.model_copy(update={"target_modules": ("q_proj", "embed_tokens")})
    with pytest.raises(ModelError, match=r"Set export\.merged to false"):
        export(TinyRun(settings.model_copy(update={"lora": lora})))


def test_the_card_and_config_say_how_the_policy_was_sampled(tmp_path: Path) -> None:
    run = TinyRun(config(tmp_path))
    section = GenerationSection(stop_strings=("\n\n", "END"), forbidden_tokens=(7, 40))
    run.policy.codec.stop_strings = StopStrings(run.policy.codec.tokenizer, section.stop_strings)
    run.policy.codec.forbidden_ids = frozenset(section.forbidden_tokens)
    run.policy.codec.system_prompt = 'Be "kind".'
    folder = export(run)
    card = (folder / "merged/README.md").read_text(encoding="utf-8")
    assert r"generate(..., stop_strings=['\n\n', 'END'], tokenizer=tokenizer)" in card
    assert r'without a system turn were given this one: `"Be \"kind\"."`' in card
    first, second = run.policy.codec.tokenizer.convert_ids_to_tokens([7, 40])
    assert f"Never sampled: `{first}`, `{second}`" in card
    # Plain transformers: the forbidden tokens are never written, by the exported config alone.
    model, tokenizer = load(folder, "merged"), AutoTokenizer.from_pretrained(folder / "merged")
    assert model.generation_config.suppress_tokens == [7, 40]
    ids = torch.tensor([tokenizer.encode(POSTS[0])])
    written = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    own = NativeEngine().generate(
        run.policy, [ids[0].tolist()], [0], Sampling(max_new_tokens=12, temperature=0)
    )
    plain = written[0, ids.shape[1] :].tolist()
    assert run.policy.codec.until_end(plain) == own.response_ids[0]
