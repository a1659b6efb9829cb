"The tool that runs many cases in one test."
import re
from pathlib import Path

import pytest
from cases import each


def failed(test, **fixtures):
    "Lines of what a test with failing cases says"
    with pytest.raises(AssertionError) as caught: test(**fixtures)
    assert caught.value.__cause__ is not None
    return str(caught.value).splitlines()


def test_all_cases_run_and_those_that_fail_are_named():
    seen = []

    @each("a, b", [(1, 2), (3, 3), pytest.param(5, 6, id="the last")])
    def check(a, b):
        seen.append(a)
        if a == 1:
            with pytest.raises(ValueError): int("1")
        assert a == b, "not equal"

    lines = failed(check)
    assert seen == [1, 3, 5] and lines[0] == "2 of 3 cases failed"
    assert re.match("a=1, b=2: Failed: DID NOT RAISE", lines[1])
    assert lines[2].startswith("the last: AssertionError: not equal")


def test_one_above_the_other_is_the_product():
    seen = []

    @each("a", [1, 2])
    @each("b", "xy", ids=str.upper)
    def check(a, b):
        seen.append((a, b))
        assert (a, b) != (2, "y")

    assert failed(check)[:3] == ["1 of 2 cases failed", "a=2: AssertionError: 1 of 2 cases failed",
                                 "Y: AssertionError: " + failed(check)[2][19:]]
    assert sorted(set(seen)) == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]


def test_a_case_has_its_own_folder_and_its_patches_end_with_it(tmp_path, monkeypatch):
    folders = []

    @each("name", ["one", "two"])
    def check(name, tmp_path, monkeypatch):
        assert list(tmp_path.iterdir()) == [] and Path.home() != Path("/one")
        (tmp_path / "file").touch()
        monkeypatch.setattr(Path, "home", lambda: Path(f"/{name}"))
        folders.append(tmp_path)

    check(tmp_path=tmp_path, monkeypatch=monkeypatch)
    assert len(set(folders)) == 2 and Path.home() not in (Path("/one"), Path("/two"))


def test_no_cases_are_refused():
    with pytest.raises(AssertionError, match="there are no cases"): each("a", [])
    with pytest.raises(AssertionError, match="has no value for each of"): each("a, b", [(1,)])(lambda a, b: None)()


@each("value", ["a", "b"])
def test_fixtures_are_those_that_remain(value, tmp_path_factory, request):
    assert request.fixturenames.count("tmp_path_factory") == 1 and "value" not in request.fixturenames
