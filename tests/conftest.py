"Tests marked slow run with --slow only: `make test SLOW=1`."

import os

import pytest

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # bytes are compared, and two processes may have one GPU


def pytest_addoption(parser: pytest.Parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests, too")


def pytest_configure(config: pytest.Config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: make test SLOW=1"))
