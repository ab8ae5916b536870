"""A W&B server on this machine, as far as the public API asks it: runs, histories, reports."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class GraphQLServer:
    """Answers the queries of the real client from what it was given, and remembers them.

    Args:
        runs: Id to ``{"name", "state", "config", "rows"}``; rows have ``_step``.
    """

    def __init__(self, runs: dict[str, dict[str, Any]]) -> None:
        self.runs = runs
        self.queries: list[tuple[str, dict[str, Any]]] = []
        self.reports: list[dict[str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                variables = body.get("variables") or {}
                query = " ".join(body["query"].split())
                server.queries.append((query, variables))
                self.answer(200, {"data": server.answer(query, variables)})

            def do_GET(self) -> None:
                self.answer(404, {})

            def answer(self, status: int, content: dict[str, Any]) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)

    def __enter__(self) -> GraphQLServer:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def asked(self, word: str) -> list[dict[str, Any]]:
        """The variables of all queries with a word in them."""
        return [variables for query, variables in self.queries if word in query]

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "viewer {" in query:
            viewer = {"id": "1", "username": "ada", "entity": "ada", "email": "", "admin": False}
            return {"viewer": viewer | {"flags": "{}", "teams": {"edges": []}}}
        if "upsertView" in query:
            self.reports.append(variables)
            return {"upsertView": {"view": self._view(variables), "inserted": True}}
        if "models(" in query or "query Projects" in query or "GetProjects" in query:
            return {"models": {"edges": [{"node": self._project(), "cursor": "p"}],
                               "pageInfo": {"endCursor": "p", "hasNextPage": False}}}  # fmt: skip
        if variables.get("project", variables.get("projectName")) != "digits":
            return {"project": None}
        if "runs(" in query:
            return {"project": self._project() | self._runs(variables)}
        run_id = variables.get("name") or variables.get("run") or variables.get("runName")
        if run_id is None:
            return {"project": self._project()}
        if run_id not in self.runs:
            return {"project": {"run": None}}
        return {"project": self._project() | {"run": self._run(run_id, query, variables)}}

    def _project(self) -> dict[str, Any]:
        names = {
            "id": "UDE=",
            "internalId": "1",
            "name": "digits",
            "entityName": "ada",
            "user": None,
        }
        return names | {"createdAt": "2026-01-01T00:00:00", "readOnly": False, "isBenchmark": False}

    def _runs(self, variables: dict[str, Any]) -> dict[str, Any]:
        """A page of the runs that pass the filters."""
        filters = json.loads(variables.get("filters") or "{}")
        wanted = {k.removeprefix("config.").removesuffix(".value"): v for k, v in filters.items()}
        chosen = [
            run_id
            for run_id, run in self.runs.items()
            if all(run["config"].get(key) == value for key, value in wanted.items())
        ]
        begin = int(variables["cursor"] or 0)
        end = min(begin + 2, len(chosen))  # small pages, so that there are several
        edges = [{"node": self._run(run_id, "", {}), "cursor": str(end)}
                 for run_id in chosen[begin:end]]  # fmt: skip
        page = {"endCursor": str(end), "hasNextPage": end < len(chosen)}
        return {"runCount": len(chosen), "runs": {"edges": edges, "pageInfo": page}}

    def _run(self, run_id: str, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[run_id]
        rows = run["rows"]
        keys = {key: {} for row in rows for key in row}
        found: dict[str, Any] = {
            "id": f"id-{run_id}", "name": run_id, "displayName": run["name"], "state": run["state"],
            "config": json.dumps({key: {"value": v} for key, v in run["config"].items()}),
            "tags": [], "group": None, "sweepName": None, "jobType": None, "commit": None,
            "readOnly": False, "createdAt": "2026-01-01T00:00:00", "description": None,
            "heartbeatAt": "2026-01-01T00:00:00", "notes": None, "projectId": "1",
            "user": {"name": "ada", "username": "ada"}, "historyLineCount": len(rows),
            "historyKeys": {"lastStep": rows[-1]["_step"], "keys": keys},
            "summaryMetrics": "{}", "systemMetrics": "{}",
        }  # fmt: skip
        if "parquetHistory" in query:
            found["parquetHistory"] = {"parquetUrls": [], "liveData": []}
        elif "sampledHistory" in query:
            spec = json.loads(variables["spec"])
            found["sampledHistory"] = [
                [
                    {key: row[key] for key in spec["keys"]}
                    for row in rows
                    if spec["minStep"] <= row["_step"] <= spec["maxStep"]
                    and all(key in row for key in spec["keys"])
                ]
            ]
        elif "history(" in query:
            found["history"] = [
                json.dumps(row)
                for row in rows
                if variables["minStep"] <= row["_step"] < variables["maxStep"]
            ]
        return found

    def _view(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": "Vmlldzox", "name": "v", "displayName": variables["displayName"],
            "description": variables["description"], "type": variables["type"],
            "project": {"id": "UDE=", "name": "digits", "entityName": "ada"},
            "user": {"id": "1", "username": "ada", "name": "ada", "photoUrl": None, "admin": False},
            "createdAt": "2026-01-01T00:00:00", "updatedAt": "2026-01-01T00:00:00",
            "spec": variables["spec"],
        }  # fmt: skip
