"""A Hub for tests: the part of the Hugging Face Hub's HTTP protocol that its real client needs, on 127.0.0.1.

It keeps repositories in memory, speaks to downloads (HEAD and GET of `resolve`, with ranges), uploads (`preupload`,
Git LFS, commits, branches, pull requests) and can misbehave on request, file by file.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_test"
LFS_FROM = 100_000
"""Bytes from which on the server asks for a file by Git LFS."""


@dataclass
class Repo:
    """Commits by id, each all of its files; branches by name; and how it misbehaves."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    truncated: set[str] = field(default_factory=set)
    """Files of which half is sent, as if it were all."""
    drops: dict[str, int] = field(default_factory=dict)
    """Files whose transfer breaks off half-way, so many times."""

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Puts files on a branch; returns the commit."""
        whole = {**self.commits.get(self.branches.get(branch, self.branches.get("main", "")), {}), **files}
        text = json.dumps([(name, hashlib.sha256(content).hexdigest()) for name, content in sorted(whole.items())])
        oid = hashlib.sha1(f"{len(self.commits)} {text}".encode()).hexdigest()
        self.commits[oid] = whole
        self.branches[branch] = oid
        return oid


class Hub(ThreadingHTTPServer):
    """The server; `repos` by id, `requests` are the lines it got."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def endpoint(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is no error."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def answer(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def route(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.server.requests.append(f"{self.command} {path}")
        for method, pattern, handle in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split():
                handle(self, *found.groups(), query=parse_qs(url.query))
                return
        self.body()
        self.refuse(404, "", f"the test's Hub does not know {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = route

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def find(self, name: str, revision: str | None) -> tuple[Repo, str] | None:
        """The repository and commit, or None after an answer that says what is wrong."""
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.known):
            return self.refuse(404 if self.known else 401, "RepoNotFound", "Repository not found")
        if repo.gated and not self.known:
            return self.refuse(401, "GatedRepo", f"Access to model {name} is restricted and you must have access to it")
        commit = repo.branches.get(revision or "main", revision or "")
        if commit not in repo.commits:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commit

    def resolve(self, name: str, revision: str, file: str, query: dict[str, list[str]]) -> None:
        place = self.find(name, revision)
        if place is None:
            return None
        repo, commit = place
        content = repo.commits[commit].get(file)
        if content is None:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        etag = hashlib.sha256(content).hexdigest()
        size = str(len(content))
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "X-Linked-Size": size, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return self.answer(200, b"", {**headers, "Content-Length": size})
        start, status = 0, 200
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, status = int(found[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        part = content[start:]
        if file in repo.truncated:
            return self.answer(status, part[: len(part) // 2], headers)
        if repo.drops.get(file, 0):
            repo.drops[file] -= 1
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(part))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            return None
        return self.answer(status, part, headers)

    def model_info(self, name: str, revision: str | None, query: dict[str, list[str]]) -> None:
        if place := self.find(name, revision):
            repo, commit = place
            files = [{"rfilename": file} for file in repo.commits[commit]]
            self.answer(200, {"id": name, "modelId": name, "sha": commit, "siblings": files, "private": repo.private})

    def create(self, query: dict[str, list[str]]) -> None:
        asked = json.loads(self.body())
        if not self.known:
            return self.refuse(401, "", "Invalid username or password.")
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repos:
            taken = {"error": "You already created this model repo", "url": f"{self.server.endpoint}/{name}"}
            return self.answer(409, taken)
        repo = self.server.repos[name] = Repo(private=asked.get("private", asked.get("visibility") == "private"))
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.answer(200, {"url": f"{self.server.endpoint}/{name}", "name": name})

    def create_branch(self, name: str, branch: str, query: dict[str, list[str]]) -> None:
        self.body()
        if place := self.find(name, None):
            repo, commit = place
            if branch in repo.branches:
                return self.refuse(409, "", "Reference already exists")
            repo.branches[branch] = commit
            self.answer(200, {})
        return None

    def validate_yaml(self, query: dict[str, list[str]]) -> None:
        content = json.loads(self.body())["content"]
        wrong = not content.startswith("---\n")
        self.answer(400 if wrong else 200, {"errors": [{"message": "no metadata"}] if wrong else [], "warnings": []})

    def preupload(self, name: str, revision: str, query: dict[str, list[str]]) -> None:
        asked = json.loads(self.body())
        if self.find(name, revision):
            mode = ["regular", "lfs"]
            files = [
                {"path": file["path"], "uploadMode": mode[file["size"] >= LFS_FROM], "shouldIgnore": False}
                for file in asked["files"]
            ]
            self.answer(200, {"files": files})

    def lfs_batch(self, name: str, query: dict[str, list[str]]) -> None:
        objects = json.loads(self.body())["objects"]
        for wanted in objects:
            wanted["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs/{wanted['oid']}"}}
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str, query: dict[str, list[str]]) -> None:
        content = self.body()
        right = hashlib.sha256(content).hexdigest() == oid
        if right:
            self.server.objects[oid] = content
        self.answer(200 if right else 400)

    def commit(self, name: str, revision: str, query: dict[str, list[str]]) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        if not self.known:
            return self.refuse(401, "", "Invalid username or password.")
        place = self.find(name, revision)
        if place is None:
            return None
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        request = "create_pr" in query
        oid = place[0].commit(files, "refs/pr/1" if request else revision)
        url = f"{self.server.endpoint}/{name}"
        answer = {"commitUrl": f"{url}/commit/{oid}", "commitOid": oid, "success": True}
        return self.answer(200, {**answer, **({"pullRequestUrl": f"{url}/discussions/1"} if request else {})})


NAME = r"([^/]+/[^/]+)"
ROUTES: tuple[tuple[str, str, Any], ...] = (
    ("GET HEAD", rf"/{NAME}/resolve/(.+?)/([^/]+)", Handler.resolve),
    ("GET", rf"/api/models/{NAME}(?:/revision/(.+))?", Handler.model_info),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", rf"/api/models/{NAME}/branch/(.+)", Handler.create_branch),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", Handler.lfs_put),
    ("POST", rf"/api/models/{NAME}/commit/(.+)", Handler.commit),
)
