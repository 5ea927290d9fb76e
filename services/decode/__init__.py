"""The decode service: a worker that starts in the decode role. All it does is in tandem.worker."""
