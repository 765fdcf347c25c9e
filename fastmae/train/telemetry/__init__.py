"""What a run says of itself: rows of metrics, where they go, each process's own values and log."""
