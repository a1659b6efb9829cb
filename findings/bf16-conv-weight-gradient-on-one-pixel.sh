#!/usr/bin/env bash
# One would guess: a convolution trained in bfloat16 autocast on a CPU has the gradients of float32, less exact.
# What happens: where a 3x3 kernel with stride 2 meets a feature map of one pixel (the last stage of a ResNet on images of 16 pixels),
#   only the middle of the kernel sees data and the gradient of the other eight weights is zero by definition. In bfloat16 they are whatever
#   the memory held before: NaN, or large numbers, now and then, without an error; the middle and the gradient of the input are right.
#   Stride 1, maps of two pixels and float32 are right.
# Version: torch 2.13.0 (the same with 2.14.1) on a CPU with avx512_bf16, one thread. Without these instructions nothing is shown.
# Source: measured; the formula is that of torch.nn.Conv2d in the documentation of PyTorch, the kernel is the one of oneDNN that PyTorch takes for bfloat16
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.3.5
OMP_NUM_THREADS=1 "$folder/env/bin/python" - <<'PY'
import sys
import torch

print('torch', torch.__version__)
if not torch.cpu._is_avx512_bf16_supported():
    print('this processor has no avx512_bf16: nothing to see here')
    sys.exit()

def off_centre(dtype, side, stride, tries=20):
    "Largest |gradient| of the eight weights that see only padding (of a map of one pixel), or error against float32"
    torch.manual_seed(0)
    conv, worst = torch.nn.Conv2d(128, 128, 3, stride=stride, padding=1, bias=False), 0.
    x = torch.randn(16, 128, side, side)
    for _ in range(tries):
        junk = [torch.full((128*128*9,), 1e6, dtype=d) for d in (torch.float32, torch.bfloat16) for _ in range(8)] # memory that was used before
        del junk
        conv.zero_grad()
        with torch.autocast('cpu', dtype, enabled=dtype!=torch.float32): y = conv(x)
        y.sum().backward()
        got = conv.weight.grad.clone()
        conv.zero_grad()
        conv(x).sum().backward()
        worst = max(worst, float((got-conv.weight.grad).abs().nan_to_num(float('inf')).max()))
    return worst

seen = {(d, side, stride): off_centre(d, side, stride) for d in (torch.float32, torch.bfloat16) for side, stride in ((1, 2), (1, 1), (2, 2))}
for (d, side, stride), error in seen.items(): print(f'{str(d):15} map of {side}x{side}, stride {stride}: gradient of the weights off by up to {error:.3g}')
wrong = {k for k, error in seen.items() if error > 10}
sys.exit(0 if wrong=={(torch.bfloat16, 1, 2)} else 'the behaviour has changed')
PY
