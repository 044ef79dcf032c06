"""Captions over HTTP: what the server and the web demo are made of."""
