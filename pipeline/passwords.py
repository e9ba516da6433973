"""Passwords that stand in addresses, such as `ftp://me:secret@host`: found, and taken out.

Enters: an address, or any text that may quote one. Leaves: whether it holds a password; or the text without it.
"""

import re

_USER_INFO = re.compile(r"://[^/@\s]*@")
_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")


def has_password(address: str) -> bool:
    """True where a password stands before the host.

    >>> [has_password(address) for address in ("ftp://me:secret@host/x", "ftp://me@host/x", "clicks/a:b@c")]
    [True, False, False]
    """
    return _PASSWORD.search(address) is not None


def without_passwords(text: str) -> str:
    """`text` without what stands before the host of an address.

    >>> without_passwords("no server at https://me:secret@host/x")
    'no server at https://***@host/x'
    """
    return _USER_INFO.sub("://***@", text)
