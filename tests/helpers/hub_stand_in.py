"""A stand-in for the Hugging Face Hub: the few parts of its HTTP interface that uploads and downloads of models use.

with HubStandIn(token="...") as hub:
    hub.url                     what HF_ENDPOINT has to be; Xet has to be off (HF_HUB_DISABLE_XET=1)
    hub.repos["user/repo"]      .files {path: bytes}, .private, .commits [message]
    hub.cut = "/commit/"        requests with this in their path are cut off: the connection closes without an answer
    hub.answer["/commit/"] = 503    these get this status instead
    hub.requests                [(method, path, status)]
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


@dataclass
class Repo:
    private: bool = False
    files: dict = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: list = field(default_factory=lambda: ["initial commit"])

    @property
    def sha(self):
        content = repr(self.commits) + repr(sorted(self.files.items()))
        return hashlib.sha1(content.encode()).hexdigest()


class HubStandIn:
    def __init__(self, token):
        self.token, self.repos, self.objects = token, {}, {}  # objects: {sha256: bytes} of large files
        self.cut, self.answer, self.requests = "", {}, []
        self.before = lambda asked: None
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self):
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = f"{self.command} {path}"
        hub.before(asked)
        if hub.cut and re.match(hub.cut, asked):
            hub.requests.append(f"{asked} cut")
            if self.command == "GET":
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                self.wfile.write(b"half")
            self.close_connection = True
            return
        status = next((status for like, status in hub.answer.items() if re.match(like, asked)), None)
        if status is None:
            status, content, headers = self._answer(path, body)
        else:
            content, headers = {"error": f"answer {status}"}, {}
        hub.requests.append(f"{asked} {status}")
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _answer(self, path, body):
        """-> (status, JSON or bytes, headers)."""
        hub, given = self.hub, self.headers.get("Authorization", "")
        if path.startswith("/objects/"):  # where large files go: the address is the permission
            oid = path.removeprefix("/objects/")
            if hashlib.sha256(body).hexdigest() != oid:
                return 400, {"error": "another checksum"}, {}
            hub.objects[oid] = body
            return 200, {}, {}
        if given and given != f"Bearer {hub.token}":
            return 401, {"error": "Invalid username or password."}, {
                "X-Error-Message": "Invalid credentials in Authorization header"
            }  # fmt: skip
        writes = path.startswith("/api/repos/") or any(
            part in path for part in ("/preupload/", "/commit/", "/info/lfs/")
        )
        if writes and not given:
            return 401, {"error": "Unauthorized"}, {}
        if path == "/api/repos/create":
            wish = json.loads(body)
            name = f"{wish['organization'] or 'user'}/{wish['name']}"
            if name.startswith("forbidden/"):
                return 403, {"error": "no rights there"}, {"X-Error-Message": "You have no rights there"}
            there = name in hub.repos
            if not there:
                hub.repos[name] = Repo(wish.get("visibility") == "private" or wish.get("private") is True)
            return (409 if there else 200), {"url": f"{hub.url}/{name}", "name": name}, {}
        if path == "/api/validate-yaml":
            text = json.loads(body)["content"]
            front = yaml.safe_load(text.split("---\n")[1])
            if not isinstance(front, dict) or not isinstance(front.get("license"), str):
                return 400, {"errors": [{"message": '"license" must be a string'}], "warnings": []}, {}
            return 200, {"errors": [], "warnings": []}, {}
        parts = path.removeprefix("/api/models").lstrip("/").split("/")
        name, rest = "/".join(parts[:2]).removesuffix(".git"), parts[2:]
        repo = hub.repos.get(name)
        if repo is None or (repo.private and not given):
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if path.startswith("/api/models"):
            return self._of_repo(repo, name, rest, body)
        if rest[:2] == ["info", "lfs"]:
            wanted = json.loads(body)["objects"]
            answers = []
            for entry in wanted:
                upload = {"upload": {"href": f"{hub.url}/objects/{entry['oid']}"}}
                answers.append(entry | ({} if entry["oid"] in hub.objects else {"actions": upload}))
            return 200, {"transfer": "basic", "objects": answers}, {}
        if rest[0] == "resolve":
            content = repo.files.get("/".join(rest[2:]))
            if content is None:
                return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.sha}
            return 200, content, {"X-Repo-Commit": repo.sha, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        return 404, {"error": f"no such page: {path}"}, {}

    def _of_repo(self, repo, name, rest, body):
        hub = self.hub
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": path} for path in sorted(repo.files)]
            return 200, dict(id=name, modelId=name, sha=repo.sha, private=repo.private, siblings=siblings, tags=[]), {}
        if rest[0] == "tree":
            entries = [
                dict(type="file", path=path, size=len(content), oid=hashlib.sha1(content).hexdigest())
                for path, content in sorted(repo.files.items())
            ]
            return 200, entries, {}
        if rest[0] == "preupload":
            modes = [
                dict(path=f["path"], uploadMode="lfs" if f["path"].endswith(".safetensors") else "regular")
                | dict(shouldIgnore=False)
                for f in json.loads(body)["files"]
            ]
            return 200, {"files": modes}, {}
        if rest[0] == "commit":
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    repo.commits.append(value["summary"])
                elif entry["key"] == "file":
                    repo.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    repo.files[value["path"]] = hub.objects[value["oid"]]
                elif entry["key"] == "deletedFile":
                    del repo.files[value["path"]]
            return 200, dict(commitUrl=f"{hub.url}/{name}/commit/{repo.sha}", commitOid=repo.sha), {}
        return 404, {"error": f"no such interface: {rest}"}, {}
