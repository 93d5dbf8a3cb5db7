"""A stand-in for the W&B server on loopback: it takes runs, artifacts and reports from the real SDK and keeps them.

It proves what we send, not what W&B does with it.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ENTITY = "tester"
DAY = "2026-01-01T00:00:00"


class StandIn:
    """Serves on a free port until `stop`.

    runs: id → what was registered; files: name → bytes; views: id → report or workspace; artifacts: id → what was
    created, with its state; unknown: queries without an answer; received: every body that was sent.
    broken: a path that ends in one of these is answered with status 500. delay: seconds before every answer to POST.
    """

    def __init__(self) -> None:
        self.runs, self.streams, self.files, self.views, self.artifacts = {}, {}, {}, {}, {}
        self.unknown, self.received = [], []
        self.broken: tuple[str, ...] = ()
        self.delay = 0.0
        self.stopping = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()

    def specification(self, kind: str) -> dict:
        """What the only view of this kind ("runs" is a report, "project-view" a workspace) is made of."""
        (view,) = [view for view in self.views.values() if view["type"] == kind]
        return json.loads(view["spec"])

    def answer(self, query: str, variables: dict) -> dict:
        root = re.search(r"\{\s*(?:\w+\s*:\s*)?(\w+)", query)[1]
        answering = getattr(self, f"_{root}", None)
        if answering is None:
            self.unknown.append(query)
            return {}
        return answering(variables, query)

    def _viewer(self, _variables: dict, _query: str) -> dict:
        teams = {"edges": [{"node": {"id": "E", "name": ENTITY}}]}
        user = {"id": "U", "entity": ENTITY, "username": ENTITY, "name": ENTITY, "email": "t@example.org"}
        info = {"cliVersionInfo": {"max_cli_version": "99.0.0"}, "latestLocalVersionInfo": None}
        return {
            "viewer": {
                **user,
                "admin": False,
                "flags": "{}",
                "deletedAt": None,
                "apiKeys": {"edges": []},
                "teams": teams,
            },
            "serverInfo": {**info, "features": [], "featureFlags": []},
        }

    _serverInfo = _viewer

    def ___type(self, _variables: dict, query: str) -> dict:
        return {"__type": None, **dict.fromkeys(re.findall(r"(\w+)\s*:\s*__type", query))}

    def _model(self, _variables: dict, _query: str) -> dict:
        return {"model": {"bucket": None, "project": None}}

    def _upsertBucket(self, variables: dict, _query: str) -> dict:
        name = variables["name"]
        self.runs.setdefault(name, {}).update({k: v for k, v in variables.items() if v is not None})
        project = {"id": "P", "name": "project", "entity": {"id": "E", "name": ENTITY}}
        bucket = {"id": name, "name": name, "displayName": name, "config": "{}", "project": project}
        return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}

    def _createRunFiles(self, variables: dict, _query: str) -> dict:
        files = [{"name": f, "uploadUrl": f"{self.url}/{f}"} for f in variables["files"]]
        return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}

    def _createArtifact(self, variables: dict, _query: str) -> dict:
        key = f"A{len(self.artifacts)}"
        self.artifacts[key] = {**variables, "state": "PENDING"}
        sequence = {"id": f"S{key}", "name": "sequence", "latestArtifact": None}
        artifact = {"id": key, "state": "PENDING", "digest": variables.get("digest"), "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    def _createArtifactManifest(self, variables: dict, _query: str) -> dict:
        key = variables["artifactID"]
        file = {"id": f"F{key}", "name": "manifest", "displayName": "manifest", "uploadHeaders": []}
        file["uploadUrl"] = f"{self.url}/manifest/{key}"
        return {"createArtifactManifest": {"artifactManifest": {"id": f"M{key}", "file": file}}}

    def _createArtifactFiles(self, variables: dict, _query: str) -> dict:
        nodes = []
        for place, file in enumerate(variables.get("artifactFiles") or variables["input"]["artifactFiles"]):
            key, name = file["artifactID"], file["name"]
            node = {"id": f"F{place}", "name": name, "displayName": name, "uploadHeaders": [], "storagePath": "x"}
            node |= {"uploadUrl": f"{self.url}/artifact/{key}/{name}", "uploadMultipartUrls": None}
            nodes.append({"node": {**node, "artifact": {"id": key}}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def _commitArtifact(self, variables: dict, _query: str) -> dict:
        key = variables["artifactID"]
        self.artifacts[key]["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": key, "digest": "x"}}}

    def _project(self, variables: dict, query: str) -> dict:
        if "allViews" in query:
            asked = (variables.get("viewType"), variables.get("viewName"))
            found = [view for view in self.views.values() if (view["type"], view["name"]) == asked]
            return {"project": {"allViews": {"edges": [{"node": view} for view in found]}}}
        return {"project": {**self._described(), "artifact": None}}

    def _models(self, _variables: dict, _query: str) -> dict:
        page = {"hasNextPage": False, "endCursor": None}
        return {"models": {"edges": [{"node": self._described(), "cursor": "c"}], "pageInfo": page}}

    def _described(self) -> dict:
        names = {"id": "P", "internalId": "1000", "name": "project", "entityName": ENTITY}
        return {**names, "createdAt": DAY, "isBenchmark": False, "user": None}

    def _upsertView(self, variables: dict, _query: str) -> dict:
        fresh = base64.b64encode(f"View:{len(self.views)}".encode()).decode().rstrip("=")
        key = variables.get("id") or fresh
        known = {k: variables.get(k) for k in ("type", "name", "displayName", "description", "spec")}
        inserted = key not in self.views
        self.views[key] = {"id": key, **known, "project": self._described(), "createdAt": DAY, "updatedAt": DAY}
        return {"upsertView": {"view": self.views[key], "inserted": inserted}}

    def _view(self, variables: dict, _query: str) -> dict:
        return {"view": self.views.get(variables.get("reportId"))}

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
                sent = gzip.decompress(sent) if self.headers.get("Content-Encoding") == "gzip" else sent
                stand_in.received.append(self.path.encode() + b"\n" + sent)
                return sent

            def do_POST(self) -> None:
                sent = self.body()
                if stand_in.delay:
                    stand_in.stopping.wait(stand_in.delay)
                if stand_in.broken and self.path.endswith(stand_in.broken):
                    return self.reply({"errors": [{"message": "out of order"}]}, status=500)
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

            def handle(self) -> None:
                with suppress(ConnectionError):  # the SDK's service was killed, or gave up
                    super().handle()

            def log_message(self, *_: object) -> None:
                pass

        return Handler
