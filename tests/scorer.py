"""A scorer behind an address on this machine, for tests of remote rewards."""

import json
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CERTIFICATE = str(Path(__file__).parent / "localhost.pem")
Answer = Callable[[dict[str, Any], Any], tuple[int, bytes]]


class Scorer:
    """A server on a port of its own; `answer` makes (status, body) of a request."""

    def __init__(self, *, tls: bool = False) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.answer: Answer = lambda body, handler: (200, lengths(body))
        scorer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                scorer.asked.append(body)
                scorer.headers.append(dict(self.headers))
                scorer.paths.append(self.path)
                status, text = scorer.answer(body, self)
                if status:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                """A client that hangs up is what some tests are about."""

        self.server = Server(("127.0.0.1", 0), Handler)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http{'s' * tls}://localhost:{self.server.server_port}/score"


def lengths(body: dict[str, Any]) -> bytes:
    """An answer that scores each response by its characters."""
    return json.dumps({"scores": [len(text) for text in body["completions"]]}).encode()
