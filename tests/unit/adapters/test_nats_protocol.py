"""What a server may send is read the same wherever it is cut, and however its control lines are spaced."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.adapters.nats_protocol import Delivery, Parser, Pong, ProtocolError, publish

SENT = (
    b"MSG a.b 1 2\r\nhi\r\n"
    b"MSG a.b 7 re.ply 0\r\n\r\n"
    b"PONG\r\n"
    b"HMSG a 2 16 16\r\nNATS/1.0 503\r\n\r\n\r\n"
    b"HMSG a 2 re 12 15\r\nNATS/1.0\r\n\r\nyes\r\n"
)
MEANT = [
    Delivery(1, "a.b", "", b"hi", b""),
    Delivery(7, "a.b", "re.ply", b"", b""),
    Pong(),
    Delivery(2, "a", "", b"", b"503"),
    Delivery(2, "a", "re", b"yes", b""),
]


@given(st.lists(st.integers(0, len(SENT)), max_size=12))
def test_wherever_it_is_cut(cuts: list[int]) -> None:
    parser, at, found = Parser(), 0, []
    for cut in [*sorted(cuts), len(SENT)]:
        found += parser.feed(SENT[at:cut])
        at = cut
    assert [event if isinstance(event, Delivery) else type(event) for event in found] == [
        event if isinstance(event, Delivery) else type(event) for event in MEANT
    ]


@pytest.mark.parametrize("line", [b"MSG a 1  2", b"MSG  a 1 2 ", b"MSG a 1\t2", b"MSG a\t1 2"])
def test_white_space_of_any_kind_separates(line: bytes) -> None:
    assert Parser().feed(line + b"\r\nhi\r\n") == [Delivery(1, "a", "", b"hi", b"")]


@pytest.mark.parametrize("line", [b"MSG a", b"MSG a one 2", b"MSG a 1 two", b"HMSG a 1 2"])
def test_what_cannot_be_read_is_no_nats(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        Parser().feed(line + b"\r\nhi\r\n")


@pytest.mark.parametrize(("subject", "reply"), [("", ""), ("a b", ""), ("a", "b\tc")])
def test_no_subject_is_refused(subject: str, reply: str) -> None:
    assert publish("a", "", b"hi") == b"PUB a 2\r\nhi\r\n"
    with pytest.raises(ValueError, match="not a subject"):
        publish(subject, reply, b"")
