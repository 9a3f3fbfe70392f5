"""What a config means."""
