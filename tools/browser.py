"""Find a Chromium for the tests that look at pages, or get one: `python tools/browser.py [--optional]`."""
import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"


def find_chromium():
    "Path of a Chromium or Chrome: that of the system, or the one that Playwright has put aside; None without one"
    if found := next(filter(None, map(shutil.which, NAMES)), None): return found
    try: from playwright.sync_api import sync_playwright
    except ImportError: return None
    with sync_playwright() as p:
        return p.chromium.executable_path if Path(p.chromium.executable_path).exists() else None


def install_chromium():
    "Playwright's own Chromium; where it cannot be fetched, and this is a container of root's, that of the distribution"
    commands = [[sys.executable, "-m", "playwright", "install", "chromium"]]
    if os.name == "posix" and os.geteuid() == 0 and shutil.which("apt-get"):
        commands.append(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0 and (path := find_chromium()): return path
        print(f"{' '.join(command[-3:])}: no Chromium came of it", file=sys.stderr)
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optional", action="store_true", help="exit with 0 even if there is none")
    args = parser.parse_args()
    path = find_chromium() or install_chromium()
    print(
        f"browser: {path or 'there is no Chromium, and none could be installed; tests that look at pages are skipped'}")
    return 0 if path or args.optional else 1


if __name__ == "__main__": sys.exit(main())
