"""What runs in containers: the images, the compose file, the port suites against NATS and Redis containers."""
