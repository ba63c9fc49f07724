"""What data_doctor.py does, in parts: plan (what a recipe needs), examine, report, hints, sheets."""
