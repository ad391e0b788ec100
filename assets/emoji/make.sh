#!/usr/bin/env bash
# Remake the small world from nothing, in order. Less than two hours on two CPU cores; every
# training continues from its checkpoint in build/emoji/ when it is stopped and started again.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}

"$python" assets/emoji/build_tokenizer.py
"$python" assets/emoji/train_vae.py --steps 1000 --batch 56
(
  export OMP_NUM_THREADS=1 # two processes of one thread beat one of two: the layers are small
  "$python" assets/emoji/train_denoiser.py sd --favour 1 --stop 3000
  "$python" assets/emoji/train_denoiser.py sd --stop 6000
) &
OMP_NUM_THREADS=1 "$python" assets/emoji/train_clip.py reward --seed 1
OMP_NUM_THREADS=1 "$python" assets/emoji/train_clip.py judge --seed 2
wait
"$python" assets/emoji/train_vae.py --steps 1000 --decoder-only
"$python" assets/emoji/train_lcm.py
flow="assets/emoji/train_denoiser.py sd3 --favour 1"
OMP_NUM_THREADS=1 "$python" $flow --lr 2e-3 --stop 400
OMP_NUM_THREADS=1 "$python" $flow --lr 3e-3 --stop 2200
OMP_NUM_THREADS=1 "$python" assets/emoji/train_turbo.py
"$python" assets/emoji/show.py reconstructions
"$python" assets/emoji/show.py samples
"$python" assets/emoji/show.py flow_samples --steps 10
"$python" assets/emoji/show.py lcm_samples
"$python" assets/emoji/show.py turbo_samples --steps 10
"$python" assets/emoji/score_clip.py
"$python" assets/emoji/score_lcm.py
