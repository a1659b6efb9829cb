"""How far a reader goes on the two long roads: from `train_run` to the saved run, and from `predict_run` to its
predictions.

    python tools/road.py [--list]

Followed are the functions of this library that have a name, in the order in which they are first entered: no lambdas,
no comprehensions, nothing within a function. A stop is a stretch of them in one module; a return is a stop in a module
that was left before. Three views: all functions; of the rooms below only the doors, which are the functions that
another room calls; and the room `run` alone, as it is read by who trusts the names of those doors.
"""

import sys
import tempfile
from itertools import groupby
from pathlib import Path

BELOW = ("screen.", "data.", "model.", "loss.", "predict.", "profile.", "labels.", "recipe.", "train.", "files",
         "credentials", "errors", "private")
VIEWS = "all functions", "doors of the rooms below", "room run alone"


class Road:
    """Functions of ours in the order in which they are first entered, and whether one of a room below was entered
    from such a room."""

    def __init__(self, package):
        self.package, self.seen = Path(package).resolve(), {}

    def place(self, frame):
        file = Path(frame.f_code.co_filename)
        name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
        if self.package not in file.parents or "<" in name: return None
        return ".".join(file.relative_to(self.package).with_suffix("").parts), name

    def __call__(self, frame, event, arg):
        if event != "call" or (here := self.place(frame)) is None: return
        caller = frame.f_back
        while caller is not None and (up := self.place(caller)) is None: caller = caller.f_back
        within = caller is not None and up[0].startswith(BELOW) and here[0].startswith(BELOW)
        self.seen[here] = self.seen.get(here, True) and within

    def walk(self, func, *args, **kwargs):
        sys.setprofile(self)
        try: return func(*args, **kwargs)
        finally: sys.setprofile(None)

    def functions(self, view):
        if view == VIEWS[0]: return list(self.seen)
        doors = [f for f, within in self.seen.items() if not within]
        return doors if view == VIEWS[1] else [f for f in doors if not f[0].startswith(BELOW)]


def figures(functions):
    stops = [module for module, _ in groupby(m for m, _ in functions)]
    return dict(functions=len(functions), stops=len(stops), returns=len(stops) - len(set(stops)),
                modules=len(set(stops)))


def main():
    import rcic_fastai
    from rcic_fastai.recipe.published import change_recipe, get_recipe
    from rcic_fastai.run.predict import predict_run
    from rcic_fastai.run.train import train_run
    from rcic_fastai.screen.read import read_screen
    from rcic_fastai.screen.simulate import simulate_screen

    train, predict, quiet = Road(Path(rcic_fastai.__file__).parent), Road(
        Path(rcic_fastai.__file__).parent), dict(say=lambda *a: None)
    with tempfile.TemporaryDirectory() as folder:
        screen = read_screen(simulate_screen(f"{folder}/screen", 8, n_train=3, n_test=1, cell_types=("HUVEC",),
                                             image_size=48, progress=False))
        small = 'model.arch_options={"channels": [8, 16, 24, 32], "stem_width": 8}'
        recipe = change_recipe(get_recipe("laptop"), "train.epochs=1", "data.batch_size=16", "model.arch=resnet10t",
                               small)
        train.walk(train_run, screen, recipe, f"{folder}/run", valid="experiment=HUVEC-03", **quiet)
        predict.walk(predict_run, f"{folder}/run", screen, "test", progress=False, **quiet)
    for name, road in {"train_run -> saved run": train, "predict_run -> predictions": predict}.items():
        for view in VIEWS:
            found = road.functions(view)
            print(f"{name}, {view}: " + ", ".join(f"{n} {k}" for k, n in figures(found).items()))
            if "--list" in sys.argv and view != VIEWS[0]:
                for module, stop in groupby(found, key=lambda f: f[0]):
                    print(f"    {module}: " + ", ".join(n for _, n in stop))


if __name__ == "__main__": main()
