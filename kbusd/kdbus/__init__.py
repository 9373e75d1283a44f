"""The kdbus ABI of 2015 as bytes and values, without I/O."""
