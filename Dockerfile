# docker build -t sptseg . && docker run --rm sptseg
# The versions are those of requirements.lock (x86-64); add `--gpus all` to `docker run` to use GPUs.
FROM python:3.11-slim

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 sptseg \
    && mkdir /opt/venv /sptseg \
    && chown sptseg /opt/venv /sptseg

USER sptseg
WORKDIR /sptseg
# the Makefile uses the active environment
ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1

COPY --chown=sptseg requirements.lock ./
RUN python -m venv /opt/venv \
    && pip install --no-cache-dir --quiet --require-hashes --requirement requirements.lock

COPY --chown=sptseg . .
RUN make install

CMD ["make", "demo"]
