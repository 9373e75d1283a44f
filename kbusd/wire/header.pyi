import msgspec

METHOD_CALL: int
METHOD_RETURN: int
ERROR: int
SIGNAL: int
NO_REPLY_EXPECTED: int
NO_AUTO_START: int
ALLOW_INTERACTIVE_AUTHORIZATION: int

class ParsedHeader(msgspec.Struct, frozen=True):
    endian: str
    type: int
    flags: int
    serial: int
    reply_serial: int | None
    body_length: int
    header_length: int
    unix_fds: int
    path: str | None
    interface: str | None
    member: str | None
    error_name: str | None
    destination: str | None
    sender: str | None
    signature: str
    unknown_fields: bool

def reason(code: int) -> str: ...
def total_length(first16: bytes) -> int: ...
def parse(data: bytes) -> ParsedHeader: ...
def build(
    endian: int,
    type: int,
    flags: int,
    path: str | bytes | None = None,
    interface: str | bytes | None = None,
    member: str | bytes | None = None,
    error_name: str | bytes | None = None,
    destination: str | bytes | None = None,
    sender: str | bytes | None = None,
    signature: str | bytes | None = None,
    unix_fds: int = 0,
    has_reply_serial: bool = False,
    reply_serial: int = 0,
    serial: int = 0,
    body_length: int = 0,
) -> bytes: ...
