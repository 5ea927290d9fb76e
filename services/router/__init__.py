"""The router: admission, ordering and placement. One leader per model at a time; the others stand by, warm."""
