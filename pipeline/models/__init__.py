"""Models of a run: trunks, handles, adapters, heads, and where they are loaded from."""
