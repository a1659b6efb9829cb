"Many cases in one test: all of them run, and those that fail are named."

import functools
import inspect

import pytest

PARAM = type(pytest.param())


def values_of(case, names):
    "Values of a case by the names of the parameters"
    if isinstance(case, PARAM): case = case.values
    elif len(names) == 1: case = [case]
    assert len(case) == len(names), f"{case!r} has no value for each of {names}"
    return dict(zip(names, case))


def name_of(case, ids, values):
    if isinstance(case, PARAM) and case.id: return case.id
    if ids is not None: return "-".join(str(ids(v)) for v in values.values())
    return ", ".join(f"{k}={v!r:.60}" for k, v in values.items())


def run_case(test, values, fixtures, folder):
    "A folder of its own, and nothing stays patched or printed"
    fixtures = dict(fixtures)
    if "tmp_path" in fixtures:
        fixtures["tmp_path"] = fixtures["tmp_path"] / folder
        fixtures["tmp_path"].mkdir(exist_ok=True)
    if "capsys" in fixtures: fixtures["capsys"].readouterr()
    if "monkeypatch" not in fixtures: return test(**fixtures, **values)
    with fixtures["monkeypatch"].context() as patch: test(**{**fixtures, "monkeypatch": patch}, **values)


def each(names, cases, ids=None):
    """Takes what `pytest.mark.parametrize` takes, for cases that need no test each: it runs all of them, then names
    those that fail.

    `ids` is a function of a value. A fixture is made once for all cases; `tmp_path` is a new folder for each.
    """
    names, cases = [n.strip() for n in names.split(",")], list(cases)
    assert cases, "there are no cases"

    def decorate(test):
        @functools.wraps(test)
        def all_cases(**fixtures):
            failed = {}
            for i, case in enumerate(cases):
                values = values_of(case, names)
                try: run_case(test, values, fixtures, f"case{i}")
                except (Exception, pytest.fail.Exception) as e: failed[name_of(case, ids, values)] = e
            if not failed: return
            lines = [f"{name}: {type(e).__name__}: {str(e)[:500]}" for name, e in failed.items()]
            raise AssertionError("\n".join([f"{len(failed)} of {len(cases)} cases failed", *lines])) from next(
                iter(failed.values()))

        signature = inspect.signature(test)
        all_cases.__signature__ = (
            signature.replace(parameters=[p for p in signature.parameters.values() if p.name not in names]))
        return all_cases

    return decorate
