"""Trunk, heads and adapters against plain transformers and plain peft."""

import copy
import json

import pytest
import torch
from torch import nn

from pipeline.batches import TokenBatch
from pipeline.config import LoraSection
from pipeline.errors import ModelError
from pipeline.fit_config import FitSection
from pipeline.models import adapters
from pipeline.models.heads import ScalarHead
from pipeline.models.joiner import DecoderJoiner
from pipeline.models.trunk import Role

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13]]
RESPONSES = [[20, 21], [22, 23, 24, 25, 26], [27]]
EVERYTHING = {"logprobs", "entropy", "values", "scores"}
DECODERS = {
    "llama": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64, "do_layer_norm_before": True},
    "phi": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"final_logit_softcapping": 5.0, "sliding_window": 4, "query_pre_attn_scalar": 16},
    "bloom": {"n_layer": 2, "n_head": 2},
}
# Their attention takes softmax in float32, where float64's mask of -1.8e308 becomes -inf and a
# padding position that sees nothing becomes NaN: a float64 run of them is not possible.
FLOAT32_ONLY = {"gemma2", "bloom"}


def batch() -> TokenBatch:
    return TokenBatch.from_ragged(PROMPTS, RESPONSES, pad_id=0)


def train_adapter(model, name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.adapter_parameters(model, name):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(0.1 * noise.to(parameter.dtype))


@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.parametrize("padding_side", ["left", "right"])
@torch.no_grad()
def test_outputs_equal_plain_transformers_row_by_row(make_handle, model_type, padding_side):
    dtype, tolerance = ("float32", 1e-4) if model_type in FLOAT32_ONLY else ("float64", 1e-9)
    handle = make_handle(model_type, dtype, **DECODERS[model_type])
    handle.trunk.add_head("h").init_normal(torch.Generator().manual_seed(1))
    handle.trunk.joiner.padding_side = padding_side
    out = handle.with_role("r", head="h")(batch(), EVERYTHING, temperature=0.7)
    head = handle.trunk.heads["h"]
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids = torch.tensor([prompt + response])
        seen = []
        layer = handle.trunk.model.get_output_embeddings()
        hook = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0]))
        logp = (handle.trunk.model(ids).logits[0] / 0.7).log_softmax(-1)
        hook.remove()
        for t, token in enumerate(response):
            at = len(prompt) - 1 + t  # the position that predicts response token t
            assert out.logprobs[row, t] == pytest.approx(logp[at, token].item(), abs=tolerance)
            entropy = -(logp[at].exp() * logp[at]).sum().item()
            assert out.entropy[row, t] == pytest.approx(entropy, abs=tolerance)
            value = (seen[0][at] @ head.weight + head.bias).item()
            assert out.values[row, t] == pytest.approx(value, abs=tolerance)
        score = (seen[0][-1] @ head.weight + head.bias).item()
        assert out.scores[row] == pytest.approx(score, abs=tolerance)
        for field in (out.logprobs, out.entropy, out.values):
            assert not field[row, len(response) :].any()  # zeros on padding


def test_logits_are_made_at_response_positions_only(make_handle):
    handle = make_handle()
    rows = []
    handle.trunk.model.get_output_embeddings().register_forward_hook(
        lambda _module, _args, out: rows.append(out.shape[:-1].numel())
    )
    handle(batch(), {"logprobs"})
    assert rows == [2 + 5 + 1]
    handle.trunk.add_head("h")
    handle.with_role("r", head="h")(batch(), {"scores"})
    assert len(rows) == 1  # scores need no logits at all


def test_logits_in_chunks_are_the_same_numbers_and_gradients(make_handle, monkeypatch):
    handle = make_handle()
    handle.trunk.requires_grad_(True)
    widest = []

    def run() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out = handle(batch(), {"logprobs", "entropy"}, 0.7)
        handle.trunk.zero_grad()
        (out.logprobs.sum() + 0.1 * out.entropy.sum()).backward()
        grads = [p.grad.flatten() for p in handle.trunk.model.parameters()]
        return out.logprobs.detach(), out.entropy.detach(), torch.cat(grads)

    whole = run()
    handle.trunk.model.get_output_embeddings().register_forward_hook(
        lambda _module, _args, out: widest.append(out.shape[:-1].numel())
    )
    monkeypatch.setattr("pipeline.models.trunk.LOGITS_AT_A_TIME", 3 * handle.trunk.vocabulary_size)
    parts = run()
    assert widest == [3, 3, 2, 2, 3, 3]  # 2 + 5 + 1 rows, and again, last first, on the way back
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    with torch.no_grad():
        scored = handle(batch(), {"logprobs", "entropy"}, 0.7)
    torch.testing.assert_close(scored.logprobs, whole[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(scored.entropy, whole[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "opt", "phi", "bloom"])
def test_recomputed_activations_give_the_gradients_of_each_role(make_handle, model_type):
    """Two adapters on one base: the second computation must be in the role of the first."""
    extra = {
        "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64, "dropout": 0.5},
        "gpt2": {"resid_pdrop": 0.5, "attn_pdrop": 0.5},
        "bloom": {"n_layer": 2, "n_head": 2},
    }.get(model_type, {})
    handle = make_handle(model_type, **extra)
    roles = []
    for name in ("one", "two"):
        adapters.add_adapter(handle.trunk.model, name, adapters.lora_config(LoraSection(rank=2)))
        role = Role(name, adapter=name)
        for parameter in handle.trunk.role_parameters(role):
            parameter.data = torch.randn_like(parameter) * 0.1
        roles.append(role)
    handle.trunk.freeze()
    parameters = [p for role in roles for p in handle.trunk.role_parameters(role)]
    for parameter in parameters:
        parameter.requires_grad_(True)
    layers = handle.trunk.model.config.num_hidden_layers
    passes = []
    mlp = [m for n, m in handle.trunk.model.named_modules() if n.endswith(("mlp", "fc1"))]
    mlp[-1].register_forward_pre_hook(lambda *_: passes.append(1))

    def gradients(recompute: bool) -> torch.Tensor:
        handle.trunk.recompute = recompute
        handle.trunk.zero_grad()
        sums = [handle.trunk(batch(), role, {"logprobs"}).logprobs.sum() for role in roles]
        (sums[0] + 2 * sums[1]).backward()
        return torch.cat([p.grad.flatten() for p in parameters])

    plain = gradients(False)
    assert len(passes) == 2 and layers == 2
    torch.testing.assert_close(gradients(True), plain, rtol=0, atol=1e-10)
    assert len(passes) == 2 + 4  # each role forward, and again on the way back
    assert not any(module.training for module in handle.trunk.modules())


@pytest.mark.parametrize("bias", [True, False])
def test_lean_lora_is_pefts(bias):
    from peft.tuners.lora.layer import Linear

    from pipeline.models.lean_lora import LeanLoraLinear

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7, bias=bias), nn.Tanh(), nn.Linear(7, 3)).double()
    model.requires_grad_(False)
    section = LoraSection(rank=2, alpha=5, target_modules=["0", "2"])
    adapters.add_adapter(model, "a", adapters.lora_config(section))
    assert type(model[0]) is LeanLoraLinear
    trained = adapters.adapter_parameters(model, "a")
    for parameter in trained:
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
        parameter.requires_grad_(True)
    adapters.activate(model, "a")
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)

    def run() -> list[torch.Tensor]:
        for tensor in (*trained, x):
            tensor.grad = None
        out = model(x)
        (out**2).sum().backward()
        return [out.detach(), x.grad.clone(), *(p.grad.clone() for p in trained)]

    lean = run()
    for layer in (model[0], model[2]):
        layer.__class__ = Linear
    for one, other in zip(lean, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"dropout": 0.5}, {}])
def test_unusual_lora_is_left_to_peft(options):
    from peft.tuners.lora.layer import Linear

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3))
    model.requires_grad_(False)
    section = LoraSection(rank=2, target_modules=["0"], **options)
    adapters.add_adapter(model, "a", adapters.lora_config(section))
    for parameter in adapters.adapter_parameters(model, "a"):
        parameter.data = torch.randn_like(parameter)
    adapters.activate(model, "a")
    model.train()
    x = torch.randn(6, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not options):
        torch.manual_seed(1)
        ours = model(x)
        model[0].__class__ = Linear
        torch.manual_seed(1)
        theirs = model(x)
    assert ours.dtype == theirs.dtype == (torch.bfloat16 if not options else torch.float32)
    assert torch.equal(ours, theirs)


def test_head_normalisation_moves_scores_to_mean_0_and_deviation_1():
    head = ScalarHead(3, torch.float64)
    head.init_normal(torch.Generator().manual_seed(0))
    hidden = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        raw = head(hidden)
        head.normalise(raw.mean().item(), raw.std().item())
        scores = head(hidden)
        assert scores.mean().item() == pytest.approx(0, abs=1e-12)
        assert scores.std().item() == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(scores, (raw - raw.mean()) / raw.std(), rtol=0, atol=1e-12)
        # A second normalisation composes with the first; folding changes no score.
        head.normalise(0.25, 2.0)
        torch.testing.assert_close(head(hidden), (scores - 0.25) / 2, rtol=0, atol=1e-12)
        torch.testing.assert_close(head.folded()(hidden), head(hidden), rtol=0, atol=1e-12)
    assert (head.folded().shift.item(), head.folded().scale.item()) == (0, 1)


def test_head_init_has_deviation_one_over_root_of_width_plus_one():
    head = ScalarHead(40_000)
    head.init_normal(torch.Generator().manual_seed(0))
    # 1 / sqrt(40001) = 0.0049999; the sample deviation of 40,000 draws is within 2% of it
    assert head.weight.std().item() == pytest.approx(0.005, rel=0.02)
    assert head.bias.item() == 0


def test_roles_switch_without_touching_requires_grad_or_the_base(make_handle):
    handle = make_handle()
    model = handle.trunk.model
    with torch.no_grad():
        bare = handle(batch(), {"logprobs"}).logprobs
    before = handle.trunk.base_hash()
    adapters.add_adapter(model, "sft", adapters.lora_config(LoraSection(rank=4)))
    train_adapter(model, "sft")
    adapters.copy_adapter(model, "sft", "policy")
    train_adapter(model, "policy", seed=1)
    for parameter in adapters.adapter_parameters(model, "policy"):
        parameter.requires_grad_(True)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    outputs = {}
    for adapter in [None, "sft", "policy", None, "sft"]:
        role = handle.with_role("r", adapter=adapter)
        with torch.no_grad():
            logprobs = role(batch(), {"logprobs"}).logprobs
        torch.testing.assert_close(logprobs, outputs.setdefault(adapter, logprobs), rtol=0, atol=0)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    torch.testing.assert_close(outputs[None], bare, rtol=0, atol=0)
    assert (outputs["sft"] - bare).abs().max() > 1e-3
    assert (outputs["policy"] - outputs["sft"]).abs().max() > 1e-3
    assert handle.trunk.base_hash() == before
    assert all(".policy." in name for name in trainable)


def test_one_backward_through_two_roles_reaches_both_adapters(make_handle):
    handle = make_handle()
    trunk = handle.trunk
    adapters.add_adapter(trunk.model, "policy", adapters.lora_config(LoraSection(rank=4)))
    adapters.copy_adapter(trunk.model, "policy", "value")
    trunk.add_head("value").init_normal()
    policy, value = Role("policy", "policy"), Role("value", "value", "value")
    for role in (policy, value):
        train_adapter(trunk.model, role.adapter)
        for parameter in trunk.role_parameters(role):
            parameter.requires_grad_(True)

    def gradients(loss):
        trunk.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in trunk.named_parameters() if p.grad is not None}

    both = gradients(
        trunk(batch(), policy, {"logprobs"}).logprobs.sum()
        + trunk(batch(), value, {"values"}).values.pow(2).sum()
    )
    apart = gradients(trunk(batch(), policy, {"logprobs"}).logprobs.sum())
    apart |= gradients(trunk(batch(), value, {"values"}).values.pow(2).sum())
    assert both.keys() == apart.keys()
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, apart[name], rtol=1e-12, atol=1e-12)


def test_saved_adapter_loads_in_plain_peft(tmp_path, make_handle):
    from peft import PeftModel

    handle = make_handle()
    plain = copy.deepcopy(handle.trunk.model)
    adapters.add_adapter(handle.trunk.model, "sft", adapters.lora_config(LoraSection(rank=4)))
    train_adapter(handle.trunk.model, "sft")
    adapters.save_adapter(handle.trunk.model, "sft", tmp_path, "some/base")
    adapters.activate(handle.trunk.model, "sft")
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        ours = handle.trunk.model(ids).logits
        theirs = PeftModel.from_pretrained(plain, tmp_path)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"


def test_an_adapter_of_another_rank_is_refused(make_handle):
    model = make_handle().trunk.model
    adapters.add_adapter(model, "a", adapters.lora_config(LoraSection(rank=4)))
    adapters.add_adapter(model, "b", adapters.lora_config(LoraSection(rank=8)))
    with pytest.raises(ModelError, match=r"adapter 'a' does not fit.*lora\.rank"):
        adapters.load_adapter_state(model, "a", adapters.adapter_state(model, "b"))


def test_targets_that_do_not_exist_are_named(make_handle):
    model = make_handle().trunk.model
    config = adapters.lora_config(LoraSection(target_modules=("no_such_proj",)))
    with pytest.raises(ModelError, match=r"lora\.target_modules.*no_such_proj"):
        adapters.add_adapter(model, "a", config)


def test_a_module_called_like_an_adapter_is_not_taken_for_it():
    assert adapters.is_of("layers.0.q_proj.lora_A.value.weight", "value")
    assert adapters.is_of("embed_tokens.lora_embedding_A.value", "value")
    assert not adapters.is_of("layers.0.attention.value.weight", "value")
    assert not adapters.is_of("layers.0.q_proj.lora_A.value-2.weight", "value")


@pytest.mark.parametrize(
    ("width", "tokens"),
    [(16, 4096), (128, 3072), (384, 1024), (768, 512), (4096, 256)],  # 1024 x 384 / width
)
def test_micro_batches_suit_a_processors_cache(make_handle, width, tokens, monkeypatch):
    trunk = make_handle().trunk
    trunk.hidden_size = width
    assert trunk.token_budget(None) == tokens
    assert trunk.token_budget(77) == 77  # a setting counts, on any device
    monkeypatch.setattr(type(trunk), "device", torch.device("cuda"))
    assert trunk.token_budget(None) == 8192
    assert trunk.token_budget(77) == 77


def test_settings_take_the_size_of_the_trunk_and_nothing_else():
    section = FitSection(batch_size=7, epochs=2)
    assert section.micro_batch_tokens is None
    sized = section.sized(512)
    assert sized.micro_batch_tokens == 512
    assert sized == section.model_copy(update={"micro_batch_tokens": 512})
    assert section.micro_batch_tokens is None


@pytest.mark.parametrize("model_type", ["llama", "bloom"])
def test_padding_on_the_right_needs_no_mask_and_on_the_left_does(make_handle, model_type):
    model = make_handle(model_type, "float32", **DECODERS[model_type]).trunk.model
    right, left = (DecoderJoiner(model, padding_side=side)(batch()) for side in ("right", "left"))
    assert right.inputs.keys() == {"input_ids"}  # kernels that skip half of the work apply
    assert right.inputs["input_ids"].tolist() == [
        [5, 6, 7, 8, 9, 10, 20, 21],
        [11, 12, 22, 23, 24, 25, 26, 0],
        [13, 27, 0, 0, 0, 0, 0, 0],
    ]
    # The prompt's last token predicts the first of the response.
    assert [row[: len(r)] for row, r in zip(right.predictors.tolist(), RESPONSES, strict=True)] == [
        [5, 6],
        [1, 2, 3, 4, 5],
        [0],
    ]
    assert right.last.tolist() == [7, 6, 1]
    positions = {"position_ids"} if model_type == "llama" else set()
    assert left.inputs.keys() == {"input_ids", "attention_mask"} | positions
    assert left.inputs["input_ids"][2].tolist() == [0, 0, 0, 0, 0, 0, 13, 27]
    assert left.inputs["attention_mask"][2].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert left.predictors[2, 0] == 6 and left.last.tolist() == [7, 7, 7]


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "opt", "bloom", "llama", "phi"])
@pytest.mark.parametrize("tied", [False, True])
def test_values_need_no_output_layer(make_handle, model_type, tied):
    handle = make_handle(model_type, tie_word_embeddings=tied)
    handle.trunk.add_head("v").init_normal(torch.Generator().manual_seed(0))
    handle = handle.with_role("v", head="v")
    before = handle(batch(), {"values"}).values
    weights = sum(parameter.numel() for parameter in handle.parameters())
    layer = handle.trunk.model.get_output_embeddings()
    dropped = 0 if tied else sum(parameter.numel() for parameter in layer.parameters())
    handle.trunk.drop_output_layer()
    torch.testing.assert_close(handle(batch(), {"values"}).values, before, rtol=0, atol=0)
    assert weights - sum(parameter.numel() for parameter in handle.parameters()) == dropped
    assert tied or dropped >= handle.trunk.vocabulary_size * handle.trunk.hidden_size
    if not tied:
        with pytest.raises(RuntimeError, match="forward"):
            handle(batch(), {"logprobs"})
