"""Base models and tokenizers: from the Hub, from a folder, or small ones built from a config."""

import hashlib
import inspect
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.config import ArchitectureSection, ModelSection
from pipeline.errors import ConfigError, ModelError
from pipeline.models import lean_layers
from pipeline.runfolder import file_hash

END_TOKEN = "<|end|>"
PAD_TOKEN = "<|pad|>"


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a `model.dtype`."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_pretrained(
    section: ModelSection, path: str, revision: str | None, device: torch.device
) -> tuple[Any, Any]:
    """A model and its tokenizer from a Hub id or a local folder.

    A quantised one (`model.quantization`) lies on `device`; others lie in main memory.

    Raises:
        ModelError: missing, gated, unsafe (pickled weights), without some of its weights, of an
            architecture that no stage can train, or not to be quantised here; says what to do.
    """
    from transformers import AutoTokenizer

    options: dict[str, Any] = {
        "revision": revision or "main",
        "trust_remote_code": section.trust_remote_code,
    }
    placed = quantised_loading(section, device)
    with explain_load_errors(path, revision), without_bars():
        config = load_config(section, path, revision)
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        kind, arguments = auto_class(config)
        with without_report(hidden=is_encoder(config)):
            model, found = kind.from_pretrained(
                path,
                config=config,
                dtype=torch_dtype(section.dtype),
                use_safetensors=True,
                output_loading_info=True,
                **({"attn_implementation": section.attn_implementation} | arguments),
                **options,
                **placed,
            )
    if is_encoder(config) and found["missing_keys"]:
        raise ModelError(
            f"model {path!r} lacks {len(found['missing_keys'])} weights of a {config.model_type}, "
            f"the first is {min(found['missing_keys'])}: they would be random. Name a whole model"
        )
    layers: Iterable[Any] = model.modules()
    for layer in layers:
        # With AVX512-BF16, bitsandbytes rewrites a 4-bit layer at its first pass without gradient:
        # its scales lose bits, and no gradient goes through it afterwards, without a word.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    lean_layers.slim(model)
    return model, tokenizer


ALIGNMENT = 64  # bytes, as torch allocates


def align(model: Any) -> None:
    """Move weights that lie in a mapped file, behind its header, to where torch would put them.

    Matrix products of processors may round differently by alignment: a process that opens a model
    would not compute what the one that trained it does, to the bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def quantised_loading(section: ModelSection, device: torch.device) -> dict[str, Any]:
    """transformers' arguments for `model.quantization`: none without one.

    4 bits are NF4 with quantised scales (QLoRA, arXiv:2305.14314), computed in `model.dtype`, or in
    that of autocast; 8 bits are LLM.int8() (arXiv:2208.07339), computed in float16, where outliers
    of one row change the rounding of those that are computed with it.

    Raises:
        ModelError: bitsandbytes is missing, or has nothing for this device.
    """
    name = section.quantization
    if name == "none":
        return {}
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:  # also a library that does not load
        raise ModelError(
            f"model.quantization is {name}, which needs the bitsandbytes package "
            f"({type(error).__name__}: {error}): pip install 'rlhf-pipeline[quant]', or set "
            "model.quantization to none"
        ) from error
    # Where its library has no kernels for the platform, the import still goes through.
    supported = {str(kind) for kind in getattr(bitsandbytes, "supported_torch_devices", ())}
    if device.type not in supported:
        raise ModelError(
            f"model.quantization is {name}, but bitsandbytes {bitsandbytes.__version__} computes "
            f"on {', '.join(sorted(supported)) or 'no device'} and not on {device.type}: set "
            "run.device to cpu, or model.quantization to none"
        )
    from transformers import BitsAndBytesConfig

    # It says at every layer of every forward that 8 bits are computed in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    settings = BitsAndBytesConfig(
        load_in_8bit=name == "8bit",
        load_in_4bit=name == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch_dtype(section.dtype),
    )
    return {"quantization_config": settings, "device_map": {"": str(device)}}


def is_quantised(model: Any) -> bool:
    """Whether the model's linear layers hold numbers of 4 or 8 bits."""
    return bool(getattr(model, "is_quantized", False))


def auto_class(config: Any) -> tuple[Any, dict[str, Any]]:
    """transformers' class that loads an architecture for us, and its arguments.

    An encoder comes without its pooler: a layer that no score of ours reads would have no gradient,
    for which DDP waits. `model.attn_implementation` is the policy's and not for encoders.
    """
    from transformers import AutoModel

    if not is_encoder(config):
        return language_model(config), {}
    made: Any = AutoModel._model_mapping[type(config)]
    made = made[0] if isinstance(made, tuple) else made  # Funnel has a second, half of it
    takes_pooler = "add_pooling_layer" in inspect.signature(made).parameters
    without_pooler = {"add_pooling_layer": False} if takes_pooler else {}
    return AutoModel, {"attn_implementation": None} | without_pooler


def is_encoder(config: Any) -> bool:
    """Whether an architecture reads text in both directions and writes none (BERT and its kin)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    writes = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not writes


# Bidirectional, or of parts that no prompt makes, under transformers' causal language models.
_NO_DECODERS = {"cpmant", "trocr", "xlm", "xlnet"}


def refuse_encoder(config: Any, path: str) -> None:
    """Raise ModelError where a model is to write text and cannot."""
    if is_encoder(config) or config.model_type in _NO_DECODERS:
        raise ModelError(
            f"{path} is no decoder ({config.model_type}): its tokens read what comes after them, "
            "so that it cannot write text from left to right, and no policy can start from it. As "
            "the base of a reward model, name it in reward.base"
        )


def load_config(section: ModelSection, path: str, revision: str | None) -> Any:
    """The architecture's config of a Hub id or folder."""
    from transformers import AutoConfig

    with explain_load_errors(path, revision):
        return AutoConfig.from_pretrained(
            path, revision=revision or "main", trust_remote_code=section.trust_remote_code
        )


def language_model(config: Any) -> Any:
    """The Auto class of a config: of decoders, or of encoder-decoders."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


# Where architectures call the fields of `model.architecture` by other names, for which their
# configs have no synonym.
_OTHER_NAMES = {
    "num_hidden_layers": ("decoder_layers", "num_decoder_layers"),
    "num_attention_heads": ("decoder_attention_heads",),
    "intermediate_size": ("d_ff", "encoder_ffn_dim", "decoder_ffn_dim"),
}


def build_from_config(section: ArchitectureSection, tokenizer: Any, dtype: torch.dtype) -> Any:
    """A language model with random weights for a tokenizer's vocabulary (torch's global RNG).

    Raises:
        ConfigError: the architecture does not exist, or its fields do not fit one another.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if section.model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"model.architecture.model_type={section.model_type!r} is not an architecture of "
            "transformers; small ones that work here: llama, qwen3, gpt_neox, gpt2, phi, t5, bart"
        )
    fields = section.model_dump(exclude={"model_type", "extra"})
    known = inspect.signature(CONFIG_MAPPING[section.model_type].__init__).parameters
    if "num_key_value_heads" in known:
        fields["num_key_value_heads"] = section.num_attention_heads
    for name in {"head_dim", "d_kv"} & known.keys():
        fields[name] = section.hidden_size // section.num_attention_heads
    for name, others in _OTHER_NAMES.items():
        fields |= {other: fields[name] for other in others if other in known}
    if CONFIG_MAPPING[section.model_type].is_encoder_decoder:
        fields["decoder_start_token_id"] = tokenizer.pad_token_id
    fields |= section.extra
    config = AutoConfig.for_model(
        section.model_type,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **fields,
    )
    try:
        model = language_model(config).from_config(config, dtype=dtype)
        lean_layers.slim(model)
        return model
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"model.architecture cannot be built: {error}") from error


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Any:
    """A byte-level BPE tokenizer trained on `texts`: any script, no unknown token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary_size < len(alphabet) + 2:
        raise ConfigError(
            f"model.vocabulary_size={vocabulary_size} is below {len(alphabet) + 2}: 256 bytes and "
            "the two special tokens"
        )
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PAD_TOKEN, END_TOKEN],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=END_TOKEN, pad_token=PAD_TOKEN, padding_side="left"
    )


def stop_ids(model: Any) -> frozenset[int]:
    """Every id that ends a response according to the model's generation config."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos is None:
        return frozenset()
    return frozenset(eos if isinstance(eos, list) else [eos])


def base_identity(path: str, revision: str | None) -> str:
    """What identifies the weights of a folder (their hash) or a Hub model (id and revision)."""
    if Path(path).is_dir():
        return folder_identity(Path(path))
    return f"{path}@{revision or 'main'}"


def cached_commit(path: str, revision: str | None) -> str | None:
    """The commit of a Hub model that has been loaded, from where it lies in the local cache."""
    from transformers.utils.hub import cached_file

    config = cached_file(path, "config.json", revision=revision or "main", local_files_only=True)
    return Path(config).parent.name if config is not None else None


def folder_identity(folder: Path) -> str:
    """SHA-256 over the weight files of a model folder: what adapters trained on it belong to."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no .safetensors weights; {_CONVERT}")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}:{file_hash(path)}\n".encode())
    return digest.hexdigest()


_CONVERT = (
    "pickled weights (.bin, .pt) can run code when loaded and are refused: convert them once with "
    "transformers' save_pretrained, or name a revision that has safetensors"
)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers' bars over weight files off the screen (downloads show their own)."""
    from transformers.utils import logging as screen

    shown = screen.is_progress_bar_enabled()
    screen.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            screen.enable_progress_bar()


@contextmanager
def without_report(*, hidden: bool) -> Iterator[None]:
    """Keep off the screen which weights of an encoder's files are of heads that we do not load."""
    logger = logging.getLogger("transformers.modeling_utils")

    def keeps(record: logging.LogRecord) -> bool:
        return not (hidden and "LOAD REPORT" in record.getMessage())

    logger.addFilter(keeps)
    try:
        yield
    finally:
        logger.removeFilter(keeps)


@contextmanager
def explain_load_errors(path: str, revision: str | None) -> Iterator[None]:
    """Turn transformers' and the Hub's errors into a `ModelError` that says what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"model {path!r}: {_advice(error, revision)}") from error


def _advice(error: BaseException, revision: str | None) -> str:
    text = f"{type(error).__name__} {error} {error.__cause__!r}"
    if "gated" in text.lower() or "401" in text or "403" in text:
        return (
            "access is refused. If it is gated, accept its licence on its Hub page; then run "
            "`hf auth login` or set HF_TOKEN."
        )
    absent = ("does not appear to have a file", "no file named")
    if "safetensors" in text and any(words in text for words in absent):
        return f"it has no safetensors weights; {_CONVERT}."
    if "trust_remote_code" in text:
        return (
            "it needs Python code from its repository. Read that code, then set "
            "model.trust_remote_code=true and a fixed model.revision."
        )
    if "RevisionNotFound" in text:
        return f"it has no revision {revision!r}. Set model.revision to one it has."
    if "RepositoryNotFound" in text or "not a valid model identifier" in text:
        return "no such folder here and no such model on the Hub. Check model.path."
    if any(word in text for word in ("OfflineMode", "LocalEntryNotFound", "couldn't connect")):
        return (
            "it is neither a local folder nor in the local Hub cache, and the Hub cannot be "
            "reached. Download it where there is a network (`hf download`), or set model.path "
            "to a folder."
        )
    return f"{type(error).__name__}: {error}"
