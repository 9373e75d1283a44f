"""The D-Bus protocol as bytes and values; touches no descriptor and imports nothing of ours."""
