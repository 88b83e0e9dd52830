"""The rows that numbers which are not finite came from, as people know them."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from pipeline.codec import Codec
from pipeline.not_finite import NotFinite, Row
from pipeline.records import Prompt
from stages.ppo.experience import Experience
from stages.ppo.losses import SUMS
from stages.ppo.ptx import LanguageModelTerm
from stages.ppo.rollout import Rollout
from stages.ppo.samples import sample_rows

T = TypeVar("T")
# Numbers a response token that later ones are made of: at fault alone, they would hide in sums.
MEASURED = ("logprobs", "ref_logprobs", "values", "entropy", "importance")


def with_texts(
    work: Callable[[], T],
    place: str,
    prompts: Sequence[Prompt],
    sample_indices: Sequence[int],
    codec: Codec,
) -> T:
    """What `work` (sampling and scoring these prompts) returns.

    Raises:
        NotFinite: with the place, and with texts of the rows, which `work` counts from 0.
    """
    try:
        return work()
    except NotFinite as error:
        rows = [
            {
                "sample_index": sample_indices[row["row"]],
                "origin": prompts[row["row"]].origin,
                "prompt": codec.prompt_text(prompts[row["row"]].prompt),
                **{name: value for name, value in row.items() if name != "row"},
            }
            for row in error.rows
        ]
        raise NotFinite(error.what, f"ppo, {place}: {error}", rows, place) from error


def refuse_not_finite(rollout: Rollout) -> None:
    """Hold a rollout's own numbers to be finite, before they are mixed with those of other rows.

    Raises:
        NotFinite: names the tensor; its rows count from 0.
    """
    for name in MEASURED:
        numbers = getattr(rollout, name)
        bad = [] if numbers is None else (~numbers.isfinite()).any(1).nonzero().flatten().tolist()
        if bad:
            rows = [
                {
                    "row": row,
                    "response": rollout.texts[row],
                    "score": float(rollout.scores[row]),
                    name: numbers[row, : rollout.batch.response_lengths[row]].tolist(),
                }
                for row in bad
            ]
            raise NotFinite(
                name,
                f"{name} of {len(bad)} responses are not finite: the weights have diverged, or the "
                "model cannot be run in this precision (run.mixed_precision, model.dtype)",
                rows,
            )


# --- in an update ---


def with_samples(
    error: NotFinite, experience: Experience, iteration: int, codec: Codec
) -> NotFinite:
    """The same error, its samples with their texts and numbers instead of their indices alone."""
    indices = {row.get("sample_index") for row in error.rows}
    ids = ("prompt_ids", "response_ids", "iteration")
    rows: list[Row] = [
        {name: value for name, value in row.items() if name not in ids}
        for row in sample_rows(experience, iteration, codec)
        if row["sample_index"] in indices
    ]
    rows += [row for row in error.rows if "sample_index" not in row]
    return NotFinite(error.what, str(error), rows, error.place)


def loss_fault(
    measured: Tensor,
    parts: Sequence[Sequence[int]],
    indices: Sequence[int],
    place: str,
    gather: Callable[[Sequence[Any]], list[Any]],
) -> NotFinite:
    """The error for a loss or ratio: `measured` holds SUMS and the largest ratio of each part.

    `parts` are places in `indices`, the samples of this process; `gather` collects from all.
    """
    finite = measured.isfinite()
    names = [*SUMS, "ratio_max"]
    found = [
        (names[int((~finite[part]).nonzero()[0])], indices[position])
        for part in (~finite).any(1).nonzero().flatten().tolist()
        for position in parts[part]
    ]
    everyone = gather(found)
    # Finite numbers may add up to one that is not: then no sample is to blame alone.
    name = everyone[0][0] if everyone else "the sum of losses"
    shown = sorted(index for _, index in everyone)
    return NotFinite(
        name,
        f"ppo: {name} is not finite in {place}, among the samples {shown[:8]}"
        f"{' ...' if len(shown) > 8 else ''}; no step was taken. Lower ppo.optim.learning_rate or "
        "ppo.optim.ppo_epochs, or clip scores (ppo.advantage.reward_clip).",
        [{"sample_index": index} for _, index in found],
        place,
    )


def gradient_fault(name: str, norm: float, indices: Sequence[int], place: str) -> NotFinite:
    """The error for a gradient whose losses are finite: all rows of the minibatch had a part."""
    return NotFinite(
        f"{name} gradient",
        f"ppo: the {name} gradient is {norm} in {place}; no step was taken. Lower "
        "ppo.optim.learning_rate, or train in float32.",
        [{"sample_index": index} for index in indices],
        place,
    )


def language_model_fault(
    losses: Tensor,
    parts: Sequence[Sequence[int]],
    pairs: Sequence[tuple[list[int], list[int]]],
    place: str,
    term: LanguageModelTerm,
    codec: Codec,
) -> NotFinite:
    """The error for a language-model term: `losses` has a number a part of `pairs`."""
    chosen = [
        pairs[row]
        for part in (~losses.isfinite()).nonzero().flatten().tolist()
        for row in parts[part]
    ]
    return NotFinite(
        "language-model loss",
        f"ppo: the language-model loss on {term.data} (ppo.optim.{term.name}_coef) is not finite "
        f"in {place}; no step was taken. Lower ppo.optim.learning_rate, or look at the rows.",
        [
            {"prompt": codec.tokenizer.decode(prompt), "response": codec.text(response)}
            for prompt, response in chosen
        ],
        place,
    )
