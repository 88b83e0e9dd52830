"""What a score reads of an encoder, which has no last token that has seen everything.

`first` is the state of the first token (`[CLS]`), which BERT's next-sentence objective and most
classifiers read; `mean` the mean of all states, which sentence encoders were trained by (Sentence-
BERT, arXiv:1908.10084, section 3). A base that says how it was pooled is read so.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.models.joiner import Joined
from pipeline.models.passes import recomputing
from pipeline.tensors import send, widen

READINGS = {"first": "its first token", "mean": "the mean of all tokens"}
_SENTENCE_POOLING = "1_Pooling/config.json"  # of sentence-transformers


def pooled_states(
    model: Any,
    joined: Joined,
    pooling: str,
    device: torch.device,
    again: Callable[..., Any] | None = None,
) -> Tensor:
    """The state that each row's score reads, (B, d); in float32 or wider where it is a mean.

    `again` makes the layers' calls whose activations are not kept (`passes.recomputed`).
    """
    inputs = {name: send(tensor, device) for name, tensor in joined.inputs.items()}
    if again is None:
        states = model(**inputs).last_hidden_state  # (B, T, d)
    else:
        with recomputing(model, again):
            states = model(**inputs).last_hidden_state
    if pooling == "first":
        first: Tensor = states[:, 0]
        return first
    mask = inputs["attention_mask"].unsqueeze(-1)  # (B, T, 1)
    mean: Tensor = (widen(states) * mask).sum(1) / mask.sum(1)
    return mean


def default_pooling(path: str, revision: str | None, config: Any) -> str:
    """How a base was pooled in its own training, by what lies beside its weights; else `first`.

    Raises:
        ModelError: it was pooled in a way that we do not have.
    """
    said = _sentence_pooling(path, revision)
    if said is None:
        return {"mean": "mean"}.get(getattr(config, "classifier_pooling", ""), "first")
    if said.get("pooling_mode_mean_tokens"):
        return "mean"
    if said.get("pooling_mode_cls_token"):
        return "first"
    raise ModelError(
        f"{path} was pooled by neither its first token nor the mean of all ({_SENTENCE_POOLING}): "
        f"set reward.pooling to {' or '.join(READINGS)}"
    )


def _sentence_pooling(path: str, revision: str | None) -> dict[str, Any] | None:
    from transformers.utils.hub import cached_file

    if Path(path).is_dir():
        file = Path(path, _SENTENCE_POOLING)
        found = str(file) if file.is_file() else None
    else:
        found = cached_file(
            path,
            _SENTENCE_POOLING,
            revision=revision or "main",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if found is None:
        return None
    said: dict[str, Any] = json.loads(Path(found).read_text(encoding="utf-8"))
    return said


def positions(model: Any) -> int | None:
    """Tokens of the longest row that a model can read, or None where its config names no limit.

    RoBERTa's kin count positions from behind the padding's own, which their tables have too.
    """
    for name, table in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding):
            behind = -1 if table.padding_idx is None else table.padding_idx
            return table.num_embeddings - behind - 1
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit
