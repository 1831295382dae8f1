"""Grafana dashboards, built from the catalogue of metrics and the table of alert rules."""
