"""An environment with the newest releases, upper bounds of settings.ini left out: `python tools/newest.py FOLDER`."""
import configparser
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WITHOUT = ("jupyterlab", "ipywidgets", "playwright", "twine", "build", "mypy")  # the quick tests do without them


def unbounded(requirements):
    "Requirements without upper bounds and pins"
    return [re.sub(r",?(<=?|==|~=)[^,;]*", "", r) for r in requirements]


def main(folder):
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    venv.create(folder, with_pip=True, clear=True)
    pip = lambda *args: subprocess.run([str(Path(folder) / "bin" / "python"), "-m", "pip", "install", "--quiet", *args],
                                       check=True)
    development = [r for r in parser["DEFAULT"]["dev_requirements"].split() if not r.startswith(WITHOUT)]
    pip("--upgrade", *unbounded([*parser["DEFAULT"]["requirements"].split(), *development]))
    pip("--no-deps", "-e", str(ROOT))


if __name__ == "__main__": main(sys.argv[1])
