"""What a representation is worth: one file a protocol."""
