"""A server that judges over HTTP on this machine, as a user's would, and what it was asked."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Judge:
    """Answers by the first word of the response: `CODE`, `CODE once`, `hang`, `say TEXT`; else the length's reward."""

    def __init__(self, server: ThreadingHTTPServer, scheme: str) -> None:
        self.url = f"{scheme}://127.0.0.1:{server.server_port}/judge"
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []

    def answer(self, response: str) -> tuple[int, bytes]:
        word, _, rest = response.partition(" ")
        if word == "hang":
            time.sleep(3)
        if word == "say":
            return 200, rest.encode()
        seen = sum(asked["response"] == response for asked in self.asked)
        if word.isdigit() and (rest != "once" or seen == 1):
            return int(word), b"not now"
        return 200, json.dumps({"reward": float(len(response)), "checks": {"judge:short": len(response) < 20}}).encode()


@contextmanager
def judge(certificate: Path | None = None) -> Iterator[Judge]:
    """Args: certificate: with its key, for TLS; None: without."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            made.asked.append(asked)
            made.headers.append(dict(self.headers))
            status, body = made.answer(asked["response"])
            self.send_response(status)
            if status == 302:
                self.send_header("Location", made.url)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    made = Judge(server, "https" if certificate else "http")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
