"""What a run opens may come from anybody: nothing of it runs as code, and paths stay inside."""

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.config import DataSection, ModelSection, RunSection
from pipeline.errors import CheckpointError, ModelError
from pipeline.fit_config import FitSection
from pipeline.models.store import ModelStore
from pipeline.rewards import SequenceClassificationReward
from pipeline.runfolder import MANIFEST, RunFolder, verify, write_manifest
from pipeline.trainer_arguments import training_arguments
from tests.tiny_chain import rlhf, write_config
from tests.unit.test_house import PRODUCT, TREES

# Pickles run code when they are read, and so does what unpickles them on the way. Trainer's and
# accelerate's checkpoints hold pickles: states are ours (`pipeline/resume.py`).
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "torch.load", "torch.save", "eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load",
}  # fmt: skip
FORBIDDEN_METHODS = {
    "load_state", "save_state", "register_for_checkpointing", "_load_from_checkpoint",
    "_save_checkpoint",
}  # fmt: skip
FORBIDDEN_VALUES = {
    ("weights_only", False), ("allow_pickle", True), ("shell", True), ("trust_remote_code", True),
    ("use_safetensors", False), ("safe_serialization", False),
}  # fmt: skip


def faults(tree: ast.AST) -> list[str]:
    """What a file does that it must not."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = [module or ""] if module else [alias.name for alias in node.names]
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        if call in FORBIDDEN_CALLS or call.rpartition(".")[2] in FORBIDDEN_METHODS:
            found.append(call)
        for keyword in node.keywords:
            value = getattr(keyword.value, "value", None)
            found += [f"{call}({k}={v})" for k, v in FORBIDDEN_VALUES
                      if keyword.arg == k and value is v]  # fmt: skip
    return found


def test_nothing_of_ours_reads_or_writes_pickles_or_runs_text() -> None:
    assert {name: found for name in PRODUCT if (found := faults(TREES[name]))} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from joblib import load", "torch.load(path)", "f(p, weights_only=False)",
        "accelerator.load_state(folder)", "numpy.load(p, allow_pickle=True)", "eval(text)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)", "subprocess.run(x, shell=True)",
    ],
)  # fmt: skip
def test_that_test_can_fail(code: str) -> None:
    assert faults(ast.parse(code))


def test_transformers_own_checkpoints_are_off(tmp_path: Path) -> None:
    """They hold pickles, and are written in place; `pipeline/resume.py` does it instead."""
    section = FitSection().sized(100)
    arguments = training_arguments(section, RunSection(device="cpu"), 3, False, tmp_path)
    assert arguments.save_strategy == "no"
    assert arguments.resume_from_checkpoint is None and not arguments.load_best_model_at_end


# --- code that comes with a model ---

CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
class Config(LlamaConfig):
    model_type = "strange"
class Model(LlamaForCausalLM):
    config_class = Config
class Classifier(LlamaForSequenceClassification):
    config_class = Config
"""


@pytest.fixture
def strange(tmp_path, make_store):
    """A model whose classes are in a Python file beside its weights; `ran` shows that it ran."""
    store = make_store()
    store.save(store.build(["the cat sat on the mat"] * 4).with_role("sft"), tmp_path / "sft")
    folder = tmp_path / "sft/model"
    for path in (tmp_path / "sft/tokenizer").iterdir():
        path.rename(folder / path.name)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    classes["AutoModelForSequenceClassification"] = "code.Classifier"
    config |= {"model_type": "strange", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    return folder


def test_code_of_a_model_does_not_run_unless_asked_for(strange, tmp_path):
    section = ModelSection(path=str(strange), dtype="float64")
    advice = "needs Python code from its repository. Read that code, then set model.trust_remote"
    with pytest.raises(ModelError, match=advice):
        ModelStore(section, DataSection()).pretrained()
    with pytest.raises(ModelError, match=advice):
        SequenceClassificationReward(str(strange), section, torch.device("cpu"))
    assert not (tmp_path / "ran").exists()
    trusted = section.model_copy(update={"trust_remote_code": True})
    ModelStore(trusted, DataSection()).pretrained()
    assert (tmp_path / "ran").exists()


def test_a_check_runs_no_code_either(strange, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    overrides = ["model.init=pretrained", f"model.path={strange}", "model.architecture={}"]
    output = rlhf("check", *overrides, code=2)
    assert "model.trust_remote_code=true" in output
    assert not (tmp_path / "ran").exists()


def test_a_classifier_with_pickled_weights_alone_is_refused(strange):
    config = json.loads((strange / "config.json").read_text()) | {"model_type": "llama"}
    del config["auto_map"]
    (strange / "config.json").write_text(json.dumps(config))
    torch.save({}, strange / "pytorch_model.bin")
    (strange / "model.safetensors").unlink()
    section = ModelSection(path=str(strange))
    with pytest.raises(ModelError, match="no safetensors weights"):
        SequenceClassificationReward(str(strange), section, torch.device("cpu"))


# --- paths ---


@pytest.mark.parametrize(
    "name", ["..", ".", "../x", "a/b", "/x", "a/../../x", ".hidden", "~", "a\\b", "a b", "x" * 101]
)
def test_run_names_stay_inside_the_folder_of_runs(tmp_path, monkeypatch, name):
    write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    output = rlhf("sft", f"run.name='{name}'", code=2)
    assert "run.name is " in output and "must be text that matches" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "judge.py"]


@pytest.mark.parametrize("source", ["..", "runs", "c.yaml", "nowhere/at/all"])
def test_only_runs_are_taken_over(tmp_path, monkeypatch, source):
    write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert f"--from {source}: no run lies there" in rlhf("sft", "--from", source, code=2)


@pytest.mark.parametrize("name", ["../outside.json", "a/../../outside.json", "/outside.json"])
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path, name):
    folder = tmp_path / "artifact"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, folder / "x.safetensors")
    write_manifest(folder, stage="sft", key="k", material={}, summary={}, seconds=0.0)
    verify(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"names {name}, outside of it"):
        verify(folder)


def test_a_manifest_cannot_send_a_stage_elsewhere(tmp_path):
    with pytest.raises(CheckpointError, match="names the stage"):
        RunFolder(tmp_path / "runs/r").previous("../../../elsewhere", "0" * 64)
