"""Draw which module imports which, as text: `python tools/imports.py`, or `make imports`.

A room is a folder of the package, a floor the number of the notebook that exports a module. Every import counts, those
inside functions too.
"""
import argparse
import ast
import importlib.util
import re
import sys
from collections import defaultdict
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "rcic_fastai"
GROUND = "ground"  # the room of the modules that stand in no folder
MOST_ROOMS = 25


def module_floors(nbs=ROOT / "nbs"):
    "Module -> floor, from the numbers of the notebooks and what they export"
    floors = {}
    for path in sorted(Path(nbs).rglob("[0-9][0-9]_*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        code = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code")
        if found := re.search(r"^#\|\s*default_exp\s+(\S+)", code, flags=re.M): floors[found[1]] = int(path.name[:2])
    return floors


def imported(source, name, modules):
    "Modules out of `modules` that the source of the module `name` imports"
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            at = "." * node.level + (node.module or "")
            full = importlib.util.resolve_name(at, f"{PACKAGE}.{name}".rpartition(".")[0]) if node.level else at
            names = [full, *(f"{full}.{a.name}" for a in node.names)]
        else: continue
        found |= {n.removeprefix(f"{PACKAGE}.") for n in names if n.startswith(f"{PACKAGE}.")}
    return found & set(modules)


def import_graph(floors, package=ROOT / PACKAGE):
    "Module -> the modules that it imports"
    return {m: imported((package / f"{m.replace('.', '/')}.py").read_text(encoding="utf-8"), m, floors) for m in floors}


def room(module):
    "The folder of a module"
    return module.partition(".")[0] if "." in module else GROUND


def room_graph(graph):
    "Room -> the other rooms that its modules import"
    rooms = defaultdict(set)
    for m, targets in graph.items(): rooms[room(m)] |= {room(t) for t in targets} - {room(m)}
    return dict(rooms)


def circles(graph):
    "Sets of nodes that reach each other, by what each of them reaches"
    def reach(node):
        seen, todo = set(), [node]
        while todo: todo += (new := graph.get(todo.pop(), set()) - seen); seen |= new
        return seen
    reached = {n: reach(n) for n in graph}
    return sorted({tuple(sorted(m for m in r if n in reached[m])) for n, r in reached.items() if n in r})


def arrows_up(graph, floors):
    "Imports of the same floor or of a higher one"
    return sorted((m, t) for m, targets in graph.items() for t in targets if floors[t] >= floors[m])


def counts(graph, floors):
    "What the drawing ends with"
    rooms = room_graph(graph)
    return {"rooms": len(rooms), "modules": len(graph), "arrows": sum(map(len, graph.values())),
            "circles": len(circles(graph)) + len(circles(rooms)), "arrows up": len(arrows_up(graph, floors))}


def drawing(graph, floors):
    "Rooms from the top floor down: their modules on each floor, and the rooms that they import"
    rooms, lines = defaultdict(lambda: defaultdict(list)), []
    for m in graph: rooms[room(m)][floors[m]].append(m.rpartition(".")[2])
    for name, levels in sorted(rooms.items(), key=lambda x: -min(x[1])):
        for i, floor in enumerate(sorted(levels, reverse=True)):
            lines.append(f"{'' if i else name:<10}{floor:02}  {'  '.join(sorted(levels[floor]))}")
        below = sorted(room_graph(graph)[name], key=lambda r: -min(rooms[r]))
        lines += [f"{'':<10}--> {', '.join(below) or 'nothing'}", ""]
    lines += [f"up: {m} --> {t}" for m, t in arrows_up(graph, floors)]
    lines += ["circle: " + ", ".join(c) for c in [*circles(graph), *circles(room_graph(graph))]]
    return "\n".join([*lines, ", ".join(f"{k} {v}" for k, v in counts(graph, floors).items())])


def module_arrows(graph):
    "One line for each module and what it imports"
    return "\n".join(f"{m} --> {', '.join(sorted(t)) or 'nothing'}" for m, t in sorted(graph.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--modules", action="store_true", help="first a line for each module")
    floors = module_floors()
    graph = import_graph(floors)
    if parser.parse_args().modules: print(module_arrows(graph), end="\n\n")
    print(drawing(graph, floors))
    found = counts(graph, floors)
    return bool(found["circles"] or found["arrows up"] or found["rooms"] > MOST_ROOMS)


if __name__ == "__main__": sys.exit(main())
