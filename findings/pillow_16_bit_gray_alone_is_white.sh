#!/usr/bin/env bash
# Pillow's convert("RGB") reads 16-bit PNG and TIFF rightly in every colour type but plain gray.
#
# One ramp from 0 to 65535, written with 16 bits as gray, gray with alpha, RGB and RGBA. Colour and alpha images open as
# RGB or RGBA with the upper byte of every sample: 60 levels, mean 127.5. The gray one opens in mode I;16, and
# convert("RGB") or convert("L") clips instead of scaling: every value above 255 is white, 2 levels are left, mean 250.8.
# A data set of 16-bit images that mixes gray and colour files is therefore half white, and adding an alpha
# channel to a gray file mends it. TIFF behaves like PNG. Nothing is raised or warned of.
#
# Seen with Pillow 13.0.0 (files written by pypng 0.20220715.0 and tifffile 2026.3.3), Python 3.11, 2026-11-29.
# Exits with 1 if the numbers are no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet pillow==13.0.0 pypng==0.20220715.0 tifffile==2026.3.3 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import io
import sys

import numpy as np
import png
import tifffile
from PIL import Image

LEVELS = 60
ramp = np.linspace(0, 65535, LEVELS).round().astype("uint16")[None].repeat(4, 0)
full = np.full_like(ramp, 65535)
CHANNELS = {
    "gray": (ramp,),
    "gray, alpha": (ramp, full),
    "RGB": (ramp, ramp, ramp),
    "RGBA": (ramp, ramp, ramp, full),
}


def levels_and_mean(file):
    file.seek(0)
    image = Image.open(file)
    values = np.asarray(image.convert("RGB"))
    return image.mode, len(np.unique(values)), float(values.mean())


found = {}
for name, channels in CHANNELS.items():
    file = io.BytesIO()
    writer = png.Writer(LEVELS, 4, bitdepth=16, greyscale="gray" in name, alpha=len(channels) % 2 == 0)
    writer.write(file, np.stack(channels, -1).reshape(4, -1).tolist())
    found[f"PNG {name}"] = levels_and_mean(file)
for name, photometric in (("gray", "minisblack"), ("RGB", "rgb")):
    file = io.BytesIO()
    tifffile.imwrite(file, np.stack(CHANNELS[name], -1).squeeze(), photometric=photometric)
    found[f"TIFF {name}"] = levels_and_mean(file)
for name, (mode, levels, mean) in found.items():
    print(f"{name:<16} opens as {mode:<5} convert('RGB'): {levels:2d} levels, mean {mean:5.1f}")
as_described = all(
    (levels == 2 and mean > 250) if name.endswith(" gray") else (levels == LEVELS and abs(mean - 127.5) < 1)
    for name, (_, levels, mean) in found.items()
)
sys.exit(0 if as_described else 1)
PYTHON
