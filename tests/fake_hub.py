"""A hub on loopback: as much of its HTTP API as repositories, branches and commits need. No file is too large."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class FakeHub:
    """
    Attributes:
        branches (`dict[str, dict[str, bytes]]`): Files of each branch.
        commits (`list[str]`): Branch of each commit, in order.
        refuses (`bool`): Whether commits are answered with an error.
        tokens (`set[str]`): What requests were authorized with.
    """

    def __init__(self):
        self.branches: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.tokens: set[str] = set()
        self.refuses = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.tokens.add((self.headers.get("Authorization") or "").removeprefix("Bearer "))
                self.reply(*hub.answer(unquote(self.path.partition("?")[0]), body))

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
        if "/branch/" in path:
            is_new = last not in self.branches
            self.branches.setdefault(last, dict(self.branches["main"]))
            return (200, {}) if is_new else (409, {"error": "exists"})
        if "/preupload/" in path:
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return 200, {"files": [{"path": file["path"], **modes} for file in json.loads(body)["files"]]}
        if "/commit/" in path:
            return (400, {"error": "the disk of the hub is full"}) if self.refuses else (200, self.commit(last, body))
        return (200, {"errors": [], "warnings": []}) if path == "/api/validate-yaml" else (404, {"error": path})

    def commit(self, branch: str, body: bytes) -> dict:
        lines = [json.loads(line) for line in body.splitlines()]
        files = [line["value"] for line in lines if line["key"] == "file"]
        self.branches[branch] |= {file["path"]: base64.b64decode(file["content"]) for file in files}
        self.commits.append(branch)
        oid = f"{len(self.commits):040x}"
        return {"commitUrl": f"{self.url}/me/run/commit/{oid}", "commitOid": oid, "hookOutput": ""}
