"""A local stub of the model hub: an HTTP server on the loopback interface that answers the API requests of a push and of a download.

The stub keeps repositories, files and commits in memory. Like the real hub, it reports the id of each stored file before an upload, so that a client
does not upload unchanged files. Source of the protocol: huggingface_hub 2.4 (`hf_api.py`, `_commit_api.py`, `lfs.py`).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "hf_secretTokenOfTheTests"
USER = "me"
LARGE_FILE_SUFFIXES = (".safetensors", "tokenizer.json")


@dataclass
class Commit:
    """One commit of a repository: its id, the first line and the rest of its message, and the paths that it changes."""

    oid: str
    summary: str
    description: str
    paths: list[str]


@dataclass
class Repository:
    """A repository: its current files, the paths of its large files, and its commits, oldest first."""

    is_private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    commits: list[Commit] = field(default_factory=list)
    is_served: bool = False
    """Whether clients can download the files. If they can, a private or gated repository still requires a token for the download."""
    is_gated: bool = False

    def find_oid(self, path: str) -> str | None:
        """Return the hub's id of a file: the git blob id, or the sha256 of a large file. Returns None if the repository has no file with this path."""
        if path not in self.files:
            return None
        data = self.files[path]
        if path in self.large:
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324  git's own id


@dataclass
class Hub:
    """The state of a running stub."""

    url: str = ""
    port: int = 0
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    """All requests so far, each as `METHOD /path`."""
    uploads: dict[str, bytes] = field(default_factory=dict)
    """Contents of the uploaded large files, by sha256 (hex)."""
    failures: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """Error responses to send, by a part of the request path: requests whose path contains this part receive these (status, error text) in order."""
    accepted_token: str = TOKEN
    owners: tuple[str, ...] = (USER, "org")

    def serve_model(self, name: str, folder: Path, *, is_gated: bool = False, is_private: bool = False) -> Repository:
        """Serve the files of a folder as a repository with one commit."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        large = {path for path in files if path.endswith(LARGE_FILE_SUFFIXES)}
        commit = Commit(hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest(), "first", "", sorted(files))  # noqa: S324  any id of 40 digits
        repository = Repository(is_private, files, large, [commit], is_served=True, is_gated=is_gated)
        self.repositories[name] = repository
        return repository

    def list_downloads(self, name: str) -> list[str]:
        """Return the names of the downloaded files of a repository, sorted. A file that was downloaded twice is listed twice."""
        prefix = f"GET /{name}/resolve/"
        return sorted(request.removeprefix(prefix).partition("/")[2] for request in self.requests if request.startswith(prefix))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        """Write no log."""

    def do_GET(self) -> None:
        self._answer(b"")

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self._read_body())

    do_PUT = do_POST

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, body: bytes) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        for path_part, responses in self.hub.failures.items():
            if path_part in path and responses:
                status, text = responses.pop(0)
                self._send(status, {"error": text})
                return
        if self._answer_download(path):
            return
        if not path.startswith("/upload/") and self.headers.get("Authorization") != f"Bearer {self.hub.accepted_token}":
            self._send(401, {"error": "Invalid credentials in Authorization header"})
            return
        self._send(*self._route(path, body))

    def _answer_download(self, path: str) -> bool:
        """Answer a request for a downloadable repository. If the request is for something else, send no answer and return False."""
        model_match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|auth-check)(?:/([^/]+))?)?", path)
        file_match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", path)
        match = model_match or file_match
        repository = self.hub.repositories.get(match[1]) if match else None
        if match is None or repository is None or not repository.is_served:
            return False
        has_token = self.headers.get("Authorization") == f"Bearer {self.hub.accepted_token}"
        needs_access = file_match is not None or match[2] == "auth-check"
        if repository.is_private and not has_token:
            self._send(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif repository.is_gated and not has_token and needs_access:
            self._send(403, {"error": "Access to model is restricted"}, {"X-Error-Code": "GatedRepo"})
        elif file_match is not None:
            self._send_file(repository, file_match[3])
        elif match[2] == "tree":
            self._send(200, [self._make_tree_entry(repository, name) for name in sorted(repository.files)])
        else:
            gated = "auto" if repository.is_gated else False
            self._send(200, {"id": match[1], "private": repository.is_private, "gated": gated, "sha": repository.commits[-1].oid, "siblings": []})
        return True

    def _make_tree_entry(self, repository: Repository, name: str) -> dict[str, Any]:
        oid, size = repository.find_oid(name), len(repository.files[name])
        lfs_fields = {"lfs": {"oid": oid, "size": size, "pointerSize": 130}} if name in repository.large else {}
        return {"type": "file", "path": name, "size": size, "oid": oid, **lfs_fields}

    def _send_file(self, repository: Repository, name: str) -> None:
        data = repository.files.get(name)
        if data is None:
            self._send(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
            return
        self.send_response(200)
        headers = {"ETag": f'"{repository.find_oid(name)}"', "X-Repo-Commit": repository.commits[-1].oid, "Content-Length": str(len(data))}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _route(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        hub = self.hub
        if path == "/api/whoami-v2":
            return 200, {"name": USER, "type": "user"}
        if path == "/api/repos/create":
            return self._create_repository(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path_match := re.fullmatch(r"/upload/(\w+)", path):
            hub.uploads[path_match[1]] = body
            return 200, {}
        if path_match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return 200, {"transfer": "basic", "objects": [self._describe_upload_action(item) for item in json.loads(body)["objects"]]}
        if path_match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(preupload|commit|revision)/main)?", path):
            repository = hub.repositories.get(path_match[1])
            if repository is None:
                return 404, {"error": "Repository not found"}
            match path_match[2]:
                case "preupload":
                    return 200, {"files": [self._describe_upload_mode(repository, item["path"]) for item in json.loads(body)["files"]]}
                case "commit":
                    return self._add_commit(path_match[1], repository, [json.loads(line) for line in body.splitlines()])
            return 200, {"id": path_match[1], "private": repository.is_private, "sha": repository.commits[-1].oid if repository.commits else None}
        return 404, {"error": f"the stub has no {self.command} {path}"}

    def _create_repository(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        owner = request.get("organization") or USER
        name = f"{owner}/{request['name']}"
        if owner not in self.hub.owners:
            return 404, {"error": "no such organisation"}
        if name in self.hub.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
        self.hub.repositories[name] = Repository(is_private=request.get("visibility") == "private" or request.get("private") is True)
        return 200, {"url": f"{self.hub.url}/{name}", "name": name}

    def _describe_upload_mode(self, repository: Repository, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(LARGE_FILE_SUFFIXES) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": repository.find_oid(path)}

    def _describe_upload_action(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["oid"] in self.hub.uploads:
            return item
        return {**item, "actions": {"upload": {"href": f"{self.hub.url}/upload/{item['oid']}"}}}

    def _add_commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
        paths = []
        for line in lines:
            fields = line["value"]
            match line["key"]:
                case "header":
                    header = fields
                case "file":
                    repository.files[fields["path"]] = base64.b64decode(fields["content"])
                    paths.append(fields["path"])
                case "lfsFile":
                    if fields["oid"] not in self.hub.uploads:
                        return 400, {"error": f"{fields['path']} was not uploaded"}
                    repository.files[fields["path"]] = self.hub.uploads[fields["oid"]]
                    repository.large.add(fields["path"])
                    paths.append(fields["path"])
        oid = hashlib.sha1(f"{name} {len(repository.commits)}".encode()).hexdigest()  # noqa: S324  any id of 40 digits
        repository.commits.append(Commit(oid, header["summary"], header.get("description") or "", sorted(paths)))
        return 200, {"commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "success": True}

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status >= 400:
            self.send_header("X-Error-Message", str(value.get("error")))
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextlib.contextmanager
def serve_hub(host: str = "127.0.0.1", bind: AbstractContextManager[None] | None = None, url: str | None = None) -> Iterator[Hub]:
    """Run a stub without repositories. The socket is opened inside the context `bind`. If clients reach the stub at another address than the socket's, `url`
    is this address.
    """
    hub = Hub()
    with bind or contextlib.nullcontext():
        server = ThreadingHTTPServer((host, 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.port = server.server_address[1]
    hub.url = url or f"http://{host}:{hub.port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
