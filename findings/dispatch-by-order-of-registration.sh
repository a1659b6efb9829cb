#!/usr/bin/env bash
# One would guess: plum calls the method whose types are nearest to the arguments, in whatever order the methods were registered.
# What happens: beside a method without annotations and with *args (as fastai's `plot_top_losses` has one in fastai.interpret), the order decides.
#   A method for a class may lose to one for its parent, or to the one that takes anything, without an error: whoever imports a library that
#   teaches `plot_top_losses` a type of image before fastai.vision.learner gets fastai's pictures, and ours afterwards. 2.10.0 is right in every order.
# Version: plum-dispatch 2.9.0 (the same with 2.7.1 and 2.8.0), against 2.10.0; Python 3.10 and newer.
# Source: measured; the rule of the nearest method is that of plum's documentation.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/orders.py" <<'PY'
import itertools, sys
import importlib.metadata
from plum import Dispatcher

class Image: pass
class Stains(Image): pass
class Label: pass

def registered(order):
    d = Dispatcher()
    def stains():
        @d
        def show(x:Stains, y:Label, sample): return 'stains'
    def image():
        @d
        def show(x:Image, y:Label, sample): return 'image'
    def anything():
        @d
        def show(x, y, *args): return 'anything'
    for name in order: dict(stains=stains, image=image, anything=anything)[name]()
    return next(iter(d.functions.values()))

called = {order: registered(order)(Stains(), Label(), 1) for order in itertools.permutations(('stains', 'image', 'anything'))}
print('plum', importlib.metadata.version('plum-dispatch'))
for order, method in called.items(): print(f'  registered {", ".join(order):26} -> {method}')
wrong = sum(m!='stains' for m in called.values())
sys.exit(0 if wrong==int(sys.argv[1]) else f'{wrong} orders are wrong, {sys.argv[1]} were: the behaviour has changed')
PY
for case in 2.9.0:3 2.10.0:0; do
  "${PYTHON:-python3}" -m venv "$folder/${case%:*}"
  "$folder/${case%:*}/bin/python" -m pip install --quiet "plum-dispatch==${case%:*}"
  "$folder/${case%:*}/bin/python" "$folder/orders.py" "${case#*:}"
done
