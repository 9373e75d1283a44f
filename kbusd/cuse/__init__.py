"""CUSE and FUSE requests and replies as bytes and values; touches no descriptor."""
