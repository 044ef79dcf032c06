"""Captioners for others: the folder on the Hugging Face Hub, its model card, the upload; ONNX, a page for browsers."""
