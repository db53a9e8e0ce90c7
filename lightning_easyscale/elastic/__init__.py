"""Elastic jobs: stop signals, snapshots, and the supervisor that changes devices and restarts after crashes."""
