"""What happens to each tensor, with which spec, and what it costs: pure functions of headers and settings."""
