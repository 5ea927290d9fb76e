"""The virtual-clock simulator: replays a trace against a fleet and a policy, with the router's own decision core.

    workload (traces, synthetic) ──> simulation ──> metrics ──> report (JSON, HTML)
                                       │    └── worker: enginemodel on the virtual clock
                                       └── routing: tandem.core.scheduler, or a baseline

Everything is seeded; the same arguments give the same bytes. GPUs are simulated from timing profiles.
"""

from tandem.compiled import with_compiled

__path__ = with_compiled(__name__, __path__)
