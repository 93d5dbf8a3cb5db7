"""What is measured, one aspect a file."""
