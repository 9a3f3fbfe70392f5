"""What a paper says: one file a method."""
