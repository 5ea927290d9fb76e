#!/bin/sh
# Runs at each start, and changes nothing that is there already.
set -eu
umask 022
python -m tandem.adapters.credentials /secrets --cluster "${CLUSTER:-default}"
python -m tandem.models.prepare --tokenizer-only --out "/models/SmolLM2-135M-Instruct"
