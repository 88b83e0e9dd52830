"""Random weights, a tokenizer and prompts that both programs read from one folder.

    python -m benchmarks.ppo_peer.weights SPEC.json RESULT.json

`policy/` is a causal model. `reward/` is a sequence-classification model with one label, for TRL,
which starts its value model from it as well; it has the policy's weights, or those of `critic/`, a
causal model, where the workload has a critic of another shape. `head.safetensors` is the reward
model's last layer. `prompts.json` holds the prompts and a few probes, on which both programs must
give the same numbers before anything is measured.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from benchmarks.ppo_peer.workloads import SEED, Shape, Workload

PAD_ID = 0
FORBIDDEN = -1e4  # a logit that is never sampled, and finite


def make(workload: Workload, folder: Path) -> None:
    """Write everything that the two programs read."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(SEED)
    tokenizer = _tokenizer(workload)
    policy = _causal(workload.shape, workload)
    _set_end(policy, workload)
    _save(policy, tokenizer, folder / "policy")
    source = policy
    if workload.critic is not None:
        source = _causal(workload.critic, workload)
        _save(source, tokenizer, folder / "critic")
    width = source.get_output_embeddings().weight.shape[1]
    weight = torch.randn(width) / math.sqrt(width + 1)
    save_file({"weight": weight}, folder / "head.safetensors")
    if workload.against_trl:
        _save(_classifier(source, weight), tokenizer, folder / "reward")
    prompts = _prompts(workload)
    probes = [
        (prompt[:6], _random_ids(workload.shape.vocabulary, 5 + number))
        for number, prompt in enumerate(prompts[:4])
    ]
    (folder / "prompts.json").write_text(json.dumps({"prompts": prompts, "probes": probes}))


def _tokenizer(workload: Workload) -> Any:
    """One word an id, with the pad and end ids of the workload."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(max(workload.shape.vocabulary, workload.end_id + 1))}
    words |= {"<pad>": words.pop(f"w{PAD_ID}"), "<end>": words.pop(f"w{workload.end_id}")}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<end>",
        padding_side="left",
    )


def _causal(shape: Shape, workload: Workload) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    longest = workload.prompt_tokens[1] + workload.response_tokens
    config = AutoConfig.for_model(
        shape.model_type,
        vocab_size=shape.vocabulary,
        max_position_embeddings=longest + 8,
        bos_token_id=None,
        eos_token_id=None if workload.never_ends else workload.end_id,
        pad_token_id=PAD_ID,
        **shape.fields,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, workload.dtype))
    model.generation_config.pad_token_id = PAD_ID
    return model


def _set_end(model: Any, workload: Workload) -> None:
    """Let the end follow any token with the workload's probability, and pads never.

    The end's row of the output layer is zero, so that its logit is the bias b everywhere;
    p = exp(b) / (exp(b) + sum of the others) gives b = log(p / (1 - p)) + logsumexp(others).
    """
    import torch

    layer = model.get_output_embeddings()
    if layer.bias is None:
        assert workload.never_ends, f"{workload.name}: this output layer has no bias to set"
        return  # a pad among 100,000 tokens changes no measurement
    with torch.no_grad():
        layer.bias[PAD_ID] = FORBIDDEN
        if workload.end_probability is None:
            return
        layer.weight[workload.end_id] = 0.0
        layer.bias[workload.end_id] = FORBIDDEN
        ids = torch.tensor([_random_ids(workload.shape.vocabulary, 64) for _ in range(8)])
        others = float(model(input_ids=ids).logits.logsumexp(-1).mean())
        odds = workload.end_probability / (1 - workload.end_probability)
        layer.bias[workload.end_id] = math.log(odds) + others


def _classifier(causal: Any, weight: Any) -> Any:
    """The causal model's trunk with one score."""
    import torch
    from transformers import AutoModelForSequenceClassification

    config = type(causal.config).from_dict(causal.config.to_dict() | {"num_labels": 1})
    model = AutoModelForSequenceClassification.from_config(config, dtype=causal.dtype)
    trunk = getattr(model, model.base_model_prefix)
    trunk.load_state_dict(getattr(causal, causal.base_model_prefix).state_dict())
    with torch.no_grad():
        model.score.weight.copy_(weight.unsqueeze(0))
    return model


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _prompts(workload: Workload) -> list[list[int]]:
    return [_random_ids(workload.shape.vocabulary, n) for n in workload.prompt_lengths()]


def _random_ids(vocabulary: int, count: int) -> list[int]:
    """Token ids that are neither pad nor end, from torch's generator."""
    import torch

    ids: list[int] = torch.randint(2, vocabulary, (count,)).tolist()
    return ids


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    make(Workload.from_dict(spec["workload"]), Path(spec["folder"]))
    Path(sys.argv[2]).write_text("{}", encoding="utf-8")
