"""Reward sources: what they are given, what they return, and how they fail."""

import pytest
import torch

from pipeline.config import ModelSection
from pipeline.errors import ConfigError, ModelError, TrainingError
from pipeline.records import Message, Prompt
from pipeline.rewards import (
    Completions,
    FunctionReward,
    ModelReward,
    SequenceClassificationReward,
    open_reward,
)
from pipeline.runfolder import write_manifest


def completions(texts, prompt="q", **columns):
    prompts = [
        Prompt(prompt, {name: values[row] for name, values in columns.items()})
        for row in range(len(texts))
    ]
    ids = [[1, 2]] * len(texts)
    return Completions(prompts, ids, ids, texts, [True] * len(texts))


@pytest.fixture
def function_file(tmp_path):
    def write(body):
        path = tmp_path / "judge.py"
        path.write_text(body, encoding="utf-8")
        return f"{path}:score"

    return write


def test_a_function_gets_trls_arguments_and_columns(function_file):
    source = FunctionReward(
        function_file(
            "def score(prompts, completions, completion_ids, target, ended, **rest):\n"
            "    assert completion_ids == [[1, 2]] * len(prompts) and all(ended) and not rest\n"
            "    return [float(p + c == t) for p, c, t in zip(prompts, completions, target)]\n"
        )
    )
    batch = completions([" 안녕", " no"], target=["q 안녕", "q 안녕"])
    assert source.score(batch) == [1.0, 0.0]
    assert source.name == "score"


def test_a_column_named_like_an_argument_does_not_hide_what_was_sampled(function_file):
    # UltraFeedback's rows have a column `completions`
    source = FunctionReward(
        function_file("def score(completions, **rest):\n    return [float(len(completions[0]))]\n")
    )
    assert source.score(completions([" abc"], completions=["another text"])) == [4.0]


def test_a_function_gets_conversations_as_messages(function_file):
    source = FunctionReward(
        function_file(
            "def score(prompts, completions, **rest):\n"
            "    assert prompts[0] == [{'role': 'user', 'content': 'hi'}]\n"
            "    assert completions[0] == [{'role': 'assistant', 'content': 'yes'}]\n"
            "    return [2.5]\n"
        )
    )
    assert source.score(completions(["yes"], prompt=(Message("user", "hi"),))) == [2.5]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1.0]", "returned 1 scores for 2 completions"),
        ("[1.0, float('nan')]", r"returned nan for 1 of 2 completions.*row 1: ' b'"),
        ("['good', 'bad']", "must return a list of numbers"),
        ("1 / 0", r"ZeroDivisionError: division by zero \(judge\.py, line 2\)"),
        ("exit(0)", r"raised SystemExit: 0"),
    ],
)
def test_a_function_that_fails_is_named_with_its_rows(function_file, returned, message):
    source = FunctionReward(function_file(f"def score(**rest):\n    return {returned}\n"))
    with pytest.raises(TrainingError, match=message):
        source.score(completions([" a", " b"]))


def test_a_file_or_function_that_is_not_there_is_a_config_error(function_file, tmp_path):
    with pytest.raises(ConfigError, match="no function 'score'"):
        FunctionReward(function_file("x = 1\n"))
    with pytest.raises(ConfigError, match=r"no file .*gone\.py"):
        FunctionReward(f"{tmp_path}/gone.py:score")
    with pytest.raises(ConfigError, match="cannot be imported: SyntaxError"):
        FunctionReward(function_file("def score(:\n"))


def test_a_file_may_define_dataclasses_with_postponed_annotations(function_file):
    # dataclasses look their module up in sys.modules
    body = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Point:
    x: int = 1

def score(completions, **rest):
    return [float(Point().x)] * len(completions)
"""
    assert FunctionReward(function_file(body)).score(completions(["a"])) == [1.0]


def test_trls_own_reward_functions_work_by_module_name():
    source = FunctionReward("trl.rewards:think_format_reward")
    texts = ["<think>why</think> because", "because"]
    assert source.score(completions(texts, prompt=(Message("user", "?"),))) == [1.0, 0.0]
    with pytest.raises(ConfigError, match=r"trl\.rewards has no function 'no_such'"):
        FunctionReward("trl.rewards:no_such")
    with pytest.raises(ConfigError, match=r"no_such_module cannot be imported"):
        FunctionReward("no_such_module:score")


def test_a_file_without_a_function_says_what_to_write(function_file):
    path = function_file("").removesuffix(":score")
    with pytest.raises(ConfigError, match=r"names no function: write .*judge\.py:NAME"):
        open_reward(path, _Store(), ModelSection(path="x"), 100)


def test_our_reward_model_reads_the_sampled_ids(make_handle):
    handle = make_handle()
    handle.trunk.add_head("reward").init_normal(torch.Generator().manual_seed(0))
    source = ModelReward(handle.with_role("reward", head="reward"), token_budget=8)
    prompts, responses = [[5, 6, 7], [8], [9, 10]], [[11], [12, 13, 14], [15, 16]]
    batch = Completions([Prompt("")] * 3, prompts, responses, [""] * 3, [True] * 3)
    scores = source.score(batch)
    head = handle.trunk.heads["reward"]
    model = handle.trunk.model
    for prompt, response, score in zip(prompts, responses, scores, strict=True):
        with torch.no_grad():
            hidden = model.model(torch.tensor([prompt + response])).last_hidden_state
        assert score == pytest.approx((hidden[0, -1] @ head.weight + head.bias).item(), abs=1e-9)


@pytest.fixture
def classifier(tmp_path, make_handle):
    """A sequence classifier folder with a tokenizer of its own, as any Hub reward model."""
    from transformers import LlamaForSequenceClassification

    handle = make_handle(dtype="float32")
    config = handle.trunk.model.config
    config.num_labels = 1
    config.pad_token_id = handle.codec.tokenizer.pad_token_id
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "rm")
    handle.codec.tokenizer.save_pretrained(tmp_path / "rm")
    return tmp_path / "rm", model.eval(), handle


def test_any_sequence_classifier_scores_text(classifier):
    folder, model, handle = classifier
    source = open_reward(str(folder), _Store(), ModelSection(path="x"), 8)
    assert isinstance(source, SequenceClassificationReward)
    texts = [" the cat sat", " 고양이", " ran away on the mat and sat"]
    for text, score in zip(texts, source.score(completions(texts)), strict=True):
        ids = torch.tensor([handle.codec.tokenizer.encode("q" + text)])
        with torch.no_grad():
            alone = model(ids).logits[0, 0].item()  # no padding at all
        assert score == pytest.approx(alone, abs=1e-5)


def test_a_classifier_reads_the_response_of_a_prompt_that_is_too_long(classifier):
    folder, model, handle = classifier
    source = open_reward(str(folder), _Store(), ModelSection(path="x"), 8)
    source.tokenizer.model_max_length = 6
    batch = completions([" the cat sat"], prompt="and ran away on the mat " * 3)
    ids = handle.codec.tokenizer.encode(batch.prompts[0].prompt + " the cat sat")
    assert len(ids) > 6
    with torch.no_grad():
        end = model(torch.tensor([ids[-6:]])).logits[0, 0].item()
    assert source.score(batch) == [pytest.approx(end, abs=1e-5)]


@pytest.fixture
def encoder(tmp_path):
    """A BERT with one label and a tokenizer of whole words, in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    names = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *["is", "it", "cold", "yes", "no", "what", "user", ":"],
    ]
    raw = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, "[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    marks = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]  # as BERT's own tokenizers have
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, model_input_names=inputs, **marks)
    tokenizer.save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(names), intermediate_size=16, num_labels=1, **shape)
    config.initializer_range = 1.0  # so that what is read makes a difference
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert", model


def test_an_encoder_reads_prompt_and_response_as_a_pair(encoder):
    folder, model = encoder
    source = open_reward(str(folder), _Store(), ModelSection(path="x"), 8)
    # [CLS] is it cold [SEP] yes it is [SEP], of types 0 and 1; and a shorter row beside it.
    ids = torch.tensor([[2, 4, 5, 6, 3, 7, 5, 4, 3]])
    with torch.no_grad():
        alone = model(ids, token_type_ids=torch.tensor([[0] * 5 + [1] * 4])).logits[0, 0].item()
        joined = model(torch.tensor([[2, 4, 5, 6, 7, 5, 4, 3]])).logits[0, 0].item()
    texts = ["yes it is", "no"]
    for prompt in ("is it cold", (Message("user", "is it cold"),)):
        assert source.score(completions(texts, prompt))[0] == pytest.approx(alone, abs=1e-6)
    text = open_reward(str(folder), _Store(), ModelSection(path="x"), 8, reads="text")
    found = text.score(completions([" yes it is", " no"], "is it cold"))[0]
    assert found == pytest.approx(joined, abs=1e-6) != pytest.approx(alone, abs=1e-4)


def test_a_reward_model_of_ours_is_opened_with_the_token_budget_of_who_asks(tmp_path, make_store):
    store = make_store()
    handle = store.build(["the cat sat on the mat"] * 4)
    handle.trunk.add_head("reward")
    store.save(handle.with_role("reward", head="reward"), tmp_path / "artifact")
    write_manifest(
        tmp_path / "artifact", stage="reward", key="", material={}, summary={}, seconds=0
    )
    source = open_reward(str(tmp_path), store, store.section, 99)
    assert isinstance(source, ModelReward)
    assert source.token_budget == 99


def test_a_classifier_without_a_pad_token_is_refused(classifier):
    folder, _, handle = classifier
    handle.codec.tokenizer.pad_token = None
    handle.codec.tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="no pad token"):
        SequenceClassificationReward(str(folder), ModelSection(path="x"), torch.device("cpu"))


def test_a_classifier_with_several_labels_is_refused(classifier):
    folder, model, _ = classifier
    model.config.num_labels = 3
    type(model)(model.config).save_pretrained(folder)
    with pytest.raises(ModelError, match="has 3 labels; a reward model has one"):
        SequenceClassificationReward(str(folder), ModelSection(path="x"), torch.device("cpu"))


class _Store:
    computes_on = torch.device("cpu")
