"""How good captions are: metrics, their tokenization, evaluation of a split."""
