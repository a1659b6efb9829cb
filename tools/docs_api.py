"Entries of the API pages and of the command reference: docments as Markdown for Sphinx's Python domain."

import argparse
import ast
import inspect
import re
from importlib import import_module
from typing import Annotated, get_args, get_origin

from fastcore.docments import docments
from numpy.typing import ArrayLike

from rcic_fastai.cli.script import option_parser

# what a docstring of this project says after its first sentence
FIELDS = re.compile(r"(?:^|\s)(Shape|Raises|Source): ")
CODE = re.compile(r"(`[^`]+`)")


def escape(text):
    "Plain text with code in backticks as Markdown: nothing but the code has a meaning"
    parts = CODE.split(" ".join(text.split()))
    return "".join(p.replace("|", r"\|") if i % 2 else re.sub(r"([\\*_<>\[\]{}|#$~^])", r"\\\1", p)
                   for i, p in enumerate(parts))


def type_name(annotation):
    "`pandas.DataFrame` as DataFrame, `Annotated[Path, ...]` as Path; nothing for what is not annotated"
    if annotation is inspect.Parameter.empty:
        return ""
    if annotation == ArrayLike:
        return "ArrayLike"
    if get_origin(annotation) is Annotated:
        return type_name(get_args(annotation)[0])
    name = annotation if isinstance(annotation, str) else annotation.__name__ if isinstance(
        annotation, type) and not get_args(annotation) else str(annotation)
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", name).replace("NoneType", "None")


class Default:
    "A default value that says what it is, not where it lies in memory"

    def __init__(self, value):
        text = getattr(value, "__name__", None) or repr(value)
        self.text = f"{type(value).__name__}(...)" if len(text) > 60 else text.replace("<factory>", "...")

    def __repr__(self):
        return self.text


def plain(symbol):
    "The function behind decorators, caches, properties and class methods"
    symbol = symbol.fget if isinstance(symbol, property) else getattr(symbol, "__func__", symbol)
    return symbol if isinstance(symbol, type) else inspect.unwrap(symbol)


def own_parameters(symbol):
    """Parameters written in the definition (those of `delegates` are in other libraries), by name, and whether there
    are others"""
    try:
        parameters = dict(inspect.signature(symbol).parameters)
    except (TypeError, ValueError):
        return {}, False
    function = symbol.__init__ if isinstance(symbol, type) else symbol
    parameters.pop("self", None), parameters.pop("cls", None)
    if not hasattr(function, "__delwrap__"):
        return parameters, False
    code = function.__code__
    own = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return {k: p for k, p in parameters.items() if k in own}, True


def signature(symbol):
    "Names and defaults; types are in the table"
    parameters, more = own_parameters(symbol)
    empty = inspect.Parameter.empty
    shown = [p.replace(annotation=empty, default=p.default if p.default is empty else Default(p.default))
             for p in parameters.values()]
    if more:
        shown.append(inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD))
    return str(inspect.Signature(shown))


def documented(symbol):
    "Comment, type and default of each parameter, and of the value returned"
    parameters, _ = own_parameters(symbol)
    try:
        comments = docments(symbol, full=True)
    except (TypeError, ValueError, OSError):
        comments = {}
    notes = {k: v.docment for k, v in comments.items()}
    # docments knows no named tuples
    if isinstance(symbol, type) and issubclass(symbol, tuple) and hasattr(symbol, "_fields"):
        notes = dict(re.findall(r"^    (\w+):[^#\n]*# (.+)$", inspect.getsource(symbol), flags=re.M))
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    rows = [(stars.get(p.kind, "") + k, type_name(p.annotation), p.default, notes.get(k)) for k, p in parameters.items()
            if p.kind not in stars or notes.get(k)]
    result = comments.get("return")
    if result is not None and not isinstance(symbol, type) and (result.docment
                                                                or result.anno not in (None, inspect.Parameter.empty)):
        rows.append(("Returns", type_name(result.anno), inspect.Parameter.empty, result.docment))
    return rows if any(note for *_, note in rows) or rows[-1:] and rows[-1][0] == "Returns" else []


def table(symbol):
    "The parameters as a table"
    rows = documented(symbol)
    if not rows:
        return ""
    cells = []
    for name, kind, default, note in rows:
        name = "**Returns**" if name == "Returns" else f"`{name}`"
        kind = f"`{kind}`".replace("|", r"\|") if kind else ""
        given = "" if default is inspect.Parameter.empty else f" = `{Default(default)}`".replace("|", r"\|")
        cells.append(f"| {name} | {kind}{given} | {escape(note or '')} |")
    return "\n".join(["| Parameter | Type | |", "|---|---|---|", *cells]) + "\n"


def description(symbol):
    "Docstring of a symbol: paragraphs, and its `Shape:`, `Raises:` and `Source:` as fields"
    text = inspect.getdoc(symbol) or ""
    body, *fields = FIELDS.split(text)
    paragraphs = [escape(p) for p in re.split(r"\n\s*\n", body) if p.strip()]
    return "\n\n".join(paragraphs), "\n".join(f":{name}: {escape(value)}"
                                              for name, value in zip(fields[::2], fields[1::2]))


def summary(symbol, comment=""):
    "First sentence of a docstring; of a constant its comment, or what it is"
    text = description(symbol)[0].split("\n\n")[0] if callable(symbol) else escape(comment or value_text(symbol, 80))
    return re.split(r"(?<=[.!?])\s", text)[0]


def public_members(cls):
    """Methods and properties that the class itself defines and describes; fastai's events and dispatched methods
    have no docstring of their own"""
    for name, member in vars(cls).items():
        doc = getattr(plain(member), "__doc__", None) if callable(plain(member)) else None
        if not name.startswith("_") and doc and not doc.startswith("---") and not isinstance(member, type):
            yield name, member


def directive(kind, head, body, fence=":::"):
    "A MyST directive"
    return f"{fence}{{{kind}}} {head}\n\n{body.strip()}\n{fence}\n"


def entry(module, name, comment=""):
    "The entry of one exported name"
    symbol = getattr(module, name)
    if not callable(symbol):
        return directive("py:data", name, f"{escape(comment)}\n\n{escape(value_text(symbol))}")
    symbol = plain(symbol)
    body, fields = description(symbol)
    parts = [body, table(symbol), fields]
    if not isinstance(symbol, type):
        return directive("py:function", name + signature(symbol), "\n\n".join(filter(None, parts)))
    for member, value in public_members(symbol):
        parts.append(member_entry(name, member, value))
    return directive("py:class", name + signature(symbol), "\n\n".join(filter(None, parts)), "::::")


def member_entry(owner, name, value):
    "A method or property within the entry of its class"
    function = plain(value)
    body, fields = description(function)
    kind = ("property" if isinstance(value, property)
            else {classmethod: "classmethod", staticmethod: "staticmethod"}.get(type(value), "method"))
    head = name if kind == "property" else name + signature(function)
    rows = "" if kind == "property" else table(function)
    return directive(f"py:{kind}", f"{owner}.{head}", "\n\n".join(filter(None, [body, rows, fields])))


def value_text(value, longest=160):
    "What a constant is, in one line"
    text = repr(value)
    if len(text) <= longest:
        return f"`{text}`"
    if isinstance(value, dict):
        return f"A dictionary with {len(value)} entries: {', '.join(f'`{k}`' for k in value)}."
    return f"{type(value).__name__} of {len(value)}." if hasattr(value, "__len__") else f"A {type(value).__name__}."


def defined_names(source):
    "Names that a cell defines at its top level, each with the comment beside it or above it"
    found, lines = {}, source.splitlines()
    for node in ast.parse(source).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names = [node.name] if hasattr(node, "name") else [n.id for t in targets if t is not None for n in ast.walk(t)
                                                           if isinstance(n, ast.Name)]
        beside = re.search(r"\s#\s(.+)$", lines[node.lineno - 1])
        above = re.match(r"#\s(.+)$", lines[node.lineno - 2]) if node.lineno > 1 else None
        found |= dict.fromkeys(names, beside[1] if beside else above[1] if above else "")
    return found


def commands(settings):
    "Console scripts of the project in the order of `settings.ini`: name and function"
    for line in settings["console_scripts"].split():
        name, target = line.split("=")
        module, function = target.split(":")
        if module.split(".")[0] == settings["lib_name"]:
            yield name, getattr(import_module(module), function)


def command_entry(name, function):
    "What `--help` says about a command, with a link target for each option"
    parser = option_parser(function, prog=name)
    usage = re.sub(r"\((\w+)\)", r"\1", parser.format_usage().removeprefix("usage: ")).replace("[-h] ", "")
    out = [f"({name})=\n## {name}\n\n{escape(parser.description)}\n\n```text\n{usage.rstrip()}\n```\n\n"
           f":::{{program}} {name}\n:::\n"]
    for action in parser._actions:
        if action.help is argparse.SUPPRESS or action.option_strings[:1] == ["-h"]:
            continue
        shown = ", ".join(action.option_strings) or action.dest
        value = (f" <{action.metavar.strip('()')}>" if action.option_strings and action.metavar and action.nargs != 0
                 else "")
        text = re.sub(r" \(default: (.*)\)$", lambda m: "" if m[1] == "False" else f" (default: `{m[1]}`)",
                      action.help or "")
        needed = "**Required.** " if action.required and action.option_strings else ""
        text += f" One of {', '.join(f'`{c}`' for c in action.choices)}." if action.choices else ""
        out.append(directive("option", shown + value, needed + escape(text)))
    return "\n".join(out)
