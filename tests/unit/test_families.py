"""Each family's log-probs against plain `transformers`: padded, packed, and as they were sampled.

The plain pass reads one row alone, without padding, mask or cache.
"""

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from pipeline.batches import TokenBatch
from pipeline.codec import Codec
from pipeline.config import DataSection, LoraSection, ModelSection
from pipeline.errors import ModelError
from pipeline.generation import NativeEngine, Sampling
from pipeline.generation.caches import needs_static_batches
from pipeline.generation.local import serving
from pipeline.generation.static import StaticEngine
from pipeline.models import adapters
from pipeline.models.joiner import (
    PACKED_FAMILIES,
    DecoderJoiner,
    EncoderDecoderJoiner,
    PackedJoiner,
)
from pipeline.models.loading import refuse_encoder
from pipeline.models.passes import recomputing
from pipeline.models.store import ModelStore
from pipeline.models.trunk import BaseOrigin, Handle, Role, Trunk
from tests.families import (
    DECODERS,
    ENCODER_DECODERS,
    FAMILIES,
    MIXTURES,
    OTHERS,
    PARTIAL,
    Family,
    gpt2_tokenizer,
    make_model,
    other_family,
    plain_logprobs,
    plain_model,
    write_model,
)

TOLERANCE = 1e-4  # in float32
TEMPERATURE = 0.7
RESPONSES = [[20, 21, 22], [30, 31, 32, 33, 34, 35, 36], [40]]
PACKED = [name for name, f in DECODERS.items() if f.model_type in PACKED_FAMILIES]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory) -> tuple[Handle, Any]:
    """Our handle, and the same folder in plain transformers."""
    folder = write_model(request.param, tmp_path_factory.mktemp(request.param))
    with pytest.MonkeyPatch.context() as patch:
        # On a processor attention is called once a sequence, in wide models.
        patch.setattr("pipeline.models.sequence_attention.WORTH_IT_FROM", 0)
        handle = ModelStore(ModelSection(path=str(folder)), DataSection()).pretrained()
    return handle, plain_model(folder)


def prompts(handle: Handle) -> list[list[int]]:
    """Longer than the windows; with the ids of pad and end in them, which mean nothing there."""
    pad, end = handle.codec.pad_id, handle.codec.end_id
    return [[5, 6, 7, pad, 8, 9, 10, end, 11, 12], [pad, 13, 14], [15]]


def assert_plain(handle: Handle, plain: Any, monkeypatch, joiner: Any = None) -> None:
    """The numbers of a batch, joined by `joiner` or as the trunk does, are each row's alone."""
    rows = prompts(handle)
    batch = TokenBatch.from_ragged(rows, RESPONSES, pad_id=handle.codec.pad_id)
    if joiner is not None:
        monkeypatch.setattr(handle.trunk, "joiner", joiner)
    with torch.no_grad():
        found = handle(batch, {"logprobs"}, TEMPERATURE).logprobs
    for row, (prompt, response) in enumerate(zip(rows, RESPONSES, strict=True)):
        wanted = plain_logprobs(plain, prompt, response, TEMPERATURE)
        assert found[row, : len(response)].tolist() == pytest.approx(wanted, abs=TOLERANCE)


def test_logits_are_far_from_uniform(family):
    """Otherwise what follows would show little."""
    handle, _ = family
    batch = TokenBatch.from_ragged(prompts(handle), RESPONSES, pad_id=0)
    with torch.no_grad():
        logprobs = handle(batch, {"logprobs"}).logprobs[batch.response_mask]
    assert logprobs.std() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", DECODERS, indirect=True)
def test_padded(family, side, monkeypatch):
    handle, plain = family
    assert_plain(handle, plain, monkeypatch, DecoderJoiner(handle.trunk.model, side))


@pytest.mark.parametrize("family", ENCODER_DECODERS, indirect=True)
def test_prompts_in_an_encoder(family, monkeypatch):
    """Padded on the right: BART's encoder counts positions from the first column."""
    handle, plain = family
    assert isinstance(handle.trunk.joiner, EncoderDecoderJoiner)
    assert_plain(handle, plain, monkeypatch)


@pytest.mark.parametrize("family", PACKED, indirect=True)
def test_packed_by_positions(family, monkeypatch):
    """As kernels on GPUs are told; here transformers makes the mask from them."""
    handle, plain = family
    assert_plain(handle, plain, monkeypatch, PackedJoiner(handle.trunk.model))


# Gemma 2 is eager only: it caps the products.
@pytest.mark.parametrize("family", sorted(set(PACKED) - {"gemma2"}), indirect=True)
def test_packed_by_lengths(family, monkeypatch):
    handle, plain = family
    assert handle.trunk.packs and handle.trunk.joiner.tells_lengths
    assert_plain(handle, plain, monkeypatch)


def test_sampled(family):
    """The log-probs that the native engine returns with its tokens."""
    handle, plain = family
    sampling = Sampling(12, TEMPERATURE, seed=3)
    if handle.trunk.model.config.is_encoder_decoder:
        assert serving(handle, sampling) is StaticEngine  # tells none; PPO computes its own
        return
    assert serving(handle, sampling) is NativeEngine
    rows = prompts(handle) * 2
    made = NativeEngine(max_rows=4).generate(handle, rows, range(len(rows)), sampling)
    assert sum(map(len, made.response_ids)) > 12
    for prompt, response, told in zip(rows, made.response_ids, made.logprobs, strict=True):
        wanted = plain_logprobs(plain, prompt, response, TEMPERATURE)
        assert told == pytest.approx(wanted, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "field", "other"),
    [
        ("gpt-neox", "rope_parameters", PARTIAL | {"partial_rotary_factor": 1.0}),
        ("gpt-neox", "use_parallel_residual", False),
        ("opt-350m", "do_layer_norm_before", True),
        ("llama3", "rope_parameters", {"rope_type": "default", "rope_theta": 10_000.0}),
        ("mistral", "sliding_window", None),
        ("gemma2", "sliding_window", 64),
        ("gemma2", "attn_logit_softcapping", None),
        ("gemma2", "final_logit_softcapping", None),
        ("gemma3", "sliding_window", 64),
        ("phi", "rope_parameters", PARTIAL | {"partial_rotary_factor": 1.0}),
        ("mixtral", "num_experts_per_tok", 1),
    ],
)
def test_what_makes_a_family_its_own_is_seen_in_the_numbers(name, field, other):
    """Windows, caps and rotations change log-probs by far more than the tolerance."""
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    without = Family(family.model_type, family.tokenizer, family.fields | {field: other})
    response = list(range(20, 40))
    one, two = (
        plain_logprobs(make_model(f, tokenizer), [5, 6, 7], response) for f in (family, without)
    )
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) > 10 * TOLERANCE


_GATED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
TARGETS = {
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "gpt-neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "opt-350m": {
        "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out",
    },
    "bloom": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "llama3": _GATED,
    "mistral": _GATED,
    "qwen3": _GATED,
    "gemma": _GATED,
    "gemma2": _GATED,
    "gemma3": _GATED,
    "phi": {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
    "xglm": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "t5": {"q", "k", "v", "o", "wi", "wo"},
    "flan-t5": {"q", "k", "v", "o", "wi_0", "wi_1", "wo"},
    "mt5": {"q", "k", "v", "o", "wi_0", "wi_1", "wo"},
    "bart": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
}  # fmt: skip


def new_model(name: str) -> Any:
    family = FAMILIES[name]
    return make_model(family, family.tokenizer()).requires_grad_(False)


@pytest.mark.parametrize("name", TARGETS)
def test_all_linear_is_every_linear_layer_but_the_output_layer(name):
    model = new_model(name)
    layers = {n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
    adapters.add_adapter(model, "a", adapters.lora_config(LoraSection(rank=2)))
    found = {key.split(".lora_")[0] for key, _ in model.named_parameters() if ".lora_" in key}
    assert found == layers - {"lm_head"}
    assert {path.rpartition(".")[2] for path in found} == TARGETS[name]


def test_every_family_has_its_targets():
    assert TARGETS.keys() | set(MIXTURES) | {"gpt2-wordpiece"} == FAMILIES.keys()


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("gpt2", "q_proj", r"'q_proj'.*GPT2LMHeadModel.*c_attn, c_fc, c_proj$"),
        ("llama3", "k_porj", r"'k_porj'.*did you mean 'k_proj'\?.*down_proj, gate_proj, k_proj"),
        ("opt", "mlp", r"'mlp'.*OPTForCausalLM has no such layer"),
        ("llama3", "mlp", r"'mlp'.*no such layer"),  # it has one, which is no matrix
    ],
)
def test_layers_that_a_family_has_not_are_named_with_those_that_it_has(name, wrong, words):
    right = sorted(TARGETS[name])[0]
    lora = LoraSection(rank=2, target_modules=(right, wrong))
    with pytest.raises(ModelError, match=words):
        adapters.add_adapter(new_model(name), "a", adapters.lora_config(lora))
    pattern = adapters.lora_config(LoraSection(rank=2, target_modules=rf".*\.{wrong}"))
    with pytest.raises(ModelError, match=rf"Its linear layers are: .*{right}"):
        adapters.add_adapter(new_model(name), "a", pattern)


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_decoders(model_type, monkeypatch):
    """Padded log-probs are plain ones, and an adapter computes what its merged weights would."""
    family = other_family(model_type)
    tokenizer = family.tokenizer()
    model, plain = make_model(family, tokenizer), make_model(family, tokenizer)
    trunk = Trunk(model, BaseOrigin("random", "random"))
    trunk.freeze()
    handle = Handle(trunk, Role("base"), Codec(tokenizer))
    for side in ("left", "right"):
        assert_plain(handle, plain, monkeypatch, DecoderJoiner(model, side))
    adapters.add_adapter(model, "a", adapters.lora_config(LoraSection(rank=2)))
    for parameter in adapters.adapter_parameters(model, "a"):
        parameter.data = 0.1 * torch.randn(parameter.shape)
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        adapters.activate(model, "a")
        adapted, bare = model(ids).logits, plain(ids).logits
        adapters.bake(model, "a")
        baked = model(ids).logits
    assert (adapted - bare).abs().max() > 1e-2
    torch.testing.assert_close(adapted, baked, rtol=0, atol=1e-3)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlnet", "cpmant"])
def test_what_reads_ahead_is_no_decoder(model_type):
    with pytest.raises(ModelError, match=rf"no decoder \({model_type}\).*left to right"):
        refuse_encoder(AutoConfig.for_model(model_type), "org/model")
    if model_type == "bert":  # some were trained as decoders
        refuse_encoder(AutoConfig.for_model(model_type, is_decoder=True), "org/model")


def test_models_without_a_cache_get_static_batches():
    assert needs_static_batches(AutoConfig.for_model("openai-gpt")) == "openai-gpt keeps no cache"


def test_layers_that_cannot_be_recomputed_are_said_to_be_so():
    model = make_model(other_family("ctrl"), gpt2_tokenizer())
    said = pytest.raises(ModelError, match="set gradient_checkpointing to false")
    with said, recomputing(model, lambda *_: None):
        pass
