#!/usr/bin/env bash
# One would guess: a TIFF with a horizontal predictor gives the same pixels in every reader, or an error where a reader cannot undo it.
# What happens: tifffile writes and reads Predictor 2 with PackBits compression. Pillow and OpenCV (both through libtiff, whose PackBits codec
#   has no predictor) ignore the tag and return the differences between neighbours as if they were pixels, without a word. With LZW and
#   Deflate all three agree. A microscope's export that was "losslessly recompressed" turns into an edge image in one reader only.
# Version: tifffile 2025.10.16 with imagecodecs 2025.11.11, Pillow 12.0.0, opencv-python-headless 4.12.0.88
# Source: measured; TIFF 6.0, section 14 (Predictor) speaks of LZW, libtiff added Deflate, ZSTD and LERC
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet tifffile==2025.10.16 imagecodecs==2025.11.11 pillow==12.0.0 opencv-python-headless==4.12.0.88 'numpy<2.3'
cd "$folder"
env/bin/python - <<'PY'
import sys
import cv2, imagecodecs, numpy as np, PIL, tifffile
from PIL import Image

print('tifffile', tifffile.__version__, 'imagecodecs', imagecodecs.__version__, 'Pillow', PIL.__version__, 'OpenCV', cv2.__version__)
yy, xx = np.mgrid[:64, :64]
wrong = set()
for dtype in (np.uint8, np.uint16):
    x = (100+30*np.sin(xx/7)+20*np.cos(yy/5)).astype(dtype)
    for compression in ('packbits', 'lzw', 'zlib'):
        tifffile.imwrite('a.tif', x, compression=compression, predictor=2, photometric='minisblack')
        read = dict(tifffile=tifffile.imread('a.tif'), Pillow=np.asarray(Image.open('a.tif')), OpenCV=cv2.imread('a.tif', cv2.IMREAD_UNCHANGED))
        for name, y in read.items():
            same = y.shape==x.shape and bool((y==x).all())
            print(f'{np.dtype(dtype).name:7} {compression:9} {name:9} {"right" if same else "WRONG: first row " + str(y[0, :5].tolist()) + " instead of " + str(x[0, :5].tolist())}')
            if not same: wrong.add((np.dtype(dtype).name, compression, name))
expected = {(d, 'packbits', n) for d in ('uint8', 'uint16') for n in ('Pillow', 'OpenCV')}
sys.exit(0 if wrong==expected else f'the behaviour has changed: {sorted(wrong ^ expected)}')
PY
