"""A stand-in for a vLLM server: its HTTP, with transformers and peft behind it instead of kernels.

It loads its own copy of a base folder, and the adapter folders it is given with peft's own loader,
so that what it samples shows which weights were handed over. Like vLLM it keeps one adapter at a
time (`--max-loras 1`), goes on reading a name's first weights if the name comes again (its prefix
cache, issue 42125), takes sampling defaults from the model, and returns raw log-probs unless told.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

# Fields of vLLM's CompletionRequest that the client may use: a misspelt one is refused here.
FIELDS = {
    "model", "prompt", "max_tokens", "temperature", "n", "top_p", "top_k", "min_p", "seed",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "stop_token_ids", "ignore_eos",
    "min_tokens", "skip_special_tokens", "logprobs", "return_token_ids", "stop",
    "include_stop_str_in_output", "logit_bias",
}  # fmt: skip
NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
           "presence_penalty": 0.0, "frequency_penalty": 0.0}  # fmt: skip


class Refused(Exception):
    """An error answer: status and message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class StandIn:
    """The server; `url` is where it listens, and the fields are the knobs of a test."""

    base: Path
    port: int = 0  # 0 takes a free one
    logprobs_mode: str = "raw_logprobs"
    served_name: str | None = None
    max_lora_rank: int = 16
    max_model_len: int = 256
    updating: bool = True  # VLLM_ALLOW_RUNTIME_LORA_UPDATING
    api_key: str | None = None
    defaults: dict[str, float] = field(default_factory=dict)  # generation_config.json
    # Statuses to answer with instead, by path, first to last; 0 drops the connection.
    faults: dict[str, list[int]] = field(default_factory=dict)
    spoil: Callable[[dict[str, Any]], None] | None = None  # changes a choice before it is sent
    delay: float = 0.0  # seconds before each completion
    dies_after: int | None = None  # completions after which it answers nobody
    noise: float = 0.0  # added to logits, as other kernels would
    calls: list[tuple[str, Any]] = field(default_factory=list)  # path and body
    loaded: dict[str, str] = field(default_factory=dict)  # adapters: name to path
    most_at_once: int = 0

    def __enter__(self) -> "StandIn":
        self._lock, self._now = threading.Lock(), 0
        self._model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(self.base)
        self._peft: Any = None
        self._known: set[str] = set()
        server = self

        class Handler(_Handler):
            stand_in = server

        self._http = _Http(("127.0.0.1", self.port), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def asked(self, path: str) -> list[Any]:
        """Bodies of the requests to `path`."""
        return [body for called, body in self.calls if called == path]

    # --- endpoints ---

    def answer(self, path: str, body: Any) -> Any:
        """What a request gets. Raises Refused."""
        self.calls.append((path, body))
        if path == "/v1/models":
            return {"object": "list", "data": self._cards()}
        if path == "/v1/completions":
            return self._complete(body)
        if path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter") and self.updating:
            with self._lock:
                return self._load(body) if path == "/v1/load_lora_adapter" else self._unload(body)
        raise Refused(404, "Not Found")

    def _cards(self) -> list[dict[str, Any]]:
        name = self.served_name or str(self.base)
        card = {"id": name, "root": str(self.base), "parent": None}
        base = {**card, "max_model_len": self.max_model_len}
        return [base] + [{"id": n, "root": p, "parent": name} for n, p in self.loaded.items()]

    def _load(self, body: dict[str, Any]) -> str:
        name, path = body["lora_name"], body["lora_path"]
        if name in self.loaded:
            raise Refused(400, f"The lora adapter '{name}' has already been loaded.")
        folder = Path(path)
        if not (folder / "adapter_config.json").exists():
            raise Refused(404, f"No adapter found for {path}")
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > self.max_lora_rank:
            raise Refused(500, f"LoRA rank {rank} is greater than max_lora_rank")
        if name not in self._known:
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self._model, path, adapter_name=name).eval()
            else:
                self._peft.load_adapter(path, adapter_name=name)
        self._known.add(name)
        # One slot: the adapter that was there is pushed out, and its name is not forgotten.
        self.slot = name
        self.loaded[name] = path
        return f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, body: dict[str, Any]) -> str:
        name = body["lora_name"]
        if name not in self.loaded:
            raise Refused(404, f"The lora adapter '{name}' cannot be found.")
        if self.slot != name:
            raise Refused(500, f"Failed to remove lora adapter '{name}' from the engine.")
        self.slot = ""
        del self.loaded[name]
        return f"Success: LoRA adapter '{name}' removed successfully."

    # --- sampling ---

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        if unknown := body.keys() - FIELDS:
            raise Refused(400, f"unknown fields {unknown}")
        if body["model"] not in self.loaded:
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            time.sleep(self.delay)
            with self._lock:
                choice = self._sample({**NEUTRAL, **self.defaults, **body})
        finally:
            self._now -= 1
        if self.spoil is not None:
            self.spoil(choice)
        return {"object": "text_completion", "choices": [choice]}

    @torch.no_grad()
    def _sample(self, body: dict[str, Any]) -> dict[str, Any]:
        """One token after another, each from a full forward: no cache to be wrong."""
        self._peft.set_adapter(body["model"])
        random = torch.Generator().manual_seed(body["seed"] % 2**63)
        (prompt,) = body["prompt"]
        ids, out, logprobs = list(prompt), [], []
        reason, stop = "length", None
        while len(out) < body["max_tokens"]:
            logits = self._peft(input_ids=torch.tensor([ids])).logits[0, -1].float()
            logits = logits + self.noise * torch.sin(17.0 * torch.arange(len(logits)))
            scaled = logits.clone()
            for seen in set(ids):  # repetition penalty, as in transformers
                scaled[seen] *= 1 / body["repetition_penalty"] if scaled[seen] > 0 else (
                    body["repetition_penalty"])  # fmt: skip
            for token, bias in body.get("logit_bias", {}).items():
                scaled[int(token)] += bias
            greedy = body["temperature"] < 1e-5
            scaled = scaled if greedy else scaled / body["temperature"]
            if body["top_k"] > 0:
                scaled[scaled < scaled.topk(int(body["top_k"])).values[-1]] = -torch.inf
            probabilities = scaled.softmax(-1)
            token = int(
                scaled.argmax() if greedy else torch.multinomial(probabilities, 1, generator=random)
            )
            told = logits if self.logprobs_mode == "raw_logprobs" else scaled
            logprobs.append(float(told.log_softmax(-1)[token]))
            out.append(token)
            ids.append(token)
            if token in body["stop_token_ids"]:
                reason, stop = "stop", token
                break
            # As vLLM: its own decoding, looked into after each token.
            text = self._tokenizer.decode(out)
            stop = next((string for string in body.get("stop", []) if string in text), None)
            if stop is not None:
                reason = "stop"
                break
        return {
            "index": 0,
            "text": "",
            "token_ids": out if body["return_token_ids"] else None,
            "logprobs": {"token_logprobs": logprobs} if body["logprobs"] is not None else None,
            "finish_reason": reason,
            "stop_reason": stop,
        }


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # connections that wait to be taken; the default is 5


class _Handler(BaseHTTPRequestHandler):
    stand_in: StandIn

    def _respond(self) -> None:
        server = self.stand_in
        size = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(size)) if size else None
        faults = server.faults.get(self.path, [])
        try:
            done = sum(path == "/v1/completions" for path, _ in server.calls)
            if server.dies_after is not None and done >= server.dies_after:
                self.close_connection = True
                return
            if faults:
                server.calls.append((self.path, body))
                status = faults.pop(0)
                if status == 0:
                    self.close_connection = True
                    return
                raise Refused(status, "as the test asked")
            if server.api_key and self.headers.get("Authorization") != f"Bearer {server.api_key}":
                raise Refused(401, "Unauthorized")
            self._send(200, server.answer(self.path, body))
        except Refused as refused:
            self._send(refused.status, {"error": {"message": str(refused), "code": refused.status}})

    do_GET = do_POST = _respond

    def _send(self, status: int, value: Any) -> None:
        try:
            text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
        except ValueError:  # as Starlette's JSONResponse, by which vLLM answers
            status, text = 500, "Internal Server Error"
        data = text.encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # a client that did not wait

    def log_message(self, *_: object) -> None:
        """Keep requests off the screen."""
