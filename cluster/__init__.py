"""Clusters to run on: one node on this machine, and the files for clouds, Kubernetes and containers."""
