"The report of a tiny run as people meet it: files, a browser without a network, paper, a run without its data, card."

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import mistune
import numpy as np
import pandas as pd
import pytest
import yaml
from markdown_it import MarkdownIt
from patience import PATIENCE

from biomass_lib.demo import render_dataset
from biomass_lib.files import read_json, write_json
from biomass_lib.report import REPORT_KEYS, read_report
from biomass_lib.targets import TARGETS, WEIGHTS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
FIGURES = 9  # scores, scatter, errors by State, date, decile and species, learning curves, worst and best photographs
TINY = {
    "data_dir": "demo",
    "experiment": "tiny",
    "n_folds": 3,
    "workers": 0,
    "backbone": "test_resnet",
    "pretrained": False,
    "img_size": 64,
    "batch_size": 8,
    "stage1_epochs": 1,
    "stage2_epochs": 1,
}


def command(home: Path, name: str, *arguments: str) -> tuple[int, str]:
    "Exit status and all output of a command typed in `home`."
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ended = subprocess.run([BIN / name, *arguments], cwd=home, env=environment, timeout=PATIENCE, check=False, **pipes)
    return ended.returncode, ended.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Make demo data and a run of three folds, reported with a ridge on features from elsewhere: random numbers."
    home = tmp_path_factory.mktemp("home")
    render_dataset(home / "demo", n_train=24, n_test=2, seed=0)
    (home / "tiny.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    ids = sorted(path.stem for path in (home / "demo/train").glob("*.jpg"))
    np.save(home / "outside.npy", np.random.default_rng(0).normal(size=(len(ids), 8)))
    pd.DataFrame({"image_id": ids}).to_csv(home / "outside.csv", index=False)
    folds = ("biomass_folds", "tiny.yaml", "--jobs", "2")
    for name, *arguments in (folds, ("biomass_report", "runs/tiny", "--features", "outside.npy")):
        status, output = command(home, name, *arguments)
        assert status == 0, output
    return home


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    "A copy that a test may break."
    return Path(shutil.copytree(home, tmp_path / "home"))


class Page(HTMLParser):
    "Collects the tags of a page."

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]


def score_by_hand(truth: pd.DataFrame, predicted: pd.DataFrame) -> float:
    "The official score over the long table, written anew."
    y, p = truth.to_numpy().ravel(), predicted.to_numpy().ravel()
    w = np.tile(WEIGHTS, len(truth))
    mean = (w * y).sum() / w.sum()
    return 1 - (w * (y - p) ** 2).sum() / (w * (y - mean) ** 2).sum()


def test_numbers_are_those_of_the_predictions(home: Path):
    run = home / "runs/tiny"
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    table = pd.read_csv(run / "scores.csv", index_col=0)
    for file, name in (("oof.csv", "model"), ("oof_best.csv", "model, best epoch")):
        oof = pd.concat(pd.read_csv(path) for path in run.glob(f"fold*/{file}"))
        score = score_by_hand(oof[list(TARGETS)], oof[[f"{target}_pred" for target in TARGETS]])
        assert table.loc[name, "score"] == pytest.approx(score)
        assert report["ladder"][name]["score"] == pytest.approx(score)
        assert table.loc[name, "low"] < score < table.loc[name, "high"]
    assert report["score"]["value"] == pytest.approx(table.loc["model", "score"])
    assert {"training mean", "State mean", "feature ridge", "ceiling"} <= set(table.index) == set(report["ladder"])
    assert report["data"]["photographs"] == 24 == sum(report["data"]["States"].values())
    assert report["data"]["demo"] and any("drawn by a program" in line for line in report["warnings"])
    done = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(run.glob("fold*/done.json"))]
    assert list(report) == list(REPORT_KEYS)
    other = done[0] | {"epoch": 1}
    assert read_report(run, done)[1] == "" and "about other weights" in read_report(run, [other, *done[1:]])[1]
    assert report["models"] == [{key: fold[key] for key in ("fold", "seed", "epoch", "score")} for fold in done]
    assert report["kept"] == "last" and report["last_epoch"]["value"] == report["score"]["value"]
    assert report["best_epoch"]["optimism"] == pytest.approx(
        table.loc["model, best epoch", "score"] - table.loc["model", "score"]
    )
    score, low, high = table.loc["model", ["score", "low", "high"]]
    rival = table["score"].drop(["model", "model, best epoch", "ceiling"]).idxmax()
    assert report["headline"].startswith(f"tiny: {score:.2f} (95 % {low:.2f} to {high:.2f}), ")
    assert report["headline"].endswith(f" the {rival}")


def test_notebook_holds_no_logic():
    "What the report computes is exported and tested; its cells are short, and none is called hidden."
    notebook = json.loads((ROOT / "notebooks/report.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not [source for source in sources if re.search(r"^(def|class) |^# *\| *hide", source, re.MULTILINE)]
    assert max(len(source.splitlines()) for source in sources[2:]) <= 15 and len(sources) <= 20


def test_html_is_whole_small_and_offline(home: Path):
    path = home / "runs/tiny/report.html"
    assert path.stat().st_size < 5_000_000
    html = path.read_text(encoding="utf-8")
    page, score = Page(html), json.loads((home / "runs/tiny/report.json").read_text(encoding="utf-8"))["score"]["value"]
    assert f"<strong>{score:.3f}</strong>" in html
    title = json.loads((home / "runs/tiny/report.json").read_text(encoding="utf-8"))["headline"]
    assert f"<title>{title}</title>" in html and f">{title}" in html[html.index("<h1") :][:300]
    assert len(page.all("h1")) == 1 and html.count('class="tile"') == 4
    assert html.index("<h1") < html.index('class="tile"') < html.index("<img") < html.index("<blockquote")
    pictures = page.all("img")
    assert len(pictures) == FIGURES
    for picture in pictures:
        assert len(picture["alt"]) > 20 and "No description" not in picture["alt"]
        kind, data = picture["src"].split(",", 1)
        assert kind == "data:image/png;base64"
        image = cv2.imdecode(np.frombuffer(base64.b64decode(data), dtype=np.uint8), cv2.IMREAD_COLOR)
        assert min(image.shape[:2]) > 100 and image.std() > 5
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed"}
    assert not [
        value
        for _, attributes in page.tags
        for key in ("src", "href")
        if "//" in (value := attributes.get(key) or "")[:9]
    ]
    assert not re.search(r"url\(|@import", html)
    assert "Traceback" not in html and str(ROOT) not in html and str(home) not in html
    assert len(page.all("h2")) >= 9 and not re.search(r">\s*(nan|NaN|None)\s*<", html)


def browse(page: Path, folder: Path, *options: str) -> str:
    "What Chromium, headless and with a profile of its own, writes to its log."
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", *options]
    ended = subprocess.run(
        [CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stderr


def console(log: str) -> list[str]:
    "Lines that a page or its policy wrote to the console."
    return [line for line in log.splitlines() if "CONSOLE" in line]


needs_chromium = pytest.mark.needs(*BROWSERS, package="chromium")


@needs_chromium
def test_browser_shows_it_without_complaint(home: Path, tmp_path: Path):
    shot = tmp_path / "shot.png"
    log = browse(home / "runs/tiny/report.html", tmp_path, "--window-size=1000,9000", f"--screenshot={shot}")
    assert console(log) == []
    image_HW3 = cv2.imread(str(shot))
    assert image_HW3.shape[:2] == (9000, 1000)
    written = (image_HW3 < 200).any(axis=(1, 2))
    assert written[:6000].mean() > 0.4 and written[300:3000].any()


@needs_chromium
def test_browser_would_complain(home: Path, tmp_path: Path):
    "The check above can fail: a script and a picture from elsewhere are refused, and the console says so."
    html = (home / "runs/tiny/report.html").read_text(encoding="utf-8")
    worse = tmp_path / "worse.html"
    foreign = '<script>document.title = "changed"</script><img src="http://127.0.0.1:9/dot.png" alt="">'
    worse.write_text(html.replace("</body>", f"{foreign}</body>"), encoding="utf-8")
    lines = console(browse(worse, tmp_path, f"--screenshot={tmp_path / 'shot.png'}"))
    assert len(lines) >= 2 and all("Content Security Policy" in line for line in lines), lines


@needs_chromium
def test_paper(home: Path, tmp_path: Path):
    pdf = tmp_path / "report.pdf"
    log = browse(home / "runs/tiny/report.html", tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={pdf}")
    assert console(log) == []
    content = pdf.read_bytes()
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 20
    boxes = {tuple(map(float, box.split())) for box in re.findall(rb"/MediaBox\s*\[([^\]]+)\]", content)}
    assert all(abs(box[2] - 595) < 2 and abs(box[3] - 842) < 2 for box in boxes), boxes  # A4 in points
    assert len(re.findall(rb"/Subtype\s*/Image", content)) >= FIGURES


def forget_files(run: Path, *more: str) -> None:
    "Make folds as earlier versions left them: nobody knows what their files were, nor more facts."
    for path in run.glob("fold*/done.json"):
        write_json({name: value for name, value in read_json(path).items() if name not in ("files", *more)}, path)


@pytest.mark.slow
def test_run_without_its_data(copy: Path):
    before = pd.read_csv(copy / "runs/tiny/scores.csv", index_col=0)
    shutil.rmtree(copy / "demo")
    status, output = command(copy, "biomass_report", "runs/tiny")
    assert status == 0, output
    pd.testing.assert_frame_equal(pd.read_csv(copy / "runs/tiny/scores.csv", index_col=0), before)
    html = (copy / "runs/tiny/report.html").read_text(encoding="utf-8")
    assert "he photographs of the run are not here" in html  # a sentence begins with a capital
    assert len(Page(html).all("img")) == FIGURES - 2

    for path in (copy / "runs/tiny/baselines.csv", *copy.glob("runs/tiny/fold*/oof_best.csv")):  # a run of earlier days
        path.unlink()
    forget_files(copy / "runs/tiny", "kept", "best_epoch", "best_score")
    status, output = command(copy, "biomass_report", "runs/tiny")
    assert status == 0, output
    table = pd.read_csv(copy / "runs/tiny/scores.csv", index_col=0)
    assert table.loc["model", "score"] == before.loc["model", "score"]
    assert not [name for name in table.index if name.endswith("ridge")] and "training mean" in table.index
    report = json.loads((copy / "runs/tiny/report.json").read_text(encoding="utf-8"))
    assert report["last_epoch"] is None and any("last epoch" in line for line in report["warnings"])


def test_failed_report_leaves_no_old_one(copy: Path):
    run = copy / "runs/tiny"
    oof = pd.read_csv(run / "fold1/oof.csv")
    oof[1:].to_csv(run / "fold1/oof.csv", index=False)
    status, output = command(copy, "biomass_report", "runs/tiny")
    assert (
        status == 1 and "runs/tiny/fold1 is called done, but oof.csv has" in output and "train the fold again" in output
    )
    forget_files(run)
    status, output = command(copy, "biomass_report", "runs/tiny")
    assert status == 1 and "the report failed" in output and oof["image_id"][0] in output
    assert not [name for name in ("report.html", "report.json", "scores.csv") if (run / name).exists()]
    status, output = command(copy, "biomass_report", "runs/tiny", "--data-dir", "nowhere")
    assert status == 1 and "nowhere has no train.csv" in output


@pytest.mark.slow
def test_model_card_says_what_the_report_says(copy: Path):
    run = copy / "runs/tiny"
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    status, output = command(copy, "biomass_weights", "runs/tiny", "--out", "weights")
    assert status == 0, output
    card = (copy / "weights/README.md").read_text(encoding="utf-8")
    assert report["verdict"] in card and "know nothing about real pasture" in card
    for name, row in report["ladder"].items():
        assert f"| {name} | {row['score']:.2f} | {row['low']:.2f} | {row['high']:.2f} |" in card
    assert all(f"| {state} | {n} |" in card for state, n in report["data"]["States"].items())
    assert str(copy) not in card

    forget_files(run)
    sidecar = json.loads((run / "fold1/weights.json").read_text(encoding="utf-8"))
    (run / "fold1/weights.json").write_text(json.dumps(sidecar | {"score": 0.123, "epoch": 1}), encoding="utf-8")
    command(copy, "biomass_weights", "runs/tiny", "--out", "weights")
    card = (copy / "weights/README.md").read_text(encoding="utf-8")
    assert "Not known: the run's report.json is about other weights" in card and report["verdict"] not in card
    (run / "report.json").unlink()
    command(copy, "biomass_weights", "runs/tiny", "--out", "weights")
    assert "Not known: the run has no report.json" in (copy / "weights/README.md").read_text(encoding="utf-8")


HOSTILE = (
    '</td></table><meta http-equiv="refresh" content="0; url=SERVER"><img src="SERVER">$\\frac{$ **b** [a](SERVER) |`'
)


def hostile(letter: str, server: str) -> str:
    "A name that leads to a server, if a page obeys it."
    return letter + HOSTILE.replace("SERVER", server)


class Visits(BaseHTTPRequestHandler):
    "Record the requests."

    def do_GET(self) -> None:
        self.server.visits.append(self.path)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        "Log nothing."


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    "Start a server on this machine that no page should ask for anything."
    with ThreadingHTTPServer(("127.0.0.1", 0), Visits) as server:
        server.visits = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory, server: ThreadingHTTPServer) -> tuple[Path, list[str]]:
    "A reported run on a table whose names are HTML, Markdown and broken formulas; and these names."
    home, link = tmp_path_factory.mktemp("strange"), f"http://127.0.0.1:{server.server_port}/"
    render_dataset(home / "demo", n_train=12, n_test=2, seed=0)
    (home / "demo/demo.json").unlink()  # whose truth knows the photographs by their old names
    table = pd.read_csv(home / "demo/train.csv", dtype=str)
    state, species, image = hostile("S", link), hostile("P", link), "I<meta http-equiv=refresh content=0>$x^$"
    table["State"] = table["State"].replace(table["State"][0], state)
    table["Species"] = table["Species"].replace(table["Species"][0], species)
    for number, image_id in ((0, image), (30, f"{image}excluded")):
        here = table["image_path"] == table["image_path"][number]
        table.loc[here, "sample_id"] = image_id + "__" + table.loc[here, "target_name"]
    table.to_csv(home / "demo/train.csv", index=False)
    experiment = "E<meta http-equiv=refresh content=0>**b**$^"
    params = TINY | {"experiment": experiment, "n_folds": 2, "exclude": [f"{image}excluded"]}
    (home / "tiny.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    run = f"runs/{experiment}"
    commands = (("folds", "tiny.yaml", "--jobs", "2"), ("report", run), ("weights", run, "--out", "weights"))
    for name, *arguments in commands:
        status, output = command(home, f"biomass_{name}", *arguments)
        assert status == 0, output
    return home, [state, experiment, f"{image}excluded"]


def shown_text(html: str) -> str:
    "What a reader of a page sees, apart from how it looks."
    parser = HTMLParser(convert_charrefs=True)
    parts: list[str] = []
    parser.handle_data = parts.append
    parser.feed(html)
    return "".join(parts)


def test_names_stay_text_in_the_report(strange: tuple[Path, list[str]]):
    home, names = strange
    html = next(home.glob("runs/*/report.html")).read_text(encoding="utf-8")
    page, text = Page(html), shown_text(html)
    assert [name for name in names if name not in text] == []
    assert len(page.all("img")) == FIGURES and all(picture["src"].startswith("data:") for picture in page.all("img"))
    assert [meta.get("http-equiv") for meta in page.all("meta")] == [None, "Content-Security-Policy", None]
    assert not [link for link in page.all("a") if not link["href"].startswith("#")]
    assert "form-action 'none'; base-uri 'none'" in html


def test_names_stay_text_in_the_model_card(strange: tuple[Path, list[str]]):
    home, names = strange
    card = (home / "weights/README.md").read_text(encoding="utf-8")
    pages = mistune.create_markdown(escape=False, plugins=["table"])(card)
    for html in (pages, MarkdownIt("commonmark", {"html": True}).enable("table").render(card)):
        assert [name for name in names if name not in shown_text(html)] == []
        assert not {tag for tag, _ in Page(html).tags} & {"meta", "img", "script", "a"}


@needs_chromium
def test_names_lead_nowhere_in_a_browser(strange: tuple[Path, list[str]], server: ThreadingHTTPServer, tmp_path: Path):
    "The report asks for nothing; the same page with the name of a State as it is does, so the check can fail."
    home, names = strange
    report = next(home.glob("runs/*/report.html"))
    plain = tmp_path / "report.html"
    plain.write_bytes(report.read_bytes())
    worse = tmp_path / "worse.html"
    worse.write_text(plain.read_text(encoding="utf-8").replace("<h1", f"{names[0]}<h1", 1), encoding="utf-8")
    assert console(browse(plain, tmp_path, "--virtual-time-budget=5000", "--dump-dom")) == []
    assert server.visits == []
    browse(worse, tmp_path, "--virtual-time-budget=5000", "--dump-dom")
    assert server.visits != []
