"""What data_doctor.py does, in parts: what a recipe needs, a rehearsal of training, findings, report, hints, sheets."""
