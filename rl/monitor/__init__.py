"""What a run says while it goes on: metrics, events, alerts, verdicts, trackers.

Read first: monitor.py.
"""
