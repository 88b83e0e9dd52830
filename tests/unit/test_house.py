"""The house rules: imports, sizes, paths, configs, links. They read files and train nothing."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from docs.generate import REFERENCE, render
from pipeline.yaml_config import read_config
from stages.config import RunConfig

ROOT = Path(__file__).parents[2]
ROOMS = ("pipeline", "stages", "tests", "benchmarks", "data", "docs")
SKIPPED = {"runs", "build", "dist", "__pycache__"}
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def _files(*suffixes: str) -> list[Path]:
    """The project's own files with one of the suffixes (all text files without any)."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name not in SKIPPED
            and not name.endswith(".egg-info")
            and (not name.startswith(".") or name == ".ci")
        ]
        found += [Path(folder) / name for name in names]
    return sorted(path for path in found if not suffixes or path.suffix in suffixes)


SOURCES = {str(path.relative_to(ROOT)): path for path in _files(".py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}
PRODUCT = {name for name in TREES if name.startswith(("pipeline/", "stages/"))}


def _imports(name: str) -> Iterator[tuple[int, str]]:
    """Every import of a file, at any depth, as (line, dotted name of module and member).

    Relative imports are made absolute; `from a import b` gives `a.b`, since `b` may be a module.
    """
    package = Path(name).parent.parts
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def _within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def _stage_of(name: str) -> str | None:
    """`ppo` for stages/ppo/rollout.py; None for stages/config.py, stages/cli.py and others."""
    parts = Path(name).parts
    return parts[1] if parts[0] == "stages" and len(parts) > 2 else None


STAGES = {stage for name in PRODUCT if (stage := _stage_of(name))}


# --- imports ---


@pytest.mark.parametrize("leaf", ["errors", "tensors", "records"])
def test_leaves_import_nothing_of_ours_but_errors(leaf: str) -> None:
    ours = [
        f"{line}: {module}"
        for line, module in _imports(f"pipeline/{leaf}.py")
        if _within(module, "pipeline", "stages") and not _within(module, "pipeline.errors")
    ]
    assert ours == []


def test_pipeline_never_imports_stages() -> None:
    wrong = [
        f"{name}:{line} {module}"
        for name in sorted(PRODUCT)
        if name.startswith("pipeline/")
        for line, module in _imports(name)
        if _within(module, "stages")
    ]
    assert wrong == []


def test_a_stage_never_imports_another_stage() -> None:
    wrong = [
        f"{name}:{line} {module}"
        for name in sorted(PRODUCT)
        if (stage := _stage_of(name))
        for line, module in _imports(name)
        if _within(module, *(f"stages.{other}" for other in STAGES - {stage}))
    ]
    assert wrong == []


# The mathematics: no rank, file, logger or configuration object.
PURE = {"objective.py", "controllers.py", "loss.py", "calibration.py", "metrics.py"}
OUTSIDE_WORLD = {"io", "json", "logging", "os", "pathlib", "random", "subprocess", "sys", "time"}
PURE_MAY_IMPORT = (
    *("torch", "numpy", "pipeline.tensors"),
    *(sys.stdlib_module_names - OUTSIDE_WORLD),
)


@pytest.mark.parametrize("name", sorted(n for n in PRODUCT if Path(n).name in PURE))
def test_mathematics_is_pure(name: str) -> None:
    wrong = [
        f"{line}: {module}"
        for line, module in _imports(name)
        if not _within(module, *PURE_MAY_IMPORT) or _within(module, "torch.distributed")
    ]
    assert wrong == []


def test_there_is_mathematics() -> None:
    assert {Path(name).name for name in PRODUCT} >= PURE


def test_only_distributed_and_tracking_import_accelerate() -> None:
    wrong = [
        f"{name}:{line} {module}"
        for name in sorted(PRODUCT)
        if not name.startswith("pipeline/distributed/") and name != "pipeline/tracking.py"
        for line, module in _imports(name)
        if _within(module, "accelerate", "torch.distributed")
    ]
    assert wrong == []


def test_only_the_fence_imports_trainers() -> None:
    fence = (
        "pipeline/hf_trainer.py",
        "pipeline/trainer_arguments.py",
        "pipeline/trainer_callbacks.py",
        "pipeline/trainer_steps.py",
        "stages/sft/",
        "stages/reward/trainer.py",
    )
    trainer = re.compile(r"(transformers|trl)\b.*(Trainer\w*|TrainingArguments|SFTConfig)$")
    wrong = [
        f"{name}:{line} {module}"
        for name in sorted(PRODUCT)
        if not name.startswith(fence)
        for line, module in _imports(name)
        if trainer.match(module) or _within(module, "trl")
    ]
    assert wrong == []


def test_light_modules_load_no_heavy_library() -> None:
    """`rlhf --help`, `show` and `check` answer within a second: only the configuration loads."""
    light = ["pipeline.config", "pipeline.yaml_config", "stages", "stages.config", "stages.cli"]
    light += [f"stages.{stage}.config" for stage in sorted(STAGES)]
    heavy = {"torch", "transformers", "datasets", "trl", "peft", "accelerate", "pandas"}
    code = f"import sys, {', '.join(light)}; print(*sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


# --- files of a run ---

# Who may write files without `runfolder.py`, and why.
OWN_WRITERS = {
    "pipeline/runfolder.py": "the writer itself",
    "pipeline/tracking.py": "appends one line a step to metrics.jsonl, flushed at once",
}


WRITERS = (".write_text", ".write_bytes", "json.dump", "torch.save")
PICKLERS = ("pickle.dump", "pickle.dumps", "pickle.load", "pickle.loads")


def _writes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Calls that write a file directly, or pickle."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        values = [*node.args[:2], *(k.value for k in node.keywords if k.arg == "mode")]
        modes = [str(value.value) for value in values if isinstance(value, ast.Constant)]
        opens = call == "open" or call.endswith(".open")
        writes = any(re.fullmatch(r"[rbt]*[wax+][rbt+]*", mode) for mode in modes)
        if (opens and writes) or call.endswith(WRITERS) or call in PICKLERS:
            yield node.lineno, f"{call}({', '.join(modes)})"


def test_files_of_a_run_are_written_through_runfolder() -> None:
    wrong = [
        f"{name}:{line} {call}"
        for name in sorted(PRODUCT - OWN_WRITERS.keys())
        for line, call in _writes(TREES[name])
    ]
    assert wrong == []


# --- sizes ---


def test_files_and_functions_stay_small() -> None:
    long = [
        f"{name}: {lines} lines"
        for name, path in SOURCES.items()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    ]
    long += [
        f"{name}:{node.lineno} {node.name}: {lines} lines"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > 100
    ]
    assert long == []


# --- texts ---

# Folders of one machine, and hosts of package registries (users and mirrors choose their own).
FOREIGN = [
    re.compile(r"(?<![\w.~-])/(work|farm|root|home|Users)/\w"),
    re.compile(r"(?<![\w.~-])/tmp/(venv|brief|bash_jobs)\b"),
    re.compile(r"(pypi|pythonhosted|npmjs|debian)[.](org|io)|download[.]pytorch[.]org"),
]
# Words that promise work which is not there.
UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX|NotImplemented" r"Error)\b")
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".svg", ".json", ".cfg", ""}


def test_no_machine_paths_registry_hosts_or_unfinished_work() -> None:
    patterns = [*FOREIGN, UNFINISHED]
    wrong = [
        f"{path.relative_to(ROOT)}:{number} {line.strip()[:80]}"
        for path in _files(*TEXT)
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if any(pattern.search(line) for pattern in patterns)
    ]
    assert wrong == []


LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def _anchors(path: Path) -> set[str]:
    """GitHub's anchors of a Markdown file's headings."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", _files(".md"), ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    broken = []
    for groups in LINK.findall(text):
        link = "".join(groups)
        if re.match(r"[a-z]+:", link):
            continue  # an address on the web
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in _anchors(path)):
            broken.append(link)
    assert broken == []


def test_tests_that_pages_name_exist() -> None:
    known = {
        f"{Path(name).name}::{node.name}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    named = {
        (page.name, test)
        for page in _files(".md")
        for test in re.findall(r"\w+\.py::\w+", page.read_text(encoding="utf-8"))
    }
    assert len(named) > 30
    assert [pair for pair in sorted(named) if pair[1] not in known] == []


@pytest.mark.parametrize("picture", _files(".svg"), ids=lambda path: path.name)
def test_pictures_are_valid_xml(picture: Path) -> None:
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


# --- configs ---


def test_there_are_configs() -> None:
    assert {path.stem for path in CONFIGS} >= {"quickstart", "hh-cpu", "pythia-1b-tldr"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_committed_config_is_valid(path: Path) -> None:
    config = read_config(path, [], RunConfig)
    assert config.run.name == path.stem


def test_config_reference_is_current() -> None:
    """If this fails: run `make docs` and commit docs/config-reference.md."""
    assert REFERENCE.read_text(encoding="utf-8") == render(RunConfig.model_json_schema())


# --- packaging ---


def _requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    own = canonicalize_name(project["name"])
    return [r for r in map(Requirement, lines) if canonicalize_name(r.name) != own]


@pytest.mark.parametrize("requirement", _requirements(), ids=lambda r: r.name)
def test_every_requirement_has_bounds(requirement: Requirement) -> None:
    assert {s.operator for s in requirement.specifier} == {">=", "<"}


# Distributions whose module has another name, and modules that come with another distribution.
DISTRIBUTION = {"yaml": "pyyaml", "rouge_score": "rouge-score", "pydantic_core": "pydantic"}


def test_every_library_that_the_product_imports_is_declared() -> None:
    imported = {module.split(".")[0] for name in PRODUCT for _, module in _imports(name)}
    libraries = imported - sys.stdlib_module_names - {"pipeline", "stages"}
    used = {canonicalize_name(DISTRIBUTION.get(library, library)) for library in libraries}
    assert used - {canonicalize_name(r.name) for r in _requirements()} == set()


def test_constraints_satisfy_pyproject() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for line in lines:
        if not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    wanted = {canonicalize_name(r.name): r.specifier for r in _requirements()}
    # An optional tracker, and a library that needs a compiler: any version within their range.
    not_tested = {"wandb", "deepspeed"}
    assert wanted.keys() - pins.keys() == not_tested
    wrong = {n: pins[n] for n, spec in wanted.items() if n in pins and pins[n] not in spec}
    assert wrong == {}
    assert [pin for pin in pins.values() if "+" in pin] == []  # no local builds


def test_ci_run_is_executable_and_checks() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make check" in script.read_text(encoding="utf-8")


def test_changelog_has_unreleased() -> None:
    assert "\n## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
