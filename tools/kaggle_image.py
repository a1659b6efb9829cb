"""An environment like Kaggle's image with this library installed on top: `python3.12 tools/kaggle_image.py FOLDER`.

The releases are those of tools/kaggle_image.txt. Installing the library must replace none of them.
"""
import json
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "tools" / "kaggle_image.txt"
PYTHON = (3, 12)
TEST_TOOLS = ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.5", "playwright"]


def read_pins(path=PINS):
    "Package -> release"
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return {normal(line.split("==")[0]): line.split("==")[1] for line in lines if line}


def normal(name): return name.lower().replace("_", "-").replace(".", "-")


def replaced(planned, there):
    "What an installation would change of the packages that are there, as lines"
    return [f"{name} {there[name]} -> {version}" for name, version in sorted(planned.items())
            if there.get(name, version) != version]


def main(folder):
    if sys.version_info[:2] != PYTHON:
        sys.exit(f"Kaggle's image has Python {'.'.join(map(str, PYTHON))}, this is {sys.version.split()[0]}: make "
                 "test-kaggle KAGGLE_PYTHON=...")
    venv.create(folder, with_pip=True, clear=True)
    python = str(Path(folder) / "bin" / "python")
    run = lambda *args, **kwargs: subprocess.run([python, "-m", *args], check=True, **kwargs)
    run("pip", "install", "--quiet", "uv")
    run("uv", "pip", "install", "--quiet", "--python", python, "--requirements", str(PINS))
    there = {normal(d["name"]): d["version"]
             for d in json.loads(run("pip", "list", "--format", "json", capture_output=True).stdout)}
    wrong = {n: v for n, v in read_pins().items() if there.get(n) != v}
    if wrong: sys.exit(f"not as pinned: {wrong}")
    # what pip would do for a person who types this on Kaggle
    report = run("pip", "install", "--dry-run", "--quiet", "--report", "-", str(ROOT), capture_output=True).stdout
    planned = {normal(i["metadata"]["name"]): i["metadata"]["version"] for i in json.loads(report)["install"]}
    if bad := replaced(planned, there):
        sys.exit("pip install rcic_fastai would replace what the image holds: " + ", ".join(bad))
    print(f"pip install rcic_fastai adds {', '.join(f'{n} {v}' for n, v in sorted(planned.items()))} to {len(there)} "
          "packages and replaces none")
    run("pip", "install", "--quiet", str(ROOT))
    run("uv", "pip", "install", "--quiet", "--python", python, "--constraints", str(PINS), *TEST_TOOLS)


if __name__ == "__main__": main(sys.argv[1])
