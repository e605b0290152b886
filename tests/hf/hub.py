"""A Hugging Face hub on this machine, as far as `huggingface_hub` asks for one to up- and download a small folder."""

from __future__ import annotations

import base64
import json
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

_COMMIT = "c" * 40


class Hub:
    """Serves while it is entered.

    Args:
        refuse_commit: answer uploads with an error.
        model: a folder to serve as some/model; None: it is there and gated.

    `files`: what was committed. `fetched`: names of files that were downloaded. `lookups`: times that some/model was
    asked for its list of files.
    """

    def __init__(self, refuse_commit: bool = False, token: str = "hf_right", model: Path | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.lookups = 0
        self.model = model
        self.created: list[dict[str, Any]] = []
        self.refuse_commit, self.token = refuse_commit, token
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path.startswith("/api/models/some/model") and hub.model is None:
                    reason = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to some/model is restricted"}
                    self.answer(403, {}, reason)
                elif hub.model is not None and path.startswith("/api/models/some/model/revision/"):
                    hub.lookups += 1
                    names = [{"rfilename": file.name} for file in hub.model.iterdir()]
                    self.answer(200, {"id": "some/model", "sha": _COMMIT, "siblings": names})
                elif hub.model is not None and path.startswith("/api/models/some/model/tree/"):
                    sizes = [(file.name, file.stat().st_size) for file in hub.model.iterdir()]
                    self.answer(200, [{"type": "file", "path": n, "size": size, "oid": ""} for n, size in sizes])
                elif hub.model is not None and path.startswith(f"/some/model/resolve/{_COMMIT}/"):
                    file = hub.model / path.rpartition("/")[2]
                    if self.command == "GET":
                        hub.fetched.append(file.name)
                    headers = {"ETag": f'"{zlib.crc32(file.read_bytes()):040x}"', "X-Repo-Commit": _COMMIT}
                    self.answer(200, file.read_bytes(), headers)
                else:
                    self.answer(404, {"error": f"GET {self.path}"})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    self.answer(401, {"error": "Invalid username or password."})
                elif self.path == "/api/repos/create":
                    hub.created.append(json.loads(body))
                    self.answer(200, {"url": f"{hub.address}/{hub.created[-1].get('organization', 'me')}/model"})
                elif self.path.endswith("/preupload/main"):
                    names = [item["path"] for item in json.loads(body)["files"]]
                    files = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
                    self.answer(200, {"files": files})
                elif self.path.endswith("/commit/main") and not hub.refuse_commit:
                    for line in map(json.loads, body.splitlines()):
                        if line["key"] == "file":
                            hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    url = f"{hub.address}/some/model/commit/abc"
                    self.answer(200, {"commitUrl": url, "commitOid": "abc", "success": True})
                else:
                    self.answer(403, {"error": "Forbidden here"})

            def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler
