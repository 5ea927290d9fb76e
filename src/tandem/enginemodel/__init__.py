"""A pure, stepwise model of an LLM engine: continuous batching, paged KV blocks, prefix cache, KV handoffs.

Two clocks drive it: the simulated engine runs it in real time, the simulator in virtual time. No I/O, clock, asyncio or
randomness here; ``now`` is an argument.
"""
