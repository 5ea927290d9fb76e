"""The prefill service: a worker that starts in the prefill role. All it does is in tandem.worker."""
