#!/usr/bin/env bash
# Trains LaSagnA on this machine's devices. usage: bash scripts/train_lasagna.sh LLAVA SAM DATASET [7b|13b] [train_ds.py flags]
exec bash "$(dirname "$0")/train.sh" lasagna "$@"
