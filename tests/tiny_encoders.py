"""Encoders of real architectures and tokenizers trained here: small, random, no network."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

TEXTS = [
    "the cat sat on the mat and ran away",
    "human: which colour is the ball? assistant: it is red, green or blue",
    "안녕하세요 고양이",
    "0123456789 .,!?:",
] * 4
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def word_piece() -> PreTrainedTokenizerFast:
    """BERT's kind: `[CLS] A [SEP] B [SEP]` with types 0 and 1."""
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    named = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    raw.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=named))
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", raw.token_to_id("[CLS]")), ("[SEP]", raw.token_to_id("[SEP]"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def byte_level() -> PreTrainedTokenizerFast:
    """RoBERTa's kind: `<s> A </s> </s> B </s>` without types."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    named = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=named,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(TEXTS, trainer)
    raw.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def unigram() -> PreTrainedTokenizerFast:
    """DeBERTa-v2's kind: pieces of a Unigram model, `[CLS] A [SEP] B [SEP]`."""
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    named = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=named, unk_token="[UNK]")
    raw.train_from_iterator(TEXTS, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )


def make_encoder(
    kind: str, positions: int = 64, **fields: Any
) -> tuple[Any, PreTrainedTokenizerFast]:
    """A random encoder far from its initial near-zero weights, and its tokenizer."""
    torch.manual_seed(3)
    tokenizer = {"bert": word_piece, "roberta": byte_level}.get(kind, unigram)()
    sizes = SIZES | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    sizes |= fields
    model: Any
    if kind == "bert":
        model = BertModel(BertConfig(max_position_embeddings=positions, **sizes))
    elif kind == "roberta":  # positions count from behind the padding's
        config = RobertaConfig(max_position_embeddings=positions + 2, type_vocab_size=1, **sizes)
        model = RobertaModel(config)
    elif kind == "deberta-v2":
        model = DebertaV2Model(
            DebertaV2Config(
                max_position_embeddings=positions,
                relative_attention=True,
                position_buckets=8,
                pos_att_type=["p2c", "c2p"],
                norm_rel_ebd="layer_norm",
                share_att_key=True,
                type_vocab_size=0,
                **sizes,
            )
        )
    else:
        model = ModernBertModel(
            ModernBertConfig(
                max_position_embeddings=positions,
                global_attn_every_n_layers=2,
                local_attention=8,
                classifier_pooling="mean",
                cls_token_id=1,
                sep_token_id=2,
                bos_token_id=None,
                eos_token_id=None,
                **sizes,
            )
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval(), tokenizer


def save_encoder(kind: str, folder: Path, positions: int = 64, **fields: Any) -> Path:
    """A folder that `reward.base` can name."""
    model, tokenizer = make_encoder(kind, positions, **fields)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
