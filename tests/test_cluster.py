"A Ray cluster of two nodes on this machine: both work, each is killed in every way, what does not fit is refused."

import contextlib
import importlib.util
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from patience import PATIENCE, wait_until
from test_runs import TINY

from biomass_lib.claims import LEASE, claim
from biomass_lib.demo import render_dataset
from biomass_lib.supervise import descendants, start_supervised

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks/train_fold.ipynb"
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="no Ray here: pip install 'biomass_lib[cluster]'"
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]
DRIVER = """
import sys
from pathlib import Path
from biomass_lib.claims import Cell
from biomass_lib.cluster import run_jobs_on_cluster
from biomass_lib.command import command
from biomass_lib.runs import Job

address, notebook, name, gpus, *folds = sys.argv[1:]
with command("driver"):
    queue = [Job(Path("runs", name), Cell(int(fold)), "tiny.yaml", {"experiment": name}) for fold in folds]
    failed = run_jobs_on_cluster(queue, address, notebook, gpus_per_cell=float(gpus) if gpus else None)
    print("failed:", *map(str, failed))
"""
BEGIN = """
import json, os, pathlib, time
folder = pathlib.Path('runs', experiment, f'fold{fold}')
with open(f'runs/{experiment}.begun', 'a') as begun:
    begun.write(f"{fold} {os.environ['NODE']} {os.environ.get('CUDA_VISIBLE_DEVICES') or 'none'}\\n")
while not pathlib.Path(f'runs/{experiment}.open').exists():
    time.sleep(0.1)
done = {'fold': fold, 'score': 0.5, 'epoch': 3, 'seconds': 1.0}
(folder / 'done.json').write_text(json.dumps(done))
"""


def pids_with(mark: str) -> list[int]:
    "All processes that have a mark in their environment."
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes() and (path.parent / "cmdline").read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue  # it has just ended
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def kill(pids: list[int]) -> list[int]:
    "Kill processes; those that were asked for."
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return pids


FORGETS = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
while any(node["Alive"] and node["NodeName"] == sys.argv[2] for node in ray.nodes()):
    time.sleep(0.1)
"""


def heed_interrupts() -> None:
    "Tests that run in the background of a shell were started with SIGINT ignored, and so would their driver be."
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Cluster:
    "A head and other nodes, each with one CPU and an address of its own on loopback."

    def __init__(self, home: Path):
        self.home, self.mark = home, f"cluster-{uuid.uuid4().hex}"
        self.boxes: dict[str, subprocess.Popen] = {}  # whose processes end with ours, however ours ends
        self.temp = Path(tempfile.mkdtemp(prefix="r"))  # short: sockets have short names
        with socket.socket() as free:
            free.bind(("127.0.0.2", 0))
            self.address = f"127.0.0.2:{free.getsockname()[1]}"
        self.token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = plain | {"MARK": self.mark, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
        self.environment |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HOME": str(self.temp)}
        self.environment["RAY_worker_niceness"] = "0"  # not 15: other work on this machine would come first

    def start(self, name: str, number: int, *wrapper: str, gpus: int = 0, **environment: str) -> None:
        "Start a node; the head is number 2."
        head = ["--head", "--port", self.address.partition(":")[2], "--include-dashboard=false"]
        place = head if number == 2 else ["--address", self.address]
        command = [*wrapper, str(Path(sys.executable).parent / "ray"), "start", *place, "--node-name", name]
        command += ["--node-ip-address", f"127.0.0.{number}", "--num-cpus", str(1 + gpus), "--num-gpus", str(gpus)]
        command += ["--temp-dir", str(self.temp / name), "--object-store-memory", "80000000", "--disable-usage-stats"]
        given = self.environment | self.token | {"NODE": f"{name}-{self.mark}"} | environment
        log = self.temp / f"{name}.log"
        with log.open("w") as output:
            shell = ["sh", "-c", '"$@" && echo ready && exec sleep infinity', "sh", *command]
            outputs = {"stdout": output, "stderr": subprocess.STDOUT}
            self.boxes[name] = start_supervised(shell, cwd=self.temp, env=given, **outputs)
        wait_until(lambda: "ready\n" in log.read_text() or self.boxes[name].poll() is not None, f"the start of {name}")
        assert self.boxes[name].poll() is None, log.read_text()

    def pids(self, name: str, words: str = "") -> list[int]:
        "The processes of a node; Ray's have titles in place of their environment."
        below = descendants(self.boxes[name].pid) if name in self.boxes else []
        return [pid for pid in below if words in command_line(pid)]

    def end(self, name: str) -> None:
        "Kill all processes of a node."
        wait_until(lambda: not kill(self.pids(name)), f"the end of {name}")
        self.boxes.pop(name).wait(PATIENCE)
        if self.has("one"):  # the head, which may list a dead node for seconds
            forgets = [sys.executable, "-c", FORGETS, self.address, name]
            subprocess.run(
                forgets, env=self.environment | self.token, check=True, timeout=PATIENCE, capture_output=True
            )

    def has(self, name: str) -> bool:
        return bool(self.pids(name, "raylet/raylet"))

    def close(self) -> None:
        for name in [*self.boxes]:
            self.end(name)
        kill(pids_with(self.mark))
        shutil.rmtree(self.temp, ignore_errors=True)

    def driver(
        self, name: str, *folds: int, notebook: str | Path = "stand_in.ipynb", gpus: str = "", **environment: str
    ):
        "Start a driver in the shared folder, with the token where none is given."
        (self.home / "runs" / name).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", DRIVER, self.address, str(notebook), name, gpus, *map(str, folds)]
        given = self.environment | (environment or self.token)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=self.home, env=given, preexec_fn=heed_interrupts, **pipes)

    def begun(self, name: str) -> list[list[str]]:
        "Fold and node of each training that has begun, and the GPU that it sees."
        path = self.home / f"runs/{name}.begun"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [line.replace(f"-{self.mark}", "").split() for line in lines]

    def open(self, name: str) -> None:
        "Let trainings end."
        (self.home / f"runs/{name}.open").touch()

    def kernels(self) -> list[int]:
        return [pid for pid in pids_with(self.mark) if "ipykernel" in command_line(pid)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    "Two nodes that share a folder with data, a parameter file and a training notebook of two cells."
    home = tmp_path_factory.mktemp("home")
    render_dataset(home / "demo", n_train=12, n_test=2, seed=0)
    (home / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"n_folds": 4}), encoding="utf-8")
    sources = {"parameters": "fold = 0\nseed = 0\nexperiment = ''", "train": BEGIN}
    cells = [
        {"cell_type": "code", "execution_count": None, "id": tag, "metadata": {"tags": [tag]}, "outputs": []}
        | {"source": source}
        for tag, source in sources.items()
    ]
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    notebook = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    (home / "stand_in.ipynb").write_text(json.dumps(notebook))
    cluster = Cluster(home)
    try:
        cluster.start("one", 2)
        cluster.start("two", 3)
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def nodes(cluster: Cluster) -> Iterator[Cluster]:
    "The two nodes, started again where a test has ended them; nothing that a test has begun is left behind."
    if not cluster.has("one") or not cluster.has("two"):
        for name in [*cluster.boxes]:
            cluster.end(name)
        cluster.start("one", 2)
        cluster.start("two", 3)
    yield cluster
    kill([pid for pid in pids_with(cluster.mark) if "run_jobs_on_cluster" in command_line(pid)])
    kill(cluster.kernels())


def finished(driver: subprocess.Popen, failed: str = "") -> str:
    "What a driver printed that ended well."
    output, _ = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 0 and output.splitlines()[-1].strip() == f"failed: {failed}".strip(), output
    return output


def read_until(driver: subprocess.Popen, words: str) -> str:
    "What a driver prints until some words are there."
    said, pipe = "", driver.stdout.fileno()
    while words not in said:
        wait_until(lambda: select.select([pipe], [], [], 0.1)[0], f"{words!r} of a driver that said: {said}")
        chunk = os.read(pipe, 1 << 16).decode()
        assert chunk, said
        said += chunk
    return said


def refused(driver: subprocess.Popen) -> str:
    "The one line of a driver that was refused."
    output, _ = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 1 and output.count("\n") == 1 and output.startswith("driver: "), output
    return output


def is_clean(cluster: Cluster, name: str) -> bool:
    "Nothing runs any more, and neither leases nor temporary files are left."
    files = [path.name for path in (cluster.home / "runs" / name).rglob("*")]
    return not cluster.kernels() and not [name for name in files if name == LEASE or name.endswith(".tmp")]


def test_both_nodes_work(nodes: Cluster):
    driver = nodes.driver("both", 0, 1, 2)
    wait_until(lambda: len(nodes.begun("both")) == 2, "two trainings at once", driver)
    assert {node for _, node, _ in nodes.begun("both")} == {"one", "two"}
    nodes.open("both")
    output = finished(driver)
    assert sorted(fold for fold, *_ in nodes.begun("both")) == ["0", "1", "2"]
    assert "(node one)" in output and "(node two)" in output and output.count("score 0.500") == 3
    assert is_clean(nodes, "both")
    assert finished(nodes.driver("both", 0, 1, 2)).count("(done before)") == 3


def test_a_missing_or_wrong_token_is_refused(nodes: Cluster):
    drivers = [
        nodes.driver("token", 0, **given) for given in ({"RAY_AUTH_TOKEN": ""}, {**nodes.token, "RAY_AUTH_TOKEN": "x"})
    ]
    for driver in drivers:
        assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE" in refused(driver)
    assert nodes.begun("token") == [] and is_clean(nodes, "token")


def test_a_killed_worker_is_replaced(nodes: Cluster):
    driver = nodes.driver("worker", 0, 1)
    wait_until(lambda: len(nodes.begun("worker")) == 2, "two trainings", driver)
    worker = json.loads((nodes.home / "runs/worker/fold0" / LEASE).read_text())["pid"]
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: len(nodes.begun("worker")) == 3, "another beginning", driver)
    nodes.open("worker")
    assert "fold 0: its node or process died, and it is placed again" in finished(driver)
    assert Counter(fold for fold, *_ in nodes.begun("worker")) == {"0": 2, "1": 1}
    assert is_clean(nodes, "worker")


def test_a_cell_that_somebody_else_holds_is_waited_for(nodes: Cluster):
    lease = claim(nodes.home / "runs/held/fold0")
    try:
        nodes.open("held")
        driver = nodes.driver("held", 0, 1)
        said = read_until(driver, "score 0.500")
        said += read_until(driver, "is being trained by") if "is being trained by" not in said else ""
        assert [fold for fold, *_ in nodes.begun("held")] == ["1"], said
    finally:
        lease.release()
    finished(driver)
    assert [fold for fold, *_ in nodes.begun("held")] == ["1", "0"] and is_clean(nodes, "held")


@pytest.mark.slow
def test_a_killed_node_is_replaced(nodes: Cluster):
    driver = nodes.driver("node", 0, 1, 2)
    wait_until(lambda: len(nodes.begun("node")) == 2, "two trainings", driver)
    lost = next(fold for fold, node, _ in nodes.begun("node") if node == "two")
    nodes.end("two")
    nodes.open("node")
    assert f"fold {lost}: its node or process died, and it is placed again" in finished(driver)
    assert Counter(fold for fold, *_ in nodes.begun("node")) == Counter(["0", "1", "2", lost])
    assert is_clean(nodes, "node")


@pytest.mark.slow
def test_a_node_without_its_raylet_ends_its_cell(nodes: Cluster):
    driver = nodes.driver("raylet", 0, 1, 2)
    wait_until(lambda: len(nodes.begun("raylet")) == 2, "two trainings", driver)
    kill(nodes.pids("two", "raylet/raylet"))
    said = read_until(driver, "node two is gone")
    nodes.open("raylet")
    assert driver.wait(PATIENCE) == 0, said + driver.stdout.read()
    begun = Counter(fold for fold, *_ in nodes.begun("raylet"))
    assert begun == {"0": 1, "1": 1, "2": 1}, "the orphaned task goes on with its cell, and its lease keeps others away"
    wait_until(lambda: is_clean(nodes, "raylet"), "the end of all processes")


@pytest.mark.slow
def test_a_killed_head_ends_the_driver_and_all_kernels(nodes: Cluster):
    driver = nodes.driver("head", 0, 1)
    wait_until(lambda: len(nodes.begun("head")) == 2, "two trainings", driver)
    nodes.end("one")
    output, _ = driver.communicate(timeout=PATIENCE)
    last = output.splitlines()[-1]
    assert driver.returncode == 1 and "Traceback" not in output, output
    assert last.startswith("driver: the Ray cluster at") and "the same command goes on" in last, output
    ended = time.monotonic()
    wait_until(lambda: is_clean(nodes, "head") or time.monotonic() > ended + 15, "the end of all kernels")
    assert nodes.kernels() == []
    for name in [*nodes.boxes]:
        nodes.end(name)
    nodes.start("one", 2)
    nodes.open("head")
    finished(nodes.driver("head", 0, 1))
    assert Counter(fold for fold, *_ in nodes.begun("head")) == {"0": 2, "1": 2}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_driver_ends_all_kernels(nodes: Cluster, number: int):
    name = f"end{number}"
    driver = nodes.driver(name, 0, 1, 2, 3)
    wait_until(lambda: len(nodes.begun(name)) == 2, "two trainings", driver)
    driver.send_signal(number)
    output, _ = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number], output
    wait_until(lambda: not nodes.kernels(), "the end of all kernels")
    assert number == signal.SIGKILL or is_clean(nodes, name)
    assert len(nodes.begun(name)) == 2
    nodes.open(name)
    finished(nodes.driver(name, 0, 1, 2, 3))
    assert sorted(Counter(fold for fold, *_ in nodes.begun(name)).values()) == [1, 1, 2, 2]


@pytest.mark.slow
def test_another_version_of_the_code_is_refused(nodes: Cluster, tmp_path: Path):
    shutil.copytree(ROOT / "biomass_lib", tmp_path / "biomass_lib", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "biomass_lib/loop.py").open("a") as file:
        file.write("# changed\n")
    nodes.end("two")
    nodes.start("other", 4, PYTHONPATH=str(tmp_path))
    try:
        output = refused(nodes.driver("code", 0))
        assert "node other has another version of" in output and "install the same commit there" in output
        (tmp_path / "biomass_lib/cluster.py").unlink()
        nodes.end("other")
        nodes.start("other", 4, PYTHONPATH=str(tmp_path))
        output = refused(nodes.driver("code", 0))  # whether its copy lacks a module or differs, the node is named
        assert "node other has" in output and "biomass_lib" in output
        assert nodes.begun("code") == [] and is_clean(nodes, "code")
    finally:
        nodes.end("other")


@pytest.mark.slow
def test_a_node_without_the_shared_folder_gets_no_work(nodes: Cluster):
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(nodes.home / "runs")]
    if shutil.which("unshare") is None or subprocess.run([*hidden, "true"], capture_output=True).returncode:
        pytest.skip("no right to hide a folder from a process: needs root and unshare")
    driver = nodes.driver("folder", 0, 1, 2)
    wait_until(lambda: len(nodes.begun("folder")) == 2, "two trainings", driver)
    try:
        nodes.start("lonely", 4, *hidden)  # it joins while we train
        said = read_until(driver, "node lonely does not see what the driver writes into")
        assert "mount the shared folder under the same path on every box. It gets no more cells" in said
        output = refused(nodes.driver("folder", 3))  # one that is there from the start
        assert "node lonely does not see what the driver writes into" in output
        nodes.open("folder")
        finished(driver)
        assert Counter(fold for fold, *_ in nodes.begun("folder")) == {"0": 1, "1": 1, "2": 1}
        assert "lonely" not in {node for _, node, _ in nodes.begun("folder")}
    finally:
        nodes.end("lonely")


@pytest.mark.slow
def test_two_cells_share_a_gpu_where_there_is_one(nodes: Cluster):
    nodes.start("gpu", 4, gpus=1, CUDA_VISIBLE_DEVICES="3")
    try:
        driver = nodes.driver("gpu", 0, 1, 2, gpus="0.5")
        wait_until(lambda: len(nodes.begun("gpu")) == 2, "two trainings", driver)
        nodes.open("gpu")
        finished(driver)
        assert [cell[1:] for cell in nodes.begun("gpu")] == [["gpu", "3"]] * 3
    finally:
        nodes.end("gpu")


@pytest.mark.slow
def test_real_trainings(nodes: Cluster):
    output = finished(nodes.driver("real", 0, 1, notebook=NOTEBOOK))
    assert output.count("score") == 2 and is_clean(nodes, "real")
    folders = [nodes.home / f"runs/real/fold{fold}" for fold in (0, 1)]
    assert all((folder / "weights.safetensors").is_file() for folder in folders)
