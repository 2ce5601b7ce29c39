"""What is known about a request, as headers, usage, metrics, traces and a log line."""
