"""What every process tells about itself: log lines, Prometheus figures, traces."""
