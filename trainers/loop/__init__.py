"""What runs a method."""
