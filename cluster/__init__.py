"""Clusters to run on: so far, one node on this machine."""
