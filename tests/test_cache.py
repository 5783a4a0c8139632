"The cache under fire: a process killed while it writes, a disk that really is full."

import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mounting import mounts
from patience import PATIENCE

from biomass_lib.cache import _is_whole, fill_cache, open_halves
from biomass_lib.images import load_halves

SIZE = 96
COUNT = 24
FILL = """
import os, sys
from biomass_lib import cache

def fill():
    cache.fill_cache(sys.argv[2:], 96, sys.argv[1])
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    paths = [folder / f"ID{i}.jpg" for i in range(COUNT)]
    for path in paths:
        picture_HW3 = cv2.resize(rng.integers(0, 255, (100, 200, 3), dtype=np.uint8), (2000, 1000))
        assert cv2.imwrite(str(path), picture_HW3)
    return paths


def started(program: str, cache_dir: Path, photos: list[Path]) -> subprocess.Popen:
    command = [sys.executable, "-c", FILL + program, str(cache_dir), *map(str, photos)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def is_right(cache_dir: Path, photos: list[Path]) -> bool:
    "Tell whether every photograph is in the cache, whole and with the pixels of a direct decode."
    files = fill_cache(photos, SIZE, cache_dir)
    return all((open_halves(f) == load_halves(p, SIZE)).all() for p, f in zip(photos, files, strict=True))


def test_killed_process_harms_nobody(photos: list[Path], tmp_path: Path):
    "Two fill one cache; one is killed after writing its fifth file and before naming it; the other and a third finish."
    stuck = """
import time
renamed, replace = [], os.replace

def stuck_replace(temporary, file):
    renamed.append(file)
    if len(renamed) >= 5:
        os.write(1, b"stuck\\n")  # one write: threads speak at once
        time.sleep(600)
    replace(temporary, file)

cache.os.replace = stuck_replace
fill()
"""
    begun = """
original = cache.load_halves

def load(*args):
    os.write(1, b"begun\\n")
    return original(*args)

cache.load_halves = load
fill()
"""
    cache_dir = tmp_path / "cache"
    victim = started(stuck, cache_dir, photos)
    assert victim.stdout.readline() == "stuck\n"
    other = started(begun, cache_dir, photos)
    assert other.stdout.readline() == "begun\n"
    os.kill(victim.pid, signal.SIGKILL)
    assert victim.wait(60) == -signal.SIGKILL
    output, _ = other.communicate(timeout=PATIENCE)
    assert other.returncode == 0, output
    folder = cache_dir / f"{SIZE}px_none"
    files = list(folder.glob("*.npy"))
    assert len(files) == COUNT and all(_is_whole(file, SIZE) for file in files)
    temporary = list(folder.glob(".*.tmp"))
    assert temporary, "the killed process was not in the middle of a write"
    before = {file: file.stat().st_mtime_ns for file in files}
    third = started("fill()", cache_dir, photos)
    output, _ = third.communicate(timeout=PATIENCE)
    assert third.returncode == 0, output
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before  # nothing twice, temporary files gone
    assert is_right(cache_dir, photos)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment(photos: list[Path], tmp_path: Path, seed: int):
    "Killed after a random share of the work, alone in the cache; whatever has a final name is right."
    after = int(np.random.default_rng(seed).integers(1, COUNT))
    counting = f"""
original, seen = cache.load_halves, []
def load(*args):
    seen.append(1)
    if len(seen) == {after}:
        os.write(1, b"now\\n")
    return original(*args)
cache.load_halves = load
fill()
"""
    cache_dir = tmp_path / "cache"
    victim = started(counting, cache_dir, photos)
    assert victim.stdout.readline() == "now\n"
    victim.kill()
    victim.wait(60)
    whole = [_is_whole(file, SIZE) for file in cache_dir.rglob("*.npy")]
    assert all(whole)
    assert is_right(cache_dir, photos)


@pytest.mark.skipif(not mounts(), reason="no user namespaces here, so no small file system can be mounted")
def test_a_cache_that_is_read_only(photos: list[Path], tmp_path: Path):
    "It is used where it is whole; where something is missing, the message says whose it is and what to do."
    program = """
import subprocess
from biomass_lib.images import load_halves
first, more = sys.argv[2:12], sys.argv[2:]
files = cache.fill_cache(first, 96, sys.argv[1])
subprocess.run(["mount", "-o", "remount,ro", sys.argv[1]], check=True)
assert cache.fill_cache(first, 96, sys.argv[1]) == files
for path, file in zip(first, files):
    assert (cache.open_halves(file) == load_halves(path, 96)).all()
try:
    cache.fill_cache(more, 96, sys.argv[1])
except PermissionError as error:
    print(error)
else:
    sys.exit("it could be written")
"""
    cache_dir = tmp_path / "cache"
    cache_dir.mkdir()
    mount = 'mount -t tmpfs -o size=9m tmpfs "$1" && exec "$0" -c "$2" "$1" "${@:3}"'
    command = ["unshare", "-rm", "bash", "-c", mount, sys.executable, str(cache_dir), FILL + program, *map(str, photos)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"the cache {cache_dir} cannot be written or read (Read-only file system; " in result.stdout
    assert f"and {COUNT - 10} photographs are not in it: set cache_dir to a folder of your own" in result.stdout


@pytest.mark.skipif(not mounts(), reason="no user namespaces here, so no small file system can be mounted")
def test_full_disk_leaves_no_broken_cache(photos: list[Path], tmp_path: Path):
    "A file system of 1.5 MB, half of which somebody else takes in the middle of the work."
    program = """
import errno
ballast = os.path.join(sys.argv[1], "ballast")
original = cache.load_halves

def load(*args):
    if not os.path.exists(ballast):
        with open(ballast, "wb") as file:
            file.write(bytes(800_000))
    return original(*args)

cache.load_halves = load
try:
    fill()
except OSError as error:
    assert error.errno == errno.ENOSPC, error
    print(error)
else:
    sys.exit("the disk was not full")
names = [name for _, _, files in os.walk(sys.argv[1]) for name in files]
assert not [name for name in names if name.endswith(".tmp")], names
assert 0 < sum(name.endswith(".npy") for name in names) < len(sys.argv[2:]), names
os.remove(ballast)
cache.load_halves = original
fill()
from biomass_lib.images import load_halves
for path, file in zip(sys.argv[2:], cache.fill_cache(sys.argv[2:], 96, sys.argv[1])):
    assert (cache.open_halves(file) == load_halves(path, 96)).all()
print("complete")
"""
    cache_dir = tmp_path / "cache"
    cache_dir.mkdir()
    mount = 'mount -t tmpfs -o size=1500k tmpfs "$1" && exec "$0" -c "$2" "$1" "${@:3}"'
    command = ["unshare", "-rm", "bash", "-c", mount, sys.executable, str(cache_dir), FILL + program, *map(str, photos)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "free some, set cache_dir to another disk" in result.stdout
    assert result.stdout.endswith("complete\n")
