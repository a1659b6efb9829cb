"""An environment with the oldest releases that settings.ini permits: `python3.10 tools/oldest.py FOLDER`.

What nobody asks for by name (the requirements of requirements) is resolved as ever. Development tools that read or
write notebooks byte by byte (nbdev) and documentation tools are left out: their tests skip or belong to `make test`.
"""
import configparser
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEST_TOOLS = ["setuptools>=77", "pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.5", "lightgbm>=4.0",
              "iterative-stratification", "imagehash",
              "playwright"]


def main(folder):
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    venv.create(folder, with_pip=True, clear=True)
    python = str(Path(folder) / "bin" / "python")
    run = lambda *args: subprocess.run([python, "-m", *args], check=True)
    run("pip", "install", "--quiet", "uv")
    lowest = ["--resolution", "lowest-direct", "--index-strategy", "unsafe-best-match"]
    run("uv", "pip", "install", "--python", python, *lowest, *parser["DEFAULT"]["requirements"].split())
    run("uv", "pip", "install", "--python", python, *TEST_TOOLS)
    run("uv", "pip", "install", "--python", python, "--no-deps", "-e", str(ROOT))


if __name__ == "__main__": main(sys.argv[1])
