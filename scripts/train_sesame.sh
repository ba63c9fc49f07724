#!/usr/bin/env bash
# Trains SESAME on this machine's devices. usage: bash scripts/train_sesame.sh LLAVA SAM DATASET [7b|13b] [train_ds.py flags]
exec bash "$(dirname "$0")/train.sh" sesame "$@"
