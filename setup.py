"""Everything setuptools needs is read from settings.ini, which nbdev reads too."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]


def lines(key: str) -> list[str]:
    "The non-empty lines of a multi-line setting."
    return [line.strip() for line in settings.get(key, "").splitlines() if line.strip()]


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    license="Apache-2.0",
    keywords=settings["keywords"],
    packages=find_packages(include=["biomass_lib*"]),
    python_requires=f">={settings['min_python']}",
    install_requires=lines("requirements"),
    extras_require={
        name: lines(f"{name}_requirements")
        for name in ("dev", "lab", "docs", "wandb", "lora", "sweep", "cluster", "onnx", "heic")
    },
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": [f"biomass_lib={'biomass_lib._modidx:d'}"]},
)
