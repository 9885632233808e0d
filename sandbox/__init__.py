"""Sandboxes: kinds of isolated boxes behind one protocol, and the agent that runs inside them."""
