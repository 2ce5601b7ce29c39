"""Grafana's dashboards, written in Python: `python -m deploy.grafana` writes them to dashboards/."""
