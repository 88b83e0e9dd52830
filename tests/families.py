"""Small models of the families that docs/models.md lists, as folders that `model.path` names.

Each is built from its architecture's own config, with what makes the family its own: how positions
are told, what is tied or shared, windows, caps, experts. Its tokenizer is of the class that its
checkpoints have, trained here. Weights are random, and far enough apart that logits are not
uniform.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 400
WORDS = ["good", "bad", "kind", "rude", "calm", "loud", "clear", "vague", "short", "long", "warm"]
ROWS = [
    {"prompt": f"say {word} {number}", "chosen": f"{word} {number}.", "rejected": f"no {number}"}
    for number, word in enumerate(WORDS * 3)
]
TEXTS = [text for row in ROWS for text in row.values()] * 4
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_key_value_heads": 2, "num_experts_per_tok": 2}


# --- tokenizers -----------------------------------------------------------------------------------


@cache
def trained(class_name: str, bos: bool = False, more: tuple[str, ...] = (), **names: str) -> Any:
    """A tokenizer of transformers' class, trained on this page's texts.

    `bos`: every text begins with the begin token; `more`: further special tokens.
    """
    import transformers

    untrained = getattr(transformers, class_name)(**names)
    tokenizer = untrained.train_new_from_iterator(TEXTS, VOCABULARY)
    if more:
        tokenizer.add_special_tokens({"additional_special_tokens": list(more)})
    if bos:
        tokenizer.add_bos_token = True
    return tokenizer


# As each family's checkpoints have it. GPT-2 and Llama 3 have no pad token at all.
def gpt2_tokenizer() -> Any:
    """Byte-level BPE; no pad token."""
    return trained("GPT2Tokenizer")


def wordpiece() -> Any:
    """BERT's, which some GPT-2 models for Chinese have: [CLS] before and [SEP] after each text."""
    return trained("BertTokenizer", eos_token="[SEP]", bos_token="[CLS]")


def unigram() -> Any:
    """SentencePiece Unigram with Metaspace."""
    return trained("XGLMTokenizer")


def neox_tokenizer() -> Any:
    """Byte-level BPE; Pythia's files name no pad token."""
    tokenizer = trained("GPTNeoXTokenizer", pad_token="<|endoftext|>")
    tokenizer.pad_token = None
    return tokenizer


def opt_tokenizer() -> Any:
    """GPT-2's kind; `</s>` begins each text and ends it."""
    return trained("GPT2Tokenizer", True, **_names("</s>", "</s>"), pad_token="<pad>")


def bloom_tokenizer() -> Any:
    """Byte-level BPE with a pad token."""
    return trained("GPT2Tokenizer", **_names("<s>", "</s>"), pad_token="<pad>")


def llama3_tokenizer() -> Any:
    """Byte-level BPE with a begin token and header tokens; no pad token."""
    names = _names("<|begin_of_text|>", "<|end_of_text|>")
    headers = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return trained("GPT2Tokenizer", True, headers, **names)


def _names(bos: str, eos: str) -> dict[str, str]:
    return {"bos_token": bos, "eos_token": eos, "unk_token": eos}


def mistral_tokenizer() -> Any:
    """SentencePiece BPE; the pad token is the end token, as users often set it."""
    return trained("LlamaTokenizer", True, pad_token="</s>")


def qwen_tokenizer() -> Any:
    """Byte-level BPE; `<|im_end|>` ends a turn, `<|endoftext|>` pads."""
    tokenizer = trained("Qwen2Tokenizer", more=("<|im_start|>", "<|im_end|>"))
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def gemma_tokenizer() -> Any:
    """SentencePiece BPE with a begin token and a pad token."""
    return trained("GemmaTokenizer", True, ("<start_of_turn>", "<end_of_turn>"))


def phi_tokenizer() -> Any:
    """CodeGen's byte-level BPE; no pad token."""
    return trained("CodeGenTokenizer")


def t5_tokenizer() -> Any:
    """SentencePiece Unigram; every text is closed by `</s>`."""
    return trained("T5Tokenizer")


def bart_tokenizer() -> Any:
    """GPT-2's byte-level BPE; every text lies between `<s>` and `</s>`."""
    return trained("BartTokenizer")


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>"
    "\n\n{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


# --- families -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A family: its config's fields beside `SHAPE`, its tokenizer and its chat template."""

    model_type: str
    tokenizer: Callable[[], Any]
    fields: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    end_of_turn: str | None = None  # ends responses beside the tokenizer's own end
    decoder_start: str | None = None  # what a decoder behind an encoder begins with
    shape: dict[str, Any] = field(default_factory=lambda: SHAPE)


LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
WINDOWED = {"head_dim": 16, "num_key_value_heads": 2, "sliding_window": 5}
DECODERS = {
    "gpt2": Family("gpt2", gpt2_tokenizer),
    "gpt2-wordpiece": Family("gpt2", wordpiece),
    "gpt-neox": Family("gpt_neox", neox_tokenizer, {"rope_parameters": PARTIAL}),
    "opt": Family("opt", opt_tokenizer, {"ffn_dim": 64}),
    # OPT 350M: norms after the layers, and embeddings narrower than the states.
    "opt-350m": Family(
        "opt",
        opt_tokenizer,
        {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "bloom": Family("bloom", bloom_tokenizer, {"n_layer": 2, "n_head": 4}),
    "llama3": Family(
        "llama",
        llama3_tokenizer,
        {"num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE},
        LLAMA3,
        "<|eot_id|>",
    ),
    "mistral": Family(
        "mistral", mistral_tokenizer, {"num_key_value_heads": 2, "sliding_window": 5}
    ),
    "qwen3": Family(
        "qwen3",
        qwen_tokenizer,
        {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
        CHATML,
    ),
    "gemma": Family(
        "gemma",
        gemma_tokenizer,
        {"num_key_value_heads": 1, "head_dim": 16},
        GEMMA,
        "<end_of_turn>",
    ),
    "gemma2": Family(
        "gemma2",
        gemma_tokenizer,
        WINDOWED
        | {
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        GEMMA,
        "<end_of_turn>",
    ),
    "gemma3": Family(
        "gemma3_text",
        gemma_tokenizer,
        WINDOWED
        | {
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        GEMMA,
        "<end_of_turn>",
    ),
    "phi": Family(
        "phi", phi_tokenizer, {"rope_parameters": PARTIAL | {"partial_rotary_factor": 0.5}}
    ),
    "mixtral": Family("mixtral", mistral_tokenizer, EXPERTS | {"num_local_experts": 4}),
    "qwen3-moe": Family(
        "qwen3_moe",
        qwen_tokenizer,
        EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 16},
        CHATML,
    ),
    "xglm": Family(
        "xglm",
        unigram,
        {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
    ),
}
# T5's own start is wide enough: `spread` widens it.
T5 = {"d_kv": 8, "d_ff": 64, "num_decoder_layers": 3, "initializer_factor": 0.2}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
BART = {
    "decoder_layers": 3, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "decoder_attention_heads": 2, "init_std": 0.1,
}  # fmt: skip
ENCODER_DECODERS = {
    "t5": Family("t5", t5_tokenizer, T5, decoder_start="pad_token_id"),
    # FLAN-T5, T5 1.1 and UL2: gated, and an output layer of their own.
    "flan-t5": Family("t5", t5_tokenizer, T5 | GATED, decoder_start="pad_token_id"),
    "mt5": Family("mt5", t5_tokenizer, T5 | GATED, decoder_start="pad_token_id"),
    "bart": Family("bart", bart_tokenizer, BART, decoder_start="eos_token_id"),
}
FAMILIES = DECODERS | ENCODER_DECODERS
# Their experts are adapted through `lora.target_parameters`.
MIXTURES = ("mixtral", "qwen3-moe")


# Decoders by their `model_type`, built from what their configs know of these fields.
OTHERS = (
    "codegen", "cohere", "ctrl", "falcon", "glm", "gpt_bigcode", "gpt_neo", "gpt_oss", "gptj",
    "granite", "granitemoe", "llama4_text", "mamba", "mpt", "olmo2", "olmoe", "openai-gpt",
    "persimmon", "phi3", "phimoe", "qwen2", "qwen2_moe", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
SIZES = SHAPE | {
    "d_model": 32, "n_embd": 32, "n_layer": 2, "n_layers": 2, "n_head": 4, "n_heads": 4,
    "num_layers": 2, "num_heads": 4, "n_positions": 64, "rotary_dim": 4, "max_seq_len": 64,
    "attention_types": [[["global", "local"], 1]], "num_key_value_heads": 2, "head_dim": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}  # fmt: skip


def other_family(model_type: str) -> Family:
    """A decoder that is none of the table's, by the fields of `SIZES` that its config has."""
    config = CONFIG_MAPPING[model_type]
    known = set(signature(config.__init__).parameters) | set(config.attribute_map)
    fields = {name: size for name, size in SIZES.items() if name in known}
    return Family(model_type, gpt2_tokenizer, fields, shape={})


def make_model(family: Family, tokenizer: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A model of the family in plain transformers; the same one each time."""
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family.decoder_start is not None:
        ids["decoder_start_token_id"] = getattr(tokenizer, family.decoder_start)
    config = AutoConfig.for_model(family.model_type, **family.shape | family.fields | ids)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=dtype).eval()
    spread(model)
    return model


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Weights further apart, and no bias or norm where it began."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(4)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))


def write_model(name: str, folder: Path) -> Path:
    """Save a family's model and tokenizer as its checkpoints are."""
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    tokenizer.chat_template = family.template
    model = make_model(family, tokenizer)
    ends = [tokenizer.eos_token_id]
    if family.end_of_turn is not None:
        ends.append(tokenizer.convert_tokens_to_ids(family.end_of_turn))
    model.generation_config = GenerationConfig(eos_token_id=ends)
    if family.decoder_start is not None:
        start = model.config.decoder_start_token_id
        model.generation_config.decoder_start_token_id = start
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain_model(folder: Path) -> Any:
    """The model of a folder in plain transformers."""
    return auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder)


def auto_class(config: Any) -> Any:
    """transformers' class for a config."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


@torch.no_grad()
def plain_logprobs(
    model: Any, prompt: list[int], response: list[int], temperature: float = 1.0
) -> list[float]:
    """Log-probs of one response alone: no padding, no mask, no cache."""
    logits = model(**plain_inputs(model, prompt, response)).logits[0] / temperature
    logprobs = logits.log_softmax(-1)
    # Token 0 is predicted by the prompt's last token, or by the token that a decoder begins with.
    first = 0 if model.config.is_encoder_decoder else len(prompt) - 1
    return [logprobs[first + t, token].item() for t, token in enumerate(response)]


def plain_inputs(model: Any, prompt: list[int], response: list[int]) -> dict[str, torch.Tensor]:
    """One row for `forward`: one sequence, or the prompt for the encoder."""
    if not model.config.is_encoder_decoder:
        return {"input_ids": torch.tensor([prompt + response])}
    read = [model.config.decoder_start_token_id, *response]
    return {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([read])}


@torch.no_grad()
def final_state(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """The final hidden state (d,) at the response's last token."""
    out = model(**plain_inputs(model, prompt, response), output_hidden_states=True)
    states = getattr(out, "decoder_hidden_states", None) or out.hidden_states
    state: torch.Tensor = states[-1][0, -1]
    return state


def write_rows(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Rows as a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
