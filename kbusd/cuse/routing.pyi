HEADER_SIZE: int
INTERRUPT: int

def route(request: bytes | bytearray | memoryview) -> tuple[int, int, int, int]: ...
