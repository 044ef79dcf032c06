"""Sharing on the Hugging Face Hub: the folder that is uploaded, its model card, the upload."""
