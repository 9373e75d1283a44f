"""The kdbus ABI of 2015 as bytes and values; touches no descriptor and imports nothing of ours."""
