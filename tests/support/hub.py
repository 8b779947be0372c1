"""A hub in memory, behind huggingface_hub's own HTTP client: its library runs as it is, only the wire is not there."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


class MemoryHub:
    """Repositories as `{name: {path: bytes}}`; `down` is a network without a hub, `may_write` the right to upload."""

    def __init__(self, down: bool = False, may_write: bool = True) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.down, self.may_write = down, may_write
        self.asked: list[str] = []

    def __call__(self, request: Any) -> Any:
        """Answer one request."""
        http = http_library()
        self.asked.append(f"{request.method} {request.url.path}")
        if self.down:
            raise http.ConnectError("Name or service not known", request=request)
        status, content, headers = self._answer(request.method, request.url.path, request.read())
        if isinstance(content, dict | list):
            content = json.dumps(content).encode()
        body = b"" if request.method == "HEAD" else content
        length = {"content-length": str(len(content))}
        return http.Response(status, content=body, headers={**length, **headers}, request=request)

    def _answer(self, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if path == "/api/repos/create":
            if not self.may_write:
                return 401, {"error": "Invalid username or password."}, {}
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.files.setdefault(name, {})
            return 200, {"url": f"{endpoint()}/{name}", "id": name}, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(preupload|commit)/main", path):
            return 200, self._preupload(body) if found[2] == "preupload" else self._commit(found[1], body), {}
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/[\w.-]+)?", path):
            if found[1] not in self.files:
                return 404, {"error": "Repository not found"}, {"x-error-code": "RepoNotFound"}
            siblings = [{"rfilename": name} for name in self.files[found[1]]]
            return 200, {"id": found[1], "sha": self._sha(found[1]), "siblings": siblings}, {}
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/tree/[\w.-]+", path):
            own = self.files[found[1]].items()
            return 200, [{"type": "file", "path": p, "size": len(c), "oid": _etag(c)} for p, c in own], {}
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/[\w.-]+/(.+)", path):
            content = self.files[found[1]][found[2]]
            return 200, content, {"etag": f'"{_etag(content)}"', "x-repo-commit": self._sha(found[1])}
        return (200, b"", {}) if path == "/" else (404, {"error": f"no {method} {path}"}, {})

    def _sha(self, name: str) -> str:
        return hashlib.sha1(repr(sorted(self.files[name].items())).encode()).hexdigest()

    def _preupload(self, body: bytes) -> dict[str, Any]:
        files = json.loads(body)["files"]
        return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}

    def _commit(self, name: str, body: bytes) -> dict[str, Any]:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                self.files[name][value["path"]] = base64.b64decode(value["content"])
        sha = self._sha(name)
        return {"commitUrl": f"{endpoint()}/{name}/commit/{sha}", "commitOid": sha, "hookOutput": ""}


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def http_library() -> Any:
    """The HTTP client of huggingface_hub, by whatever name this version has it."""
    from huggingface_hub.utils import _http

    return _http.httpx2 if hasattr(_http, "httpx2") else _http.httpx


def endpoint() -> str:
    """Where the library believes the hub to be."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def wire(hub: MemoryHub) -> Any:
    """A transport that ends in a hub in memory."""
    return http_library().MockTransport(hub)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryHub]:
    """The hub that huggingface_hub talks to for one test."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    from mmpeft.hub import reach

    found = MemoryHub()

    def client() -> Any:  # the library's own, which knows of being offline, on another wire
        made: Any = _http.default_client_factory()
        made._transport, made._mounts = wire(found), {}
        return made

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    huggingface_hub.set_client_factory(client)
    reach.reachable.cache_clear()
    yield found
    huggingface_hub.set_client_factory(_http.default_client_factory)
    reach.reachable.cache_clear()
