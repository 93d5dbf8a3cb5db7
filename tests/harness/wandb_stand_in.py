"""A stand-in for the W&B server on loopback: it takes runs from the real SDK and keeps what was sent.

It proves what we send, not what W&B does with it.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StandIn:
    """Serves on a free port until `stop`. runs: id → what was registered; files: name → bytes; unknown: the rest."""

    def __init__(self) -> None:
        self.runs, self.streams, self.files, self.unknown = {}, {}, {}, []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, query: str, variables: dict) -> dict:
        root = re.search(r"\{\s*(?:\w+\s*:\s*)?(\w+)", query)[1]
        project = {"id": "P", "name": "project", "entity": {"id": "E", "name": "tester"}}
        if root in ("viewer", "serverInfo"):
            info = {"max_cli_version": "99.0.0"}
            server = {"cliVersionInfo": info, "latestLocalVersionInfo": None, "features": [], "featureFlags": []}
            return {
                "viewer": {"id": "U", "entity": "tester", "username": "tester", "flags": "{}"},
                "serverInfo": server,
            }
        if root == "__type":
            return {"__type": None, **dict.fromkeys(re.findall(r"(\w+)\s*:\s*__type", query))}
        if root == "model":
            return {"model": {"bucket": None, "project": None}}
        if root == "upsertBucket":
            name = variables["name"]
            self.runs.setdefault(name, {}).update({k: v for k, v in variables.items() if v is not None})
            bucket = {"id": name, "name": name, "displayName": name, "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}
        if root == "createRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/{f}"} for f in variables["files"]]
            return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}
        self.unknown.append(query)
        return {}

    def _handler(stand_in) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def reply(self, value: object = None, status: int = 200) -> None:
                text = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def body(self) -> bytes:
                sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return gzip.decompress(sent) if self.headers.get("Content-Encoding") == "gzip" else sent

            def do_POST(self) -> None:
                sent = self.body()
                if self.path == "/graphql":
                    asked = json.loads(sent)
                    return self.reply({"data": stand_in.answer(asked["query"], asked.get("variables") or {})})
                if self.path.endswith("/file_stream"):
                    stand_in.streams.setdefault(self.path.split("/")[-2], []).append(json.loads(sent))
                return self.reply({})

            def do_PUT(self) -> None:
                stand_in.files[self.path.lstrip("/")] = self.body()
                self.reply()

            def do_GET(self) -> None:
                self.reply(status=404)

            def log_message(self, *_: object) -> None:
                pass

        return Handler
