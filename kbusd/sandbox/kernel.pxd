# Compiled, so that what every forked worker does first costs it no copied pages of ctypes.
