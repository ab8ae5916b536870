"""A W&B server on this machine, as far as a client that logs asks it; it keeps the rows."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VIEWER = {
    "id": "1", "entity": "ada", "username": "ada", "email": "ada@b.c", "flags": "{}",
    "admin": False, "teams": {"edges": []}, "apiKeys": {"edges": []},
}  # fmt: skip


class LoggingServer:
    """Takes runs; ``rows`` are those of all runs by id, ``upserts`` what was said of them."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.streams: list[dict[str, Any]] = []
        self.upserts: list[dict[str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.answer(404, {})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                self.answer(200, server.answer(self.path, json.loads(body)))

            def answer(self, status: int, content: dict[str, Any]) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoggingServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            self.streams.append(body)
            history = (body.get("files") or {}).get("wandb-history.jsonl", {})
            self.rows.setdefault(path.split("/")[-2], []).extend(
                json.loads(line) for line in history.get("content", [])
            )
            return {}
        query, variables = body.get("query", ""), body.get("variables") or {}
        if "upsertBucket" in query:
            self.upserts.append(variables)
            project = {"id": "1", "name": "digits", "entity": {"id": "1", "name": "ada"}}
            bucket = {"id": "1", "name": variables["name"], "displayName": variables["name"],
                      "description": None, "config": "{}", "sweepName": None, "project": project,
                      "historyLineCount": 0}  # fmt: skip
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": False}}}
        return {"data": {"viewer": VIEWER} if "viewer" in query else {}}
