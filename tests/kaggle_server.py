"""A Kaggle of our own on the loopback interface: the unmodified `kaggle` client talks to it, and faults come on demand.

`kaggle_site(folder)` starts it. `site.environment` is the whole environment for a client (nothing else is let in;
without it the client would knock at localhost:80 and reach nobody), `site.requests` is what came in,
`site.kernel_source(ref)` the pushed notebook as it arrived, and `site.arrange(NAME)` brings about one of FAULTS.
"""

import base64
import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from patience import PATIENCE

USER = "tester"
KEY = "canary0123456789canary0123456789"  # must not be found in anything that is printed
COMPETITION = "csiro-biomass"
WHEN = "2026-01-01T00:00:00.000Z"
DROP = "drop"  # close the line before anything is done
DROP_AFTER = "drop after"  # do it, then close the line without an answer

QUOTA = "Maximum weekly GPU quota of 30.00 hours reached."
TITLE = "The requested title is already in use by another notebook."
RULES = "You must accept this competition's rules before you can submit."

# name: method, how often (None: always), what happens instead of the usual answer
FAULTS: dict[str, tuple[str, int | None, Any]] = {
    "quota": ("SaveKernel", 1, {"error": QUOTA}),
    "title taken": ("SaveKernel", 1, (409, TITLE)),
    "push dropped": ("SaveKernel", 1, DROP),
    "push dropped after": ("SaveKernel", 1, DROP_AFTER),
    "push busy": ("SaveKernel", 1, (429, "Too many requests")),
    "upload refused": ("PUT", 1, (403, "Forbidden")),
    "upload start busy": ("StartBlobUpload", 1, (429, "Too many requests")),
    "upload cut": ("PUT", 1, "half, 503"),
    "upload line lost": ("PUT", 1, "half, drop"),
    "upload stalls": ("PUT", 1, "half, stall"),
    "version dropped": ("CreateDatasetVersion", 1, DROP),
    "version dropped after": ("CreateDatasetVersion", 1, DROP_AFTER),
    "version refused": ("CreateDatasetVersion", 1, {"status": "error", "error": "Version creation failed"}),
    "dataset status broken": ("GetDatasetStatus", None, (500, "Internal error")),
    "kernel status 500": ("GetKernelSessionStatus", 2, (500, "Internal error")),
    "kernel status 500 for ever": ("GetKernelSessionStatus", None, (500, "Internal error")),
    "kernel status hangs": ("GetKernelSessionStatus", None, "hang"),
    "kernel status dropped": ("GetKernelSessionStatus", 1, DROP),
    "rules": ("CreateCodeSubmission", None, (403, RULES)),
    "submit dropped after": ("CreateCodeSubmission", 1, DROP_AFTER),
    "no submissions left": ("CreateCodeSubmission", None, (400, "You have used all your submissions for today.")),
    "credentials echoed": ("SaveKernel", 1, "echo"),
    "output gone": ("GET", 1, (404, "Not Found")),
    "output cut": ("GET", 1, DROP),
}


@dataclass
class KaggleSite:
    "What the server knows and has seen; the tests read and set it while it runs."

    folder: Path  # HOME and TMPDIR of the clients
    port: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)  # method, body, status, in order
    faults: dict[str, list] = field(default_factory=dict)  # by method: [times left, what happens]
    blobs: dict[str, dict[str, Any]] = field(default_factory=dict)  # by token: name, size, data
    datasets: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by ref: versions with files, notes, polls
    kernels: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by ref: versions as in SaveKernel
    outputs: dict[str, bytes] = field(default_factory=dict)  # files of a completed kernel
    submissions: list[dict[str, Any]] = field(default_factory=list)  # newest first
    not_ready: int | None = 0  # polls until a dataset version is ready; None: never
    stale: bool = False  # while it is not ready, speak of the version before
    dataset_missing: int = 404  # what asking for an unknown dataset gives; 403 is seen, too
    kernel_states: tuple[str, ...] = ("QUEUED", "RUNNING", "COMPLETE")  # one a poll, the last stays
    failure_message: str = ""
    list_lags: int | None = 0  # looks at the list until a new submission is in it; None: never
    not_scored: int = 1  # polls until a submission has ended
    score_lags: int | None = 0  # polls after that until its score is there; None: never
    submission_end: str = "COMPLETE"
    source_limit: int = 1_000_000  # bytes of a kernel
    page_limit: int = 200  # entries on a page
    rules_accepted: bool = True
    kernels_attachable: bool = True  # outputs of kernels as inputs
    stalled: threading.Event = field(default_factory=threading.Event)  # an upload hangs

    @property
    def environment(self) -> dict[str, str]:
        "All that a client gets."
        proxy = f"http://127.0.0.1:{self.port}"
        return {
            "PATH": "/usr/bin:/bin",
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"),
            "LC_ALL": "C.UTF-8",
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "KAGGLE_USERNAME": USER,
            "KAGGLE_KEY": KEY,
            "http_proxy": proxy,
            "HTTP_PROXY": proxy,
            "no_proxy": "",
            "NO_PROXY": "",
        }

    def arrange(
        self,
        name: str,  # of FAULTS
        times: int | None = 0,  # how often; 0: as in FAULTS, None: always
    ) -> None:
        method, usual, what = FAULTS[name]
        self.faults[method] = [usual if times == 0 else times, what]

    def run(
        self,
        *args: str,  # of the kaggle command
        **options: Any,  # of subprocess.run
    ) -> subprocess.CompletedProcess:
        "A plain command, as a person would type it."
        command = [str(Path(sys.executable).with_name("kaggle")), *args]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE, **options
        )

    def take(self, method: str) -> Any:
        "What goes wrong in this call, if anything."
        fault = self.faults.get(method)
        if fault is None or fault[0] == 0:
            return None
        if fault[0] is not None:
            fault[0] -= 1
        return fault[1]

    def kernel_source(self, ref: str) -> str:
        "The notebook as it arrived."
        return self.kernels[ref][-1]["text"]

    def methods(self) -> list[str]:
        return [request["method"] for request in self.requests]

    def state(self) -> str:
        "What is there now, in words."
        parts = []
        for ref, versions in self.datasets.items():
            newest = versions[-1]
            ready = "ready" if self.is_ready(newest) else "not ready"
            parts.append(f"{ref.split('/')[1]} version {len(versions)}, {len(newest['files'])} files, {ready}")
        parts += [f"{ref.split('/')[1]} version {len(versions)}" for ref, versions in self.kernels.items()]
        parts += [f"{len(self.submissions)} submission"] if self.submissions else []
        return "; ".join(parts) or "nothing"

    def is_ready(self, version: dict[str, Any]) -> bool:
        return self.not_ready is not None and version["polls"] > self.not_ready


class Refusal(Exception):
    "An HTTP error with Kaggle's nested reason."

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


# ---- the methods: site and request body in, answer out


def start_blob(site: KaggleSite, body: dict[str, Any]) -> dict[str, Any]:
    token = f"blob{len(site.blobs)}"
    site.blobs[token] = {"name": body["name"], "size": body.get("contentLength", 0), "data": b""}
    return {"token": token, "createUrl": f"http://localhost/upload/{token}"}


def find_dataset(site: KaggleSite, body: dict[str, Any]) -> list[dict[str, Any]]:
    ref = f"{body['ownerSlug']}/{body['datasetSlug']}"
    if ref not in site.datasets:
        raise Refusal(site.dataset_missing, "Permission 'datasets.get' was denied")
    return site.datasets[ref]


def dataset_status(site: KaggleSite, body: dict[str, Any]) -> dict[str, Any]:
    versions = find_dataset(site, body)
    versions[-1]["polls"] += 1
    if site.is_ready(versions[-1]) or (site.stale and len(versions) > 1):
        return {"status": "READY"}
    return {"status": "BLOBS_RECEIVED"}


def get_dataset(site: KaggleSite, body: dict[str, Any]) -> dict[str, Any]:
    versions = find_dataset(site, body)
    current = len(versions) if site.is_ready(versions[-1]) else len(versions) - 1
    return {"ref": f"{body['ownerSlug']}/{body['datasetSlug']}", "currentVersionNumber": current}


def list_files(site: KaggleSite, body: dict[str, Any]) -> dict[str, Any]:
    versions = find_dataset(site, body)
    files = versions[body.get("datasetVersionNumber", len(versions)) - 1]["files"]
    size, start = min(body.get("pageSize", 20), site.page_limit), int(body.get("pageToken") or 0)
    rows = [{"name": name, "totalBytes": len(data), "creationDate": WHEN} for name, data in sorted(files.items())]
    token = str(start + size) if start + size < len(rows) else ""
    return {"datasetFiles": rows[start : start + size], "nextPageToken": token}


def add_version(site: KaggleSite, ref: str, body: dict[str, Any], notes: str) -> dict[str, Any]:
    blobs = [site.blobs[entry["token"]] for entry in body.get("files", [])]
    files = {blob["name"]: blob["data"] for blob in blobs}
    site.datasets.setdefault(ref, []).append({"files": files, "notes": notes, "polls": 0})
    return {"status": "ok", "ref": ref, "url": f"https://www.kaggle.com/datasets/{ref}"}


def create_dataset(site: KaggleSite, body: dict[str, Any]) -> dict[str, Any]:
    return add_version(site, f"{body['ownerSlug']}/{body['slug']}", body, "created")


def create_version(site: KaggleSite, body: dict[str, Any]) -> dict[str, Any]:
    find_dataset(site, body)
    inner = body["body"]
    return add_version(site, f"{body['ownerSlug']}/{body['datasetSlug']}", inner, inner.get("versionNotes", ""))


def save_kernel(site: KaggleSite, body: dict[str, Any]) -> dict[str, Any]:
    size = len(body["text"].encode())
    if size >= site.source_limit:
        raise Refusal(400, f"The source has {size} bytes; {site.source_limit} are allowed.")
    sources = body.get("kernelDataSources", [])
    lost = [ref for ref in sources if ref not in site.kernels or not site.kernels_attachable]
    versions = site.kernels.setdefault(body["slug"], [])
    versions.append({**body, "polls": 0})
    absent = [ref for ref in body.get("datasetDataSources", []) if ref not in site.datasets]
    return {
        "ref": body["slug"],
        "url": f"https://www.kaggle.com/code/{body['slug']}",
        "versionNumber": len(versions),
        "invalidDatasetSources": absent,
        "invalidKernelSources": lost,
        "invalidCompetitionSources": [] if site.rules_accepted else body.get("competitionDataSources", []),
    }


def find_kernel(site: KaggleSite, body: dict[str, Any]) -> dict[str, Any]:
    ref = f"{body['userName']}/{body['kernelSlug']}"
    if ref not in site.kernels:
        raise Refusal(403, "Permission 'kernels.get' was denied")
    found = re.search(r"\d+", body.get("versionLabel", ""))  # from 2.2.5 on
    return site.kernels[ref][int(found[0]) - 1 if found else -1]


def kernel_status(site: KaggleSite, body: dict[str, Any]) -> dict[str, Any]:
    kernel = find_kernel(site, body)
    state = site.kernel_states[min(kernel["polls"], len(site.kernel_states) - 1)]
    kernel["polls"] += 1
    return {"status": state} | ({"failureMessage": site.failure_message} if state == "ERROR" else {})


def kernel_output(site: KaggleSite, body: dict[str, Any]) -> dict[str, Any]:
    find_kernel(site, body)
    size, start = min(body.get("pageSize", 20), site.page_limit), int(body.get("pageToken") or 0)
    rows = [{"url": f"http://localhost/output/{name}", "fileName": name} for name in sorted(site.outputs)]
    token = str(start + size) if start + size < len(rows) else ""
    return {"files": rows[start : start + size], "log": '[{"data":"done"}]', "nextPageToken": token}


def submit_code(site: KaggleSite, body: dict[str, Any]) -> dict[str, Any]:
    ref = 5000 + len(site.submissions)
    description = body.get("submissionDescription", "")
    entry = {"ref": ref, "description": description, "polls": 0, "unseen": site.list_lags, "request": body}
    site.submissions.insert(0, entry)
    return {"message": "Successfully submitted to CSIRO - Image2Biomass Prediction", "ref": ref}


def list_submissions(site: KaggleSite, body: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for entry in site.submissions:
        if (unseen := entry.get("unseen", 0)) != 0:
            entry["unseen"] = unseen and unseen - 1
            continue
        row = {"ref": entry["ref"], "description": entry["description"], "date": WHEN}
        row |= {"fileName": entry["request"].get("fileName", ""), "status": "PENDING"}
        if entry["polls"] > site.not_scored:
            row["status"] = site.submission_end
            scored = site.score_lags is not None and entry["polls"] > site.not_scored + site.score_lags
            row |= {"publicScore": "0.71", "privateScore": ""} if scored and site.submission_end == "COMPLETE" else {}
        entry["polls"] += 1
        rows.append(row)
    return {"submissions": rows}


METHODS = {
    "StartBlobUpload": start_blob,
    "GetDatasetStatus": dataset_status,
    "GetDataset": get_dataset,
    "ListDatasetFiles": list_files,
    "CreateDataset": create_dataset,
    "CreateDatasetVersion": create_version,
    "SaveKernel": save_kernel,
    "GetKernelSessionStatus": kernel_status,
    "ListKernelSessionOutput": kernel_output,
    "CreateCodeSubmission": submit_code,
    "ListSubmissions": list_submissions,
    "GetSubmissionLimits": lambda site, body: {"numAllowedNow": 4, "numToday": 1, "numTotal": 1},
}


class Handler(BaseHTTPRequestHandler):
    "Takes requests in a proxy's form (absolute addresses) and answers them itself."

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # header and body in one packet
    site: KaggleSite

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, message: str) -> None:
        body = {"error": {"code": status, "message": message}}
        self.answer(status, json.dumps(body).encode(), {"Retry-After": "1"} if status == 429 else None)

    def hang_up(self) -> None:
        self.close_connection = True

    def do_POST(self) -> None:
        method = urlsplit(self.path).path.split("/")[-1]
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        self.site.requests.append({"method": method, "body": body})
        expected = "Basic " + base64.b64encode(f"{USER}:{KEY}".encode()).decode()
        if self.headers.get("Authorization") != expected:
            return self.refuse(401, "Unauthenticated")
        fault = self.site.take(method)
        if fault == DROP:
            return self.hang_up()
        if fault == "hang":
            time.sleep(5)
            return self.hang_up()
        if fault == "echo":
            said = f"Cannot understand Authorization: {self.headers['Authorization']} of {USER}:{KEY}"
            return self.answer(400, json.dumps({"code": 400, "message": said}).encode())
        if isinstance(fault, tuple):
            return self.refuse(*fault)
        try:
            reply = fault if isinstance(fault, dict) else METHODS[method](self.site, body)
        except Refusal as refusal:
            return self.refuse(refusal.status, refusal.message)
        if fault == DROP_AFTER:
            return self.hang_up()
        return self.answer(200, json.dumps(reply).encode())

    def do_PUT(self) -> None:
        blob = self.site.blobs[urlsplit(self.path).path.split("/")[-1]]
        length, asked = int(self.headers.get("Content-Length", 0)), self.headers.get("Content-Range", "")
        self.site.requests.append({"method": "PUT", "body": {"name": blob["name"], "length": length, "range": asked}})
        if asked.startswith("bytes */"):
            return self.tell_range(blob)
        found = re.match(r"bytes (\d+)-", asked)
        blob["data"] = blob["data"][: int(found[1])] if found else b""
        fault = self.site.take("PUT")
        if isinstance(fault, str):
            blob["data"] += self.rfile.read(length // 2)
            return self.break_off(fault, length - length // 2)
        data = self.rfile.read(length)
        if isinstance(fault, tuple):
            return self.refuse(*fault)
        blob["data"] += data
        return self.answer(200, b"{}")

    def tell_range(self, blob: dict[str, Any]) -> None:
        have = len(blob["data"])
        if have == blob["size"]:
            return self.answer(200, b"{}")
        return self.answer(308, b"", {"Range": f"bytes=0-{have - 1}"} if have else None)

    def break_off(self, how: str, rest: int) -> None:
        if how == "half, drop":
            return self.hang_up()
        if how == "half, stall":
            self.site.stalled.set()
            time.sleep(PATIENCE)  # the client is stopped meanwhile
            return self.hang_up()
        self.rfile.read(rest)  # arrived, but was not kept
        return self.answer(503, b"{}")

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path.removeprefix("/output/"))
        self.site.requests.append({"method": "GET", "body": {"name": name}})
        fault = self.site.take("GET")
        if isinstance(fault, tuple):
            return self.refuse(*fault)
        data = self.site.outputs[name]
        if fault == DROP:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            return self.hang_up()
        return self.answer(200, data, {"Content-Type": "text/csv"})


@contextlib.contextmanager
def kaggle_site(
    folder: Path,  # empty; HOME and TMPDIR of the clients are made in it
) -> Iterator[KaggleSite]:
    "Run a server as long as the block lasts."
    for name in ("home", "tmp"):
        (folder / name).mkdir(parents=True)
    site = KaggleSite(folder)
    handler = type("SiteHandler", (Handler,), {"site": site})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    site.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
