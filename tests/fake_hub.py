"""A hub on loopback: as much of its HTTP API as repositories, branches and commits need, large files included."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class FakeHub:
    """
    Attributes:
        branches (`dict[str, dict[str, bytes]]`): Files of each branch.
        commits (`list[tuple[str, str]]`): Branch and message of each commit, in order.
        refuses (`Callable[[str], bool]`): Branches whose commits are answered with 500.
        tokens (`set[str]`): What requests were authorized with.
    """

    def __init__(self):
        self.branches: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, str]] = []
        self.large: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.refuses = lambda branch: False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.tokens.add((self.headers.get("Authorization") or "").removeprefix("Bearer "))
                self.reply(*hub.answer(unquote(self.path.partition("?")[0]), body))

            def do_PUT(self):
                content = self.rfile.read(int(self.headers["Content-Length"]))
                hub.large[self.path.rsplit("/", 1)[1]] = content
                self.reply(200, {})

            def do_GET(self):
                self.reply(200, {"id": "me/run", "sha": "0" * 40, "siblings": []})

            def reply(self, status: int, value: dict):
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, body: bytes) -> tuple[int, dict]:
        last = path.rsplit("/", 1)[1]
        if path == "/api/repos/create":
            self.branches.setdefault("main", {})
            return 200, {"url": f"{self.url}/me/{json.loads(body)['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/branch/" in path:
            is_new = last not in self.branches
            self.branches.setdefault(last, dict(self.branches["main"]))
            return (200, {}) if is_new else (409, {"error": "exists"})
        if "/preupload/" in path:
            return 200, {"files": [self.mode_of(last, file) for file in json.loads(body)["files"]]}
        if path.endswith("/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self.place_for(o) for o in json.loads(body)["objects"]]}
        if "/commit/" in path:
            if self.refuses(last):
                return 400, {"error": "the disk of the hub is full"}
            return 200, self.commit(last, body)
        return 404, {"error": path}

    def mode_of(self, branch: str, file: dict) -> dict:
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        content = self.branches[branch].get(file["path"])
        oid = None
        if content is not None:
            blob = content if mode == "lfs" else b"blob %d\0" % len(content) + content
            oid = hashlib.sha256(blob).hexdigest() if mode == "lfs" else hashlib.sha1(blob).hexdigest()
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def place_for(self, known: dict) -> dict:
        upload = {"href": f"{self.url}/large/{known['oid']}"}
        return {**known, **({} if known["oid"] in self.large else {"actions": {"upload": upload}})}

    def commit(self, branch: str, body: bytes) -> dict:
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.branches[branch][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.branches[branch][value["path"]] = self.large[value["oid"]]
        self.commits.append((branch, lines[0]["value"]["summary"]))
        oid = f"{len(self.commits):040x}"
        return {"commitUrl": f"{self.url}/me/run/commit/{oid}", "commitOid": oid, "hookOutput": ""}
