"""A small model hub on loopback for the real client, which can be told to misbehave.

with Hub({"owner/model": folder}) as hub: ... hub.url is an HF_ENDPOINT, hub.requests lists what was asked for
hub.fault = ("HEAD", "model.safetensors", 503)
For the status also 'hang', 'stall', 'cut', 'cut once', 'page', 'slow' and 'xet'.
"""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """models: hub id -> local folder. fault: (method, part of the path, what) or None; `headers` go with a status."""

    def __init__(self, models: dict[str, Path]):
        self.models, self.fault, self.headers, self.requests = models, None, {}, []
        self.released = threading.Event()

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None  # clients that went away
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler) -> None:
        path = handler.path.split("?")[0]
        self.requests.append(f"{handler.command} {path}")
        method, part, what = self.fault or ("", "", None)
        what = what if method == handler.command and part in path else None
        if what == "hang":
            self.released.wait()
            handler.close_connection = True
        elif what == "page":
            self.send(handler, 200, b"<html>please log in</html>", {"Content-Type": "text/html"})
        elif isinstance(what, int):
            self.send(handler, what, b"{}", self.headers)
        else:
            if what == "slow":
                time.sleep(1.5)
            self.serve(handler, path, what)

    def serve(self, handler, path: str, what) -> None:
        for name, folder in self.models.items():
            if path.startswith(f"/api/models/{name}"):
                files = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": files, "tags": [], "private": False}
                return self.send(handler, 200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            if path.startswith(f"/{name}/resolve/"):
                file = folder / path.rsplit("/", 1)[1]
                if file.is_file():
                    return self.send_file(handler, file.read_bytes(), what)
        self.send(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def send_file(self, handler, body: bytes, what) -> None:
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if what == "xet":
            headers |= {"X-Xet-Hash": "0" * 64, "X-Xet-Refresh-Route": f"{self.url}/hang"}
        start = int((handler.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        half = len(body) // 2
        if what == "cut once":
            self.fault = None
        if what in ("cut", "cut once", "stall") and handler.command == "GET":
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
        if handler.command == "GET":
            handler.wfile.write(body)
