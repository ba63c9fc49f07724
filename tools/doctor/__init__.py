"""Checks a dataset folder against a recipe: `python -m tools.doctor RECIPE --dataset_dir ROOT`."""
