"""Local stand-in of the hub, for uploads: creates repositories, checks metadata, takes commits."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from transformers.utils import hub as of_transformers

TOKEN = "hf_stand_in"

ACCOUNT = "me"
"""Owner of the token, to which repositories without an owner belong."""


class Hub:
    """Repositories as folders under `root`, and what was asked for.

    Attributes:
        created: bodies of the requests that created repositories.
        messages: summaries of the commits.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.created, self.messages = root, [], []
        self.address = ""

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """Status and answer to a request with POST, as the hub defines them."""
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            head = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return 200, {"errors": [], "warnings": [] if isinstance(head, dict) else [{"message": "no metadata"}]}
        place, _, _ = path.removeprefix("/api/models/").rpartition("/")
        repository, _, kind = place.rpartition("/")
        does = {"preupload": self._preupload, "commit": self._commit}.get(kind)
        if does is None or not (self.root / repository).is_dir():
            return 404, {"error": f"no {path}"}
        return does(repository, body)

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked.get('organization') or ACCOUNT}/{asked['name']}"
        if (self.root / name).exists():
            return 409, {"error": "exists", "url": f"{self.address}/{name}"}
        self.created.append(asked)
        (self.root / name).mkdir(parents=True)
        return 200, {"url": f"{self.address}/{name}", "name": name}

    def _preupload(self, repository: str, body: bytes) -> tuple[int, Any]:
        paths = [each["path"] for each in json.loads(body)["files"]]
        return 200, {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}

    def _commit(self, repository: str, body: bytes) -> tuple[int, Any]:
        for line in body.splitlines():
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "header":
                self.messages.append(value["summary"])
            else:
                assert key == "file"
                file = self.root / repository / value["path"]
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(base64.b64decode(value["content"]))
        return 200, {"commitUrl": f"{self.address}/{repository}/commit/{'0' * 40}", "commitOid": "0" * 40}


@contextmanager
def local_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run the stand-in on a free port, and have huggingface_hub use it."""
    hub = Hub(root)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            status, answer = hub.answer(self.path, body) if known else (401, {"error": "who are you?"})
            self._send(status, answer)

        def do_HEAD(self):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self):
            self._send(404, {"error": f"no {self.path}"})

        def _send(self, status, answer):
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(huggingface_hub.constants.ENDPOINT, "")
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + template)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.address)
    # transformers keeps a client of its own from its first use on, with the address of that time.
    monkeypatch.setattr(of_transformers, "_hf_api", None, raising=False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
