#!/usr/bin/env bash
# Trains GSVA on this machine's devices. usage: bash scripts/train_gsva.sh LLAVA SAM DATASET [7b|13b] [train_ds.py flags]
# The second stage, for one benchmark: bash scripts/train_gsva.sh MERGED SAM DATASET 7b --exp_name gsva-7b-ft-gres \
#     --dataset refer_seg --sample_rates 1 --refer_seg_data grefcoco --lr 1e-4
exec bash "$(dirname "$0")/train.sh" gsva "$@"
