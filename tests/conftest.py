"Tests marked slow run with `make test SLOW=1` only. Tests that need a program say which, and where it comes from."

import os
import shutil

import pytest

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # bytes are compared, and two processes may have one GPU


def pytest_addoption(parser: pytest.Parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests, too")


def pytest_configure(config: pytest.Config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")
    config.addinivalue_line("markers", "needs(*programs, package): skipped without any of them; with CI set it fails")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: make test SLOW=1"))


def pytest_runtest_setup(item: pytest.Item):
    for marker in item.iter_markers("needs"):
        if not any(map(shutil.which, marker.args)):
            reason = f"no {marker.args[0]} here: apt-get install {marker.kwargs['package']}"
            pytest.fail(reason, pytrace=False) if os.environ.get("CI") else pytest.skip(reason)
