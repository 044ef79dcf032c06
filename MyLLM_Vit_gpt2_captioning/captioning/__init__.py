"""What the script and the tools are made of, a room a subject."""
