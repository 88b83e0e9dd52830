"""SFT: the loss against plain loops, what it may and may not learn from, and the stage itself."""

import copy
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config import (
    ArchitectureSection,
    DataSection,
    LoraSection,
    ModelSection,
    RunSection,
)
from pipeline.distributed import Runtime
from pipeline.errors import ModelError
from pipeline.fence import fenced
from pipeline.fit_config import OptimSection
from pipeline.hf_trainer import FitSummary
from pipeline.models.adapters import add_adapter, lora_config
from pipeline.models.lean_layers import slim
from pipeline.models.store import ModelStore
from pipeline.models.trunk import BaseOrigin, Role, Trunk
from pipeline.records import Demonstration, Message
from pipeline.row_order import plan_steps
from pipeline.runfolder import RunFolder
from pipeline.stage import Context
from pipeline.tracking import Tracker
from stages.config import RunConfig
from stages.sft.config import SftOptimSection, SftSection
from stages.sft.run import SftStage, tokenizer_texts
from stages.sft.trainer import DemonstrationRows, SftTrainer

VOCABULARY, PAD, END = 40, 0, 1
RUN = RunSection(device="cpu", seed=5)
SECTION = SftSection(
    epochs=2,
    batch_size=4,
    optim=SftOptimSection(learning_rate=1e-2, schedule="constant", warmup_fraction=0),
    keep="last",
    eval_every=1,
    log_every=1,
)


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    gc.freeze()  # accelerate collects garbage twice a training; not through all of torch
    yield
    gc.unfreeze()


def trunk(dtype: torch.dtype = torch.float64) -> Trunk:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).to(dtype)
    slim(model)  # transformers' norms round to float32
    made = Trunk(model, BaseOrigin("test", "test"))
    made.freeze()
    return made


def some_rows(count: int = 10) -> DemonstrationRows:
    generator = torch.Generator().manual_seed(1)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()

    return DemonstrationRows([(ids(2, 12), [*ids(1, 8), END]) for _ in range(count)], PAD)


def train(
    module: Trunk,
    rows: DemonstrationRows,
    folder: Path,
    section: SftSection = SECTION,
    role: Role = Role("sft"),  # noqa: B008 - frozen
    held_out: DemonstrationRows | None = None,
) -> FitSummary:
    for parameter in module.role_parameters(role):
        parameter.requires_grad_(True)
    trainer = SftTrainer(
        role=role,
        module=module,
        section=section,
        run=RUN,
        folder=folder,
        train=rows,
        held_out=held_out,
        log=lambda step, metrics: None,
    )
    module.recompute = section.gradient_checkpointing
    summary = trainer.fit()
    module.freeze()
    return summary


def nll_of(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """-sum of log softmax over the response alone, one unpadded row, one token at a time."""
    logits = model(torch.tensor([prompt + response])).logits[0]
    total = torch.zeros((), dtype=logits.dtype)
    for offset, token in enumerate(response):
        total = total - torch.log_softmax(logits[len(prompt) + offset - 1], -1)[token]
    return total


def by_hand(rows: DemonstrationRows, section: SftSection) -> Any:
    """Full fine-tuning as a plain loop: per step, sum of the rows' NLL over their token count."""
    model = trunk().model.requires_grad_(True)
    adam = torch.optim.AdamW(
        model.parameters(),
        lr=section.optim.learning_rate,
        betas=(section.optim.adam_beta1, section.optim.adam_beta2),
        eps=section.optim.adam_eps,
        weight_decay=0.0,
    )
    for step in plan_steps(rows.lengths, section.batch_size, section.epochs, RUN.seed).steps:
        adam.zero_grad()
        tokens = sum(len(rows.pairs[row][1]) for row in step)
        loss = torch.stack([nll_of(model, *rows.pairs[row]) for row in step]).sum() / tokens
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), section.optim.max_grad_norm)
        adam.step()
    return model


def assert_same_weights(one: nn.Module, other: nn.Module, tolerance: float = 1e-9) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_loss_is_cross_entropy_of_response_tokens(tmp_path: Path) -> None:
    module, rows = trunk(), some_rows()
    still = SECTION.model_copy(update={"optim": OptimSection(learning_rate=1e-300)})
    summary = train(module, rows, tmp_path, still, held_out=rows)
    total = sum(nll_of(module.model, *pair).item() for pair in rows.pairs)
    tokens = sum(len(response) for _, response in rows.pairs)
    assert summary.train_loss == pytest.approx(total / tokens, abs=1e-12)
    assert summary.held_out["loss"] == pytest.approx(total / tokens, abs=1e-12)
    # perplexity = prod p(token) ** (-1 / tokens)
    assert summary.held_out["perplexity"] == pytest.approx(2.718281828459045 ** (total / tokens))


@pytest.mark.parametrize("budget", [10**6, 40, 1])
def test_weights_do_not_depend_on_micro_batches(budget: int, tmp_path: Path) -> None:
    module, rows = trunk(), some_rows()
    section = SECTION.model_copy(update={"micro_batch_tokens": budget})
    train(module, rows, tmp_path, section)
    assert_same_weights(module.model, by_hand(rows, section))
    assert not torch.allclose(module.model.lm_head.weight, trunk().model.lm_head.weight)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, recomputed, rows = trunk(), trunk(), some_rows()
    train(plain, rows, tmp_path)
    train(recomputed, rows, tmp_path, SECTION.model_copy(update={"gradient_checkpointing": True}))
    assert_same_weights(plain, recomputed, 0.0)
    assert not recomputed.model.is_activation_checkpointing and not recomputed.recompute


def test_prompt_tokens_are_not_learnt() -> None:
    # A padded batch gives every weight the gradient of the responses' NLL alone, row by row.
    module, rows = trunk(), some_rows()
    parameters = module.role_parameters(Role("sft"))
    for parameter in parameters:
        parameter.requires_grad_(True)
    batch = rows.collate(range(4))
    loss = -module(batch, Role("sft"), ("logprobs",)).logprobs.sum()
    loss.backward()
    response_only = [p.grad.clone() for p in parameters]
    module.zero_grad()
    torch.stack([nll_of(module.model, *rows.pairs[row]) for row in range(4)]).sum().backward()
    for mine, expected in zip(response_only, parameters, strict=True):
        torch.testing.assert_close(mine, expected.grad, rtol=0, atol=1e-10)


def test_end_of_the_response_is_learnt(tmp_path: Path) -> None:
    module, rows = trunk(), some_rows(6)
    section = SECTION.model_copy(update={"epochs": 40, "max_steps": 60})
    train(module, rows, tmp_path, section)
    for prompt, response in rows.pairs:
        logits = module.model(torch.tensor([prompt + response[:-1]])).logits[0, -1]
        assert torch.softmax(logits, -1)[END] > 0.9


def test_lora_trains_its_adapter_and_leaves_the_base(tmp_path: Path) -> None:
    module, rows = trunk(), some_rows()
    add_adapter(module.model, "sft", lora_config(LoraSection(rank=4)))
    add_adapter(module.model, "other", lora_config(LoraSection(rank=4)))
    before = module.base_hash()
    frozen = [p.clone() for p in module.role_parameters(Role("other", "other"))]
    start = [p.clone() for p in module.role_parameters(Role("sft", "sft"))]
    section = SECTION.model_copy(update={"keep": "best"})
    summary = train(module, rows, tmp_path, section, Role("sft", "sft"), held_out=rows)
    assert module.base_hash() == before
    other = module.role_parameters(Role("other", "other"))
    assert all(torch.equal(a, b) for a, b in zip(frozen, other, strict=True))
    trained = module.role_parameters(Role("sft", "sft"))
    assert not any(torch.equal(a, b) for a, b in zip(start, trained, strict=True))
    assert not any(p.requires_grad for p in module.parameters()) and not module.training
    tokens = sum(rows.units)
    after = -module(rows.collate(range(10)), Role("sft", "sft"), ("logprobs",)).logprobs.sum()
    assert summary.held_out["loss"] == pytest.approx(after.item() / tokens, abs=1e-12)


def test_a_copy_made_after_training_stands_alone(tmp_path: Path) -> None:
    module, rows = trunk(), some_rows()
    train(module, rows, tmp_path)
    reference = copy.deepcopy(module)
    batch = rows.collate(range(4))
    before = reference(batch, Role("sft"), ("logprobs",)).logprobs
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
    assert torch.equal(reference(batch, Role("sft"), ("logprobs",)).logprobs, before)
    assert not torch.equal(module(batch, Role("sft"), ("logprobs",)).logprobs, before)


def test_trl_has_the_same_loss_and_its_patch_is_taken_off(tmp_path: Path) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    module, rows = trunk(torch.float32), some_rows(4)
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")),
        pad_token="w0",
        eos_token="w1",
    )
    table = [
        {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}
        for prompt, response in rows.pairs
    ]
    model = module.model.requires_grad_(True)
    with fenced(model):
        trainer = SFTTrainer(
            model,
            SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
            train_dataset=Dataset.from_list(table),
            processing_class=tokenizer,
        )
        assert "forward" in vars(model)
        batch = trainer.data_collator(table)
        theirs = trainer.compute_loss(model, batch).item()
    assert "forward" not in vars(model)
    ours = -module(rows.collate(range(4)), Role("sft"), ("logprobs",)).logprobs.sum()
    assert ours.item() / sum(rows.units) == pytest.approx(theirs, abs=1e-5)


# --- the stage ---

MODEL = ModelSection(
    init="config",
    architecture=ArchitectureSection(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
    ),
    vocabulary_size=300,
)
LORA = LoraSection(rank=2)
DATA = DataSection(max_prompt_tokens=60, max_response_tokens=30)


def configured(**sections: Any) -> RunConfig:
    """A configuration of these sections, small ones for the others."""
    short = {"ppo": {"rollout": {"max_new_tokens": 30}}, "evaluation": {"max_new_tokens": 30}}
    own = {"run": RUN, "model": MODEL, "data": DATA, "lora": LORA, "sft": SECTION}
    return RunConfig.model_validate({**short, **own, **sections})


def demonstrations(count: int) -> tuple[Demonstration, ...]:
    return tuple(
        Demonstration(f"Post {index}: 우리는 오늘 바다에 갔다.\nTL;DR:", f" 바다 {index % 7}")
        for index in range(count)
    )


def context(folder: Path, config: RunConfig) -> Context:
    runtime = Runtime(config.run)
    console = Console(quiet=True)
    run = RunFolder(folder)
    stage = run.stage("sft")
    stage.remove()
    stage.artifact.mkdir(parents=True)
    split = SimpleNamespace(train=demonstrations(24), held_out=demonstrations(6))
    return Context(
        config=config,
        runtime=runtime,
        corpus=SimpleNamespace(demonstrations=split),  # type: ignore[arg-type]
        store=ModelStore(config.model, config.data, runtime.device),
        run=run,
        folder=stage,
        parents={},
        tracker=Tracker(stage.root, "test", (), console),
        console=console,
    )


def test_stage_leaves_an_artifact_with_the_numbers_it_reports(tmp_path: Path) -> None:
    made = context(tmp_path / "run", configured(sft=SECTION.model_copy(update={"keep": "best"})))
    summary = SftStage().run(made)
    rebuilt = ModelStore(MODEL, DATA).open(made.folder.artifact)
    rows = [rebuilt.codec.pair_ids(d.prompt, d.response) for d in demonstrations(6)]
    total = sum(nll_of(rebuilt.trunk.model, *pair).item() for pair in rows)
    tokens = sum(len(response) for _, response in rows)
    assert summary["eval_loss"] == pytest.approx(total / tokens, abs=1e-5)
    assert summary["perplexity"] == pytest.approx(2.718281828459045 ** summary["eval_loss"])
    assert (summary["steps"], summary["train_rows"], summary["held_out_rows"]) == (12, 24, 6)
    assert all(response[-1] == rebuilt.codec.end_id for _, response in rows)
    written = [json.loads(line) for line in made.folder.metrics_jsonl.read_text().splitlines()]
    evaluations = {row["step"]: row["eval_loss"] for row in written if "eval_loss" in row}
    assert summary["eval_loss"] == min(evaluations.values())
    assert evaluations[summary["kept_step"]] == summary["eval_loss"]
    assert [row["step"] for row in written if "loss" in row] == list(range(1, 13))


def test_stage_repeats_to_the_same_weights(tmp_path: Path) -> None:
    hashes = []
    for name in ("one", "two"):
        made = context(tmp_path / name, configured())
        SftStage().run(made)
        hashes.append(made.store.open(made.folder.artifact).trunk.base_hash())
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_stage_on_a_pretrained_base(tuning: str, tmp_path: Path) -> None:
    first = context(tmp_path / "base", configured())
    SftStage().run(first)
    section = ModelSection(path=str(first.folder.artifact / "model"))
    before = ModelStore(section, DATA).pretrained().trunk.base_hash()
    sft = SECTION.model_copy(update={"tuning": tuning})
    made = context(tmp_path / tuning, configured(model=section, sft=sft))
    SftStage().run(made)
    handle, base = made.store.open(made.folder.artifact), made.store.pretrained()
    # The base as anybody gets it afterwards has not moved; an adapter shares it in memory.
    assert base.trunk.base_hash() == before
    assert (handle.trunk is base.trunk) == (tuning == "lora")
    rebuilt = ModelStore(section, DATA).open(made.folder.artifact)
    row = demonstrations(1)[0]
    batch = DemonstrationRows([handle.codec.pair_ids(row.prompt, row.response)], 0).collate([0])
    trained = handle(batch, ("logprobs",)).logprobs
    torch.testing.assert_close(rebuilt(batch, ("logprobs",)).logprobs, trained, rtol=0, atol=1e-6)
    assert not torch.allclose(base(batch, ("logprobs",)).logprobs, trained, atol=1e-3)


def test_a_base_with_too_few_positions_is_refused(tmp_path: Path) -> None:
    store = ModelStore(MODEL, DATA)
    store.save(store.build(["a text"]), tmp_path / "base")
    section = ModelSection(path=str(tmp_path / "base/model"))
    made = configured(model=section, data=DataSection(max_prompt_tokens=99, max_response_tokens=30))
    with pytest.raises(ModelError, match=r"has 128 positions but .* = 99 \+ 30 = 129 tokens"):
        SftStage().run(context(tmp_path / "run", made))


def test_cut_rows_are_counted(tmp_path: Path) -> None:
    short = DataSection(max_prompt_tokens=5, max_response_tokens=1)
    summary = SftStage().run(context(tmp_path / "run", configured(data=short)))
    assert summary["prompts cut to data.max_prompt_tokens"] == 30  # 24 train and 6 held out
    assert summary["responses cut to data.max_response_tokens"] == 30


def test_new_tokenizer_reads_conversations_as_they_are_rendered() -> None:
    turns = (Message("user", "안녕?"), Message("assistant", "네."), Message("user", "왜?"))
    texts = tokenizer_texts([Demonstration(turns, " 그냥."), Demonstration("plain", " text")])
    assert texts == [
        "\n\nHuman: 안녕?\n\nAssistant: 네.\n\nHuman: 왜?",
        " 그냥.",
        "plain",
        " text",
    ]


def test_a_base_is_known_by_what_it_is_loaded_from(tmp_path: Path) -> None:
    for path in (str(tmp_path), "someone/on-the-hub"):
        named = configured(model=ModelSection(path=path))
        assert SftStage().resources(named) == {"model.path": path}
    assert SftStage().resources(configured()) == {}
