"""What a running Tandem says about itself: traces and metrics."""
