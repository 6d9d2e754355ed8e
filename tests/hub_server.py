"""A small model hub on localhost, for the real Hub client. Tests can make it misbehave.

Use it as `with Hub({"owner/model": folder}) as hub:`. hub.url is the HF_ENDPOINT, and hub.requests lists all requests.
hub.fault = ("HEAD", "model.safetensors", 503) injects a fault. Instead of an HTTP status, it can be 'hang', 'stall',
'cut', 'page' or 'xet'. hub.on_fault() is called at each fault. hub.uploaded contains {model: {path: bytes}}.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """models: {hub id: local folder}. All models are at COMMIT, which is also `main`."""

    def __init__(self, models: dict[str, Path]):
        self.models, self.fault, self.requests, self.uploaded = models, None, [], {}
        self.on_fault = lambda: None
        self.released = threading.Event()

    def __enter__(self):
        members = {"protocol_version": "HTTP/1.1", "log_message": lambda *args: None}
        members |= dict.fromkeys(("do_GET", "do_HEAD"), lambda handler: self.answer(handler))
        members["do_POST"] = lambda handler: self.take(handler)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (BaseHTTPRequestHandler,), members))
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None  # ignore clients that disconnect
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def fetched(self) -> list[str]:
        """Return the names of the downloaded files, in order."""
        downloads = [request for request in self.requests if request.startswith("GET") and "/resolve/" in request]
        return [request.rsplit("/", 1)[1] for request in downloads]

    def answer(self, handler) -> None:
        path = handler.path.split("?")[0]
        self.requests.append(f"{handler.command} {path}")
        method, part, what = self.fault or ("", "", None)
        what = what if method == handler.command and part in path else None
        if what:
            self.on_fault()
        if what == "hang":
            self.released.wait()
            handler.close_connection = True
        elif what == "page":
            self.send(handler, 200, b"<html>please log in</html>", {"Content-Type": "text/html"})
        elif isinstance(what, int):
            self.send(handler, what, b"{}", {})
        else:
            self.serve(handler, path, what)

    def serve(self, handler, path: str, what) -> None:
        for name, folder in self.models.items():
            found = sorted(folder.iterdir())
            if path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
                files = [{"rfilename": file.name} for file in found]
                info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": files, "tags": [], "private": False}
                return self.send_json(handler, 200, info)
            if path in (f"/api/models/{name}/tree/main", f"/api/models/{name}/tree/{COMMIT}"):
                info = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in found]
                return self.send_json(handler, 200, info)
            file = folder / path.rsplit("/", 1)[1]
            if path in (f"/{name}/resolve/{r}/{file.name}" for r in ("main", COMMIT)) and file.is_file():
                return self.send_file(handler, file.read_bytes(), what)
        self.send(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def take(self, handler) -> None:
        """Handle each request of an upload: create the model, say how to send each file, and store the files."""
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        self.requests.append(f"POST {handler.path}")
        if handler.headers.get("Authorization") is None:
            return self.send_json(handler, 401, {})
        name = "/".join(handler.path.split("/")[3:5])
        if handler.path == "/api/repos/create":
            made = json.loads(body)
            name = "/".join(filter(None, (made.get("organization"), made["name"])))
            return self.send_json(handler, 200, {"url": f"{self.url}/{name}", "name": name, "id": name})
        if handler.path.endswith("/validate-yaml"):
            return self.send_json(handler, 200, {"errors": [], "warnings": []})
        if "/preupload/" in handler.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            files = [file | {"shouldIgnore": False, "oid": None} for file in files]
            return self.send_json(handler, 200, {"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        files = [line["value"] for line in lines if line["key"] == "file"]
        self.uploaded[name] = {file["path"]: base64.b64decode(file["content"]) for file in files}
        self.send_json(handler, 200, {"commitUrl": f"{self.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def send_json(self, handler, status: int, answer) -> None:
        self.send(handler, status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def send_file(self, handler, body: bytes, what) -> None:
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if what == "xet":
            headers |= {"X-Xet-Hash": "0" * 64, "X-Xet-Refresh-Route": f"{self.url}/hang"}
        start = int((handler.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        half = len(body) // 2
        if what in ("cut", "stall") and handler.command == "GET":
            handler.send_response(206 if start else 200)
            for key, value in (headers | {"Content-Length": str(len(body) - start)}).items():
                handler.send_header(key, value)
            handler.end_headers()
            handler.wfile.write(body[start : max(start, half)])
            handler.wfile.flush()
            if what == "stall":
                self.released.wait()
            handler.close_connection = True
        else:
            self.send(handler, 206 if start else 200, body[start:], headers)

    def send(self, handler, status: int, body: bytes, headers: dict) -> None:
        handler.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            handler.send_header(key, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)
