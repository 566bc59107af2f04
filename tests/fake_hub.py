"""A Hugging Face Hub on this machine: what the client of huggingface_hub asks for when it pushes and fetches models.

Files over `LARGE` bytes go by Git LFS, and are fetched from another address, as from the real one. Users are `me`, whose token is
`hf_mine`, and `you`, whose token is `hf_yours`.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator

LARGE = 2_000
TOKENS = {"hf_mine": "me", "hf_yours": "you"}


class Refusal(Exception):
    """Status, X-Error-Code and X-Error-Message of an answer."""


class Hub:
    """Attributes: `url`, `requests`, and `repositories`: by name `private` and `commits`, (hash, {path: content}) in order."""

    def __init__(self):
        self.repositories, self.objects, self.requests, self.url = {}, {}, [], ""
        self.lock = threading.Lock()

    @property
    def elsewhere(self):
        """The same server by another name, since the client follows redirections within the Hub itself."""
        return self.url.replace("127.0.0.1", "localhost")

    def answer(self, method, path, query, headers, body):
        """(status, headers, content) of a request."""
        with self.lock:
            self.requests.append((method, path))
            user = self._user(headers.get("Authorization"))
            if path == "/api/repos/create":
                return self._create(user, json.loads(body))
            if path == "/api/validate-yaml":
                text = json.loads(body)["content"]
                assert text.startswith("---\n") and "\n---\n" in text
                return self._json({"errors": [], "warnings": []})
            if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
                return self._object(method, match[1], body)
            if match := re.fullmatch(r"/(\w+/[\w.-]+)\.git/info/lfs/objects/batch", path):
                self._writable(match[1], user)
                return self._json({"transfer": "basic", "objects": [self._upload(each) for each in json.loads(body)["objects"]]})
            if match := re.fullmatch(r"/(\w+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
                return self._resolve(match[1], urllib.parse.unquote(match[2]), match[3], user)
            if match := re.fullmatch(r"/api/models/(\w+/[\w.-]+)(?:/(revision|tree|preupload|commit)/([^/]+))?", path):
                name, what, revision = match[1], match[2], urllib.parse.unquote(match[3] or "main")
                if what in ("preupload", "commit"):
                    self._writable(name, user)
                    return self._preupload(json.loads(body)) if what == "preupload" else self._commit(name, body)
                commit, files = self._revision(name, revision, user)
                if what == "tree":
                    return self._json([self._entry(path, content) for path, content in sorted(files.items())])
                siblings = [{"rfilename": path} for path in sorted(files)]
                return self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []})
            raise Refusal(404, "", f"{method} {path} is unknown here")

    def _user(self, authorization):
        if authorization is None:
            return None
        token = authorization.removeprefix("Bearer ")
        if token not in TOKENS:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return TOKENS[token]

    def _create(self, user, fields):
        if user is None:
            raise Refusal(401, "", "Invalid username or password.")
        if fields["organization"] != user:
            raise Refusal(403, "", f"You don't have the rights to create a model under the namespace {fields['organization']}")
        name = f"{user}/{fields['name']}"
        if name in self.repositories:
            return (
                409,
                {"Content-Type": "application/json"},
                json.dumps({"error": "It is there", "url": f"{self.url}/{name}"}).encode(),
            )
        first = {".gitattributes": b"*.bin filter=lfs"}
        self.repositories[name] = {
            "private": fields.get("visibility") == "private",
            "commits": [(hashlib.sha1(name.encode()).hexdigest(), first)],
        }
        return self._json({"url": f"{self.url}/{name}", "name": name})

    def _readable(self, name, user):
        repository = self.repositories.get(name)
        if repository is None or (repository["private"] and user != name.partition("/")[0]):
            raise Refusal(401 if user is None else 404, "RepoNotFound", "Repository not found")
        return repository

    def _writable(self, name, user):
        self._readable(name, user)
        if user != name.partition("/")[0]:
            raise Refusal(403, "", "You have no rights to write here")

    def _revision(self, name, revision, user):
        commits = self._readable(name, user)["commits"]
        found = commits[-1:] if revision == "main" else [commit for commit in commits if commit[0] == revision]
        if not found:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found[0]

    def _preupload(self, fields):
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] > LARGE else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in fields["files"]
        ]
        return self._json({"files": modes})

    def _commit(self, name, body):
        header, *operations = map(json.loads, body.splitlines())
        commits = self.repositories[name]["commits"]
        files = dict(commits[-1][1])
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            else:
                assert kind == "deletedFile"
                del files[value["path"]]
        commit = hashlib.sha1(repr((commits[-1][0], header, len(commits))).encode()).hexdigest()
        commits.append((commit, files))
        return self._json({"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit})

    def _upload(self, wanted):
        action = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}
        return wanted if wanted["oid"] in self.objects else wanted | {"actions": action}

    def _object(self, method, digest, body):
        if method == "PUT":
            assert hashlib.sha256(body).hexdigest() == digest
            self.objects[digest] = body
            return 200, {}, b""
        return 200, {"ETag": f'"{digest}"'}, self.objects[digest]

    def _entry(self, path, content):
        large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        entry = {"type": "file", "path": path, "size": len(content), "oid": self._blob(content)}
        return entry | ({"lfs": large} if len(content) > LARGE else {})

    def _blob(self, content):
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def _resolve(self, name, revision, path, user):
        commit, files = self._revision(name, revision, user)
        content = files[urllib.parse.unquote(path)]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{self._blob(content)}"'}
        if len(content) <= LARGE:
            return 200, headers, content
        digest = hashlib.sha256(content).hexdigest()
        self.objects[digest] = content
        linked = {
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.elsewhere}/lfs/{digest}",
        }
        return 302, headers | linked, b""

    def _json(self, values):
        return 200, {"Content-Type": "application/json"}, json.dumps(values).encode()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _reply(self):
        url = urllib.parse.urlsplit(self.path)
        body = self._body()
        try:
            answer = self.server.hub.answer(self.command, url.path, url.query, self.headers, body)
        except Refusal as refusal:
            status, code, message = refusal.args
            headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
            answer = status, {name: value for name, value in headers.items() if value}, json.dumps({"error": message}).encode()
        status, headers, content = answer
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _reply

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.hub, hub.url = hub, f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
