"""Commands that harm a running cluster, or only watch it for long, and say what became of every request.

    python -m tests.faults.matrix     every fault of every process, under load          (make faults)
    python -m tests.faults.chaos      any mix of them, by seed, for minutes             (make chaos)
    python -m tests.faults.rolling    every process restarted in turn, under load       (make rolling)
    python -m tests.faults.cancel     what cancelled prompts cost the next one          (make cancel)
    python -m tests.faults.soak       an hour of steady load: does anything grow?       (make soak)

The suites in tests/chaos run the same code, small.
"""
