"""What data_doctor.py does, in parts: plan (what a recipe needs), rehearsal (what training does), examine, report, hints, sheets."""
