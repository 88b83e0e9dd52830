"""The forms of an export: what their cards call them, and the commands that load them."""

from dataclasses import dataclass
from typing import Literal

Form = Literal[
    "adapter",
    "sft_adapter",
    "reward_adapter",
    "base",
    "reward_base",
    "merged",
    "vllm",
    "gguf",
    "reward",
]
Task = Literal["text-generation", "text-classification"]

_LOAD_MODEL = """\
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{folder}", dtype="{dtype}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""
_LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer

base = {auto_class}.from_pretrained("{base}"{revision}, dtype="{dtype}")
model = PeftModel.from_pretrained(base, "{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""
_SERVE = """\
vllm serve {base}{revision} --tokenizer ./vllm --generation-config ./vllm \\
    --enable-lora --max-lora-rank {max_rank} --lora-modules policy=./vllm"""
_RUN_GGUF = "llama-cli -m ./gguf/policy-{outtype}.gguf"
_LOAD_CLASSIFIER = """\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("{folder}", dtype="{dtype}").eval()
tokenizer = AutoTokenizer.from_pretrained("{folder}")
reward_shift = model.config.reward_shift"""
_LOAD_CLASSIFIER_ADAPTER = """\
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

base = AutoModelForSequenceClassification.from_pretrained(
    "{base}"{revision}, num_labels=1, pad_token_id={pad_id}, dtype="{dtype}"
)
model = PeftModel.from_pretrained(base, "{folder}").eval()
tokenizer = AutoTokenizer.from_pretrained("{folder}")
reward_shift = {shift!r}"""
_SCORE = """


def token_ids(prompt, response):
    \"\"\"Prompt and response are tokenised apart; the response is closed by its end token.\"\"\"
    prompt_ids = {prompt_ids}
    response_ids = tokenizer({response}, add_special_tokens=False).input_ids
    return prompt_ids + response_ids + [tokenizer.convert_tokens_to_ids({end_token!r})]


def score(pairs):
    rows = [token_ids(prompt, response) for prompt, response in pairs]
    batch = tokenizer.pad({{"input_ids": rows}}, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits[:, 0] - reward_shift"""
TEXT_IDS = "tokenizer(prompt).input_ids"
_TURN_IDS = """tokenizer(
        tokenizer.apply_chat_template(
            [SYSTEM{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        ),
        add_special_tokens=False,
    ).input_ids"""


def turn_ids(system_prompt: str | None) -> str:
    """Code that makes the ids of a prompt as a user's turn, behind the system turn, if any."""
    turn = "" if system_prompt is None else f'{{"role": "system", "content": {system_prompt!r}}}, '
    return _TURN_IDS.replace("SYSTEM", turn)


@dataclass(frozen=True)
class Words:
    """What a card says of its form, whatever the run."""

    title: str
    what: str
    whose_numbers: str
    loading: str
    library: str = "transformers"
    task: Task = "text-generation"
    tags: tuple[str, ...] = ("rlhf", "ppo")
    language: str = "python"  # of the commands that load it


_BASE_NUMBERS = "With its adapters, it is the models that these numbers are about."
_REWARD_NUMBERS = "The policy called PPO was trained against this reward model."
FORMS: dict[Form, Words] = {
    "adapter": Words(
        "RLHF policy (LoRA adapter)",
        "the policy as a LoRA adapter (PEFT)",
        "On its base, this is the policy called PPO.",
        _LOAD_ADAPTER,
        library="peft",
        tags=("rlhf", "ppo", "lora"),
    ),
    "sft_adapter": Words(
        "Supervised policy (LoRA adapter)",
        "the policy after supervised fine-tuning, before PPO, as a LoRA adapter (PEFT)",
        "On its base, this is the policy called SFT.",
        _LOAD_ADAPTER,
        library="peft",
        tags=("rlhf", "sft", "lora"),
    ),
    "reward_adapter": Words(
        "Reward model (LoRA adapter)",
        "the reward model as a LoRA adapter with its head (PEFT, sequence classification)",
        f"On its base, {_REWARD_NUMBERS[0].lower()}{_REWARD_NUMBERS[1:]}",
        _LOAD_CLASSIFIER_ADAPTER + _SCORE,
        library="peft",
        task="text-classification",
        tags=("rlhf", "reward-model", "lora"),
    ),
    "base": Words(
        "Base of an RLHF policy",
        "the base model of the adapters that lie beside it",
        _BASE_NUMBERS,
        _LOAD_MODEL,
        tags=("rlhf", "sft"),
    ),
    "reward_base": Words(
        "Base of a reward model",
        "the base model of the reward model's adapter, which lies beside it in `reward_adapter/`",
        _BASE_NUMBERS,
        _LOAD_MODEL,
        tags=("rlhf", "sft"),
    ),
    "merged": Words(
        "RLHF policy",
        "the policy as one plain model",
        "This is the policy called PPO.",
        _LOAD_MODEL,
    ),
    "vllm": Words(
        "RLHF policy (LoRA adapter for vLLM)",
        "the policy as a LoRA adapter for a vLLM server",
        "On its base, this is the policy called PPO.",
        _SERVE,
        library="vllm",
        tags=("rlhf", "ppo", "lora"),
        language="sh",
    ),
    "gguf": Words(
        "RLHF policy (GGUF)",
        "the policy as a GGUF file for llama.cpp",
        "But for the rounding of its weights, this is the policy called PPO.",
        _RUN_GGUF,
        library="gguf",
        language="sh",
    ),
    "reward": Words(
        "Reward model",
        "the reward model as a plain sequence classifier with one label",
        _REWARD_NUMBERS,
        _LOAD_CLASSIFIER + _SCORE,
        task="text-classification",
        tags=("rlhf", "reward-model"),
    ),
}
