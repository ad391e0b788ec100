#!/usr/bin/env bash
# Remake the small world from nothing, in order. About three hours on two CPU cores; every step of
# training continues from its checkpoint in build/emoji/ when it is stopped and started again.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}

"$python" assets/emoji/build_tokenizer.py
"$python" assets/emoji/train_vae.py --steps 1000 --batch 56
"$python" assets/emoji/train_unet.py --steps 8000 &
"$python" assets/emoji/train_clip.py reward --seed 1
"$python" assets/emoji/train_clip.py judge --seed 2
wait
"$python" assets/emoji/show.py reconstructions
"$python" assets/emoji/show.py samples
"$python" assets/emoji/score_clip.py
