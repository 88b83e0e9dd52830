"""The native engine under stress, against rows written alone: a whole pass a token, no cache.

Random lengths and ends, few and many rows, caches so small that rows are moved, windows, ALiBi,
learned positions, and caches whose keys and values differ in width.
"""

import itertools
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from pipeline.batches import TokenBatch
from pipeline.config import DataSection, LoraSection
from pipeline.generation import Generations, NativeEngine, Sampling, graphs, native
from pipeline.generation.noise import gumbel, row_keys
from pipeline.generation.slots import SlotCache, _SlotLayer
from pipeline.models.adapters import add_adapter, lora_config
from pipeline.models.store import ModelStore
from pipeline.models.trunk import Handle
from tests.conftest import TEXTS, tiny_section

LENGTH = 10  # tokens of the longest response
# Model type, its fields, and whether it computes in float64 throughout.
FAMILIES = {
    "llama": ({}, True),
    "qwen3": ({"num_key_value_heads": 1}, True),
    "gpt2": ({}, True),
    "opt": ({"word_embed_proj_dim": 32, "ffn_dim": 64}, True),
    "gpt_neox": ({}, True),
    "phi": ({}, True),
    "mistral": ({"sliding_window": 4}, True),
    "gemma3_text": ({"sliding_window": 4, "query_pre_attn_scalar": 16}, False),
    "bloom": ({"n_layer": 2, "n_head": 2}, False),
    "deepseek_v3": (
        {
            "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
            "v_head_dim": 12, "first_k_dense_replace": 2,
        },
        True,
    ),
}  # fmt: skip
# What is added to the stop token's logit: it never comes, sometimes, often, always at once.
BIASES = (-100.0, 1.0, 4.0, 100.0)


@pytest.fixture(autouse=True)
def _memory_that_nobody_wrote_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A column that was never written, seen through a mask, would spread."""
    monkeypatch.setattr(graphs, "COLUMNS", 16)  # steps of fixed shape have several widths
    begin = _SlotLayer.lazy_initialization

    def poisoned(layer: _SlotLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
        begin(layer, keys, values)
        if layer.cache.column is not None:
            return  # steps of fixed shape read all columns, of zeros
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)

    monkeypatch.setattr(_SlotLayer, "lazy_initialization", poisoned)


@dataclass(frozen=True)
class Case:
    """Prompts, and what each row alone is answered; one entry a row."""

    handle: Handle
    prompts: list[list[int]]
    indices: list[int]
    sampling: Sampling
    tokens: list[list[int]]
    logprobs: list[list[float]]
    entropy: list[list[float]]
    values: list[list[float]]
    tolerance: float


@cache
def make_case(family: str, bias: float, temperature: float = 0.8, rows: int = 11) -> Case:
    """A random policy of the family with a value head, and the oracle's answers."""
    fields, is_wide = FAMILIES[family]
    torch.manual_seed(1)
    section = tiny_section(family, "float64" if is_wide else "float32", **fields)
    handle = ModelStore(section, DataSection()).build(TEXTS)
    model, end = handle.trunk.model, handle.codec.end_id
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)

    def favour_the_end(_module, _args, out):
        out = out.clone()
        out[..., end] += bias
        return out

    model.get_output_embeddings().register_forward_hook(favour_the_end)
    if family == "llama":
        add_adapter(model, "policy", lora_config(LoraSection(rank=2)))
        handle = handle.with_role("policy", adapter="policy")
        for parameter in handle.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, dtype=torch.float64)
    handle.trunk.add_head("value").init_normal(torch.Generator().manual_seed(2))
    handle = handle.with_role("policy", head="value")
    random = torch.Generator().manual_seed(int(abs(bias)) + rows)
    lengths = torch.randint(1, 41, (rows,), generator=random).tolist()
    prompts = [torch.randint(2, 300, (n,), generator=random).tolist() for n in lengths]
    indices = torch.randperm(1000, generator=random)[:rows].tolist()
    sampling = Sampling(LENGTH, temperature, seed=9, stream=4)
    with torch.no_grad():
        answers = [alone(handle, *row, sampling) for row in zip(prompts, indices, strict=True)]
    columns = [list(column) for column in zip(*answers, strict=True)]
    return Case(handle, prompts, indices, sampling, *columns, 1e-9 if is_wide else 1e-4)


def alone(
    handle: Handle, prompt: list[int], index: int, sampling: Sampling
) -> tuple[list[int], list[float], list[float], list[float]]:
    """One row by the definition: tokens, log-probs, entropies and values."""
    model, head = handle.trunk.model, handle.trunk.heads["value"]
    handle(TokenBatch.from_ragged([prompt], [[5]], 0), ["values"])  # makes the role the active one
    states: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _module, args: states.append(args[0][0, -1])
    )
    key = row_keys(sampling.seed, sampling.stream, torch.tensor([index]))
    tokens: list[int] = []
    numbers: tuple[list[float], ...] = ([], [], [])
    while len(tokens) < sampling.max_new_tokens and handle.codec.end_id not in tokens:
        logits = model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1]
        p = (logits / (sampling.temperature or 1)).softmax(-1)
        noise = gumbel(key, torch.tensor([len(tokens)]), len(logits), logits.dtype)[0]
        drawn = p.log() + noise if sampling.temperature else p
        tokens.append(int(drawn.argmax()))
        found = (
            p[tokens[-1]].log(),
            -torch.xlogy(p, p).sum(),
            states[-1] @ head.weight + head.bias,
        )
        for column, number in zip(numbers, found, strict=True):
            column.append(number.item())
    hook.remove()
    return tokens, *numbers


def generate(
    case: Case,
    max_rows: int,
    limit: int = LENGTH,
    prefill: int | None = None,
    fixed_shapes: bool = False,
) -> Generations:
    """The engine's answers to all rows of a case."""
    sampling = Sampling(limit, case.sampling.temperature, seed=9, stream=4)
    engine = NativeEngine(max_rows, prefill, fixed_shapes=fixed_shapes)
    return engine.generate(case.handle, case.prompts, case.indices, sampling)


def assert_is_the_oracles(made: Generations, case: Case, limit: int = LENGTH) -> None:
    """Tokens one by one; numbers to rounding."""
    assert made.response_ids == [tokens[:limit] for tokens in case.tokens]
    ends = [case.handle.codec.end_id in tokens[:limit] for tokens in case.tokens]
    assert made.ended == ends
    for name in ("logprobs", "entropy", "values"):
        for told, wanted in zip(getattr(made, name), getattr(case, name), strict=True):
            assert told == pytest.approx(wanted[:limit], abs=case.tolerance), name


@pytest.mark.parametrize("fixed_shapes", [False, True], ids=["fitted", "fixed"])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_written_alone(family: str, bias: float, fixed_shapes: bool) -> None:
    case = make_case(family, bias)
    lengths = {len(tokens) for tokens in case.tokens}
    wanted = {-100.0: lengths == {LENGTH}, 100.0: lengths == {1}}
    assert wanted.get(bias, len(lengths) > 2)
    for max_rows in (1, 2, 3, 7, 64):
        assert_is_the_oracles(generate(case, max_rows, fixed_shapes=fixed_shapes), case)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_are_a_whole_passes_of_the_trunk(family: str) -> None:
    case = make_case(family, 1.0)
    made = generate(case, 4)
    batch = TokenBatch.from_ragged(case.prompts, made.response_ids, pad_id=0)
    want = ["logprobs", "entropy", "values"]
    with torch.no_grad():
        whole = case.handle(batch, want, case.sampling.temperature)
    for name in want:
        for row, told in enumerate(getattr(made, name)):
            found = getattr(whole, name)[row, : len(told)].tolist()
            assert found == pytest.approx(told, abs=case.tolerance), name


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "bloom", "gpt2", "opt"])
@pytest.mark.parametrize(("free_share", "fixed_shapes"), [(0.0, False), (0.5, False), (0.0, True)])
def test_rows_that_are_moved_go_on_as_they_were(
    family: str, free_share: float, fixed_shapes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without slack the cache has no column to spare: rows are shifted again and again."""
    shifts: list[int] = []
    shift = SlotCache.shift

    def counted(cache: SlotCache) -> int:
        shifts.append(shift(cache))
        return shifts[-1]

    monkeypatch.setattr(SlotCache, "shift", counted)
    monkeypatch.setattr(native, "SLACK", 0.0)
    monkeypatch.setattr(native, "FREE_SHARE", free_share)
    case = make_case(family, 2.5, rows=23)
    for max_rows in (2, 3, 7):
        assert_is_the_oracles(generate(case, max_rows, fixed_shapes=fixed_shapes), case)
    assert len(shifts) > 1


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_a_lower_limit_cuts_the_same_text(limit: int) -> None:
    for family, bias, max_rows in itertools.product(("llama", "bloom"), (1.0, 4.0), (1, 3, 64)):
        case = make_case(family, bias)
        assert_is_the_oracles(generate(case, max_rows, limit), case, limit)


@pytest.mark.parametrize("prefill", [1, 41, 100, 10_000])
def test_the_size_of_prefills_changes_nothing(prefill: int, monkeypatch) -> None:
    case, widths = make_case("mistral", 4.0), []
    decode = Handle.decode

    def watched(handle, step):
        widths.append(step.input_ids.numel())
        return decode(handle, step)

    monkeypatch.setattr(Handle, "decode", watched)
    for max_rows in (3, 64):
        assert_is_the_oracles(generate(case, max_rows, prefill=prefill), case)
    longest = max(len(prompt) for prompt in case.prompts)
    assert max(widths) <= max(prefill, longest)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bloom", "gpt2"])
def test_greedy_rows_are_those_written_alone(family: str) -> None:
    case = make_case(family, 1.0, temperature=0.0)
    for max_rows in (1, 3, 64):
        assert_is_the_oracles(generate(case, max_rows), case)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_prompt_and_none(family: str) -> None:
    case = make_case(family, 1.0)
    for row in (0, 5):
        made = NativeEngine(8).generate(
            case.handle, [case.prompts[row]], [case.indices[row]], case.sampling
        )
        assert made.response_ids == [case.tokens[row]]
        assert made.logprobs[0] == pytest.approx(case.logprobs[row], abs=case.tolerance)
    nothing = NativeEngine(8).generate(case.handle, [], [], case.sampling)
    assert nothing.response_ids == [] and nothing.logprobs == []


def test_no_pass_is_wider_than_the_rows_that_are_being_written(monkeypatch) -> None:
    """Linear layers see one token a living row, and no padding but that of a prefill."""
    case, seen = make_case("llama", 4.0), []
    decode = Handle.decode

    def watched(handle, step):
        seen.append(tuple(step.input_ids.shape))
        return decode(handle, step)

    monkeypatch.setattr(Handle, "decode", watched)
    generate(case, 1)
    # One row at a time: a prefill and a step for each further token, without any padding.
    assert sum(rows * width for rows, width in seen) == sum(
        len(prompt) + len(tokens) - 1
        for prompt, tokens in zip(case.prompts, case.tokens, strict=True)
    )
    seen.clear()
    generate(case, 64)
    steps = [rows for rows, width in seen if width == 1]
    alive = [sum(len(tokens) > place for tokens in case.tokens) for place in range(1, LENGTH)]
    prefilled = [rows for rows, width in seen if width > 1]
    assert sum(prefilled) == len(case.prompts)
    assert steps == [count for count in alive if count]
