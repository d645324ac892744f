"""What something takes."""
