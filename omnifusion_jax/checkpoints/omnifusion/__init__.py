"""OmniFusion's published files, read and written.

Open original.py first: it reads a release. export.py writes one, phase1.py reads what the original code's
phase 1 writes, and two_encoders.py works out the tensors of the two-encoder adapter.
"""
