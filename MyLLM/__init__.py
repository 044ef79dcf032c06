"""GPT-2 from scratch, text only: the lesson blocks that the captioner is built from."""
