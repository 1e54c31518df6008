"""What was found, as a page that needs no other file."""
