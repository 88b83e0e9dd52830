"""Rollouts from a vLLM server that runs in an environment of its own: a client, no vllm import.

Requests are those of vLLM's OpenAI-compatible server (docs/vllm.md says which versions were read).
Each row is a request of its own: a seed holds for a whole request, and rows that share one would
draw the same noise. The log-probs are vLLM's, of other kernels than the training forward's, so
nothing here is exact: PPO computes its own and corrects with importance weights.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from pipeline.batches import TokenBatch, pad_numbers
from pipeline.codec import Codec
from pipeline.distributed import Runtime
from pipeline.errors import ConfigError, PipelineError, TrainingError
from pipeline.generation.engine import Generations, Sampling
from pipeline.generation.vllm_adapters import AdapterHandover
from pipeline.inference import infer
from pipeline.json_http import JsonServer, ServerFault
from pipeline.models.adapters import adapter_state
from pipeline.models.trunk import Handle
from pipeline.not_finite import NotFinite, caught, raised, together

# The first rows of each version of the policy are read by the trunk too. Other kernels and bf16
# differ by some hundredths of a nat a token, another model's weights by one or more.
CHECKED_ROWS = 8
MAX_MISMATCH = 0.3  # nats a token, the mean of absolute differences
_NEGLIGIBLE = 0.01  # nats a token: no evidence for any cause

Row = tuple[list[int], list[float], bool]  # response ids, their log-probs, whether it ended


class VllmEngine:
    """Samples from a vLLM server, `rows_at_once` requests at a time.

    With many processes each asks for its own rows; the first hands the adapter over for all.
    """

    name = "vllm"
    deterministic = False  # batches, kernels and versions of the server decide near-ties

    def __init__(
        self, server: JsonServer, adapters: AdapterHandover, runtime: Runtime, rows_at_once: int
    ) -> None:
        self._server = server
        self._adapters = adapters
        self._runtime = runtime
        self._rows_at_once = rows_at_once
        self._checked = ""  # name of the version whose numbers were compared

    def generate(
        self,
        handle: Handle,
        prompt_ids: Sequence[Sequence[int]],
        sample_indices: Sequence[int],
        sampling: Sampling,
    ) -> Generations:
        """See `Engine`. Hands the policy's adapter over first, if it has changed.

        Raises:
            ConfigError: the server is not the one that the run needs.
            NotFinite: log-probs of its answers are NaN or infinite; rows count from 0.
            TrainingError: it failed, or answered what cannot be a sample of the policy.
        """
        assert len(prompt_ids) == len(sample_indices)
        assert sampling.is_plain, sampling
        longest = handle.codec.max_prompt_tokens + sampling.max_new_tokens
        adapter = handle.role.adapter
        # Of sharded weights all processes have a part, and all of them ask.
        state = None if adapter is None else adapter_state(handle.trunk.model, adapter)
        model = self._on_main(lambda: self._adapters.current(handle, state, longest))
        fixed = request_body(model, handle.codec, sampling)

        def ask(prompt: Sequence[int], index: int) -> Row:
            own = {"prompt": [list(prompt)], "seed": row_seed(sampling, index)}
            return self._ask({**fixed, **own}, handle, index)

        def ask_all() -> list[Row]:
            pool = ThreadPoolExecutor(max(1, min(self._rows_at_once, len(prompt_ids))))
            try:
                rows = list(pool.map(ask, prompt_ids, sample_indices))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
            self._refuse_not_finite(rows, sample_indices, handle)
            return rows

        found = caught(ask_all)
        # vLLM has no answer but status 500 for log-probs of NaN: JSON has no such number.
        if self._runtime.any_of(_is_broken(found)):
            found = self._examined(found, handle, prompt_ids)
        rows = together(partial(raised, found), self._runtime)
        made = Generations(
            [ids for ids, _, _ in rows], [ended for *_, ended in rows], [own for _, own, _ in rows]
        )
        if rows and self._checked != model:
            self._compare(handle, prompt_ids, made, sampling.temperature or 1.0)
            self._checked = model
        return made

    def close(self) -> None:
        """Take the adapter off the server and delete its files."""
        if self._runtime.is_main:
            self._adapters.drop()

    def _ask(self, body: Mapping[str, Any], handle: Handle, index: int) -> Row:
        try:
            answer = self._server.post("/v1/completions", body)
        except ServerFault as fault:
            if fault.status == 404:
                raise TrainingError(
                    f"the vLLM server no longer knows the policy's adapter ({fault}). Was it "
                    "restarted? Start the stage again"
                ) from fault
            raise TrainingError(f"vLLM did not answer for sample {index}: {fault}") from fault
        vocabulary = handle.trunk.vocabulary_size
        try:
            return read_answer(answer, handle.codec, body["max_tokens"], vocabulary)
        except ValueError as error:
            raise TrainingError(
                f"{self._server.url}/v1/completions gave no sample of the policy for sample "
                f"{index}: {error}"
            ) from error

    def _refuse_not_finite(
        self, rows: Sequence[Row], sample_indices: Sequence[int], handle: Handle
    ) -> None:
        bad = [n for n, (_, own, _) in enumerate(rows) if not all(map(math.isfinite, own))]
        if bad:
            raise NotFinite(
                "logprobs",
                f"the log-probs from {self._server.url} are not finite for {len(bad)} of "
                f"{len(rows)} samples, the first of them sample {sample_indices[bad[0]]}: the "
                "policy may have diverged",
                [
                    {"row": n, "response": handle.codec.text(rows[n][0]), "logprobs": rows[n][1]}
                    for n in bad
                ],
            )

    def _examined(
        self, found: list[Row] | TrainingError, handle: Handle, prompt_ids: Sequence[Sequence[int]]
    ) -> list[Row] | TrainingError:
        """The same, or what is wrong with the policy itself, if its numbers are not finite.

        Of sharded weights all processes make these passes.
        """
        asked = prompt_ids[:CHECKED_ROWS]
        any_token = [list(prompt[-1:]) for prompt in asked]
        batch = TokenBatch.from_ragged(asked, any_token, handle.codec.pad_id)
        own = infer(handle, batch, ["logprobs"], None, 1.0)["logprobs"].flatten()
        bad = (~own.isfinite()).nonzero().flatten().tolist()
        if not (bad and _is_broken(found)):
            return found
        return NotFinite(
            "logprobs",
            f"the policy's own log-probs are not finite for {len(bad)} of {len(asked)} prompts, "
            f"for which {self._server.url} has no answer: {found}",
            [{"row": n, "response": "", "logprobs": [float(own[n])]} for n in bad],
        )

    def _on_main(self, work: Callable[[], str]) -> str:
        """What `work` returns in the first process, or raises there, in every process."""
        result, fault = "", None
        if self._runtime.is_main:
            try:
                result = work()
            except PipelineError as error:
                if self._runtime.world_size == 1:
                    raise
                fault = error
        result, fault = self._runtime.gather_objects([(result, fault)])[0]
        if fault is not None:
            fault.everywhere = True
            raise fault  # in all of them, so that none waits for the others
        return result

    @torch.no_grad()
    def _compare(
        self,
        handle: Handle,
        prompt_ids: Sequence[Sequence[int]],
        made: Generations,
        temperature: float,
    ) -> None:
        """Whether the server's log-probs are those of this policy at this temperature."""
        assert made.logprobs is not None
        rows = slice(CHECKED_ROWS)
        pad_id = handle.codec.pad_id
        batch = TokenBatch.from_ragged(prompt_ids[rows], made.response_ids[rows], pad_id)
        theirs = pad_numbers(made.logprobs[rows], handle.trunk.number_dtype)

        forbidden = handle.codec.forbidden_ids

        def mismatch(at: float, without: frozenset[int]) -> float:
            ours = infer(handle, batch, ["logprobs"], None, at, without)["logprobs"]
            return float((ours - theirs).abs()[batch.response_mask].mean())

        # The worst of all processes is judged, by all of them.
        scaled = max(self._runtime.gather_objects([mismatch(temperature, forbidden)]))
        looks = (temperature != 1.0 or bool(forbidden)) and scaled > _NEGLIGIBLE
        raw = frozenset[int]()
        if looks and max(self._runtime.gather_objects([mismatch(1.0, raw)])) < scaled / 2:
            raise ConfigError(
                f"the vLLM server's log-probs are those of temperature 1 over all tokens, but "
                f"ppo.rollout.temperature is {temperature:g} and {len(forbidden)} tokens are "
                "forbidden: importance weights would be wrong. Start the server with "
                "--logprobs-mode processed_logprobs"
            )
        if scaled > MAX_MISMATCH:
            raise TrainingError(
                f"the vLLM server's log-probs differ from the policy's by {scaled:.2f} nats a "
                f"token (at most {MAX_MISMATCH} is rounding). Does it still serve an older base "
                "under this name? Does it run with --logprobs-mode processed_logprobs, and "
                "unquantised? Start it again"
            )


def request_body(model: str, codec: Codec, sampling: Sampling) -> dict[str, Any]:
    """All of a completion request but its prompt and seed.

    What would change the distribution is named even where it is vLLM's default: a server takes its
    defaults from the model's generation_config.json.
    """
    own: dict[str, Any] = {}
    if codec.stop_strings:
        own |= {"stop": list(codec.stop_strings.strings), "include_stop_str_in_output": True}
    if codec.forbidden_ids:
        # The strongest bias there is: exp(-100) of a probability. What it lets through is refused.
        own["logit_bias"] = {str(id_): -100 for id_ in sorted(codec.forbidden_ids)}
    return own | {
        "model": model,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "n": 1,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": sorted(codec.stop_ids),
        "ignore_eos": False,
        "min_tokens": 0,
        "skip_special_tokens": False,
        "logprobs": 0,  # of the sampled token alone
        "return_token_ids": True,
    }


def row_seed(sampling: Sampling, index: int) -> int:
    """A seed of 63 bits for one row: the same row asks for the same noise in every rerun."""
    text = f"{sampling.seed}:{sampling.stream}:{index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def read_answer(answer: Any, codec: Codec, max_tokens: int, vocabulary: int) -> Row:
    """The one response in a completion, its log-probs as they are, NaN and infinite ones included.

    It ends where the codec says: the server looks for stop strings in its own decoding, and what it
    sampled beyond one is left out.

    Raises:
        ValueError: it is no whole sample that ended at a stop id or at the limit.
    """
    try:
        (choice,) = answer["choices"]
        ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        reason = choice["finish_reason"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the answer lacks {error}; token_ids and log-probs need vLLM 0.10.2 or newer"
        ) from error
    if not ids or len(ids) > max_tokens:
        raise ValueError(f"{len(ids or [])} tokens where 1 to {max_tokens} were asked for")
    if not all(isinstance(id_, int) and 0 <= id_ < vocabulary for id_ in ids):
        raise ValueError(f"ids outside the vocabulary of {vocabulary}: it serves another model")
    if len(logprobs or []) != len(ids):
        raise ValueError(f"{len(logprobs or [])} log-probs for {len(ids)} tokens")
    if not all(isinstance(x, int | float) for x in logprobs):
        raise ValueError(f"log-probs that are no numbers: {logprobs[:3]}")
    if forbidden := codec.forbidden_ids.intersection(ids):
        raise ValueError(f"it sampled the forbidden tokens {sorted(forbidden)}")
    if not codec.stop_ids.isdisjoint(ids[:-1]):
        raise ValueError("it went on after a stop id: it passed stop_token_ids over")
    whole = codec.until_end(ids)
    if len(whole) < len(ids):
        ids, logprobs, reason = whole, logprobs[: len(whole)], "stop"
    ended = codec.ends(ids)
    if reason not in ("stop", "length") or (reason == "stop" and not ended):
        raise ValueError(
            f"it finished by {reason!r} (stop_reason {choice.get('stop_reason')!r}) on id "
            f"{ids[-1]}, which is none of the run's stop ids {sorted(codec.stop_ids)} and ends "
            f"none of its stop strings {list(codec.stop_strings.strings)}"
        )
    if not ended and len(ids) < max_tokens:
        raise ValueError(
            f"it was cut after {len(ids)} of {max_tokens} tokens: raise the server's "
            "--max-model-len"
        )
    # vLLM writes -9999 for minus infinity.
    return ids, [-math.inf if x <= -9999 else float(x) for x in logprobs], ended


def _is_broken(found: list[Row] | TrainingError) -> bool:
    """Whether the server failed within itself."""
    cause = found.__cause__ if isinstance(found, TrainingError) else None
    return isinstance(cause, ServerFault) and cause.status == 500
