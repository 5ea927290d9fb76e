"""The decision core: where and when each phase of a request runs. Pure: no I/O, clock or randomness of its own."""

from tandem.compiled import with_compiled

__path__ = with_compiled(__name__, __path__)
