"""Entry points for `ray job submit`; each also runs as `python jobs/NAME.py`."""
