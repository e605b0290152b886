"""As much of W&B's server as an online run needs: it takes runs and their history."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class WandbServer:
    """Up while the block runs. `environment` leads W&B's client there; `history` is what has come, one dict a step."""

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self.history))
        self.environment = {
            "WANDB_BASE_URL": f"http://127.0.0.1:{self._server.server_port}",
            "WANDB_API_KEY": "x" * 40,
        }

    def __enter__(self) -> WandbServer:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler_of(history: list[dict[str, Any]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer: dict[str, Any] = {}
            if self.path == "/graphql":
                answer = {"data": _answer(json.loads(body))}
            elif self.path.endswith("/file_stream"):
                lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
                history.extend(json.loads(line) for line in lines)
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Not to the test's output."""

    return Handler


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    if request["operationName"] == "UpsertBucket":
        project = {"id": "1", "name": "p", "entity": {"id": "1", "name": "e"}}
        run = {"id": "1", "name": request["variables"].get("name"), "config": "{}", "project": project}
        return {"upsertBucket": {"bucket": run, "inserted": True}}
    if request["operationName"] == "CreateRunFiles":
        return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}}
    return {}
