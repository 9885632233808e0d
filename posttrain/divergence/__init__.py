"""Exact full-vocabulary divergences computed from hidden states."""
