"""What is shared on the Hugging Face Hub: the folder, its model card, the upload."""
