"""What the library says, in the source: one well is not "1 wells"."""
import ast
import re
from pathlib import Path

from rcic_fastai.errors import counted

PACKAGE = Path(__file__).resolve().parents[1] / "rcic_fastai"
NOUNS = ("archives batches bytes channels classes columns compounds controls domains duplicates embeddings entries "
         "epochs experiments features fields files folders folds groups ids images layers members models networks "
         "pages parts planes plates queries rows runs samples siRNAs sites steps tables thresholds treatments wells "
         "windows")
# what is no adjective of such a noun: "of {n} wells" follows "{split}", but not "{n} has wells"
NOT = ("of|for|has|have|is|are|was|were|in|on|with|to|and|or|from|by|the|no|not|all|other|at|sets?|than|a|an|its|mixes|"
       "needs|holds")
COUNT = re.compile(rf"\0 (?:(?:(?!(?:{NOT})\b)[\w-]+|\0) ){{0,2}}({NOUNS.replace(' ', '|')})\b")
# expressions that are no number, or one that is never 1
NO_COUNT = {"split", "which", "k", "wells", "classes", "self.n_features", "duplicates", "_least", "_least_wells",
            "len(_control_wells)", "n_images", "z"}


def counts(tree):
    "Every f-string that writes a value, a blank and a noun in the plural: the line, the expression and the text"
    for node in ast.walk(tree):
        if not isinstance(node, ast.JoinedStr): continue
        values = [v.value if isinstance(v, ast.FormattedValue) else None for v in node.values]
        text = "".join("\0" if v is not None else part.value for v, part in zip(values, node.values))
        values = [v for v in values if v is not None]
        for m in COUNT.finditer(text):
            yield node.lineno, ast.unparse(values[text[:m.start()].count("\0")]), m[0].replace("\0", "{}")


def test_every_count_has_the_right_number_of_its_noun():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "_modidx.py": continue
        for line, value, text in counts(ast.parse(path.read_text())):
            if value not in NO_COUNT and not value.startswith("counted("):
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {{{value}}}{text[2:]}")
    assert not wrong, "write {counted(n, 'wells')} instead of {n} wells:\n" + "\n".join(wrong)


def test_the_search_finds_them():
    text = 'f"{n} wells"; f"of {n} {split} sites"; f"{a} more files of {b}"; f"{x} has wells"; f"{counted(n, w)} ids"'
    assert [value for _, value, _ in counts(ast.parse(text))] == ["n", "n", "a", "counted(n, w)"]


def test_one_of_each():
    for noun in NOUNS.split():
        one = counted(1, noun).removeprefix("1 ")
        assert one != noun and noun in (one + "s", one + "es", one.removesuffix("y") + "ies"), (noun, one)
    assert counted(1, "test sites have") == "1 test site has" and counted(0, "sites are") == "0 sites are"
