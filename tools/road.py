"""How far a reader goes on the two long roads: the functions of this library that are entered from `train_run` to the network, and from `predict_run` to its predictions.

    python tools/road.py [--list]

Counts the distinct functions, their modules, and how often the road returns to a module that it has left. Counted are functions with a name:
no lambdas, no comprehensions, nothing within a function. Three views: all functions; the rooms below, of which only the doors count, since their
own calls are another road; and the same with what knows the folder of a run, as a reader sees it who trusts `Run`.
"""

import sys
import tempfile
from pathlib import Path


class Road:
    "Functions of ours in the order in which they are first entered; of modules in `ground` those only that other modules call."

    def __init__(self, package, ground=()):
        self.package, self.ground, self.seen, self.active = Path(package).resolve(), ground, {}, True

    def place(self, frame):
        file = Path(frame.f_code.co_filename)
        name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
        if self.package not in file.parents or "<" in name: return None
        return ".".join(file.relative_to(self.package).with_suffix("").parts), name

    def __call__(self, frame, event, arg):
        if event != "call" or not self.active or (here := self.place(frame)) is None: return
        if here[1] == self.until: self.active = False
        caller = frame.f_back
        while caller is not None and (up := self.place(caller)) is None: caller = caller.f_back
        if caller is not None and up[0].startswith(self.ground) and here[0].startswith(self.ground): return  # inside the ground
        if here not in self.seen: self.seen[here] = len(self.seen)

    def walk(self, func, *args, until=None, **kwargs):
        self.until = until
        sys.setprofile(self)
        try: return func(*args, **kwargs)
        finally: sys.setprofile(None)

    def figures(self):
        left, returns = set(), 0
        stops = list(self.seen)
        for a, b in zip(stops, stops[1:]):
            if a[0] == b[0]: continue
            left.add(a[0])
            returns += b[0] in left
        return dict(functions=len(stops), modules=len({m for m, _ in stops}), returns=returns)


ROOMS = ("screen.", "data.", "model.", "loss.", "predict.", "profile.", "labels.", "recipe.", "train.", "files", "credentials", "errors")
FLOOR = (*ROOMS, "run.folder", "run.record", "run.task", "run.stages")  # what knows the folder of a run
VIEWS = {"all functions": (), "the rooms below as one": ROOMS, "and the run's own folder": FLOOR}


def main():
    import rcic_fastai
    from rcic_fastai.recipe.published import change_recipe, get_recipe
    from rcic_fastai.run.predict import predict_run
    from rcic_fastai.run.train import train_run
    from rcic_fastai.screen.read import read_screen
    from rcic_fastai.screen.simulate import simulate_screen

    package, quiet = Path(rcic_fastai.__file__).parent, dict(say=lambda *a: None)
    with tempfile.TemporaryDirectory() as folder:
        screen = read_screen(simulate_screen(f"{folder}/screen", 8, n_train=3, n_test=1, cell_types=("HUVEC",), image_size=48, progress=False))
        small = 'model.arch_options={"channels": [8, 16, 24, 32], "stem_width": 8}'
        recipe = change_recipe(get_recipe("laptop"), "train.epochs=1", "data.batch_size=16", "model.arch=resnet10t", small)
        for k, (what, ground) in enumerate(VIEWS.items()):
            train, predict = Road(package, ground), Road(package, ground)
            train.walk(train_run, screen, recipe, f"{folder}/run{k}", valid="experiment=HUVEC-03", until="recipe_model", **quiet)
            predict.walk(predict_run, f"{folder}/run{k}", screen, "test", progress=False, **quiet)
            for name, road in {"train_run -> recipe_model": train, "predict_run -> predictions": predict}.items():
                print(f"{name}, {what}: " + ", ".join(f"{n} {k}" for k, n in road.figures().items()))
                if "--list" in sys.argv and ground: print("\n".join(f"    {m}:{n}" for m, n in road.seen))


if __name__ == "__main__": main()
