#!/usr/bin/env bash
# One would guess: a tensor of 16-bit unsigned integers, the type of every microscope camera, goes where a tensor of 8 bits goes: through pickle,
#   through copy.deepcopy, and from the workers of a DataLoader, also when it is of a subclass of Tensor as fastai's TensorImage is.
# What happens: torch.save, torch.load and a DataLoader of plain tensors work; pickle.dumps of it works too, or so it seems: the bytes cannot be read again
#   (pickle.loads: UntypedStorage has no attribute 'dtype'), so the data may be lost. A subclass cannot leave a worker of a DataLoader ('_untyped_storage'),
#   where uint8 and int16 can. What is written by numpy() and torch.from_numpy(), or viewed as int16, is whole.
# Version: torch 2.14.1, Linux, fork and spawn alike
# Source: measured; the rebuilding functions are torch._utils and torch.multiprocessing.reductions, the types are those of torch.uint16 in the documentation
#   ("limited support")
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.14.1 numpy==2.3.5
cat > "$folder/seen.py" <<'PY'
import io
import pickle
import sys

import torch
from torch.utils.data import DataLoader, Dataset


class Image(torch.Tensor):
    "A subclass without anything of its own, as fastai has for each kind of tensor"


class Sites(Dataset):
    def __init__(self, dtype, subclass): self.dtype, self.subclass = dtype, subclass
    def __len__(self): return 4
    def __getitem__(self, i):
        image = torch.full((6, 2, 2), 100+i, dtype=self.dtype)
        return image.as_subclass(Image) if self.subclass else image


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file)


def loaded(dtype, subclass, method):
    batches = DataLoader(Sites(dtype, subclass), batch_size=2, num_workers=1, multiprocessing_context=method)
    return torch.stack([b.as_subclass(torch.Tensor) for b in batches])


def outcome(f, *args):
    try: f(*args)
    except Exception as e: return f'{type(e).__name__}: {str(e).strip().splitlines()[-1][:90]}'
    return 'works'


if __name__ == '__main__':
    print('torch', torch.__version__)
    seen = {}
    for dtype in (torch.uint8, torch.int16, torch.uint16):
        x = torch.full((2, 3), 100, dtype=dtype)
        seen[dtype, 'torch.save and load'] = outcome(saved, x)
        seen[dtype, 'pickle.dumps'] = outcome(pickle.dumps, x)
        seen[dtype, 'pickle.loads of these'] = outcome(lambda: pickle.loads(pickle.dumps(x)))
        for method in ('fork', 'spawn'):
            seen[dtype, f'DataLoader with a worker, {method}'] = outcome(loaded, dtype, False, method)
            seen[dtype, f'the same, a subclass of Tensor, {method}'] = outcome(loaded, dtype, True, method)
    for (dtype, what), result in seen.items(): print(f'{str(dtype):13} {what:42} {result}')
    fails = {k for k, v in seen.items() if v != 'works'}
    expected = {(torch.uint16, w) for w in ('pickle.loads of these', 'the same, a subclass of Tensor, fork',
                                            'the same, a subclass of Tensor, spawn')}
    sys.exit(0 if fails == expected else f'this has changed: {sorted(map(str, fails ^ expected))}')
PY
OMP_NUM_THREADS=1 "$folder/env/bin/python" -W ignore "$folder/seen.py"
