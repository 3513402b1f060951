# One image for the three services: they share nearly all of their bytes (PyTorch and what it needs), so that three
# images would only be three times the pulling. The command says which one runs: aggregator, edge or inference.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS dependencies
COPY requirements.lock /tmp/
RUN python -m venv /opt/feddymem \
    && /opt/feddymem/bin/pip install --no-cache-dir --requirement /tmp/requirements.lock

FROM dependencies AS package
WORKDIR /src
COPY . .
RUN /opt/feddymem/bin/pip install --no-cache-dir --no-deps --no-build-isolation --prefix /package .

FROM ${BASE_IMAGE}
RUN groupadd --gid 10001 feddymem \
    && useradd --no-log-init --no-create-home --home-dir /tmp --uid 10001 --gid 10001 feddymem \
    && install --directory --owner 10001 --group 10001 /var/lib/feddymem
# Two layers: a change of our code leaves the large one of the dependencies as it is.
COPY --from=dependencies /opt/feddymem /opt/feddymem
COPY --from=package /package /opt/feddymem
ENV PATH=/opt/feddymem/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# Numeric, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /var/lib/feddymem
VOLUME /var/lib/feddymem
EXPOSE 7070 7071 7072 9070 9071 9072
ENTRYPOINT ["feddymem"]
CMD ["--help"]

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="FedDyMem" \
      org.opencontainers.image.description="Federated anomaly detection with dynamic memory: aggregator, edge client and inference service" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
