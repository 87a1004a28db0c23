"""What evaluations found, as one HTML page."""
