"""A local look-alike of the Hugging Face Hub: enough of its protocol for the real client, on 127.0.0.1, in memory.

hub = HubServer({"token": "user"}).start(); hub.url; hub.log; hub.stop()

Clients need `HF_ENDPOINT=hub.url` and `HF_HUB_DISABLE_XET=1`. Repositories are models with branches and tags; private
ones answer their owner alone. A pull request is a ref of its commit. There are no faults, redirects or pages.
"""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Optional


Files = dict[str, bytes]


@dataclass
class Repo:
    """One model repository: the files of every commit, and what its refs point to."""

    id: str
    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)  # by ref

    def commit(self, files: Files, ref: str = "main") -> str:
        listing = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
        sha = hashlib.sha1(json.dumps([self.id, len(self.commits), listing]).encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha


@dataclass
class Request:
    """One line of the log: what was asked for, how it was answered, and the bytes that went out."""

    method: str
    path: str
    status: int
    sent: int
    range: Optional[str]


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class HubServer:
    """The server, on a free port, with the users that its tokens belong to."""

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[Request] = []
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.hub = self
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def start(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        return self

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.hub: HubServer = self.server.hub
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query))
        self.content = b"".join(self.read_body())
        self.status = self.sent = 0
        try:
            self.user = self.authenticate()
            for methods, pattern, name in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in methods:
                    getattr(self, name)(**{k: urllib.parse.unquote(v or "") for k, v in match.groupdict().items()})
                    break
            else:
                raise Refusal(404, "Sorry, we can't find the page you are looking for.")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self.answer({"error": refusal.message}, refusal.status, headers)
        finally:
            entry = Request(self.command, url.path, self.status, self.sent, self.headers.get("Range"))
            with self.hub.lock:
                self.hub.log.append(entry)

    do_HEAD = do_POST = do_PUT = do_GET

    def read_body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def answer(self, content: Any = b"", status: int = 200, headers: Optional[dict[str, str]] = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Length": str(len(data)), "Content-Type": "application/json", **(headers or {})}
        self.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
            self.sent = len(data)

    # ---- who may do what

    def authenticate(self) -> Optional[str]:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        if kind and token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def repo(self, id: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get(id)
        owned = id.partition("/")[0] == self.user
        if repo is None or (repo.private and not owned):  # the Hub does not tell one from the other
            raise Refusal(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        if write and not owned:
            raise Refusal(403, "Forbidden")
        return repo

    # ---- writing

    def create(self) -> None:
        asked = json.loads(self.content)
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        id = f"{asked.get('organization') or self.user}/{asked['name']}"
        page = {"url": f"{self.hub.url}/{id}", "name": id}
        if id in self.hub.repos:
            self.answer({**page, "error": "You already created this model repo"}, 409)
            return
        private = asked.get("private") is True or asked.get("visibility") == "private"
        repo = self.hub.repos[id] = Repo(id, private)
        repo.commit({".gitattributes": b""})
        self.answer(page)

    def validate(self) -> None:
        self.answer({"errors": [], "warnings": []})

    def preupload(self, id: str, rev: str) -> None:
        self.repo(id, write=True)
        files = json.loads(self.content)["files"]
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
            for f in files
        ]
        self.answer({"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})

    def lfs_batch(self, id: str) -> None:
        self.repo(id, write=True)
        objects = json.loads(self.content)["objects"]
        missing = [o for o in objects if o["oid"] not in self.hub.blobs]
        for o in missing:
            o["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}", "header": {}}}
        self.answer(
            {"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"}
        )

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.content).hexdigest() != oid:
            raise Refusal(400, "The body is not the object that was announced")
        self.hub.blobs[oid] = self.content
        self.answer()

    def commit(self, id: str, rev: str) -> None:
        repo = self.repo(id, write=True)
        operations = [json.loads(line) for line in self.content.splitlines() if line]
        with self.hub.lock:
            files = dict(repo.commits[repo.resolve(rev)])
            for operation in operations:
                key, value = operation["key"], operation["value"]
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                elif key == "deletedFile":
                    files.pop(value["path"], None)
                elif key == "header":
                    title = value["summary"]
                else:
                    raise Refusal(400, f"Unknown operation {key!r}")
            number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
            ref = f"refs/pr/{number}" if "create_pr" in self.query else rev
            sha = repo.commit(files, ref)
            repo.titles[ref] = title
        page = f"{self.hub.url}/{id}"
        request = {"pullRequestUrl": f"{page}/discussions/{number}"} if ref != rev else {}
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}", **request})

    def tag(self, id: str, rev: str) -> None:
        repo = self.repo(id, write=True)
        repo.refs[json.loads(self.content)["tag"]] = repo.resolve(rev)
        self.answer({})

    # ---- reading

    def info(self, id: str, rev: str = "main") -> None:
        repo = self.repo(id)
        sha = repo.resolve(rev or "main")
        siblings = [self.sibling(path, content) for path, content in sorted(repo.commits[sha].items())]
        about = {"id": id, "modelId": id, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings}
        self.answer({**about, "downloads": 0, "likes": 0})

    def sibling(self, path: str, content: bytes) -> dict[str, Any]:
        oid = hashlib.sha256(content).hexdigest()
        lfs = {"lfs": {"sha256": oid, "size": len(content), "pointerSize": 130}} if oid in self.hub.blobs else {}
        return {"rfilename": path, **lfs}

    def branch(self, id: str, rev: str) -> None:
        repo = self.repo(id, write=True)
        if rev in repo.refs:
            raise Refusal(409, "Reference exists")
        repo.refs[rev] = repo.resolve("main")
        self.answer({})

    def tree(self, id: str, rev: str) -> None:
        repo = self.repo(id)
        self.answer([self.entry(path, content) for path, content in repo.commits[repo.resolve(rev)].items()])

    def paths_info(self, id: str, rev: str) -> None:
        repo = self.repo(id)
        files = repo.commits[repo.resolve(rev)]
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(self.content)["paths"]
        else:
            paths = urllib.parse.parse_qs(self.content.decode()).get("paths", [])
        self.answer([self.entry(path, files[path]) for path in paths if path in files])

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        oid, size = hashlib.sha256(content).hexdigest(), len(content)
        lfs = {"lfs": {"oid": oid, "size": len(content), "pointerSize": 130}} if oid in self.hub.blobs else {}
        if lfs:  # Git itself has a pointer
            content = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
                oid.encode(),
                len(content),
            )
        blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"type": "file", "oid": blob_id, "size": size, "path": path, **lfs}

    def resolve(self, id: str, rev: str, path: str) -> None:
        repo = self.repo(id)
        sha = repo.resolve(rev)
        if path not in repo.commits[sha]:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        content = repo.commits[sha][path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            self.answer(content, headers=headers)
            return
        start, end = int(part[1]), min(int(part[2] or len(content)) + 1, len(content))
        self.answer(content[start:end], 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"})


_API = "/api/models/(?P<id>[^/]+/[^/]+)"
_REV = "/(?P<rev>[^/]+)"
ROUTES = [
    (("POST",), "/api/repos/create", "create"),
    (("POST",), "/api/validate-yaml", "validate"),
    (("POST",), f"{_API}/preupload{_REV}", "preupload"),
    (("POST",), "/(?P<id>[^/]+/[^/]+).git/info/lfs/objects/batch", "lfs_batch"),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    (("POST",), f"{_API}/commit{_REV}", "commit"),
    (("POST",), f"{_API}/tag{_REV}", "tag"),
    (("POST",), f"{_API}/branch{_REV}", "branch"),
    (("GET",), f"{_API}(?:/revision{_REV})?", "info"),
    (("GET",), f"{_API}/tree{_REV}", "tree"),
    (("POST",), f"{_API}/paths-info{_REV}", "paths_info"),
    (("GET", "HEAD"), f"/(?P<id>[^/]+/[^/]+)/resolve{_REV}/(?P<path>.+)", "resolve"),
]
