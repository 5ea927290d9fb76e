# What runs once before the cluster: makes passwords, and the tokenizer of the demonstration model.
# Build from the root of the repository:  docker build -f deploy/compose/setup.Dockerfile .
ARG PYTHON_IMAGE=python:3.11.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS packages
# Another index, or none: wheels that lie in deploy/wheels are found too. Nothing of it reaches the image, since this
# stage is left behind.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_NO_INDEX
WORKDIR /build
COPY pyproject.toml requirements/base.lock requirements/model.lock ./
RUN --mount=type=bind,source=deploy/wheels,target=/wheels \
    python -m venv --without-pip /venv \
 && pip --python /venv/bin/python install --no-cache-dir --find-links /wheels -c base.lock xxhash \
 && pip --python /venv/bin/python install --no-cache-dir --find-links /wheels --no-deps -r model.lock

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

FROM ${PYTHON_IMAGE}
# The folders that volumes take their owner from when they are new.
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin tandem \
 && for folder in nats redis frontend router worker console; do \
        install -d -o 10001 -g 10001 -m 700 "/secrets/$folder"; \
    done \
 && install -d -o 10001 -g 10001 /volumes/jetstream /volumes/models /models
COPY --from=packages /venv /venv
COPY --from=project /project /project
COPY deploy/compose/setup.sh /
ENV PATH=/venv/bin:$PATH PYTHONPATH=/project PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
# It is done in seconds; there is nothing to watch.
HEALTHCHECK NONE
ENTRYPOINT ["sh", "/setup.sh"]
