"""qh3's connection with acknowledgements that wait for company, for both sides.

Source: RFC 9000, section 13.2. qh3 sends an acknowledgement a millisecond after what it answers, in a packet of its own
even where data goes out before that: a fourth datagram for each key and its echo. Here it goes with the next data, and
alone only after ACK_HOLD_SECONDS, well inside of the 25 ms that qh3 tells the other side; every second packet is
acknowledged at once, as before.
"""

from __future__ import annotations

import logging
from typing import Final

from qh3.quic.connection import NetworkAddress, QuicConnection

# qh3 tells every closed connection as a warning; who wants to know hears it from the conduit's end.
logging.getLogger("quic").setLevel(logging.CRITICAL)

ACK_HOLD_SECONDS: Final = 0.015
_ACK_TIMER = "ack_application"


class PatientConnection(QuicConnection):
    """A `QuicConnection` whose acknowledgements go with data where they can."""

    _company = False

    def send_stream_data(self, stream_id: int, data: bytes, end_stream: bool = False) -> None:  # type: ignore[override]  # only bytes
        """Queues bytes of a stream; what is to be acknowledged goes with them."""
        super().send_stream_data(stream_id, data, end_stream)
        self._company = True

    def next_datagram(self, now: float) -> bytes | None:
        """Returns what may be sent now, one datagram at a time, so that a key is on its way before the next is made.

        Raises RuntimeError where qh3 fails.
        """
        core = self._core
        if core is None:
            return None
        if self._company:
            self._company = False
            timer = core.get_timer()
            if timer is not None and timer[0] == _ACK_TIMER:
                self._call_core(core.handle_timer, timer[1])
        made = core.poll_transmit(now)
        return made[0] if made is not None else None

    def take_run(self, data: bytes, size: int, address: NetworkAddress, now: float) -> bool:
        """Takes datagrams of `size` bytes, the last may be smaller; tells whether any of it is the other side's.

        Once the handshake is done, nothing is looked for any more that only comes before.
        """
        core = self._core
        if core is None or not self._handshake_complete:
            for at in range(0, len(data), size):
                self.receive_datagram(data[at : at + size], address, now)
            return True
        if len(data) <= size:
            report = self._call_core(core.receive_datagram, data, address, now, len(data))
        else:
            report = self._call_core(core.receive_gro_buffer, data, size, address, now)
        self._drain_core()
        return report[2] > 0

    def get_timer(self) -> float | None:
        """Returns when `handle_timer` is to be called."""
        timer = self._core.get_timer() if self._core is not None else None
        if timer is None:
            return None
        return timer[1] + ACK_HOLD_SECONDS if timer[0] == _ACK_TIMER else timer[1]


__all__ = ["ACK_HOLD_SECONDS", "PatientConnection"]
