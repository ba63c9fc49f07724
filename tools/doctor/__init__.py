"""Parts of data_doctor.py: plan (needs of a recipe), rehearsal (of training), examine, report, hints, sheets."""
