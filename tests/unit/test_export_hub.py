"""Pushing to the Hub: what is asked of it (a stand-in over HTTP), and what its refusals leave."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from rich.console import Console

from pipeline.errors import PipelineError
from pipeline.runfolder import RunFolder
from stages.export.config import ExportSection
from stages.export.hub import push

CARD = 'From the folder that holds this one:\n\n```python\nload("./base", "./{form}")\n```\n'


@dataclass
class HubStandIn:
    """The few requests of a commit; files are small enough to come within it."""

    refuses: dict[str, int] = field(default_factory=dict)  # by end of the path: a status
    asked: list[tuple[str, Any]] = field(default_factory=list)  # path and body
    tokens: set[str | None] = field(default_factory=set)
    url: str = ""

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        lines = [json.loads(line) for line in body.splitlines()] if b"\n" in body else None
        self.asked.append((path, lines or (json.loads(body) if body else None)))
        for end, status in self.refuses.items():
            if path.endswith(end):
                return status, {"error": "no"}
        if "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/commit/" in path:
            return 200, {"commitUrl": f"{self.url}/me/mine/commit/0", "commitOid": "0"}
        return 200, {"url": f"{self.url}/me/mine", "id": "me/mine"}

    @property
    def committed(self) -> dict[str, str]:
        """The text of every file of the commit, by its place in the repository."""
        (lines,) = [body for path, body in self.asked if "/commit/" in path]
        added = [line["value"] for line in lines if line["key"] == "file"]
        return {file["path"]: base64.b64decode(file["content"]).decode() for file in added}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    found = HubStandIn()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found.tokens.add(self.headers.get("Authorization"))
            status, answer = found.answer(self.path.partition("?")[0], body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield found
    server.shutdown()
    server.server_close()


def finished(tmp_path: Path, *forms: str) -> RunFolder:
    """A run whose export holds one weight file and a card for each form."""
    run = RunFolder(tmp_path / "run")
    out = run.stage("export").artifact
    for form in forms:
        (out / form).mkdir(parents=True)
        (out / form / "README.md").write_text(CARD.replace("{form}", form))
        (out / form / "model.safetensors").write_text(f"weights of {form}")
    (out / "export.json").write_text(json.dumps({"forms": forms}))
    (out / "manifest.json").write_text("{}")
    return run


def pushed(run: RunFolder, **fields: Any) -> str:
    screen = io.StringIO()
    push(run, ExportSection(push_to_hub="me/mine", **fields), Console(file=screen, width=200))
    return screen.getvalue()


def test_one_commit_holds_every_form_and_its_card(hub: HubStandIn, tmp_path: Path) -> None:
    said = pushed(finished(tmp_path, "base", "adapter", "merged", "reward"))
    assert said.strip() == f"✓ pushed to {hub.url}/me/mine/commit/0"
    paths = [path for path, _ in hub.asked]
    assert paths[0] == "/api/repos/create"
    assert hub.asked[0][1]["name"] == "mine" and hub.asked[0][1]["organization"] == "me"
    assert hub.asked[0][1].get("private", hub.asked[0][1].get("visibility")) in (True, "private")
    assert [path for path in paths if "/commit/" in path] == ["/api/models/me/mine/commit/main"]
    assert hub.tokens == {"Bearer hf_secret"}
    # The policy's plain form is the repository itself; records of this machine stay here.
    assert hub.committed.keys() == {
        *("README.md", "model.safetensors", "adapter/README.md", "adapter/model.safetensors"),
        *("base/README.md", "base/model.safetensors"),
        *("reward/README.md", "reward/model.safetensors"),
    }
    assert hub.committed["model.safetensors"] == "weights of merged"
    loads = 'load("me/mine", subfolder="base", "me/mine", subfolder="adapter")'
    assert loads in hub.committed["adapter/README.md"]
    assert 'load("me/mine", subfolder="base", "me/mine")' in hub.committed["README.md"]


def test_without_a_merged_policy_its_adapter_is_the_repository(
    hub: HubStandIn, tmp_path: Path
) -> None:
    pushed(finished(tmp_path, "adapter", "vllm"), hub_private=False, hub_revision="second")
    paths = [path for path, _ in hub.asked]
    assert "/api/models/me/mine/branch/second" in paths
    assert "/api/models/me/mine/commit/second" in paths
    assert hub.asked[0][1].get("private", hub.asked[0][1].get("visibility")) in (False, "public")
    assert hub.committed["model.safetensors"] == "weights of adapter"
    assert hub.committed["vllm/model.safetensors"] == "weights of vllm"
    loads = 'load("me/mine", subfolder="base", revision="second", "me/mine", revision="second")'
    assert loads in hub.committed["README.md"]


@pytest.mark.parametrize(("status", "advice"), [(401, True), (403, True), (500, False)])
def test_a_refusal_is_one_line_and_loses_nothing(
    hub: HubStandIn, tmp_path: Path, status: int, advice: bool
) -> None:
    run = finished(tmp_path, "merged")
    before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
    hub.refuses["/api/repos/create"] = status
    with pytest.raises(PipelineError, match="nothing was pushed to me/mine") as caught:
        pushed(run)
    message = str(caught.value)
    assert "\n" not in message
    assert f"the Hub answers {status}" in message
    assert ("`hf auth login` or set HF_TOKEN" in message) == advice
    assert "hf_secret" not in message
    assert message.endswith("is finished; `rlhf export` again only pushes it")
    assert before == {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
    assert not [path for path, _ in hub.asked if "/commit/" in path]


def test_no_hub_and_offline_mode_say_so(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(tmp_path, "merged")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PipelineError, match="nothing was pushed to me/mine: ConnectError"):
        pushed(run)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PipelineError, match="me/mine: HF_HUB_OFFLINE is set: unset it"):
        pushed(run)


def test_a_login_that_is_missing_is_named(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    hub.refuses["/api/repos/create"] = 401
    with pytest.raises(PipelineError, match="run `hf auth login` or set HF_TOKEN"):
        pushed(finished(tmp_path, "merged"))
