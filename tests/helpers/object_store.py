"""An object store on this machine: an HTTP server with ranges and listings, which fails when told to."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ObjectStore(ThreadingHTTPServer):
    """Serves a folder.

    Attributes:
        faults: what the next GETs of a file do wrong: a status to answer with, ``"reset"`` and ``"short"`` for half of
            the body (announced whole, or as if it were whole), ``"whole"`` for a server that knows no ranges.
        always: the same, of each GET from now on.
        requests: (path, first byte, size) of each GET that was served.
        sent: bytes of bodies that were sent to their end.
        connections: how many were opened.
    """

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.faults, self.always = root, deque(), None
        self.requests, self.connections, self.sent = [], 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def process_request(self, request, client_address) -> None:
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request, client_address) -> None:
        """Clients hang up, that is what is tested."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ObjectStore

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        path = self.server.root / self.path.lstrip("/")
        if path.is_file():
            self._answer(200, path.stat().st_size, ETag=f'"{path.stat().st_mtime_ns}"')
        else:
            self._answer(404, 0)

    def do_GET(self) -> None:
        path = self.server.root / self.path.strip("/")
        if path.is_dir():
            names = (child.name + "/" * child.is_dir() for child in path.iterdir())
            page = "".join(f'<a href="{name}">{name}</a>' for name in names).encode()
            self._answer(200, len(page), **{"Content-Type": "text/html"})
            self.wfile.write(page)
            return
        fault = self.server.faults.popleft() if self.server.faults else self.server.always
        if not path.is_file() or isinstance(fault, int):
            self._answer(fault if path.is_file() else 404, 0)
            return
        body = path.read_bytes()
        first, status, limits = 0, 200, self.headers.get("Range")
        if limits and fault != "whole":
            first, last = (int(n) for n in limits.removeprefix("bytes=").split("-"))
            if first >= len(body):
                self._answer(416, 0)
                return
            body, status = body[first : last + 1], 206
        self.server.requests.append((path.name, first, len(body)))
        half = body[: len(body) // 2]
        self._answer(status, len(half if fault == "short" else body))
        self.wfile.write(half if fault in ("short", "reset") else body)
        self.server.sent += len(body)
        self.close_connection = fault == "reset"

    def _answer(self, status: int, length: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(length)} | headers).items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def serve(root: Path) -> Iterator[ObjectStore]:
    with ObjectStore(root) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
