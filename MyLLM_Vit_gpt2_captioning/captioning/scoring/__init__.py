"""The quality of captions: metrics, their tokenization, and the evaluation of a split."""
