"""Exported reward models: plain transformers and peft score them to our numbers and a constant."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from pipeline.batches import TokenBatch
from pipeline.config import LoraSection
from pipeline.errors import ModelError
from pipeline.models import adapters
from pipeline.models.trunk import Handle
from stages.export import classifier
from stages.export.classifier import pad_id, scoring, write_classifier
from stages.export.config import CLASSIFIED

# Prompts and responses of unequal lengths; the last has no end token, as a cut one has none.
ROWS = [
    ("the cat", " sat"),
    ("a mat and 0123", " ran away, away"),
    ("고양이", " the"),
    ("x", " y z"),
]
OF_FAMILY: dict[str, dict[str, object]] = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "bloom": {"n_layer": 2, "n_head": 2},
}


def reward_model(make_handle: Any, family: str) -> Handle:
    """A head whose weight, bias, shift and scale all count, on a model of `family`."""
    handle = make_handle(family, "float32", **OF_FAMILY.get(family, {}))
    head = handle.trunk.add_head("reward")
    head.init_normal(torch.Generator().manual_seed(0))
    with torch.no_grad():
        head.bias.fill_(0.3)
    head.normalise(mean=1.5, std=2.0)
    handle.trunk.freeze()
    return handle.with_role("reward", head="reward")


def token_rows(handle: Handle) -> tuple[list[list[int]], list[list[int]]]:
    pairs = [handle.codec.pair_ids(*row) for row in ROWS]
    prompts, responses = [p for p, _ in pairs], [r for _, r in pairs]
    return prompts, [*responses[:-1], responses[-1][:-1]]


def our_scores(handle: Handle) -> torch.Tensor:
    batch = TokenBatch.from_ragged(*token_rows(handle), handle.codec.pad_id)
    with torch.no_grad():
        scores = handle(batch, {"scores"}).scores
    assert scores is not None
    return scores


def their_logits(model: Any, handle: Handle, side: str) -> torch.Tensor:
    """Logits of plain transformers for the same ids, padded on `side` with the exported pad id."""
    rows = [p + r for p, r in zip(*token_rows(handle), strict=True)]
    width, pad = max(map(len, rows)), model.config.pad_token_id
    left = side == "left"
    fill = [[pad] * (width - len(row)) for row in rows]
    ids = torch.tensor([f + r if left else r + f for f, r in zip(fill, rows, strict=True)])
    ones = [[1] * len(row) for row in rows]
    none = [[0] * len(f) for f in fill]
    mask = torch.tensor([n + o if left else o + n for n, o in zip(none, ones, strict=True)])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if left and model.config.model_type == "gpt2":  # learned positions, which it does not mask
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**inputs).logits[:, 0]


@pytest.mark.parametrize("family", sorted(CLASSIFIED))
def test_plain_transformers_give_our_scores(make_handle: Any, family: str, tmp_path: Path) -> None:
    reward = reward_model(make_handle, family)
    how = scoring(reward)
    write_classifier(reward, how, tmp_path, "5GB")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(loaded).__name__.endswith("ForSequenceClassification")
    # (w.h + 0.3 - 1.5) / 2 = w.h / 2 - 0.6
    assert loaded.config.reward_shift == pytest.approx(0.6, abs=1e-6)
    assert loaded.config.num_labels == 1
    ours = our_scores(reward)
    assert ours.std() > 1e-2
    for side in ("right", "left"):
        theirs = their_logits(loaded, reward, side) - loaded.config.reward_shift
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_plain_peft_gives_our_scores(
    make_handle: Any, family: str, kind: dict[str, bool], tmp_path: Path
) -> None:
    """The adapter with its head, on a plain classifier of the base."""
    reward = reward_model(make_handle, family)
    model = reward.trunk.model
    model.save_pretrained(str(tmp_path / "base"))
    lora = LoraSection(rank=4, alpha=8, **kind)
    adapters.add_adapter(model, "reward", adapters.lora_config(lora))
    with torch.no_grad():
        for parameter in adapters.adapter_parameters(model, "reward"):
            parameter += 0.05 * torch.randn_like(parameter)
    reward = reward.with_role("reward", adapter="reward")
    how = scoring(reward)
    classifier.write_adapter(reward, tmp_path / "adapter", str(tmp_path / "base"), None)
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, pad_token_id=how.pad_id
    )
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ours = our_scores(reward)
    bare = our_scores(reward.with_role("reward", adapter=None))
    assert (ours - bare).abs().max() > 1e-2
    theirs = their_logits(loaded, reward, "right") - how.shift
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_other_families_are_refused(make_handle: Any) -> None:
    from transformers import BertConfig, T5Config

    with pytest.raises(ModelError, match="t5 is an encoder-decoder"):
        classifier.refuse_family(T5Config())
    with pytest.raises(ModelError, match="bert is none of the decoders"):
        classifier.refuse_family(BertConfig())


def test_the_pad_token_ends_no_row(make_handle: Any) -> None:
    """A pad token of the vocabulary that ends nothing is found; where there is none, it is said."""
    codec = make_handle("llama").codec
    size = len(codec.tokenizer)
    assert pad_id(codec, size) == codec.tokenizer.convert_tokens_to_ids("<|pad|>")
    tokenizer = codec.tokenizer
    tokenizer.pad_token = tokenizer.eos_token  # as many bases have it
    assert tokenizer.pad_token_id in codec.stop_ids
    assert pad_id(codec, size) == tokenizer.convert_tokens_to_ids("<|pad|>")
    codec.stop_ids |= {tokenizer.convert_tokens_to_ids("<|pad|>")}
    with pytest.raises(ModelError, match="give the base's tokenizer another pad_token"):
        pad_id(codec, size)
    assert len(tokenizer) == size  # and none is added
