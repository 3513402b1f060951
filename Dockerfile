# One image for the three services: they share nearly all of their bytes (PyTorch and what it needs), so that three
# images would only be three times the pulling. The command says which one runs: aggregator, edge or inference.
#
# Packages come from the folder wheels/, which `make wheels` fills with what the lock files name, and from nowhere else:
# a build needs no network, and none of a machine's indices, proxies and certificates gets into an image.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS dependencies
# cpu, or cuda.
ARG VARIANT=cpu
COPY requirements-${VARIANT}.lock /tmp/requirements.lock
# No pip in what is to run. Nor, 300 MB, what PyTorch brings for those who extend it in C++, packages' own tests, and
# what OpenVINO computes with on GPUs and NPUs: with us it computes on CPUs only.
RUN --mount=type=bind,source=wheels,target=/wheels \
    python -m venv --without-pip /opt/feddymem \
    && python -m pip --python /opt/feddymem/bin/python install --no-cache-dir --no-index \
       --find-links /wheels/${VARIANT} --requirement /tmp/requirements.lock \
    && rm -rf /opt/feddymem/lib/python3*/site-packages/torch/bin/protoc* \
       /opt/feddymem/lib/python3*/site-packages/torch/bin/test_* \
       /opt/feddymem/lib/python3*/site-packages/torch/include \
       /opt/feddymem/lib/python3*/site-packages/openvino/libs/libopenvino_intel_[gn]pu_plugin.so \
       /opt/feddymem/lib/python3*/site-packages/openvino/libs/cache.json \
    && find /opt/feddymem/lib -type d -regex '.*/tests?' -prune -exec rm -r {} +

FROM dependencies AS package
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY feddymem feddymem
COPY services services
# With the embedded backbone as OpenVINO takes it, so that not every pod has to make that when it starts.
RUN python -m pip --python /opt/feddymem/bin/python install --no-cache-dir --no-deps --no-build-isolation --no-index \
       --prefix /package . \
    && XDG_CACHE_HOME=/package/share /opt/feddymem/bin/python -c "from feddymem import backbone; backbone.load_extractor()" \
    && chmod --recursive a+rX /package

FROM ${BASE_IMAGE}
# Nothing that runs needs pip, or a program that makes whoever starts it root.
RUN rm -rf /usr/bin/pip* /usr/local/bin/pip* /usr/lib/python3/dist-packages/pip* /usr/local/lib/python3*/site-packages/pip* \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} + \
    && groupadd --gid 10001 feddymem \
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
EXPOSE 7070 7071 7072 7080 7081 7082 9070 9071 9072
ENTRYPOINT ["feddymem"]
CMD ["--help"]

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="FedDyMem" \
      org.opencontainers.image.description="Federated anomaly detection with dynamic memory: aggregator, edge client and inference service" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
