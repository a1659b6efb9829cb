"""Fresh processes without the seconds that imports take: a process that has imported everything and computed nothing
forks for each command.

    python tests/fork_server.py    reads lines of JSON, {"argv": [...], "cwd": ..., "out": FILE, "err": FILE}; answers
    with exit statuses
"""
import importlib
import json
import os
import pkgutil
import runpy
import sys
import traceback
import warnings
from pathlib import Path

import rcic_fastai.report.core
from compress_once import compress_once
from test_report import execute_here

def run_command(argv):
    "The installed script of the command, as a shell starts it"
    sys.argv = argv
    runpy.run_path(str(Path(sys.executable).parent / argv[0]), run_name="__main__")


def child(request):
    os.chdir(request["cwd"])
    for path, descriptor in ((request["out"], 1), (request["err"], 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        run_command(request["argv"])
        status = 0
    except SystemExit as e:  # as Python does at its end: a text goes to standard error
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
        status = 1 if isinstance(e.code, str) else e.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in pkgutil.walk_packages(rcic_fastai.__path__, "rcic_fastai."): importlib.import_module(module.name)
        for name in ("pretrainedmodels", "lightgbm", "matplotlib.pyplot"): importlib.import_module(name)
    rcic_fastai.report.core.execute_notebook = execute_here  # test_report.py gives cells a kernel
    rcic_fastai.report.core._most_wells = lambda *_: 24  # what it is of large images
    if folder := os.environ.get("RCIC_TEST_COMPRESSED"): compress_once(folder)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid: child(request)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
