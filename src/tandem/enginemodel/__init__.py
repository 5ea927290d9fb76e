"""A pure, stepwise model of an LLM engine: continuous batching, paged KV blocks, prefix cache, KV handoffs.

Two clocks drive it: the simulated engine runs it in real time, the simulator in virtual time. No I/O, clock, asyncio or
randomness here; ``now`` is an argument.
"""

from tandem.compiled import with_compiled

__path__ = with_compiled(__name__, __path__)
