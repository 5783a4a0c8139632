"The app as people meet it: a process of its own, a browser without a window, phones, and pages of strangers."

import dataclasses
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from chromium import BROWSERS, Browser
from patience import PATIENCE, wait_until

from biomass_lib.app import app_main
from biomass_lib.config import Config, smoke_config
from biomass_lib.demo import render_dataset
from biomass_lib.paddocks import paddock_table
from biomass_lib.page import paddock_cells, predict_main
from biomass_lib.photos import open_weights, predict_photos
from biomass_lib.targets import TARGETS
from biomass_lib.train import train_fold
from biomass_lib.weights import assemble_weights

ROOT = Path(__file__).parent.parent
CALL = "from biomass_lib.app import app_main; app_main()"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Weights that predict densities, and photographs: two good ones, a text, a portrait, and two that are too large."
    home = tmp_path_factory.mktemp("home")
    render_dataset(home / "data", n_train=18, n_test=2, seed=0, workers=1)
    config = smoke_config(Config(cache_dir=str(home / "cache"), model="dense"), home / "data")[0]
    config = dataclasses.replace(config, runs_dir=str(home / "runs"), experiment="tiny", stage2_epochs=1)
    for fold in range(config.n_folds):
        train_fold(dataclasses.replace(config, fold=fold))
    assemble_weights(home / "runs/tiny", home / "weights", look=True)
    photos = home / "photos"
    photos.mkdir()
    for name, path in zip(("a.jpg", "b.jpg"), sorted((home / "data/test").glob("*.jpg")), strict=True):
        (photos / name).write_bytes(path.read_bytes())
    (photos / "<script>alert(1)<!--.jpg").write_text("This is no photograph.")
    turned_HW3 = np.ascontiguousarray(np.rot90(cv2.imread(str(photos / "a.jpg"))))
    cv2.imwrite(str(photos / "portrait.jpg"), turned_HW3)
    (photos / "wide.png").write_bytes(cv2.imencode(".png", np.zeros((6000, 12000), np.uint8))[1].tobytes())
    (photos / "large.jpg").write_bytes((photos / "a.jpg").read_bytes() + bytes(2_000_000))
    return home


class App:
    "A running app, with everything that it has printed."

    def __init__(self, home: Path, *options: str):
        self.temporary = Path(tempfile.mkdtemp(dir=home))
        given = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary)}
        command = [sys.executable, "-c", CALL, str(home / "weights"), "--port", "0", *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, env=given, start_new_session=True, preexec_fn=self.heed, **pipes)
        self.lines: list[str] = []
        self.listener = threading.Thread(target=self.listen, daemon=True)
        self.listener.start()
        wait_until(lambda: any("Ctrl-C" in line for line in self.lines), "the app", self.process)
        self.url = re.search(r"http://\S+", "".join(self.lines))[0]
        self.port = int(re.search(r":(\d+)/", self.url)[1])

    @staticmethod
    def heed() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def listen(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, str, dict]:
        "Status, text and headers of an answer; headers in the call replace those of the page."
        own = {"Origin": f"http://127.0.0.1:{self.port}", "Content-Type": "application/octet-stream"}
        own |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request(method, path, body, {name: value for name, value in own.items() if value})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text, dict(response.headers)

    def uploads(self) -> list[Path]:
        return [path for path in self.temporary.rglob("*") if path.is_file()]

    def stop(self, how: int = signal.SIGINT) -> int:
        self.process.send_signal(how)
        return self.process.wait(PATIENCE)


@pytest.fixture(scope="module")
def app(home: Path) -> Iterator[App]:
    app = App(home, "--max-mb", "2")
    yield app
    app.process.kill()
    app.process.wait()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


def sent(paths: list[Path], shape: str = "refuse") -> bytes:
    head = {"shape": shape, "files": [{"name": path.name, "size": path.stat().st_size} for path in paths]}
    return json.dumps(head).encode() + b"\n" + b"".join(path.read_bytes() for path in paths)


def predicted(text: str) -> list[dict]:
    return json.loads(text.splitlines()[-1])["photos"]


needs_chromium = pytest.mark.needs(*BROWSERS, package="chromium")


def card_texts(browser: Browser) -> list[list[str]]:
    "What each card shows: name, total, and masses."
    cells = "[...card.querySelectorAll('h3, .total, td.number')].map((each) => each.textContent)"
    return browser.js(f"[...document.querySelectorAll('article')].map((card) => {cells})")


def when_done(browser: Browser, words: str) -> None:
    browser.until(f"document.getElementById('status').textContent === '{words}'")


@needs_chromium
def test_photographs_in_masses_and_csv_out(app: App, home: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch):
    photos, download = home / "photos", home / "download"
    names = ["a.jpg", "<script>alert(1)<!--.jpg", "large.jpg", "b.jpg", "wide.png"]
    monkeypatch.chdir(photos)
    expected = predict_photos(home / "weights", [name for name in names if name != "large.jpg"])
    browser.size(1200, 900)
    browser.open(app.url)
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(download))
    browser.js("document.getElementById('paddock').value = 'River \"flat\", <b>'")
    browser.choose("#files", [photos / name for name in names])
    when_done(browser, "2 photographs predicted, 3 not.")
    good = expected[expected["problem"] == ""].reset_index(drop=True)
    for (name, total, *masses), row in zip(card_texts(browser), good.to_dict("records"), strict=True):
        assert name == row["path"] and total.startswith(f"{row['total_kg_ha']:.0f} (")
        assert [text.split()[0] for text in masses] == [f"{row[target]:.1f}" for target in TARGETS]
    broken = browser.js("[...document.querySelectorAll('#broken li')].map((each) => each.textContent)")
    assert "<script>alert(1)<!--.jpg cannot be decoded: it is neither a JPEG nor a PNG" in broken[0]
    assert "large.jpg is too large" in broken[1] and "at most 2 MB" in broken[1] and "--max-mb" in broken[1]
    assert "wide.png is too large, 12000 x 6000 pixels: at most 50 megapixels are read" in broken[2]

    field = open_weights(home / "weights")[1]["field"]
    [mean] = paddock_table(good, field, ["River"] * 2).to_dict("records")
    browser.until("document.querySelectorAll('#means tbody td').length === 5")
    shown = browser.js("[...document.querySelectorAll('#means tbody td')].map((each) => each.textContent)")
    assert shown[0] == 'River "flat", <b>' and shown[1] == "2, 3 without a prediction"
    assert shown[2:] == paddock_cells(mean)[2:]
    pictures = "[...document.querySelectorAll('article img')].every((each) => each.complete && each.naturalWidth > 99)"
    browser.until(pictures)
    assert browser.js("document.querySelectorAll('article img.map[src^=\"data:image/jpeg\"]').length") == 2

    browser.js("document.getElementById('save').click()")
    csv = download / "predictions.csv"
    wait_until(csv.is_file, "the CSV")
    table = pd.read_csv(csv)
    assert table["paddock"].tolist() == ['River "flat", <b>'] * 5
    columns = [*TARGETS, "total_kg_ha", "unlike"]
    left = table[table["path"] != "large.jpg"].reset_index(drop=True)
    pd.testing.assert_frame_equal(left[columns], expected[columns], check_exact=True)
    assert all(url.startswith((app.url, "data:image/", f"blob:{app.url}")) for url in browser.requested())
    assert browser.complaints() == [] and len(browser.requested()) > 4
    assert not app.uploads() and not any("a.jpg" in line for line in app.lines)


@needs_chromium
def test_csv_is_the_commands_to_the_last_digit(app: App, home: Path, browser: Browser, monkeypatch, capsys):
    download = home / "download_same"
    monkeypatch.chdir(home / "photos")
    names = ["b.jpg", "a.jpg", "portrait.jpg"]
    predict_main([str(home / "weights"), *names, "--shape", "crop", "--out", str(home / "command.csv")])
    browser.open(app.url)
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(download))
    browser.js("document.getElementById('crop').click()")
    browser.drop("#drop", [home / "photos" / name for name in names])
    when_done(browser, "3 photographs predicted, 0 not.")
    browser.js("document.getElementById('save').click()")
    wait_until((download / "predictions.csv").is_file, "the CSV")
    assert (download / "predictions.csv").read_bytes() == (home / "command.csv").read_bytes()
    flags = browser.js("[...document.querySelectorAll('.flag')].map((each) => each.textContent)")
    assert len(flags) == 1 and "not 2 : 1, turned and cut from 1000 x 2000" in flags[0]


@needs_chromium
def test_page_on_a_phone_and_with_keys(app: App, home: Path, browser: Browser):
    browser.size(390, 844)
    browser.open(app.url)
    browser.call("Page.setInterceptFileChooserDialog", enabled=True)
    browser.key("Tab", 9)
    assert browser.js("document.activeElement.id") == "files"
    browser.key("Enter", 13, "\r")
    assert browser.wait_event("Page.fileChooserOpened")["mode"] == "selectMultiple"
    long = home / ("a_name_without_a_space_" * 5 + ".jpg")
    long.write_bytes((home / "photos/a.jpg").read_bytes())
    browser.choose("#files", [long, home / "photos/portrait.jpg", home / "photos"])
    when_done(browser, "1 photograph predicted, 2 not.")
    broken = browser.js("document.querySelector('#broken ul').textContent")
    assert "photos can't be read: if it is a folder" in broken and "cut it to the frame, or tick the box" in broken
    browser.js("document.getElementById('crop').click()")  # gives the portrait another try, without its being sent anew
    when_done(browser, "1 photograph predicted, 0 not.")
    assert len(card_texts(browser)) == 2
    for scheme in ("light", "dark"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        assert browser.js("document.documentElement.scrollWidth") <= 390
        colours = browser.js("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
        ink, paper = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
        assert (ink > 600 and paper < 150) if scheme == "dark" else ink < 150
    named = (
        "[...document.querySelectorAll('input, button')].every((e) => e.labels?.length || e.ariaLabel || e.textContent)"
    )
    assert browser.js(named)
    browser.js("document.getElementById('clear').click()")
    assert browser.js("document.querySelectorAll('article, li').length") == 0 and browser.complaints() == []


@needs_chromium
def test_page_of_the_command_fits_a_phone(home: Path, browser: Browser):
    long = home / ("another_name_without_a_space_" * 5 + ".jpg")
    long.write_bytes((home / "photos/a.jpg").read_bytes())
    names = [str(home / "photos"), str(long)]
    predict_main([str(home / "weights"), *names, "--paddocks", "folders", "--html", str(home / "page.html")])
    browser.size(390, 844)
    browser.open((home / "page.html").as_uri())
    ends = "[...document.querySelectorAll('td, th, img, li, h2')].map((each) => each.getBoundingClientRect().right)"
    assert 300 < max(browser.js(ends)) <= 390 and browser.complaints() == []


def test_strangers_are_refused(app: App, home: Path):
    body = sent([home / "photos/a.jpg"])
    for host in ("evil.example", f"evil.example:{app.port}", "192.168.1.5", "127.0.0.1.evil.example"):
        assert app.ask("GET", "/", Host=host)[0] == 403
    for origin in ("http://evil.example", "null", f"http://localhost:{app.port}", f"https://127.0.0.1:{app.port}", ""):
        status, text, _ = app.ask("POST", "/predict", body, Origin=origin)
        assert status == 403 and "only the page of biomass_app itself" in text
    assert app.ask("POST", "/predict", body, Content_Type="multipart/form-data; boundary=x")[0] == 415
    assert app.ask("OPTIONS", "/predict")[0] == 501 and app.ask("GET", "/predict")[0] == 404
    assert app.ask("POST", "/predict", body)[0] == 200
    status, html, headers = app.ask("GET", "/")
    assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"
    assert "Python" not in headers["Server"] and not re.search(r"(src|href)=.?https?:", html)
    with socket.create_connection(("127.0.0.1", app.port), timeout=PATIENCE) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n")
        assert b" 403 " in raw.recv(100)


def test_too_much_is_refused_before_it_is_read(app: App, home: Path):
    for length, words in (("10000000000", "at most"), ("-5", "how long"), ("9" * 400, "at most")):
        status, text, _ = app.ask("POST", "/predict", b"", Content_Length=length)
        assert status in (411, 413) and words in text
    many = json.dumps({"shape": "refuse", "files": [{"name": "a", "size": 0}] * 65}).encode() + b"\n"
    status, text, _ = app.ask("POST", "/predict", many)
    assert status == 413 and "65 photographs at once: from 1 to 64" in text
    for wrong in (b"{}\n", b"[" * 100_000, sent([home / "photos/a.jpg"])[:-1], b"\xff\n"):
        status, text, _ = app.ask("POST", "/predict", wrong)
        assert status == 400 and "no photographs from this page" in text
    with socket.create_connection(("127.0.0.1", app.port), timeout=PATIENCE) as raw:
        start = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{app.port}\r\nOrigin: http://127.0.0.1:{app.port}\r\n"
        body = sent([home / "photos/a.jpg"])
        start += f"Content-Type: application/octet-stream\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(start.encode() + body[:50_000])
        wait_until(app.uploads, "a part of the photograph")
        raw.shutdown(socket.SHUT_WR)
        assert b"a.jpg ended early: send it again" in raw.makefile("rb").read()
    wait_until(lambda: not app.uploads(), "the end of the part")


def test_many_ask_and_one_goes_away(app: App, home: Path):
    "Each gets its own numbers, those of the command."
    photos = [home / "photos" / name for name in ("a.jpg", "b.jpg")]
    expected = [predict_photos(home / "weights", path).loc[0, list(TARGETS)].tolist() for path in photos]
    with socket.create_connection(("127.0.0.1", app.port)) as raw:
        body = sent(photos * 10)
        start = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{app.port}\r\nOrigin: http://127.0.0.1:{app.port}\r\n"
        start += f"Content-Type: application/octet-stream\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(start.encode() + body)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda n: app.ask("POST", "/predict", sent([photos[n % 2]])), range(6)))
    for n, (status, text, _) in enumerate(answers):
        [photo] = predicted(text)
        row = pd.read_csv(io.StringIO(photo["csv"]), header=None).iloc[0].tolist()
        assert status == 200 and row[0] == photos[n % 2].name and row[1:6] == expected[n % 2]
    wait_until(lambda: not app.uploads(), "the removal of all photographs")


def test_ctrl_c_is_quiet_and_leaves_nothing(home: Path):
    app = App(home)
    assert app.url == f"http://127.0.0.1:{app.port}/"
    with socket.create_connection(("127.0.0.1", app.port)) as raw:
        raw.sendall(b"GET")  # one who doesn't finish
        assert app.stop() == 0
    app.listener.join()
    assert app.lines == ["loading the weights ...\n", f"ready: {app.url}\n", "Ctrl-C ends it\n"]
    assert list(app.temporary.iterdir()) == []


def test_a_phone_needs_the_token(home: Path):
    app = App(home, "--host", "0.0.0.0")
    addresses = re.findall(r"http://\S+", "".join(app.lines))
    token = addresses[0].rstrip("/").rpartition("/")[2]
    assert len(token) > 20 and all(address.endswith(f"/{token}/") for address in addresses)
    for path, status in (("/", 403), ("/wrong/", 403), (f"/{token[:-1]}/", 403), (f"/{token}/", 200)):
        assert app.ask("GET", path)[0] == status
    assert app.ask("GET", f"/{token}/", Host=f"192.168.1.5:{app.port}")[0] == 200
    assert app.ask("GET", f"/{token}/", Host="evil.example")[0] == 403
    body = sent([home / "photos/a.jpg"])
    assert app.ask("POST", "/predict", body)[0] == 403
    assert app.ask("POST", f"/{token}/predict", body)[0] == 200
    wait_until(lambda: any("photographs: 1" in line for line in app.lines), "a line")
    assert sum(token in line for line in app.lines) == 1
    assert app.stop(signal.SIGTERM) == 143


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["weights", "--port", "PORT"], "port PORT is in use, perhaps by another biomass_app: choose one with --port"),
        (["weights", "--host", "203.0.113.9"], "--host 203.0.113.9 is no address of this computer"),
        (["weights", "--port", "70000"], "--port 70000 must be from 0 to 65535"),
        (["data", "--port", "0"], "holds no weights"),
        (["weights", "--port", "0", "--views", "sideways"], "view 'sideways' is unknown"),
        (["weights", "--max-files", "0"], "--max-files 0 must be at least 1"),
    ],
)
def test_a_mistake_is_a_line(home: Path, app: App, options: list[str], words: str):
    folder, *others = [word.replace("PORT", str(app.port)) for word in options]
    with pytest.raises(SystemExit) as stopped:
        app_main([str(home / folder), *others])
    told = str(stopped.value)
    assert words.replace("PORT", str(app.port)) in told and told.startswith("biomass_app: ") and "\n" not in told
