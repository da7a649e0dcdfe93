"""How an op is issued: in the order of the program, or beside other work."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Flight:
    """How one op is issued. On CPU and with the reference it changes nothing.

    Attributes:
        channel: The part of the group's workspace that the op uses, and the stream that it runs on. 0
            is for ops in line with the program, which nothing of the same program passes.
        most_sms: The SMs that ops which may run at the same time leave to this one; None for no bound.
    """

    channel: int = 0
    most_sms: int | None = None


IN_LINE = Flight()
