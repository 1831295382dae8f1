"""Train a run under a seeded schedule of faults and compare it with an undisturbed one."""
