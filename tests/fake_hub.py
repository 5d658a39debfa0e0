"""As much of Hugging Face's server as huggingface_hub asks for: one data set, name/set, with a folder in mine/."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    failures: dict[str, list[int]]  # by file: the statuses of its next ranges
    starts: list[tuple[str, int]]  # (file, first byte) of each range
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        files = [self.folder / path.removeprefix("mine/") for path in parse_qs(body).get("paths", [])]
        self.json([self.entry(file) for file in files if file.is_file()])

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            self.json([self.entry(file) for file in self.folder.iterdir()])
        elif self.path.startswith("/api/datasets/name/set"):
            self.json({"id": "name/set", "sha": "a" * 40, "siblings": [], "private": False})
        else:
            self.file(self.path.rpartition("/")[2])

    def entry(self, file: Path) -> dict:
        return {"type": "file", "path": f"mine/{file.name}", "size": file.stat().st_size, "oid": "0" * 40}

    def file(self, name: str) -> None:
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not (self.folder / name).is_file() or not part:
            return self.send(404, b"")
        self.starts.append((name, int(part[1])))
        if self.failures.get(name):
            return self.send(self.failures[name].pop(0), b"")
        data = (self.folder / name).read_bytes()
        chunk = data[int(part[1]) : int(part[2]) + 1]
        content_range = f"bytes {part[1]}-{int(part[1]) + len(chunk) - 1}/{len(data)}"
        return self.send(206, chunk, **{"Content-Range": content_range})

    def json(self, answer: object) -> None:
        self.send(200, json.dumps(answer).encode(), **{"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def fake_hub(folder: Path) -> Iterator[type[_Handler]]:
    """The handler of a running server; `endpoint` is its address."""
    handler = type("Handler", (_Handler,), {"folder": folder, "failures": {}, "starts": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    handler.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield handler
    server.shutdown()
    server.server_close()
