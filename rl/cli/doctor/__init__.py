"""`shoal doctor`: is this machine ready, and do engine and learner agree? Read first: doctor.py."""
