"""The reward model as a plain `AutoModelForSequenceClassification`, which has one logit.

Ours scores (w . h + b - shift) / scale at a response's last token. A decoder classifier of
transformers scores w' . h, without bias, at the last token that is no padding. So w' = w / scale,
and the rest is a constant: score = logit - reward_shift with reward_shift = (shift - b) / scale.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.codec import Codec
from pipeline.errors import ModelError
from pipeline.models import adapters
from pipeline.models.loading import without_bars
from pipeline.models.trunk import Handle
from pipeline.runfolder import read_json, write_json_atomic, writing
from stages.export.config import CLASSIFIED

# What a special token is called that a vocabulary keeps for such a use.
_SPARE = ("pad", "reserved", "unused")


@dataclass(frozen=True)
class Scoring:
    """What a plain classifier needs besides its weights to give our scores."""

    shift: float  # score = logit - shift
    pad_token: str
    pad_id: int


def refuse_family(config: Any) -> None:
    """Raise ModelError if no plain classifier gives the scores of a reward model on this base."""
    remedy = (
        "set export.reward to false, take reward out of export.adapters, and use the reward "
        "stage's artifact with this program"
    )
    if config.is_encoder_decoder:
        raise ModelError(
            f"{config.model_type} is an encoder-decoder, whose classifiers in transformers read "
            f"their input otherwise than our reward model: {remedy}"
        )
    if config.model_type not in CLASSIFIED:
        raise ModelError(
            f"{config.model_type} is none of the decoders whose classifier in transformers is "
            f"known to give our scores ({', '.join(sorted(CLASSIFIED))}): {remedy}"
        )


def pad_id(codec: Codec, vocabulary_size: int) -> int:
    """Id of a token that ends no row: the pad token, or a special token that is kept for such use.

    A plain classifier scores at the last token that is not padding. Were the pad token one that
    ends responses, it would score the token before it.

    Raises:
        ModelError: the vocabulary has none.
    """
    tokenizer = codec.tokenizer
    own = tokenizer.pad_token_id
    if own is not None and own not in codec.stop_ids:
        return int(own)
    taken = {*codec.stop_ids, tokenizer.bos_token_id, tokenizer.unk_token_id}
    template = tokenizer.chat_template or ""
    spare = {
        id_: token.content.lower()
        for id_, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and id_ not in taken and id_ < vocabulary_size
        if token.content not in template
    }
    for word in _SPARE:
        for id_, name in spare.items():
            if word in name:
                return int(id_)
    raise ModelError(
        f"the pad token of {codec.name!r} is unset or ends responses "
        f"({tokenizer.pad_token!r}), and a plain classifier finds the end of a row by its pad "
        "token: give the base's tokenizer another pad_token, or set export.reward to false and "
        "take reward out of export.adapters"
    )


def scoring(reward: Handle) -> Scoring:
    """How a plain classifier gives the scores of `reward`.

    Raises:
        ModelError: none can; says why.
    """
    refuse_family(reward.trunk.model.config)
    id_ = pad_id(reward.codec, reward.trunk.vocabulary_size)
    token = reward.codec.tokenizer.convert_ids_to_tokens(id_)
    return Scoring(-_folded(reward).bias.item(), token, id_)


def padded(codec: Codec, how: Scoring) -> Codec:
    """The codec with a tokenizer that pads as the classifier expects, on the right."""
    padded = copy.copy(codec)
    padded.tokenizer = copy.deepcopy(codec.tokenizer)
    padded.tokenizer.pad_token = how.pad_token
    padded.tokenizer.padding_side = "right"  # where learned positions are those of training
    return padded


def write_classifier(reward: Handle, how: Scoring, folder: Path, max_shard_size: str) -> None:
    """Write a reward model that has no adapter as a plain classifier."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    decoder = reward.trunk.model
    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(decoder.config)]
    config = copy.deepcopy(decoder.config)
    config.num_labels = 1
    config.pad_token_id = how.pad_id
    config.reward_shift = how.shift
    with torch.device("meta"):
        classifier = kind(config)
    assert kind.base_model_prefix == decoder.base_model_prefix
    setattr(classifier, kind.base_model_prefix, decoder.base_model)
    classifier.score.weight = nn.Parameter(_score_weight(reward).to(decoder.dtype))
    with without_bars(), writing(folder):
        classifier.save_pretrained(str(folder), max_shard_size=max_shard_size)


def write_adapter(reward: Handle, folder: Path, base: str, revision: str | None) -> None:
    """Write a reward model's adapter with its head, for plain PEFT on a classifier of its base."""
    model, adapter = reward.trunk.model, reward.role.adapter
    assert adapter is not None
    body = f"{model.base_model_prefix}."  # a classifier has no output layer
    state = adapters.adapter_state(model, adapter)
    state = {key: value for key, value in state.items() if key.startswith(body)}
    state["score.weight"] = _score_weight(reward)
    adapters.save_adapter(model, adapter, folder, base, revision, state)
    settings = read_json(folder / "adapter_config.json")
    settings |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    write_json_atomic(folder / "adapter_config.json", settings)


def _score_weight(reward: Handle) -> Tensor:
    """The classifier's (1, d)."""
    weight: Tensor = _folded(reward).weight.detach().unsqueeze(0).contiguous()
    return weight


def _folded(reward: Handle) -> Any:
    head: Any = reward.trunk.heads[reward.role.head or ""]
    return head.folded()
